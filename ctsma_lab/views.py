"""What notebooks alone need: slices, Table 1, recorded times."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk


def anatomical_plane(
    image: sitk.Image, plane: str, share: float = 0.5
) -> tuple[np.ndarray, tuple[float, float]]:
    """A "sagittal" (x), "coronal" (y) or "axial" (z) slice for display, nothing resampled.

    Parameters
    ----------
    share : place of the slice along the image's extent, 0 to 1.

    Returns
    -------
    The array (rows from the top or front) and its (row, column) spacing in mm.
    """
    image = sitk.DICOMOrient(image, "LPS")
    array, (dx, dy, dz) = sitk.GetArrayViewFromImage(image), image.GetSpacing()
    axis = {"axial": 0, "coronal": 1, "sagittal": 2}[plane]
    spacing_mm = {"axial": (dy, dx), "coronal": (dz, dx), "sagittal": (dz, dy)}[plane]
    chosen = np.take(array, int(share * (array.shape[axis] - 1)), axis=axis)
    return (chosen if plane == "axial" else chosen[::-1]), spacing_mm


def table_one(manifest: pd.DataFrame) -> pd.DataFrame:
    """Table 1: mean (SD), or share in %, by OA label; knees without a label are left out.

    Returns
    -------
    DataFrame, one row per characteristic; columns `no OA`, `OA`, and `SMD`, the standardised mean
    difference (pooled SD).
    """
    values = manifest[["age", "bmi", "kl_grade"]].astype(float)
    values["female_pct"] = 100.0 * (manifest["sex"] == "F")
    values["right_pct"] = 100.0 * (manifest["side"] == "R")
    without, with_oa = values[manifest["oa"] == 0], values[manifest["oa"] == 1]
    pooled_sd = np.sqrt((without.var() + with_oa.var()) / 2)
    smd = ((with_oa.mean() - without.mean()) / pooled_sd).round(2)
    rows = {"n": [len(without), len(with_oa), np.nan]}
    for name in values:
        rows[name] = [_mean_sd(without[name]), _mean_sd(with_oa[name]), smd[name]]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["no OA", "OA", "SMD"])


def _mean_sd(values: pd.Series) -> str:
    if values.name.endswith("_pct"):
        return f"{values.mean():.1f}"
    return f"{values.mean():.1f} ({values.std():.1f})"


def recorded_seconds(folder: str | Path) -> pd.Series:
    """Seconds by knee_id of the records in a `map_knees` folder; empty without records."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "seconds" in record:
            found[record["knee_id"]] = record["seconds"]
    return pd.Series(found, dtype=float)
