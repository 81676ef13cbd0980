#!/usr/bin/env python3
"""Serves a language model and its Θ to other programs by OpenAI's API, and to a browser as a chat."""

from nkat.commands import serve

if __name__ == "__main__":
    serve()
