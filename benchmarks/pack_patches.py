"""Pack the patches of a run into one file, for training on a machine that has torch and numpy only.

    python benchmarks/pack_patches.py runs/full --out patches.npz.xz

The layout is that of packed.py. A ridge is fitted to the training subjects of each fold. Prints the
loss of precision: the SD of the error over the SD of the image. Instead of a run, a folder of
scanned knees (`--folder` of calibration.py and distillation.py) can be packed; its folds are drawn
by subject, and its protocol is the present one of kneesim.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from packed import BadInput, dequantised, packed_bytes, quantised, run_main

from ctsma.cohort import make_splits
from ctsma.common import BIOMARKERS, InputError
from ctsma.distillation import TrainingData, prepare
from ctsma.files import atomic, git_commit
from ctsma.patches import Patches, load_patches
from ctsma.ridge import apply_ridge, fit_ridge
from ctsma_lab.run import Run
from kneesim import protocol_sha256

N_FOLDS = 5  # of a folder of scanned knees
LIMIT_MB = 55  # of 80 knees; design choice


def source(path: Path) -> tuple[Patches, pd.DataFrame, str]:
    """Patches, folds of their subjects and protocol of a run or of a folder of scanned knees."""
    if (path / "results").is_dir():
        run = Run(path)
        protocol = run.results("cohort").get("protocol_sha256", "")
        return load_patches(path / "patches"), run.splits(), protocol
    patches = load_patches(path)
    return patches, make_splits(patches.table, N_FOLDS, seed=0), protocol_sha256()


def ridges(data: TrainingData, fold: np.ndarray) -> dict[str, np.ndarray]:
    """`ridge` and `rho` of packed.py."""
    estimates, correlations = [], []
    for k in range(fold.max() + 1):
        fit = np.flatnonzero(fold != k)
        known = data.targets[fit], data.subjects[fit], data.knees[fit]
        plain = fit_ridge(data.ridge_input("ct")[fit], *known)
        calibrated = fit_ridge(data.features[fit], *known)
        low, high = known[0].min(axis=0), known[0].max(axis=0)
        estimates.append(apply_ridge(calibrated.weights, data.features, low, high))
        correlations.append([plain.rho, calibrated.rho, calibrated.error_correlation])
        print(f"ridge of fold {k}: done", flush=True)
    return {"ridge": np.array(estimates, np.float32), "rho": np.array(correlations)}


def precision_loss(images: np.ndarray, stored: np.ndarray) -> float:
    """SD of the error over the SD of the image."""
    images = images.astype(np.float64)
    return float((stored - images).std() / images.std())


def pack(path: Path, out: Path) -> dict:
    """Write the packed file; returns its size, its loss of precision and what it holds."""
    patches, splits, protocol = source(path)
    labelled = patches.table[list(BIOMARKERS)].notna().all(axis=1).to_numpy()
    table = patches.table[labelled].reset_index(drop=True)
    kept = Patches(table, patches.mr[labelled], patches.ct[labelled], patches.voi[labelled])
    data, grey = prepare(kept), quantised(kept.mr.astype(np.float32))
    fold = splits.set_index("subject_id")["fold"].loc[data.subjects].to_numpy(int)
    arrays = grey | {
        "ct": np.rint(data.ct).astype(np.int16),
        "voi": data.voi,
        "targets": data.targets,
        "cortical_hu": data.cortical_hu,
        "knee_id": data.knees,
        "subject_id": data.subjects,
        "patch_id": table["patch_id"].to_numpy(int),
        "fold": fold,
    }
    arrays |= ridges(data, fold)
    loss = {
        "mr": precision_loss(kept.mr, dequantised(*grey.values())),
        "ct": precision_loss(kept.ct, arrays["ct"]),
    }
    about = {"protocol_sha256": protocol, "source": path.name, "git_commit": git_commit()}
    about |= {"precision_loss": loss}
    content = packed_bytes(arrays, about)
    with atomic(out) as temporary:
        temporary.write_bytes(content)
    counts = {"patches": len(table), "knees": len(np.unique(data.knees))}
    counts |= {"left_out": int((~labelled).sum()), "megabytes": len(content) / 1e6}
    return counts | {"precision_loss": loss}


def main() -> None:
    """Pack and show what was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of scanned knees")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        found = pack(given.run, given.out)
    except InputError as error:
        raise BadInput(str(error)) from error
    print(f"{found['patches']} patches of {found['knees']} knees; {found['left_out']} left out.")
    for name, value in found["precision_loss"].items():
        print(f"{name.upper()}: SD of the error is {100 * value:.2f} % of the SD of the image.")
    size = found["megabytes"]
    print(f"{given.out}: {size:.1f} MB.")
    if size > LIMIT_MB:
        print(f"The file is larger than {LIMIT_MB} MB.")


if __name__ == "__main__":
    run_main(main)
