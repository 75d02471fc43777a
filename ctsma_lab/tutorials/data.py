"""The small data of the tutorials, made by `make_data` from a finished simulated run."""

import json
from functools import cache
from pathlib import Path

import pandas as pd
import SimpleITK as sitk

from ctsma.files import SHARE

DATA = SHARE / "notebooks" / "data"
IDENTIFIERS = {"knee_id": "str", "subject_id": "str"}


@cache
def read_patches(folder: Path = DATA) -> pd.DataFrame:
    """One row per patch: identifiers, place, `mean_hu`, and each biomarker of several sources.

    Columns `<biomarker>_<source>`; the source is `reference` (measured on MR), `true` (ground
    truth) or an arm, whose estimates are out-of-fold. The columns are described in the folder's
    README.md.
    """
    return pd.read_csv(folder / "patches.csv", dtype=IDENTIFIERS)


@cache
def read_knees(folder: Path = DATA) -> pd.DataFrame:
    """One row per knee: knee_id, subject_id, fold, oa (0 or 1), age, sex, bmi."""
    return pd.read_csv(folder / "knees.csv", dtype=IDENTIFIERS)


@cache
def read_knee(folder: Path = DATA) -> tuple[sitk.Image, sitk.Image, sitk.Image, dict]:
    """CT (HU), MR, bone labels, and the facts of knee.json (transforms, targets)."""
    facts = json.loads((folder / "knee.json").read_text(encoding="utf-8"))
    ct, mr = (
        sitk.ReadImage(str(folder / f"knee_{name}.nii.gz"), sitk.sitkFloat32)
        for name in ("ct", "mr")
    )
    return ct, mr, sitk.ReadImage(str(folder / "knee_labels.nii.gz")), facts
