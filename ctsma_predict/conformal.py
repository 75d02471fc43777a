"""Conformal prediction intervals of biomarkers: how far an estimate may lie from its reference."""

import numpy as np
import pandas as pd
from numpy import ndarray

from ctsma.agreement import checked_pairs
from ctsma.common import InputError


def conformal_radius(scores: ndarray, level: float = 0.90) -> float:
    """Split-conformal radius: the ceil((n + 1) level)-th smallest score; infinite beyond the n-th.

    Scores |reference - estimate| (n,) of calibration targets. The radius covers a new, exchangeable
    target with probability >= level (Vovk 2005; Lei 2018).
    """
    scores = np.sort(np.asarray(scores, dtype=float))
    if np.isnan(scores).any() or not 0 < level < 1:
        problem = f"hold NaN or the level is {level}"
        raise InputError("conformal scores", problem, "give numbers and a level between 0 and 1")
    rank = int(np.ceil(round((len(scores) + 1) * level, 9)))  # 10 * 0.9 must not become rank 10
    return float(scores[rank - 1]) if rank <= len(scores) else np.inf


def cross_conformal(reference, estimate, folds, level=0.90) -> pd.DataFrame:
    """Interval of each out-of-fold estimate, calibrated on the residuals of the other folds.

    folds (n,): subject-wise folds. Returns DataFrame(low, high, covered).
    """
    x, y = checked_pairs(reference, estimate)
    folds = np.asarray(folds)
    if folds.shape != x.shape or pd.isna(folds).any():
        raise InputError("folds", "hold NaN or another number of values", "give one per estimate")
    scores, half = np.abs(x - y), np.empty_like(x)
    for fold in np.unique(folds):
        half[folds == fold] = conformal_radius(scores[folds != fold], level)
    return pd.DataFrame({"low": y - half, "high": y + half, "covered": scores <= half})
