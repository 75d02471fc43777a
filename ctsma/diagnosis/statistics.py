"""ROC statistics a reviewer asks for: DeLong, bootstrap over subjects, calibration, net benefit, sample size.

labels (n,) are 0 (no OA) or 1 (OA); scores (n,) are higher for OA. DeLong takes knees as independent: with both
knees of a subject in the data use the bootstrap, which resamples subjects.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy import ndarray
from numpy.random import Generator
from scipy import optimize, special, stats

from ..cohort import InputFault

Z95 = stats.norm.ppf(0.975)  # two-sided 95 % normal quantile, 1.96


def checked_labels(labels: Sequence, *scores: Sequence) -> list[ndarray]:
    """Labels (n,) as booleans and scores (n,) as floats; InputFault for labels not 0/1, NaN, lengths, one class."""
    labels, scores = np.asarray(labels), [np.asarray(s, dtype=float) for s in scores]
    if not all(label in (0, 1) for label in labels.tolist()):
        raise InputFault("labels", "are missing or not 0 or 1", "give 0 or 1 for each knee, leave unknown ones out")
    if any(s.shape != labels.shape or not np.isfinite(s).all() for s in scores):
        raise InputFault("scores", "hold NaN or differ in length from labels", "give one number a knee")
    counts = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    if min(counts) < 2:
        raise InputFault("labels", f"hold {counts[0]} OA and {counts[1]} other knees", "give at least 2 of each")
    return [labels.astype(bool), *scores]


def auc_delong(labels: Sequence, scores: Sequence) -> dict[str, float | str]:
    """AUC with the 95 % interval of DeLong 1988, by midranks (Sun & Xu 2014), cut at 0 and 1.

    Returns auc, se, ci_low, ci_high and flag. Where the variance is zero (AUC 0 or 1, constant scores) flag says
    so and the interval is the score interval of Newcombe 2006 (method 5), which stays open.
    """
    above, below = _placements(*checked_labels(labels, scores))
    auc, se = float(above.mean()), float(np.sqrt(_variance(above, below)))
    if se < 1e-12:
        low, high = _newcombe_interval(auc, len(above), len(below))
        flag = f"AUC {auc:g} with zero DeLong variance: score interval given"
        return {"auc": auc, "se": se, "ci_low": low, "ci_high": high, "flag": flag}
    low, high = np.clip([auc - Z95 * se, auc + Z95 * se], 0, 1)
    return {"auc": auc, "se": se, "ci_low": float(low), "ci_high": float(high), "flag": ""}


def _placements(labels: ndarray, scores: ndarray) -> tuple[ndarray, ndarray]:
    """For each OA knee the share of others scored below it, for each other the share of OA above (ties half)."""
    cases, controls = scores[labels], scores[~labels]
    ranks = stats.rankdata(np.concatenate([cases, controls]))
    above = (ranks[: len(cases)] - stats.rankdata(cases)) / len(controls)
    return above, 1 - (ranks[len(cases) :] - stats.rankdata(controls)) / len(cases)


def _variance(above: ndarray, below: ndarray) -> float:
    return np.var(above, ddof=1) / len(above) + np.var(below, ddof=1) / len(below)


def hanley_mcneil_se(auc: float, n_cases: float, n_controls: float) -> float:
    """Standard error of an AUC from its value alone, exponential model (Hanley & McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (n_cases - 1) * (q1 - auc**2) + (n_controls - 1) * (q2 - auc**2)
    return float(np.sqrt(max(spread, 0) / (n_cases * n_controls)))


def _newcombe_interval(auc: float, n_cases: int, n_controls: int) -> tuple[float, float]:
    mean, product = (n_cases + n_controls) / 2, n_cases * n_controls

    def excess(theta: float, side: int) -> float:
        return side * (auc - theta) - Z95 * hanley_mcneil_se(theta, mean, mean) * mean / np.sqrt(product)

    low = 0.0 if auc == 0 else optimize.brentq(excess, 1e-12, min(auc, 1 - 1e-12), args=(1,))
    high = 1.0 if auc == 1 else optimize.brentq(excess, max(auc, 1e-12), 1 - 1e-12, args=(-1,))
    return float(low), float(high)


def compare_delong(labels: Sequence, scores_a: Sequence, scores_b: Sequence) -> dict[str, float]:
    """Paired DeLong test of AUC a - AUC b on the same knees: z, p (two-sided), difference, se, ci_low, ci_high.

    Equal placements give z = 0, p = 1. A difference without variance (one curve perfect, one constant) gives
    z = inf and p = NaN: DeLong cannot judge it.
    """
    labels, a, b = checked_labels(labels, scores_a, scores_b)
    above, below = (pa - pb for pa, pb in zip(_placements(labels, a), _placements(labels, b), strict=True))
    difference, se = float(above.mean()), float(np.sqrt(_variance(above, below)))
    z, p = (0.0, 1.0) if abs(difference) < 1e-12 else (float(np.copysign(np.inf, difference)), float("nan"))
    if se > 1e-12:
        z, p = difference / se, float(2 * stats.norm.sf(abs(difference / se)))
    interval = {"ci_low": difference - Z95 * se, "ci_high": difference + Z95 * se}
    return {"z": z, "p": p, "difference": difference, "se": se, **interval}


def subgroup_auc(labels: Sequence, scores: Sequence, groups: Mapping[str, Sequence]) -> pd.DataFrame:
    """AUC within groups of knees, given as masks (n,) by name: DataFrame(group, n_oa, n_other, auc, ci_low, ci_high).

    The interval is DeLong's; a group with fewer than two knees of either class keeps NaN.
    """
    labels, scores = checked_labels(labels, scores)
    rows = []
    for group, mask in groups.items():
        mask = np.asarray(mask, dtype=bool)
        row = {"group": group, "n_oa": int(labels[mask].sum()), "n_other": int((~labels[mask]).sum())}
        enough = min(row["n_oa"], row["n_other"]) >= 2
        rows.append(row | (auc_delong(labels[mask], scores[mask]) if enough else {}))
    return pd.DataFrame(rows).reindex(columns=["group", "n_oa", "n_other", "auc", "ci_low", "ci_high"])


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """mean, ci_low, ci_high of independent values (n,): 95 % interval of Student's t; infinite for a single value."""
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise InputFault("values", "are empty or hold NaN", "give one number a unit")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.inf
    return {"mean": float(values.mean()), "ci_low": float(values.mean() - half), "ci_high": float(values.mean() + half)}


def bootstrap_auc(
    labels: Sequence, scores: Sequence, subjects: Sequence, rng: Generator, n_resamples: int = 2000
) -> dict[str, float]:
    """AUC with a 95 % percentile interval from resampling subjects (n,) with their knees, stratified by class."""
    fpr, tpr = _resampled_roc(*checked_labels(labels, scores), subjects, rng, n_resamples)
    values = np.trapezoid(tpr, fpr, axis=1)
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"auc": float(values[0]), "ci_low": float(low), "ci_high": float(high)}


def roc_band(
    labels: Sequence, scores: Sequence, subjects: Sequence, rng: Generator, n_resamples: int = 1000
) -> pd.DataFrame:
    """ROC curve with its pointwise 95 % band (bootstrap as `bootstrap_auc`): DataFrame(fpr, tpr, low, high)."""
    fpr, tpr = _resampled_roc(*checked_labels(labels, scores), subjects, rng, n_resamples)
    grid = np.linspace(0, 1, 101)
    curves = np.array([np.interp(grid, x, y) for x, y in zip(fpr, tpr, strict=True)])
    low, high = np.percentile(curves[1:], [2.5, 97.5], axis=0)
    return pd.DataFrame({"fpr": grid, "tpr": curves[0], "low": low, "high": high})


def _resampled_roc(
    labels: ndarray, scores: ndarray, subjects: Sequence, rng: Generator, n_resamples: int
) -> tuple[ndarray, ndarray]:
    """fpr and tpr at every step of the ROC curve, (1 + resamples, steps); the first row is the data as they are."""
    order = np.argsort(-scores, kind="stable")
    weights = _stratified_weights(labels, subjects, rng, n_resamples)[:, order]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # ties are one oblique step
    counts = [np.cumsum(weights * group[order], axis=1)[:, ends] for group in (~labels, labels)]
    return tuple(np.pad(count / count[:, -1:], ((0, 0), (1, 0))) for count in counts)


def _stratified_weights(labels: ndarray, subjects: Sequence, rng: Generator, n_resamples: int) -> ndarray:
    """How often each knee is drawn, (1 + n_resamples, n)."""
    codes, names = pd.factorize(np.asarray(subjects))
    has_oa = np.bincount(codes, weights=labels) > 0
    weights = np.ones((1 + n_resamples, len(names)))
    for stratum in (np.flatnonzero(has_oa), np.flatnonzero(~has_oa)):
        share = np.full(len(stratum), 1 / max(len(stratum), 1))
        weights[1:, stratum] = rng.multinomial(len(stratum), share, n_resamples)
    return weights[:, codes]


def holm(p_values: Sequence[float]) -> ndarray:
    """Holm 1979 adjusted p values in the order given: the running maximum of (k - rank) p, at most 1."""
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputFault("p_values", "hold NaN or numbers outside 0 to 1", "leave out comparisons without p")
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted[np.argsort(order, kind="stable")]


def sensitivity_at_specificity(labels: Sequence, scores: Sequence, specificity: float = 0.90) -> dict[str, float]:
    """Sensitivity at the lowest threshold (positive: score > threshold) that keeps at least this specificity.

    Returns sensitivity, ci_low, ci_high (Wilson 95 %, threshold taken as given), threshold, specificity reached.
    """
    labels, scores = checked_labels(labels, scores)
    controls = np.sort(scores[~labels])
    threshold = controls[max(int(np.ceil(round(specificity * len(controls), 9))), 1) - 1]
    low, high = _wilson(np.sum(scores[labels] > threshold), labels.sum())
    reached = {"threshold": float(threshold), "specificity": float(np.mean(controls <= threshold))}
    return {"sensitivity": float(np.mean(scores[labels] > threshold)), "ci_low": low, "ci_high": high, **reached}


def _wilson(successes: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def calibration(labels: Sequence, probabilities: Sequence) -> dict[str, float]:
    """Brier score, calibration slope (ideal 1) and calibration in the large (ideal 0), with 95 % Wald intervals.

    slope: logit P(OA) = a + slope logit(p); intercept: the same with slope fixed at 1 (Cox 1958; Van Calster
    2019). p is kept within 1e-6 (our choice). NaN where the fit does not exist (perfect separation).
    """
    labels, p = checked_labels(labels, probabilities)
    if p.min() < 0 or p.max() > 1:
        raise InputFault("probabilities", "lie outside 0 to 1", "give probabilities, not scores")
    logit, ones = special.logit(np.clip(p, 1e-6, 1 - 1e-6)), np.ones((len(p), 1))
    slope, slope_se = _logistic_fit(np.column_stack([ones, logit]), labels, np.zeros(len(p)))
    intercept, intercept_se = _logistic_fit(ones, labels, logit)
    result = {"brier": float(np.mean((p - labels) ** 2)), "slope": slope, "intercept": intercept}
    for name, value, se in (("slope", slope, slope_se), ("intercept", intercept, intercept_se)):
        result |= {f"{name}_ci_low": value - Z95 * se, f"{name}_ci_high": value + Z95 * se}
    return result


def _logistic_fit(design: ndarray, labels: ndarray, offset: ndarray) -> tuple[float, float]:
    """Last coefficient and standard error of an unpenalised logistic regression (Newton's method)."""
    beta = np.zeros(design.shape[1])
    for _ in range(50):
        fitted = special.expit(design @ beta + offset)
        information = design.T @ (design * (fitted * (1 - fitted))[:, None])
        if np.linalg.cond(information) > 1e12:
            return float("nan"), float("nan")
        step = np.linalg.solve(information, design.T @ (labels - fitted))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            return float(beta[-1]), float(np.sqrt(np.linalg.inv(information)[-1, -1]))
    return float("nan"), float("nan")


def calibration_curve(labels: Sequence, probabilities: Sequence, n_bins: int = 5) -> pd.DataFrame:
    """Observed against predicted share of OA in equal-sized groups: DataFrame(predicted, observed, ci_*, n)."""
    labels, p = checked_labels(labels, probabilities)
    rows = []
    for group in np.array_split(np.argsort(p, kind="stable"), n_bins):
        low, high = _wilson(labels[group].sum(), len(group))
        row = {"predicted": p[group].mean(), "observed": labels[group].mean()}
        rows.append({**row, "ci_low": low, "ci_high": high, "n": len(group)})
    return pd.DataFrame(rows)


def net_benefit(labels: Sequence, probabilities: Sequence, thresholds: Sequence[float]) -> pd.DataFrame:
    """Decision curve TP/n - FP/n * t/(1-t) at thresholds t (Vickers & Elkin 2006): model and treat_all (none: 0)."""
    labels, p = checked_labels(labels, probabilities)
    t, odds = np.asarray(thresholds)[:, None], np.asarray(thresholds) / (1 - np.asarray(thresholds))
    model = ((p >= t) & labels).mean(axis=1) - ((p >= t) & ~labels).mean(axis=1) * odds
    return pd.DataFrame({"threshold": t[:, 0], "model": model, "treat_all": labels.mean() - (~labels).mean() * odds})


def detectable_auc_difference(
    n_cases: int, n_controls: int, auc: float, correlation: float = 0.5, power: float = 0.80, alpha: float = 0.05
) -> float:
    """Smallest loss of AUC from `auc` that a paired comparison of this size finds; NaN if not even chance is found.

    Normal approximation with Hanley & McNeil 1982 standard errors, correlated as in Hanley & McNeil 1983;
    correlation 0.5, power 80 % and two-sided alpha 5 % are our choice.
    """

    def excess(loss: float) -> float:
        a, b = (hanley_mcneil_se(value, n_cases, n_controls) for value in (auc, auc - loss))
        return loss - z * np.sqrt(a**2 + b**2 - 2 * correlation * a * b)

    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(optimize.brentq(excess, 0, auc - 0.5)) if excess(auc - 0.5) > 0 else float("nan")
