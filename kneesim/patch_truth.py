"""Ground truth of patches: biomarkers and slices of the simulated bone itself.

Only quality assurance and teaching read it.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.biomarkers import morphometry
from ctsma.cohort import read_knee_volume
from ctsma.common import BIOMARKERS
from ctsma.files import write_text
from ctsma.patches import (
    HEIGHT_MM,
    MR_SHAPE,
    MR_SPACING_MM,
    cut_and_measure,
    grid_points,
    patch_grid,
    read_table,
)

from .truth import Truth, read_truth

FINE_MM = 0.125  # design choice: voxel of the ground truth; trabeculae are 0.15 to 0.4 mm thick
COLUMNS = [f"true_{biomarker}" for biomarker in BIOMARKERS]


def extract_true_patches(
    knee: dict,
    folder: Path,
    *,
    root: str,
    n_per_compartment: int,
    n_truth: int,
    seed: int,
    definition: str,
) -> dict:
    """Cut patches with the true bones and transforms of a simulated knee (for `map_knees`).

    Parameters and files are those of `ctsma.patches.extract_patches`, which finds bones and
    transforms itself; besides, the ground truth of n_truth patches is measured. It shows how hard a
    cohort is, whatever the registration does.
    """
    truth = read_truth(root, knee["knee_id"])
    ct = read_knee_volume(knee, "ct", root)
    pairs = {"": (read_knee_volume(knee, "mr", root), truth.transforms)}
    if truth.rescan_transforms:
        pairs["rescan_"] = read_knee_volume(knee, "mr_rescan", root), truth.rescan_transforms
    row = cut_and_measure(
        knee, folder, ct, truth.labels, pairs, n_per_compartment, seed, definition
    )
    rng = np.random.default_rng([seed, 1, *knee["knee_id"].encode()])
    measured = write_ground_truth(Path(folder), Path(folder), knee, truth, n_truth, rng)
    return row | {"files": row["files"] + measured["files"]}


def measure_ground_truth(
    knee: dict, folder: Path, *, root: str, patches_folder: str, n_truth: int, seed: int
) -> dict:
    """Measure the true biomarkers of n_truth of a knee's usable patches (for `map_knees`).

    Reads the patches in `patches_folder`; writes `<knee>_truth.csv` into `folder`.
    """
    truth = read_truth(root, knee["knee_id"])
    rng = np.random.default_rng([seed, 1, *knee["knee_id"].encode()])
    return write_ground_truth(Path(patches_folder), Path(folder), knee, truth, n_truth, rng)


def write_ground_truth(
    patches_folder: Path, folder: Path, knee: dict, truth: Truth, n: int, rng: np.random.Generator
) -> dict:
    """Measure and write the ground truth of n usable patches of a knee, or all if it has fewer."""
    knee_id = knee["knee_id"]
    table = read_table(patches_folder / f"{knee_id}_table.csv")
    with np.load(patches_folder / f"{knee_id}.npz") as stored:
        voi = stored["voi"]
    table = table[table["flag"] == ""]
    table = table.iloc[np.sort(rng.permutation(len(table))[:n])]
    rows = []
    for patch in table.to_dict("records"):
        biomarkers = _true_biomarkers(patch, voi[patch["patch_id"]], knee["side"], truth)
        rows.append([knee_id, patch["patch_id"], *biomarkers])
    measured = pd.DataFrame(rows, columns=["knee_id", "patch_id", *COLUMNS])
    file = write_text(folder / f"{knee_id}_truth.csv", measured.to_csv(index=False))
    return {"n_patches": len(rows), "files": [file.name]}


def load_ground_truth(folder: str | Path) -> pd.DataFrame:
    """knee_id, patch_id and true_<biomarker> of all patches whose ground truth is in a folder."""
    tables = [pd.DataFrame(columns=["knee_id", "patch_id", *COLUMNS])]
    files = sorted(Path(folder).glob("*_truth.csv"))
    if files:
        tables = [pd.read_csv(file, dtype={"knee_id": "str"}) for file in files]
    return pd.concat(tables, ignore_index=True).dropna(subset=COLUMNS).reset_index(drop=True)


def ground_truth_slice(truth: Truth, row: dict, side: str, pixel_mm: float = 0.1) -> np.ndarray:
    """The bone itself (bool, rows, columns) in the middle MR slice of a patch, a row of its table.

    The middle slice is number n // 2 of the n slices of a patch.
    """
    n_slices, slice_mm = MR_SHAPE[0], MR_SPACING_MM[0]
    size = round(HEIGHT_MM / pixel_mm)
    centre, spacing_mm = (row["x"], row["y"], row["z"]), (slice_mm, pixel_mm, pixel_mm)
    grid = patch_grid(centre, side, (n_slices, size, size), spacing_mm)
    points = grid_points(grid)[n_slices // 2].reshape(-1, 3)
    bone = row["compartment"].split("_")[0]
    return truth.microstructure(bone, points).reshape(size, size)


def _true_biomarkers(row: dict, voi: np.ndarray, side: str, truth: Truth) -> list[float]:
    """BIOMARKERS of the bone inside a patch's region, on voxels of FINE_MM."""
    extent = np.multiply(MR_SHAPE, MR_SPACING_MM)
    shape = tuple(round(mm / FINE_MM) for mm in extent)
    grid = patch_grid((row["x"], row["y"], row["z"]), side, shape, (FINE_MM,) * 3)
    nearest = []  # MR voxel of each fine voxel, by axis
    for n_fine, n_mr in zip(shape, MR_SHAPE, strict=True):
        nearest.append(((np.arange(n_fine) + 0.5) * n_mr / n_fine).astype(int))
    voi = voi[np.ix_(*nearest)]
    bone = np.zeros(shape, bool)  # nothing outside the region is measured
    bone[voi] = truth.microstructure(row["compartment"].split("_")[0], grid_points(grid)[voi])
    measured = morphometry(bone, FINE_MM, voi, further=False)
    return [measured[biomarker] for biomarker in BIOMARKERS]
