"""What a simulated knee's patches truly are; only quality assurance and teaching ask."""

from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.biomarkers import morphometry
from ctsma.cohort import BIOMARKERS
from ctsma.simulation import Truth, read_truth

from .geometry import HEIGHT_MM, MR_SHAPE, MR_SPACING_MM, grid_points, patch_grid

FINE_MM = 0.125  # voxel on which truth is measured; trabeculae are 0.15 to 0.4 mm (our choice)


def knee_truth(knee: dict, folder: Path, *, root: str, patches_folder: str) -> dict:
    """Measure the true biomarkers of a knee's patches (for `map_knees`); writes `<knee>_truth.csv`. Only for QA."""
    return write_truth(Path(patches_folder), Path(folder), knee, read_truth(root, knee["knee_id"]))


def true_slice(truth: Truth, row: dict, side: str, pixel_mm: float = 0.1) -> np.ndarray:
    """The bone itself (bool, rows, columns) in the middle plane of a patch of the table; only for QA and teaching."""
    size = round(HEIGHT_MM / pixel_mm)
    grid = patch_grid((row["x"], row["y"], row["z"]), side, (1, size, size), (pixel_mm,) * 3)
    points = grid_points(grid).reshape(-1, 3)
    return truth.microstructure(row["compartment"].split("_")[0], points).reshape(size, size)


def write_truth(
    patches_folder: Path, folder: Path, knee: dict, truth: Truth, n: int | None = None, rng: np.random.Generator = None
) -> dict:
    """Measure and write the truth of a knee's usable patches, or of n of them drawn by `rng`."""
    knee_id, side = knee["knee_id"], knee["side"]
    table = pd.read_csv(patches_folder / f"{knee_id}_table.csv", dtype={"knee_id": "str", "subject_id": "str"})
    with np.load(patches_folder / f"{knee_id}.npz") as stored:
        voi = stored["voi"]
    table = table[table["flag"].isna()]
    if n is not None:
        table = table.iloc[np.sort(rng.permutation(len(table))[:n])]
    table = table.reset_index(drop=True)
    rows = [_true_biomarkers(row, voi[row["patch_id"]], side, truth) for row in table.to_dict("records")]
    found = pd.DataFrame(rows, columns=list(BIOMARKERS))
    pd.concat([table[["knee_id", "patch_id"]], found], axis=1).to_csv(folder / f"{knee_id}_truth.csv", index=False)
    return {"n_patches": len(rows)}


def _true_biomarkers(row: dict, voi: np.ndarray, side: str, truth: Truth) -> dict:
    shape = tuple(round(n * s / FINE_MM) for n, s in zip(MR_SHAPE, MR_SPACING_MM, strict=True))
    grid = patch_grid((row["x"], row["y"], row["z"]), side, shape, (FINE_MM,) * 3)
    bone = truth.microstructure(row["compartment"].split("_")[0], grid_points(grid).reshape(-1, 3)).reshape(shape)
    nearest = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, MR_SHAPE, strict=True)]
    found = morphometry(bone, FINE_MM, voi[np.ix_(*nearest)], further=False)
    return {name: found[name] for name in BIOMARKERS}
