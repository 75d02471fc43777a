"""`ctsma status`: which stages of a run are done."""

import argparse
from collections.abc import Callable

from ctsma_lab.commands import run_folder
from ctsma_lab.runner import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma status`."""
    parser.add_argument("--name", default="quick", help="folder below runs/ (default: quick)")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Print one line per stage; returns the exit code."""
    for row in status(run_folder(arguments.name)):
        seconds = f"{row['seconds']:.0f} s" if row["seconds"] else ""
        print(f"{row['stage']:28}{row['state']:16}{seconds:>8}  {row['finished'] or ''}")
    return 0
