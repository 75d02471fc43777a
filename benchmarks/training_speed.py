"""Patches a second of training, against what a plain convolution reaches on the same machine.

    python benchmarks/training_speed.py

For teacher and student: one thread, forward and backward of a batch of 32, best of several. The limit is
the same number of multiplications at the speed of one plain 3D convolution of 32 channels, measured in the same run.
Shown as patches a second and as the share of the limit that is reached. Writes docs/results/training_speed.json.
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctsma import cohort, distillation, networks
from ctsma.distillation.training import autocast

BATCH, REPEATS = 32, 5
OUT = Path(__file__).parents[1] / "docs" / "results" / "training_speed.json"
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


def main() -> None:
    """Measure, show, write."""
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
    print(json.dumps(found, indent=1))
    cohort.write_json(OUT, found)


if __name__ == "__main__":
    main()
