"""Folds by subject, made once by a seeded function and stored as a file."""

from pathlib import Path

import numpy as np
import pandas as pd

from .names import InputFault


def make_splits(manifest: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """Deal subjects into folds, stratified by OA label (0, 1, unknown).

    Parameters
    ----------
    manifest : DataFrame of `read_manifest`; both knees of a subject go to one fold.
    n_folds : number of folds.
    seed : seed of the shuffle.

    Returns
    -------
    DataFrame(subject_id, fold), sorted by subject_id; folds are 0 .. n_folds - 1.
    """
    labels = manifest.groupby("subject_id")["oa"].max().fillna(-1)
    if not 2 <= n_folds <= len(labels):
        raise InputFault("n_folds", f"is {n_folds} with {len(labels)} subjects", "choose 2 to the number of subjects")
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels.iloc[order].sort_values(kind="stable")
    folds = pd.Series(np.arange(len(shuffled)) % n_folds, index=shuffled.index, name="fold")
    return folds.sort_index().reset_index()


def splits_path(manifest_path: str | Path) -> Path:
    """The split file that belongs to a manifest: <cohort>_splits.csv beside <cohort>.csv."""
    path = Path(manifest_path)
    return path.with_name(f"{path.stem}_splits.csv")


def read_splits(path: str | Path, manifest: pd.DataFrame) -> pd.DataFrame:
    """Read stored folds and check them against the manifest.

    Raises InputFault for a subject in two folds, a subject without fold, or folds not 0 .. n - 1.
    """
    splits = pd.read_csv(path, dtype={"subject_id": "str"})
    if list(splits.columns) != ["subject_id", "fold"]:
        raise InputFault(path, f"has columns {', '.join(splits.columns)}", "give exactly subject_id, fold")
    check_splits(splits, manifest, path)
    return splits


def check_splits(splits: pd.DataFrame, manifest: pd.DataFrame, where: str | Path = "splits") -> None:
    """Refuse a subject on two sides, a subject without a fold, and gaps in the fold numbers (InputFault)."""
    twice = splits.loc[splits["subject_id"].duplicated(), "subject_id"].unique()
    if len(twice):
        raise InputFault(where, f"puts subject {', '.join(twice)} in two folds", "keep one row a subject")
    missing = sorted(set(manifest["subject_id"]) - set(splits["subject_id"]))
    if missing:
        raise InputFault(where, f"has no fold for subject {', '.join(missing)}", "add it, or delete the file to remake")
    if sorted(splits["fold"].unique()) != list(range(splits["fold"].nunique())) or splits["fold"].nunique() < 2:
        raise InputFault(where, "does not number its folds 0, 1, ...", "renumber the folds, at least two")


def stored_splits(manifest: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """The folds stored beside the manifest; made and stored first where there are none. Never overwritten."""
    path = splits_path(manifest.attrs["path"])
    if not path.exists():
        make_splits(manifest, n_folds, seed).to_csv(path, index=False)
    return read_splits(path, manifest)
