#!/usr/bin/env python3
"""Says what this machine has of all that the toolkit and KoboldCpp need, and the command that mends what is missing."""

import sys

if __name__ == "__main__":
    try:
        from nkat.commands import setup
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "nkat":
            raise
        print("error: the toolkit's folder nkat is not beside this script; fetch all of it", file=sys.stderr)
        sys.exit(2)
    setup()
