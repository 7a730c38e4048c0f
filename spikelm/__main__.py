"""python -m spikelm COMMAND"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spikelm")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, which backends run here, and why the others do not")
    parser.parse_args(arguments)
    from spikelm.doctor import report

    text, right = report()
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
