"""Patches a second of training, against what a plain convolution reaches on the same machine.

    python benchmarks/training_speed.py [--run runs/quick]

For teacher and student: one thread, forward and backward of a batch of 32, best of several. The limit is
the same number of multiplications at the speed of one plain 3D convolution of 32 channels, measured in the same run.
Shown as patches a second and as the share of the limit that is reached. With --run also the minutes that all arms of
that run's patches and folds take with one training seed on two processes, and the largest memory of a process.
Writes docs/results/training_speed.json.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctsma import cohort, distillation, networks, patches
from ctsma.distillation.training import autocast

BATCH, REPEATS = 32, 5
OUT = Path(__file__).parents[1] / "docs" / "results" / "training_speed.json"
ARMS = "hu_regression", "ruler_regression", "ct_only", "ct_residual", "ct_sma", "ct_sma_plus", "mr_teacher"
SHAPES = {"teacher": (2, 12, 48, 48), "student": (3, 12, 24, 24)}


def seconds(step) -> float:
    """Shortest of several runs of `step`, after one that is not counted."""
    step()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return min(taken)


def operations(step) -> int:
    """Floating-point operations of `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def trained(network: nn.Module, x: Tensor, settings: distillation.Settings):
    """One forward and backward pass as in training, without the optimiser."""

    def step():
        with autocast(settings):
            prediction, _ = network(x)
        prediction.square().mean().backward()

    return step


def plain(settings: distillation.Settings) -> float:
    """Operations a second of a 3 x 3 x 3 convolution, 32 channels to 32, forward and backward."""
    layer = nn.Conv3d(32, 32, 3, padding=1).to(memory_format=torch.channels_last_3d)
    x = torch.randn(BATCH, 32, 12, 24, 24).to(memory_format=torch.channels_last_3d).requires_grad_()

    def step():
        with autocast(settings):
            y = layer(x)
        y.float().mean().backward()

    return operations(step) / seconds(step)


def study(run: cohort.Run, precision: str) -> dict[str, float]:
    """Minutes for every arm, five folds, one seed, two processes, nothing reused; GB of the largest process so far."""
    data, settings = patches.load_patches(run.path / "patches"), {"precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        distillation.cross_validate(data, run.splits(), ARMS, settings, [0], folder, n_jobs=2)
        taken = time.perf_counter() - started
    get_reusable_executor().shutdown(wait=True)  # only then is its memory known
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"minutes": taken / 60, "largest_process_gb": largest, "n_patches": len(data.table)}


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run with patches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = distillation.Settings(precision=precision)
        rate = plain(settings)
        found[precision] = {"plain_gflops": rate / 1e9}
        for role, shape in SHAPES.items():
            network = networks.build(role, "compact", torch.Generator().manual_seed(0), ruler=role == "student")
            network = network.to(memory_format=torch.channels_last_3d)
            step = trained(network, torch.randn(BATCH, *shape).to(memory_format=torch.channels_last_3d), settings)
            limit, taken = operations(step) / rate, seconds(step)
            found[precision][role] = {"patches_per_s": BATCH / taken, "share_of_limit": limit / taken}
        if given.run:
            found[precision]["study"] = study(cohort.Run(given.run, "quick", 0), precision)
    print(json.dumps(found, indent=1))
    cohort.write_json(OUT, found)


if __name__ == "__main__":
    main()
