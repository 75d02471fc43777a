"""`ctsma simulate`: write a simulated cohort."""

import argparse
from collections.abc import Callable

from .knees import write_cohort


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ctsma simulate`."""
    parser.add_argument("--out", required=True, help="folder of images and ground truth")
    parser.add_argument("--knees", type=int, default=80, help="number of knees (default: 80)")
    parser.add_argument(
        "--rescans", type=int, default=0, help="knees with a second MR (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cohort (default: 0)")
    parser.add_argument("--anatomy", help="label map as template of all knees")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes, one thread each (default: 2)"
    )


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Simulate, with one line per knee to `progress`, last the manifest; returns the exit code."""
    path = write_cohort(
        root=arguments.out,
        name="simulated",
        n_knees=arguments.knees,
        seed=arguments.seed,
        n_rescan=arguments.rescans,
        anatomy=arguments.anatomy,
        n_jobs=arguments.jobs,
        report=progress,
    )
    progress(f"manifest: {path}")
    return 0
