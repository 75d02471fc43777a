"""The small data of the tutorials, made by `make_data` from a finished simulated run."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from ctsma.common import BIOMARKERS, BONES
from ctsma.files import SHARE
from ctsma.patches import MR_SHAPE, Patches

DATA = SHARE / "notebooks" / "data"
PATCH = ["knee_id", "patch_id"]  # what names a patch
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
    """One row per knee: knee_id, subject_id, fold, oa (0 or 1), age, sex, bmi.

    `ct_fwhm_mm` and `ct_noise_hu` are what the simulated CT scanner drew.
    """
    return pd.read_csv(folder / "knees.csv", dtype=IDENTIFIERS)


@cache
def read_patch_images(folder: Path = DATA) -> Patches:
    """CT, MR and trabecular region of one patch of each compartment of 24 knees.

    The table has the columns of `read_patches`, the MR reference as `<biomarker>`, and the HU of
    the knee's cortex.
    """
    with np.load(folder / "patches_small.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    names = pd.MultiIndex.from_arrays([arrays["knee_id"], arrays["patch_id"]], names=PATCH)
    table = read_patches(folder).set_index(PATCH).loc[names].reset_index()
    table[list(BIOMARKERS)] = table[[f"{name}_reference" for name in BIOMARKERS]].to_numpy()
    table[[f"cortical_hu_{bone}" for bone in BONES]] = arrays["cortical_hu"]
    low, high = arrays["mr_limits"].T[:, :, None, None, None]
    mr = low + (high - low) * (arrays["mr"] / np.float32(255))
    voi = np.unpackbits(arrays["voi"], axis=1).reshape(-1, *MR_SHAPE).astype(bool)
    return Patches(table, mr=mr.astype(np.float32), ct=arrays["ct"], voi=voi)


@cache
def read_knee(folder: Path = DATA) -> tuple[sitk.Image, sitk.Image, sitk.Image, dict]:
    """CT (HU), MR, bone labels, and the facts of knee.json (transforms, targets)."""
    facts = json.loads((folder / "knee.json").read_text(encoding="utf-8"))
    ct, mr = (
        sitk.ReadImage(str(folder / f"knee_{name}.nii.gz"), sitk.sitkFloat32)
        for name in ("ct", "mr")
    )
    return ct, mr, sitk.ReadImage(str(folder / "knee_labels.nii.gz")), facts
