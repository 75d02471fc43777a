"""Patches per second of training, against what a plain convolution reaches on the same machine.

    python benchmarks/training_speed.py [--run runs/full]

For teacher and student: one thread, forward and backward of a batch of 32, best of several. The
limit is the same number of operations at the speed of one plain 3D convolution of 32 channels,
measured in the same run. With --run also the minutes that all arms of that run's patches and folds
take with one training seed on two processes, and the largest memory of a process. Writes
docs/results/training_speed.json.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctsma.distillation import Settings, cross_validate
from ctsma.distillation.training import autocast
from ctsma.files import write_json
from ctsma.models import build
from ctsma.patches import load_patches
from ctsma_lab.run import Run

BATCH, REPEATS = 32, 5
OUT = Path(__file__).parents[1] / "docs" / "results" / "training_speed.json"
ARMS = ["hu_regression", "hu_regression_calibrated", "ct_only", "ct_residual", "ct_sma"]
ARMS += ["ct_sma_plus", "mr_teacher"]
NETWORKS = {"teacher": ("mr", (2, 12, 48, 48)), "student": ("ct+cortex", (3, 12, 24, 24))}


def best_seconds(step: Callable) -> float:
    """Shortest of several runs of `step`, after one that is not counted."""
    step()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return min(taken)


def operations(step: Callable) -> int:
    """Floating-point operations of `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def training_step(network: nn.Module, x: Tensor, settings: Settings) -> Callable:
    """One forward and backward pass as in training, without the optimiser."""

    def step():
        with autocast(settings):
            prediction, _ = network(x)
        prediction.square().mean().backward()

    return step


def plain_rate(settings: Settings) -> float:
    """Operations per second of a 3 x 3 x 3 convolution, 32 channels to 32, forward and backward."""
    layer = nn.Conv3d(32, 32, 3, padding=1).to(memory_format=torch.channels_last_3d)
    x = torch.randn(BATCH, 32, 12, 24, 24).to(memory_format=torch.channels_last_3d)
    x.requires_grad_()

    def step():
        with autocast(settings):
            y = layer(x)
        y.float().mean().backward()

    return operations(step) / best_seconds(step)


def study(run: Run, precision: str) -> dict[str, float]:
    """Minutes for every arm, all folds, one seed, two processes; GB of the largest process."""
    data, splits = load_patches(run.path / "patches"), run.splits()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cross_validate(data, splits, ARMS, {"precision": precision}, [0], folder, n_jobs=2)
        taken = time.perf_counter() - started
    get_reusable_executor().shutdown(wait=True)  # only then is the memory of its processes known
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"minutes": taken / 60, "largest_process_gb": largest, "n_patches": len(data.table)}


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a run with patches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = Settings(precision=precision)
        rate = plain_rate(settings)
        found[precision] = {"plain_gflops": rate / 1e9}
        for role, (arm_input, shape) in NETWORKS.items():
            network = build(arm_input, "compact", torch.Generator().manual_seed(0))
            network.to(memory_format=torch.channels_last_3d)
            x = torch.randn(BATCH, *shape).to(memory_format=torch.channels_last_3d)
            step = training_step(network, x, settings)
            taken = best_seconds(step)
            share = operations(step) / rate / taken
            found[precision][role] = {"patches_per_s": BATCH / taken, "share_of_limit": share}
        if given.run:
            found[precision]["study"] = study(Run(given.run), precision)
    print(json.dumps(found, indent=1))
    write_json(OUT, found)


if __name__ == "__main__":
    main()
