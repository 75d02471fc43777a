"""The command `ctsma`. Its parser and messages are in `ctsma_lab.cli`; the method needs neither."""

import importlib
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    return importlib.import_module("ctsma_lab.cli").main()


if __name__ == "__main__":
    sys.exit(main())
