"""Time and memory of `ctsma predict` on a whole clinical CT, and of simple alternatives.

    python benchmarks/predict.py [--model models/full]

One simulated knee fills a CT of 512 x 512 x 200 voxels (0.45 x 0.45 x 0.625 mm). Each measurement
is a process of one thread, from its start to its end: with imports and, for `predict`, loading the
model, writing all maps and the report page. Writes docs/results/predict.json.

- `predict`: the command that users give.
- `predict_again`: the same command with the results there: it checks and keeps them.
- `read_and_resample`: reading the same file and resampling all of it once to the voxel of the
  patches (SimpleITK, cubic B-spline): the least that a method on the whole volume does.
- `sliding_window`: the networks in windows of one patch, half overlapping, over the volume (monai's
  SlidingWindowInferer): dense prediction without bone masks. Measured on some windows and scaled by
  their number, without reading; it would also give numbers where there is no bone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from monai.inferers import SlidingWindowInferer

from ctsma.cohort import read_volume, write_volume
from ctsma.files import git_commit, versions, write_json
from ctsma.patches import CT_SHAPE, CT_SPACING_MM
from ctsma_predict.model import estimate, load_ensemble
from kneesim import draw_subjects, knees, load_protocol
from kneesim.subject import make_subject

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "predict.json"
FIELD_MM = (230.4, 230.4, 125.0)  # 512 x 512 x 200 voxels of the protocol
SEED, N_WINDOWS = 7, 200
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def simulate(ct: str) -> None:
    """Write the CT and print the side of the knee."""
    protocol = load_protocol(None)
    row = draw_subjects(protocol, 1, SEED).iloc[0].to_dict()
    subject = make_subject(row, protocol, [SEED], None)
    poses, grids = knees.settings(subject, protocol, [SEED], ["ct"], FIELD_MM)
    drawn = knees.draw_scan("ct", protocol, [SEED])
    rng = np.random.default_rng(SEED)
    image, _ = knees.scan(subject, poses["ct"], grids["ct"], "ct", drawn, rng)
    write_volume(image, ct)
    print(row["side"])


def resample(ct: str) -> None:
    """Read the CT and resample all of it to the voxel of the patches."""
    image = read_volume(ct, "CT")
    spacing = np.array(CT_SPACING_MM)[[0, 2, 1]]
    size = np.ceil(np.multiply(image.GetSize(), image.GetSpacing()) / spacing).astype(int)
    grid = sitk.Image(size.tolist(), sitk.sitkFloat32)
    grid.SetSpacing(spacing.tolist())
    grid.SetOrigin(image.GetOrigin())
    grid.SetDirection(image.GetDirection())
    sitk.Resample(image, grid, sitk.Transform(), sitk.sitkBSpline)


def slide(ct: str, model: str) -> None:
    """Time the networks on some windows; prints their number and the seconds for the volume."""
    torch.set_num_threads(1)
    ensemble, image = load_ensemble(model), read_volume(ct, "CT")
    extent_mm = np.multiply(image.GetSize(), image.GetSpacing())
    window_mm = np.multiply(CT_SHAPE, CT_SPACING_MM)[[0, 2, 1]]
    n_windows = int(np.prod(2 * extent_mm // window_mm - 1))
    slab = torch.zeros(1, 1, CT_SHAPE[0], CT_SHAPE[1], CT_SHAPE[2] * (N_WINDOWS + 1) // 2)

    def networks(batch):
        voi = np.ones((len(batch), 12, 48, 48), bool)
        cortical_hu = np.full(len(batch), 1200.0)
        values = estimate(ensemble.members, batch[:, 0].numpy(), voi, cortical_hu)
        return torch.from_numpy(values).float()[:, :, None, None, None].repeat(1, 1, *CT_SHAPE)

    started = time.perf_counter()
    SlidingWindowInferer(CT_SHAPE, sw_batch_size=32, overlap=0.5)(slab, networks)
    seconds = (time.perf_counter() - started) * n_windows / N_WINDOWS
    print(json.dumps({"n_windows": n_windows, "seconds_scaled": seconds}))


def measure(arguments: list[str]) -> tuple[dict, str]:
    """Wall seconds, CPU seconds and peak memory (GB) of a Python process; its last line of output.

    CPU seconds and memory include those of processes that it started.
    """
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().strip().splitlines()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])} ended with exit code {process.returncode}")
    cpu_seconds, peak_gb = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_gb}
    return found, lines[-1] if lines else ""


def main() -> None:
    """Measure everything and write the results; with `--step` do one step in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "models" / "full"))
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, ct = arguments.step
        if step == "simulate":
            simulate(ct)
        elif step == "resample":
            resample(ct)
        else:
            slide(ct, arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        ct = f"{folder}/knee.nii.gz"
        own = [__file__, "--model", arguments.model, "--step"]
        # The CT is made in a process of its own: a child's peak memory counts that of its parent.
        _, side = measure([*own, "simulate", ct])
        command = ["-m", "ctsma.cli", "predict", f"{ct}:{side}", "--model", arguments.model]
        command += ["--jobs", "1", "--out", f"{folder}/out"]
        found = {"predict": measure(command)[0], "predict_again": measure(command)[0]}
        found["read_and_resample"] = measure([*own, "resample", ct])[0]
        found["sliding_window"], scaled = measure([*own, "slide", ct])
        found["sliding_window"] |= json.loads(scaled)
    n_networks = len(list(Path(arguments.model).glob("*_fold*.safetensors")))
    head = {"git_commit": git_commit(), "packages": versions(), "simulated": True}
    head |= {"voxels": [512, 512, 200], "n_networks": n_networks}
    write_json(OUT, head | found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
