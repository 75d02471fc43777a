"""Speed of the networks on a GPU, from a packed file, with torch and numpy alone.

    python benchmarks/gpu.py patches.npz.xz --out speed.json --minutes 2

For teacher, student and eight students side by side on each grid, several batch sizes, with and
without CUDA graph: patches and floating-point operations per second of a whole training step
(input, loss, gradient, AdamW), the share of the rate of a plain 3D convolution, the peak of memory,
and the kernels that take most of the time. The plain convolution is 3 x 3 x 3, 64 channels to 64,
in the same precision, batch and grid, forward and backward, without anything else. A layout other
than channels last is measured at one batch size, and torch.compile with --compile alone, because it
takes minutes.
"""

import argparse
import gc
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch._dynamo
from packed import BadInput, read_packed, run_main, write_json
from packed_networks import GRIDS
from packed_training import PER_KNEE, Arm, Group, Resident, Speed, check_device
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROLES = {"teacher": [Arm("teacher", role="teacher")], "student": [Arm("ct_only")]}
ROLES["8 students"] = ROLES["student"] * 8
PLAIN_CHANNELS = 64
COMPACT_GRID = (12, 12, 12)  # of the first stage
REPEATS = 5
N_KERNELS = 12  # that are named of each network
MODES = {"eager": (False, False), "graph": (False, True)}
COMPILE = {"compile": (True, True)}


def best_seconds(step: Callable[[], None], cuda: bool) -> float:
    """Shortest of several runs of `step`, after one that is not counted."""
    step()
    taken = []
    for _ in range(REPEATS):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def operations(step: Callable[[], None]) -> int:
    """Floating-point operations of `step` in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def longest_kernels(step: Callable[[], None], cuda: bool) -> list[dict]:
    """Name, calls and share of the time of the kernels (CPU: operators) that take most of it."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in record.key_averages():
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append({"name": event.key[:120], "calls": event.count, "share": taken})
    total = sum(row["share"] for row in rows)
    rows = sorted(rows, key=lambda row: row["share"], reverse=True)[:N_KERNELS]
    return [row | {"share": row["share"] / total} for row in rows if total]


def plain_rate(batch: int, grid: tuple[int, ...], device: str, bfloat16: bool) -> float:
    """Operations per second of a plain convolution, see the module."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    options = {"device": device, "dtype": dtype}
    layer = nn.Conv3d(PLAIN_CHANNELS, PLAIN_CHANNELS, 3, padding=1, **options)
    layer.to(memory_format=torch.channels_last_3d)
    x = torch.randn(batch, PLAIN_CHANNELS, *grid, **options)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = layer(x)
    gradient = torch.ones_like(y)
    del y

    def step() -> None:
        layer(x).backward(gradient)

    return operations(step) / best_seconds(step, device.startswith("cuda"))


class ContiguousInput(nn.Module):
    """A network whose input and weights are not in the layout channels last."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As the network."""
        return self.network(x.contiguous())


def measure(
    patches: Resident, role: str, size: str, n_knees: int, mode: str, layout: str, bfloat16: bool
) -> dict:
    """Figures of one network, batch size, mode and layout; where memory is too small, that alone.

    A mode that falls back to a simpler one is announced, and the row says what really ran.
    """
    cuda, (compiled, graphs) = patches.device.startswith("cuda"), (MODES | COMPILE)[mode]
    row = {"size": size, "role": role, "batch": n_knees * PER_KNEE, "mode": mode, "layout": layout}
    torch._dynamo.reset()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        group = Group(ROLES[role], size, patches, n_knees, Speed(bfloat16, compiled, graphs))
        for member in group.members if layout == "contiguous" else ():
            member.model = ContiguousInput(member.network)
        n_operations = counted(group)
        group.prepare()
    except (BadInput, torch.OutOfMemoryError):
        return row | {"fits": False}
    row |= {"fits": True, "graph": group.graph is not None}
    step, n_patches = group.graph.replay if group.graph else group.step, row["batch"]
    n_patches *= len(group.members)
    taken = best_seconds(step, cuda)
    row |= {"patches_per_s": n_patches / taken, "tflops": n_operations / taken / 1e12}
    row["gflop_per_patch"] = n_operations / n_patches / 1e9
    row["kernels"] = longest_kernels(step, cuda)
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def counted(group: Group) -> int:
    """Operations of one step, counted without compilation."""
    models = [member.model for member in group.members]
    for member in group.members:
        member.network.train()
        member.model = member.network
    n_operations = operations(group.step)
    for member, model in zip(group.members, models, strict=True):
        member.model = model
    return n_operations


def cases(sizes: list[str], knees: list[int], compiles: bool = False) -> list[tuple]:
    """What is measured, in order: the default batch in all modes first."""
    channels_last, networks = "channels_last_3d", list(product(sizes, ROLES))
    modes = MODES | (COMPILE if compiles else {})
    found = [(*network, knees[0], mode, channels_last) for mode in modes for network in networks]
    single = [network for network in networks if len(ROLES[network[1]]) == 1]
    found += [(*network, knees[0], "eager", "contiguous") for network in single]
    return found + [(*network, n, "graph", channels_last) for n in knees[1:] for network in single]


def main(arguments: list[str] | None = None) -> None:
    """Measure in order until the time is over; write after every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="of pack_patches.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sizes", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--knees", type=int, nargs="+", default=[4, 2, 8], help="in a batch")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    given = parser.parse_args(arguments)
    deadline, bfloat16 = time.perf_counter() + 60 * given.minutes, given.precision == "bfloat16"
    check_device(given.device, bfloat16)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    data = read_packed(given.file)
    patches = Resident(data, given.device)
    patches.use_fold(0)
    cuda = given.device.startswith("cuda")
    found = {
        "device": torch.cuda.get_device_name() if cuda else given.device,
        "torch": torch.__version__,
        "precision": given.precision,
        "source": data.about,
        "rows": [],
        "missing": [],
    }
    rates = {}
    for size, role, n_knees, mode, layout in cases(given.sizes, given.knees, given.compile):
        if time.perf_counter() > deadline:
            found["missing"].append([size, role, n_knees * PER_KNEE, mode, layout])
            continue
        row = measure(patches, role, size, n_knees, mode, layout, bfloat16)
        if row["fits"]:
            grid = GRIDS[size]["teacher"] or COMPACT_GRID
            batch = row["batch"]
            if (batch, grid) not in rates:
                rates[batch, grid] = plain_rate(batch, grid, given.device, bfloat16)
            row["plain_tflops"] = rates[batch, grid] / 1e12
            row["share_of_plain"] = row["tflops"] / row["plain_tflops"]
        found["rows"].append(row)
        print(row, flush=True)
        write_json(given.out, found)
    write_json(given.out, found)


if __name__ == "__main__":
    run_main(main)
