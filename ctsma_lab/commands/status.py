"""`ctsma status`: which runs there are, and which of their stages are done."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ctsma.common import InputError
from ctsma_lab.commands import run_folder
from ctsma_lab.runner import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma status`."""
    parser.add_argument("--name", help="one folder below runs/ (default: all runs)")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Print one line per stage of every run, or of the named one; returns the exit code."""
    folders = [run_folder(arguments.name)] if arguments.name else _all_runs()
    for folder in folders:
        rows = status(folder)
        if not arguments.name:
            print(folder.name)
        for row in rows:
            seconds = f"{row['seconds']:.0f} s" if row["seconds"] else ""
            print(
                f"{row['stage']:28}{row['state']:16}{seconds:>8}  {row['finished'] or ''}".rstrip()
            )
    return 0


def _all_runs() -> list[Path]:
    folders = sorted(file.parent for file in Path("runs").glob("*/run.json"))
    if not folders:
        raise InputError("runs/", "holds no run", "start one with `ctsma run`")
    return folders
