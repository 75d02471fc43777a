"""ROC curves, calibration and net benefit of a diagnostic score, with intervals.

labels (n,) are 0 (no OA) or 1 (OA); scores (n,) are higher for OA; subjects (n,) name the owners of
the knees; rng is a numpy Generator. DeLong's method takes knees as
independent. With both knees of a subject in the data use the bootstrap, which resamples subjects.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from numpy import ndarray
from scipy import optimize, special, stats

from ctsma.agreement import subject_codes
from ctsma.common import InputError

_Z95 = stats.norm.ppf(0.975)  # two-sided 95 % normal quantile, 1.96


def checked_labels(labels: Sequence, *scores: Sequence) -> list[ndarray]:
    """Labels (n,) as booleans and each of `scores` (n,) as floats.

    Raises InputError for labels that are not 0 or 1, NaN, lengths that differ, fewer than 2 of a
    class.
    """
    labels, scores = np.asarray(labels), [np.asarray(values, dtype=float) for values in scores]
    if not all(label in (0, 1) for label in labels.tolist()):
        raise InputError("labels", "are missing or not 0 or 1", "leave out knees without label")
    if any(s.shape != labels.shape or not np.isfinite(s).all() for s in scores):
        raise InputError("scores", "hold NaN or differ in length", "give one number per knee")
    n_oa, n_other = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    if min(n_oa, n_other) < 2:
        problem = f"hold {n_oa} OA and {n_other} other knees"
        raise InputError("labels", problem, "give at least 2 of each")
    return [labels.astype(bool), *scores]


def auc_delong(labels: Sequence, scores: Sequence) -> dict[str, float | str]:
    """AUC with the 95 % interval of DeLong 1988, by midranks (Sun & Xu 2014), cut at 0 and 1.

    Returns auc, se, ci_low, ci_high and flag. Where the variance is zero (AUC 0 or 1, constant
    scores) flag says so, and the interval is the score interval of Newcombe 2006 (method 5), which
    has a width.
    """
    above, below = _placements(*checked_labels(labels, scores))
    auc, se, flag = float(above.mean()), _delong_se(above, below), ""
    if se < 1e-12:
        low, high = _newcombe_interval(auc, len(above), len(below))
        flag = f"AUC {auc:g} with zero DeLong variance: score interval given"
    else:
        low, high = np.clip([auc - _Z95 * se, auc + _Z95 * se], 0, 1)
    return {"auc": auc, "se": se, "ci_low": float(low), "ci_high": float(high), "flag": flag}


def compare_delong(labels: Sequence, scores_a: Sequence, scores_b: Sequence) -> dict[str, float]:
    """Paired DeLong test of AUC a - AUC b on the same knees.

    Returns z, p (two-sided), difference, se, ci_low, ci_high. Equal placements give z = 0, p = 1. A
    difference without variance (one curve perfect, one constant) gives z = inf and p = NaN: the
    test does not apply.
    """
    labels, a, b = checked_labels(labels, scores_a, scores_b)
    above_a, below_a = _placements(labels, a)
    above_b, below_b = _placements(labels, b)
    above, below = above_a - above_b, below_a - below_b
    difference, se = float(above.mean()), _delong_se(above, below)
    if se > 1e-12:
        z, p = difference / se, float(2 * stats.norm.sf(abs(difference / se)))
    elif abs(difference) < 1e-12:
        z, p = 0.0, 1.0
    else:
        z, p = float(np.copysign(np.inf, difference)), float("nan")
    low, high = difference - _Z95 * se, difference + _Z95 * se
    return {"z": z, "p": p, "difference": difference, "se": se, "ci_low": low, "ci_high": high}


def _placements(labels: ndarray, scores: ndarray) -> tuple[ndarray, ndarray]:
    """For each OA knee the share of others scored below it, for each other the share of OA above.

    Ties count half.
    """
    cases, controls = scores[labels], scores[~labels]
    ranks = stats.rankdata(np.concatenate([cases, controls]))
    above = (ranks[: len(cases)] - stats.rankdata(cases)) / len(controls)
    return above, 1 - (ranks[len(cases) :] - stats.rankdata(controls)) / len(cases)


def _delong_se(above: ndarray, below: ndarray) -> float:
    variance = np.var(above, ddof=1) / len(above) + np.var(below, ddof=1) / len(below)
    return float(np.sqrt(variance))


def hanley_mcneil_se(auc: float, n_cases: float, n_controls: float) -> float:
    """Standard error of an AUC from its value alone, exponential model (Hanley & McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    total = auc * (1 - auc) + (n_cases - 1) * (q1 - auc**2) + (n_controls - 1) * (q2 - auc**2)
    return float(np.sqrt(max(total, 0) / (n_cases * n_controls)))


def _newcombe_interval(auc: float, n_cases: int, n_controls: int) -> tuple[float, float]:
    mean, product = (n_cases + n_controls) / 2, n_cases * n_controls

    def excess(theta: float, side: int) -> float:
        half_width = _Z95 * hanley_mcneil_se(theta, mean, mean) * mean / np.sqrt(product)
        return side * (auc - theta) - half_width

    low, high = 0.0, 1.0
    if auc > 0:
        low = optimize.brentq(excess, 1e-12, min(auc, 1 - 1e-12), args=(1,))
    if auc < 1:
        high = optimize.brentq(excess, max(auc, 1e-12), 1 - 1e-12, args=(-1,))
    return low, high


def bootstrap_auc(labels, scores, subjects, rng, n_resamples=2000) -> dict[str, float]:
    """AUC with a 95 % percentile interval from resampling subjects (n,), stratified by class."""
    fpr, tpr = _resampled_roc(*checked_labels(labels, scores), subjects, rng, n_resamples)
    values = np.trapezoid(tpr, fpr, axis=1)
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"auc": float(values[0]), "ci_low": float(low), "ci_high": float(high)}


def roc_band(labels, scores, subjects, rng, n_resamples=1000) -> pd.DataFrame:
    """ROC curve with its pointwise 95 % band, bootstrap as `bootstrap_auc`.

    Returns DataFrame(fpr, tpr, low, high) on a grid of 1 %.
    """
    fpr, tpr = _resampled_roc(*checked_labels(labels, scores), subjects, rng, n_resamples)
    grid = np.linspace(0, 1, 101)
    curves = np.array([np.interp(grid, x, y) for x, y in zip(fpr, tpr, strict=True)])
    low, high = np.percentile(curves[1:], [2.5, 97.5], axis=0)
    return pd.DataFrame({"fpr": grid, "tpr": curves[0], "low": low, "high": high})


def _resampled_roc(labels, scores, subjects, rng, n_resamples) -> tuple[ndarray, ndarray]:
    """fpr and tpr at every step of the ROC curve, (1 + resamples, 1 + steps).

    The first row is of the data as they are. Subjects are resampled with their knees, those with
    any OA knee and those without apart. A resample that lacks a class has no curve and is left out.
    """
    codes = subject_codes(subjects, len(labels))
    has_oa = np.bincount(codes, weights=labels) > 0
    weights = np.ones((1 + n_resamples, len(has_oa)))
    for stratum in (np.flatnonzero(has_oa), np.flatnonzero(~has_oa)):
        if not len(stratum):  # every subject has an OA knee, as with the other knee as control
            continue
        share = np.full(len(stratum), 1 / len(stratum))
        weights[1:, stratum] = rng.multinomial(len(stratum), share, n_resamples)
    order = np.argsort(-scores, kind="stable")
    weights = weights[:, codes][:, order]
    weights = weights[(weights @ labels[order] > 0) & (weights @ ~labels[order] > 0)]
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    rates = []
    for group in (~labels, labels):
        count = np.cumsum(weights * group[order], axis=1)[:, last_of_ties]
        rates.append(np.pad(count / count[:, -1:], ((0, 0), (1, 0))))
    return rates[0], rates[1]


def calibration(labels: Sequence, probabilities: Sequence) -> dict[str, float]:
    """Brier score, calibration slope (ideal 1) and calibration-in-the-large (ideal 0).

    slope: logit P(OA) = a + slope logit(p); intercept: the same with the slope fixed at 1 (Cox
    1958; Van Calster 2019), both with 95 % Wald intervals. p is kept within 1e-6 of 0 and 1 (design
    choice). The slope is NaN where p separates the classes: then no estimate exists.
    """
    labels, p = checked_labels(labels, probabilities)
    if p.min() < 0 or p.max() > 1:
        raise InputError("probabilities", "lie outside 0 to 1", "give probabilities, not scores")
    logit = special.logit(np.clip(p, 1e-6, 1 - 1e-6))
    ones = np.ones_like(logit)
    fits = {"intercept": sm.GLM(labels, ones, sm.families.Binomial(), offset=logit)}
    cases, controls = logit[labels], logit[~labels]
    if cases.min() < controls.max() and controls.min() < cases.max():
        fits["slope"] = sm.GLM(labels, np.column_stack([ones, logit]), sm.families.Binomial())
    result = {"brier": float(np.mean((p - labels) ** 2))}
    for name in ("slope", "intercept"):
        value = low = high = float("nan")
        if name in fits:
            fit = fits[name].fit(tol=1e-12)
            value, (low, high) = float(fit.params[-1]), fit.conf_int()[-1]
        result |= {name: value, f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
    return result
