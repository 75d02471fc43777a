"""What every diagnostic model reads: tokens of patches, labels and folds of knees.

tokens: one row per patch with knee_id, subject_id, compartment, position u, v, w in the bone's own
coordinates and the BIOMARKERS. A knee may have any number of patches and lack whole compartments.
labels: Series of 0 (no OA) and 1 (OA) by knee_id. splits: DataFrame(subject_id, fold).
"""

from collections.abc import Sequence

import pandas as pd

from ctsma.cohort import check_splits
from ctsma.common import BIOMARKERS, InputError

from .statistics import checked_labels

POSITION = ("u", "v", "w")


def tokens_by_arm(predictions: pd.DataFrame, knees: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Tokens of every arm for the named knees, and of `mr_reference`, the reference itself.

    predictions: one row per arm and patch, as in models/predictions.csv.
    """
    names = list(BIOMARKERS)
    predictions = predictions[predictions["knee_id"].isin(knees)]
    place = ["knee_id", "subject_id", "patch_id", "compartment", *POSITION]
    arms = dict(list(predictions.groupby("arm", sort=False)))
    if not arms:
        problem = "hold no patch of a knee with an OA label"
        raise InputError("predictions", problem, "fill in column oa of the manifest")
    tokens = {arm: rows[[*place, *names]].reset_index(drop=True) for arm, rows in arms.items()}
    any_arm = next(iter(arms.values()))
    reference = any_arm[place].copy()
    reference[names] = any_arm[[f"{name}_reference" for name in names]].to_numpy()
    return tokens | {"mr_reference": reference.reset_index(drop=True)}


def knee_table(rows: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame) -> pd.DataFrame:
    """subject_id, oa and fold of each knee, by knee_id; `rows` has knee_id and subject_id.

    Raises InputError for a knee without row or label, labels that are not 0 or 1, a knee with two
    subjects or two labels, a subject without fold or in two folds, one class only outside a fold.
    """
    owners = rows[["knee_id", "subject_id"]].drop_duplicates().set_index("knee_id")["subject_id"]
    owners = owners.sort_index()
    if odd := sorted(set(labels.index) ^ set(owners.index)):
        names = ", ".join(map(str, odd))
        raise InputError("knees", f"{names} lack a patch or a label", "give both or neither")
    if owners.index.has_duplicates or labels.index.has_duplicates:
        raise InputError("knees", "are named twice", "give each knee one subject and one label")
    check_splits(splits, rows)
    oa = checked_labels(labels.reindex(owners.index))[0].astype(int)
    knees = pd.DataFrame({"subject_id": owners, "oa": oa})
    knees["fold"] = knees["subject_id"].map(splits.set_index("subject_id")["fold"])
    for fold in knees["fold"].unique():
        if knees.loc[knees["fold"] != fold, "oa"].nunique() < 2:
            problem, remedy = "leaves one class only for training", "stratify the splits by label"
            raise InputError(f"fold {fold}", problem, remedy)
    return knees
