"""Knees of a study without usable MR: their biomarkers by the networks of the study itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.arms import ARMS
from ctsma.common import BIOMARKERS
from ctsma.distillation import load_model, predict, prepare
from ctsma.distillation.cross_validation import prediction_rows
from ctsma.patches import Patches, portions


def predict_ct_only(
    patches: Patches,
    splits: pd.DataFrame,
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
) -> pd.DataFrame:
    """Predict patches of knees without usable MR by the trained students of their subjects' folds.

    Parameters
    ----------
    patches : of `load_ct_only_patches`.
    splits, arms, seeds, folder : as given to `cross_validate`, which trained the networks.

    Returns
    -------
    DataFrame as of `cross_validate`. A network of a subject's fold never saw the subject.
    """
    table = patches.table.assign(**dict.fromkeys(BIOMARKERS, np.nan))
    patches = Patches(table, patches.mr, patches.ct, patches.voi)
    folds = splits.set_index("subject_id")["fold"].loc[table["subject_id"]].to_numpy()
    parts = [prediction_rows(table[:0], "", 0, 0, np.zeros((0, len(BIOMARKERS))))]
    students = [arm for arm in arms if ARMS[arm].kind == "student"]
    for number in np.unique(folds):
        trained = {
            (arm, seed): load_model(Path(folder) / f"{arm}_fold{number}_seed{seed}")
            for arm in students
            for seed in seeds
        }
        for rows in portions(np.flatnonzero(folds == number)):
            some = patches.take(rows)
            data = prepare(some)
            for (arm, seed), (network, record) in trained.items():
                values = predict(network, record, data, np.arange(len(rows)))
                parts.append(prediction_rows(some.table, arm, number, seed, values))
    parts[1:] = sorted(parts[1:], key=lambda part: students.index(part["arm"].iloc[0]))
    return pd.concat(parts[1:] or parts, ignore_index=True)
