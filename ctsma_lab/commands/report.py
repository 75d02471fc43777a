"""`ctsma report`: write a run's HTML report again, and the README's results."""

import argparse
from collections.abc import Callable

from ctsma_lab.commands import run_folder
from ctsma_lab.report import update_readme, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma report`."""
    parser.add_argument("--name", default="quick", help="folder below runs/ (default: quick)")
    parser.add_argument("--readme", help="also renew the results of this README")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Write the report and print its path; returns the exit code."""
    path = run_folder(arguments.name)
    print(write_report(path, n_jobs=arguments.jobs))
    if arguments.readme:
        update_readme(arguments.readme, path / "results")
    return 0
