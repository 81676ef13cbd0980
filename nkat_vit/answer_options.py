"""The flags of the commands in which a trained model answers: where it computes, and where the answer goes."""

from __future__ import annotations

import argparse

from nkat.host import commandline


def add_answer_options(parser: argparse.ArgumentParser, replaced: str = "an existing record") -> None:
    """--no-cuda, --threads, --json, --output-format and --force, which replaces what is said."""
    parser.add_argument("--no-cuda", action="store_true", help="the processor although there is a GPU")
    parser.add_argument("--threads", type=commandline.thread_count, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help='record; "-": last line of stdout')
    commandline.add_output_format(parser)
    parser.add_argument("--force", action="store_true", help=f"replace {replaced}")
