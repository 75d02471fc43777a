"""`ctsma export-model`: write a run's networks as a model directory for `ctsma predict`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ctsma_predict.model import export_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ctsma export-model`."""
    add = parser.add_argument
    add("--name", default="quick", help="finished run below runs/")
    add("--out", required=True, help="model directory to write; an older one there is replaced")
    add("--arm", default="ct_sma_plus", help="which networks (default: ct_sma_plus)")
    add("--seed", type=int, default=0, help="of which training seed (default: 0)")
    add("--jobs", type=int, default=2, help="processes that measure the training CTs (default: 2)")


def run(arguments: argparse.Namespace, progress: Callable[..., None]) -> int:
    """Write the model directory and print its size; returns the exit code."""
    run_path, jobs = Path("runs") / arguments.name, arguments.jobs
    folder = export_model(run_path, arguments.out, arguments.arm, arguments.seed, jobs)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {size_mb:.1f} MB; {folder / 'MODEL_CARD.md'}")
    return 0
