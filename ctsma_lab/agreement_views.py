"""What notebook 4 needs beside `ctsma.agreement`: results by arm, comparison with another run."""

from collections.abc import Sequence

import pandas as pd

from ctsma.agreement import icc
from ctsma.common import BIOMARKERS

PATCH = ["knee_id", "patch_id"]  # what names a patch


def nested(table: pd.DataFrame, columns: str | Sequence[str]) -> dict[str, dict]:
    """A table by arm and biomarker as {arm: {biomarker: ...}} for a results file.

    `columns` is one column, whose value is given, or several, given as a mapping.
    """
    found = {}
    for row in table.to_dict("records"):
        value = row[columns] if isinstance(columns, str) else {name: row[name] for name in columns}
        found.setdefault(row["arm"], {})[row["biomarker"]] = value
    return found


def cohort_matches(predictions, others, least_icc=0.99) -> bool:
    """Whether `others` (one row per patch) are estimates of the same patches as `predictions`.

    Both hold the same patches, and the ICC of their `<biomarker>_reference` exceeds `least_icc` for
    each biomarker. The rounding of another machine leaves it above 0.99 (design choice); the second
    MR of the same knees does not.
    """
    here = predictions.drop_duplicates(PATCH)
    both = here.merge(others, on=PATCH, suffixes=("", "_there"))
    if not len(both) == len(here) == len(others):
        return False
    names = [f"{biomarker}_reference" for biomarker in BIOMARKERS]
    return all(icc(both[name], both[f"{name}_there"])["icc"] > least_icc for name in names)
