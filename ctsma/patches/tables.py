"""Patches of a cohort, read back: tables, images, tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.cohort import BIOMARKERS, BONES, InputFault

from .geometry import CT_SHAPE, MR_SHAPE


@dataclass(frozen=True)
class Patches:
    """Patches of a cohort, row by row: table, mr (n, 12, 48, 48), ct (n, 12, 24, 24), voi as mr."""

    table: pd.DataFrame
    mr: np.ndarray
    ct: np.ndarray
    voi: np.ndarray


def load_table(folder: str | Path, usable: bool = True) -> pd.DataFrame:
    """The table of all patches below a folder, in the order of knees; `usable` leaves flagged patches out."""
    files = sorted(Path(folder).glob("*_table.csv"))
    if not files:
        raise InputFault(folder, "holds no patches", "register and cut at least one knee first")
    table = pd.concat([pd.read_csv(f, dtype={"knee_id": "str", "subject_id": "str"}) for f in files], ignore_index=True)
    table["flag"] = table["flag"].astype(object).fillna("")
    return table[table["flag"] == ""].reset_index(drop=True) if usable else table


def load_truth(folder: str | Path) -> pd.DataFrame:
    """True biomarkers of all patches: knee_id, patch_id and the four, as `knee_truth` or `true_patches` wrote them."""
    files = sorted(Path(folder).glob("*_truth.csv"))
    table = pd.concat([pd.read_csv(file, dtype={"knee_id": "str"}) for file in files], ignore_index=True)
    return table.dropna(subset=list(BIOMARKERS)).reset_index(drop=True)


def load_patches(folder: str | Path, usable: bool = True) -> Patches:
    """All patches below a folder with their images, in the order of `load_table`."""
    table, arrays = load_table(folder, usable), {"mr": [], "ct": [], "voi": []}
    for knee_id, rows in table.groupby("knee_id", sort=False):
        with np.load(Path(folder) / f"{knee_id}.npz") as stored:
            for name, parts in arrays.items():
                parts.append(stored[name][rows["patch_id"].to_numpy()])
    return Patches(table, **{name: np.concatenate(parts) for name, parts in arrays.items()})


def load_ct_patches(folder: str | Path, knee_ids: Sequence[str]) -> Patches:
    """Usable patches of the named knees without MR, as `ct_patches` cut them; `mr` is zero. May be empty."""
    table, ct, voi = [], [np.zeros((0, *CT_SHAPE), np.float16)], [np.zeros((0, *MR_SHAPE), bool)]
    for file in (Path(folder) / f"{knee_id}_table.csv" for knee_id in knee_ids):
        if not file.exists():
            continue  # its CT could not be cut; the row of `map_knees` says why
        rows = pd.read_csv(file, dtype={"knee_id": "str", "subject_id": "str"})
        rows = rows[rows["flag"].isna()]
        with np.load(file.with_name(file.name.replace("_table.csv", ".npz"))) as stored:
            ct.append(stored["ct"][rows["patch_id"].to_numpy()])
            voi.append(stored["voi"][rows["patch_id"].to_numpy()])
        table.append(rows)
    columns = ["knee_id", "subject_id", "patch_id", "compartment", "u", "v", "w"]
    columns += [f"cortex_{bone}_hu" for bone in BONES]
    table = pd.concat(table, ignore_index=True) if table else pd.DataFrame(columns=columns)
    return Patches(table, np.zeros((len(table), *MR_SHAPE), np.float16), np.concatenate(ct), np.concatenate(voi))


def load_rescans(folder: str | Path, table: pd.DataFrame) -> np.ndarray:
    """The second MR (n, 12, 48, 48) of the patches in `table`; KeyError for a knee that has none."""
    stacks = []
    for knee_id, patch_id in zip(table["knee_id"], table["patch_id"], strict=True):
        with np.load(Path(folder) / f"{knee_id}.npz") as stored:
            stacks.append(stored["rescan_mr"][patch_id])
    return np.array(stacks)


def keep_only(folder: str | Path, knee_ids: Sequence[str]) -> None:
    """Remove the tables of all other knees: those of a manifest that was changed since, or that fail now.

    Whoever loads the folder then reads the knees of this run alone; a knee that comes back is cut again.
    """
    for file in Path(folder).glob("*_table.csv"):
        if file.name.removesuffix("_table.csv") not in set(knee_ids):
            file.unlink()


def ruler_hu(table: pd.DataFrame) -> np.ndarray:
    """The ruler (n,) of a table's patches: mean of both bones' cortex, HU."""
    return table[[f"cortex_{bone}_hu" for bone in BONES]].mean(axis=1).to_numpy(float)


def with_truth(patches: Patches, truth: pd.DataFrame) -> Patches:
    """The patches whose truth is known, with columns true_bv_tv, ... in their table; `truth` as of `load_truth`."""
    named = truth.rename(columns={name: f"true_{name}" for name in BIOMARKERS})
    table = patches.table.merge(named, on=["knee_id", "patch_id"], how="left")
    kept = table["true_bv_tv"].notna().to_numpy()
    return Patches(table[kept].reset_index(drop=True), patches.mr[kept], patches.ct[kept], patches.voi[kept])


def tokens_by_arm(predictions: pd.DataFrame, reference: pd.DataFrame, knees: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Patch tokens of every arm for the named knees: knee_id, subject_id, compartment, u, v, w and the biomarkers.

    `mr_reference` takes the biomarkers measured on the MR; the other arms their out-of-fold predictions.
    """
    place = ["knee_id", "patch_id", "compartment", "u", "v", "w"]
    own = ["knee_id", "subject_id", "patch_id", *BIOMARKERS]
    frames = {arm: rows[own] for arm, rows in predictions.groupby("arm", sort=False)} | {"mr_reference": reference[own]}
    joined = {arm: rows.merge(reference[place], on=["knee_id", "patch_id"]) for arm, rows in frames.items()}
    return {arm: rows[rows["knee_id"].isin(set(knees))].reset_index(drop=True) for arm, rows in joined.items()}
