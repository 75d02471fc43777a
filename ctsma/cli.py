"""The command `ctsma`. Its parser and messages are in `ctsma_lab.cli`; the method needs neither."""

import importlib
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of the process where None; returns the exit code."""
    return importlib.import_module("ctsma_lab.cli").main(argv)


if __name__ == "__main__":
    sys.exit(main())
