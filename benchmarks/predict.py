"""How long and how much memory `ctsma predict` takes on a whole clinical CT, and what the naive ways take beside it.

    python benchmarks/predict.py models/quick [--out docs/results/predict.json]

One simulated knee fills a CT of 512 x 512 x 200 voxels (0.45 x 0.45 x 0.625 mm). Everything is measured in a process of
its own, of one thread, from its start to its end: imports and model loading included, also the writing of all maps.

- `predict`: the command that users type.
- `predict_again`: the same command with the results there: it looks whether they are right, and leaves them.
- `read_and_resample`: reading the same file and resampling all of it once to the patches' voxel, SimpleITK, cubic
  B-spline: the least that anybody does who works on the whole volume.
- `sliding_window`: the networks over the volume in windows of one patch, half overlapping, with monai's
  SlidingWindowInferer: dense prediction without knowing where bone is. Timed on some windows and scaled by their number
  (reading not included); it would also give numbers where none mean anything.
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

from ctsma import cohort, prediction
from ctsma.patches import CT_SHAPE, CT_SPACING_MM
from ctsma.simulation import knees
from ctsma.simulation.protocol import draw_subjects, load_protocol
from ctsma.simulation.subject import make_subject

FIELD_MM = (230.4, 230.4, 125.0)  # 512 x 512 x 200 voxels of the protocol
SEED, SLAB_WINDOWS = 7, 200
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def write_ct(path: str) -> None:
    """Simulate the CT; says the knee's side."""
    protocol = load_protocol(None)
    knee = draw_subjects(protocol, 1, SEED).iloc[0].to_dict()
    subject = make_subject(knee, protocol, [SEED], None)
    poses, grids = knees.settings(subject, protocol, [SEED], ["ct"], FIELD_MM)
    drawn = knees.draw_scan("ct", protocol, [SEED])
    cohort.write_volume(
        knees.scan(subject, poses["ct"], grids["ct"], "ct", drawn, np.random.default_rng(SEED))[0], path
    )
    print(knee["side"])


def measured(arguments: list[str]) -> dict:
    """Wall and processor seconds and peak memory (GB) of a Python process of one thread, and the last line it said."""
    started, environment = time.perf_counter(), os.environ | dict.fromkeys(ONE_THREAD, "1")
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        said.seek(0)
        last = said.read().strip().splitlines()[-1:]
    found = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss / 1e6}
    return found | {"exit_code": process.returncode, "said": last}


def resample(path: str) -> None:
    """Read a CT and resample all of it to the patches' voxel."""
    image = cohort.read_volume(path, "CT")
    spacing = np.array(CT_SPACING_MM)[[0, 2, 1]]
    size = np.ceil(np.multiply(image.GetSize(), image.GetSpacing()) / spacing).astype(int).tolist()
    args = (sitk.Transform(), sitk.sitkBSpline, image.GetOrigin(), spacing.tolist(), image.GetDirection(), 0.0)
    print(sitk.Resample(image, size, *args, sitk.sitkFloat32).GetSize())


def slide(path: str, model: str) -> None:
    """Run the networks over some windows of one patch, half overlapping; says the seconds for the whole volume."""
    import torch
    from monai.inferers import SlidingWindowInferer

    torch.set_num_threads(1)
    ensemble, image = prediction.load_ensemble(model), cohort.read_volume(path, "CT")
    columns = round(image.GetSize()[0] * image.GetSpacing()[0] / CT_SPACING_MM[0])
    rows = [round(n * s / CT_SPACING_MM[1]) for n, s in zip(image.GetSize()[1:], image.GetSpacing()[1:], strict=True)]
    windows = np.prod([2 * n // edge - 1 for n, edge in zip((columns, *rows), CT_SHAPE, strict=True)])
    slab = torch.zeros(1, 1, CT_SHAPE[0], CT_SHAPE[1], CT_SHAPE[2] * (SLAB_WINDOWS + 1) // 2)

    def networks(batch):
        voi = np.ones((len(batch), 12, 48, 48), bool)
        found = prediction.estimate(ensemble.members, batch[:, 0].numpy(), voi, np.full(len(batch), 1200.0))
        return torch.from_numpy(found).float()[:, :, None, None, None].repeat(1, 1, *CT_SHAPE)

    started = time.perf_counter()
    SlidingWindowInferer(CT_SHAPE, sw_batch_size=32, overlap=0.5)(slab, networks)
    seconds = (time.perf_counter() - started) * float(windows) / SLAB_WINDOWS
    print(json.dumps({"n_windows": int(windows), "seconds_scaled": seconds}))


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        name, path = arguments.peer
        return (
            {"write": write_ct, "resample": resample}[name](path) if name != "slide" else slide(path, arguments.model)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knee.nii.gz"
        # A process of its own here too: a child's peak memory counts what its parent held when it was started.
        side = measured([__file__, arguments.model, "--peer", "write", str(path)])["said"][0]
        command = ["-m", "ctsma.cli", "predict", f"{path}:{side}", "--model", arguments.model, "--jobs", "1"]
        found = {"predict": measured([*command, "--out", f"{folder}/out"])}
        found["predict_again"] = measured([*command, "--out", f"{folder}/out"])
        for name, peer in (("read_and_resample", "resample"), ("sliding_window", "slide")):
            found[name] = measured([__file__, arguments.model, "--peer", peer, str(path)])
        found["sliding_window"] |= json.loads(found["sliding_window"].pop("said")[0])
    model = prediction.read_about(arguments.model)
    head = {"voxels": [512, 512, 200], "arm": model["arm"], "n_networks": len(model["members"]), "simulated": True}
    print(json.dumps(head | found, indent=1))
    if arguments.out:
        cohort.write_results(arguments.out, head | found, {})
    return None


if __name__ == "__main__":
    main()
