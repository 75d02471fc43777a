"""Folds by subject, made once by a seeded function and stored beside the manifest."""

from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.common import InputError
from ctsma.files import write_text

from .manifest import read_text_table

MIN_TRAINING = 3  # subjects: one to validate, two to choose the strength of the ridge


def make_splits(manifest: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """Deal subjects into folds, stratified by OA label (0, 1, unknown) and by `has_reference`.

    Parameters
    ----------
    manifest : DataFrame of `read_manifest`; both knees of a subject go to one fold.
    n_folds : number of folds.
    seed : seed of the shuffle.

    Returns
    -------
    DataFrame(subject_id, fold), sorted by subject_id; folds are 0 .. n_folds - 1.
    """
    strata = manifest.reindex(columns=["subject_id", "has_reference", "oa"])
    labels = strata.groupby("subject_id").max().fillna(-1)
    if not 2 <= n_folds <= len(labels):
        problem = f"is {n_folds} with {len(labels)} subjects"
        raise InputError("n_folds", problem, "choose 2 to the number of subjects")
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels.iloc[order].sort_values(list(labels), kind="stable")
    folds = pd.Series(np.arange(len(shuffled)) % n_folds, index=shuffled.index, name="fold")
    return folds.sort_index().reset_index()


def splits_path(manifest_path: str | Path) -> Path:
    """The split file that belongs to a manifest: <cohort>_splits.csv beside <cohort>.csv."""
    path = Path(manifest_path)
    return path.with_name(f"{path.stem}_splits.csv")


def read_splits(path: str | Path, manifest: pd.DataFrame) -> pd.DataFrame:
    """Read stored folds and check them against the manifest.

    Raises InputError for a subject in two folds, a subject without fold, or folds that are not
    numbered 0 .. n - 1.
    """
    splits = read_text_table(path).reset_index(drop=True)
    if list(splits.columns) != ["subject_id", "fold"]:
        problem = f"has columns {', '.join(splits.columns)}"
        raise InputError(path, problem, "give exactly subject_id, fold")
    numbers = pd.to_numeric(splits["fold"], errors="coerce")
    splits["fold"] = numbers.fillna(-1).astype(int).where(numbers % 1 == 0, -1)
    check_splits(splits, manifest, path)
    return splits


def check_splits(
    splits: pd.DataFrame, manifest: pd.DataFrame, source: str | Path = "splits"
) -> None:
    """InputError for a subject in two folds, without fold or name, or gaps in the numbers."""
    if manifest["subject_id"].isna().any():
        raise InputError("subject_id", "is missing for a knee", "name the person of every knee")
    twice = splits.loc[splits["subject_id"].duplicated(), "subject_id"].unique()
    if len(twice):
        raise InputError(source, f"puts subject {', '.join(twice)} in two folds", "keep one row")
    missing = sorted(set(manifest["subject_id"]) - set(splits["subject_id"]))
    if missing:
        problem = f"has no fold for subject {', '.join(missing)}"
        raise InputError(source, problem, "add it, or remove the file to make it again")
    folds = sorted(splits["fold"].unique())
    if len(folds) < 2 or folds != list(range(len(folds))):
        raise InputError(source, "does not number its folds 0, 1, ...", "renumber at least two")


def stored_splits(manifest: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """The folds stored beside the manifest; made and stored first where there are none.

    Raises InputError as `read_splits`, and where a fold leaves fewer than 3 subjects with CT, MR
    and a reference for training: one to validate, two to fit and choose the strength of the ridge.
    """
    path = splits_path(manifest.attrs["path"])
    stored = path.exists()
    splits = read_splits(path, manifest) if stored else make_splits(manifest, n_folds, seed)
    pairs = manifest.dropna(subset=["ct", "mr"]).reindex(columns=["subject_id", "has_reference"])
    trains = pairs.loc[pairs["has_reference"] != 0, "subject_id"]
    paired = splits["subject_id"].isin(trains)
    n_training = paired.sum() - paired.groupby(splits["fold"]).sum()
    if paired.any() and n_training.min() < MIN_TRAINING:
        problem = f"leaves {n_training.min()} subjects with CT, MR and a reference to train on"
        remedy = f"give at least {MIN_TRAINING} by more folds or subjects, and remove a stored file"
        raise InputError(path, problem, remedy)
    if not stored:
        write_text(path, splits.to_csv(index=False))
    return read_splits(path, manifest)
