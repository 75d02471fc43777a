"""What notebooks alone need: slices, Table 1, curves, numbers for results files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from statsmodels.stats.proportion import proportion_confint

from ctsma.agreement import icc
from ctsma.common import BIOMARKERS, InputError
from ctsma.diagnosis.inputs import knee_table
from ctsma.diagnosis.statistics import checked_labels

PATCH = ["knee_id", "patch_id"]  # what names a patch


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


def calibration_curve(labels: Sequence, probabilities: Sequence, n_bins: int = 5) -> pd.DataFrame:
    """Observed share of OA against mean prediction in groups of equal size, Wilson 95 % intervals.

    Returns DataFrame(predicted, observed, ci_low, ci_high, n).
    """
    labels, p = checked_labels(labels, probabilities)
    rows = []
    for group in np.array_split(np.argsort(p, kind="stable"), min(n_bins, len(p))):
        n = len(group)
        low, high = proportion_confint(labels[group].sum(), n, method="wilson")
        observed = labels[group].mean()
        rows.append((p[group].mean(), observed, low, high, n))
    return pd.DataFrame(rows, columns=["predicted", "observed", "ci_low", "ci_high", "n"])


def sensitivity_at_specificity(labels, scores, specificity=0.90) -> dict[str, float]:
    """Sensitivity at the lowest threshold that keeps at least this specificity.

    A score above the threshold is positive. Returns sensitivity, ci_low, ci_high (Wilson 95 %,
    threshold taken as given), threshold and the specificity reached.
    """
    labels, scores = checked_labels(labels, scores)
    controls = np.sort(scores[~labels])
    n_below = max(int(np.ceil(round(specificity * len(controls), 9))), 1)
    threshold = controls[n_below - 1]
    positive = scores[labels] > threshold
    low, high = proportion_confint(positive.sum(), len(positive), method="wilson")
    return {
        "sensitivity": float(positive.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "threshold": float(threshold),
        "specificity": float(np.mean(controls <= threshold)),
    }


def permute_labels(
    labels: pd.Series, subjects: pd.Series, splits: pd.DataFrame, rng: np.random.Generator
) -> pd.Series:
    """Negative control: labels permuted between subjects, both knees of a subject together.

    labels, subjects: Series by knee_id. Subjects exchange labels within their fold and their number
    of knees: folds are stratified by label, and unbalanced folds would pull the AUC of a useless
    model below 0.5.
    """
    fold = subjects.map(splits.set_index("subject_id")["fold"])
    count = subjects.map(subjects.value_counts())
    permuted = labels.copy()
    for _, names in subjects.groupby([fold, count]):
        knees = np.array([group.index for _, group in names.groupby(names)])
        donors = knees[rng.permutation(len(knees))]
        permuted[knees.ravel()] = labels[donors.ravel()].to_numpy()
    return permuted


def net_benefit(labels, probabilities, thresholds) -> pd.DataFrame:
    """Decision curve TP/n - FP/n * t/(1-t) at thresholds t (Vickers & Elkin 2006).

    Returns DataFrame(threshold, model, treat_all); treating none has net benefit 0.
    """
    labels, p = checked_labels(labels, probabilities)
    t = np.asarray(thresholds)
    odds = t / (1 - t)
    positive = p >= t[:, None]
    model = (positive & labels).mean(axis=1) - (positive & ~labels).mean(axis=1) * odds
    treat_all = labels.mean() - (~labels).mean() * odds
    return pd.DataFrame({"threshold": t, "model": model, "treat_all": treat_all})


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


def label_problem(manifest: pd.DataFrame, splits: pd.DataFrame) -> str:
    """Why knees with CT, MR and OA label cannot be diagnosed in these folds; "" where they can."""
    knees = manifest.dropna(subset=["ct", "mr", "oa"])
    try:
        knee_table(knees, knees.set_index("knee_id")["oa"], splits)
    except InputError as error:
        return str(error)
    return ""


def recorded_seconds(folder: str | Path) -> pd.Series:
    """Seconds by knee_id of the records in a `map_knees` folder; empty without records."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "seconds" in record:
            found[record["knee_id"]] = record["seconds"]
    return pd.Series(found, dtype=float)
