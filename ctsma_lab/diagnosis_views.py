"""What notebook 5 shows of diagnoses, and notebook 1 asks of labels and folds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from ctsma.common import InputError
from ctsma.diagnosis.inputs import knee_table
from ctsma.diagnosis.statistics import checked_labels


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


def label_problem(manifest: pd.DataFrame, splits: pd.DataFrame) -> str:
    """Why knees with CT, MR and OA label cannot be diagnosed in these folds; "" where they can."""
    knees = manifest.dropna(subset=["ct", "mr", "oa"])
    try:
        knee_table(knees, knees.set_index("knee_id")["oa"], splits)
    except InputError as error:
        return str(error)
    return ""
