"""Ridge on features of CT patches, with what patches of a knee have in common in its errors.

It needs no torch, so that a notebook without networks does not load it.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import uniform_filter
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from ctsma.patches import to_ct_grid

LAGS = {1: (1, 2), 2: (1, 2, 3, 4), 3: (1, 2, 3, 4)}  # voxels by axis, to 1.75 mm; design choice
BOXES = (2, 3, 5)  # in-plane voxels of the band-pass filters; design choice
LAYERS = 4  # of depth below the joint surface; design choice
ALPHAS = np.logspace(-1, 4, 11)  # ridge strengths tried; design choice
# Correlations of the errors of a knee's patches that a ridge tries; design choice
RHOS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
N_CALIBRATED = 3  # last columns of `ridge_features`, which need cortical HU


def ct_features(ct: np.ndarray, voi: np.ndarray) -> np.ndarray:
    """Statistics (n, 45) of the trabecular region of CT patches.

    ct (n, 12, 24, 24) HU, voi (n, 12, 48, 48) bool. Mean, SD, shape, percentiles, share covered;
    autocorrelation and mean absolute difference along each axis and lag; energy in bands of
    in-plane frequency; level and SD by depth.
    """
    hu, region = ct.astype(np.float64), to_ct_grid(voi) >= 0.5
    region[~region.any((1, 2, 3))] = True  # an empty region: the whole patch rather than NaN
    mean = _region_mean(hu, region)
    centred = hu - mean[:, None, None, None]
    sd = np.sqrt(_region_mean(centred**2, region)) + 1e-6
    skewness, kurtosis = (_region_mean(centred**p, region) / sd**p for p in (3, 4))
    columns = [mean, sd, np.log(sd), sd / (np.abs(mean) + 100), skewness, kurtosis]
    levels = (2, 10, 25, 50, 75, 90, 98)
    percentiles = [np.percentile(h[r], levels) for h, r in zip(hu, region, strict=True)]
    columns += list(np.transpose(percentiles))
    columns.append(region.mean((1, 2, 3)))
    for axis, lags in LAGS.items():
        n = hu.shape[axis]
        for lag in lags:
            head, tail = np.arange(n - lag), np.arange(lag, n)
            a, b = np.take(centred, head, axis), np.take(centred, tail, axis)
            both = np.take(region, head, axis) & np.take(region, tail, axis)
            columns += [_region_mean(a * b, both) / sd**2, _region_mean(np.abs(a - b), both)]
    sharper = hu
    for size in BOXES:
        smoother = uniform_filter(hu, (0, 1, size, size), mode="nearest")
        columns.append(np.log(_region_mean((sharper - smoother) ** 2, region) + 1e-6) / 2)
        sharper = smoother
    depths = zip(np.array_split(centred, LAYERS, 2), np.array_split(region, LAYERS, 2), strict=True)
    for layer, inside in depths:
        level, square = _region_mean(layer, inside), _region_mean(layer**2, inside)
        columns += [level, np.sqrt(np.maximum(square - level**2, 0))]
    return np.column_stack(columns)


def _region_mean(values: np.ndarray, region: np.ndarray) -> np.ndarray:
    return (values * region).sum((1, 2, 3)) / np.maximum(region.sum((1, 2, 3)), 1)


def ridge_features(ct: np.ndarray, voi: np.ndarray, cortical_hu: np.ndarray) -> np.ndarray:
    """`ct_features` and, last, `N_CALIBRATED` columns from the knee's cortical HU (n,): (n, 48).

    These are cortical HU, its reciprocal, and the patch's mean HU over it.
    """
    features = ct_features(ct, voi)
    calibrated = [cortical_hu, 1000 / cortical_hu, features[:, 0] / cortical_hu]
    return np.column_stack([features, *calibrated])


class RidgeFit(NamedTuple):
    """A ridge of m targets, and what its cross-validation found of errors within a knee."""

    weights: np.ndarray  # (k + 1, m), the intercepts first
    rho: np.ndarray  # (m,) correlation of the errors of a knee's patches that predicted best
    error_correlation: np.ndarray  # (m,) of the cross-validated errors, see `correlation_within`


def fit_ridge(
    features: np.ndarray, targets: np.ndarray, subjects: np.ndarray, knees: np.ndarray | None = None
) -> RidgeFit:
    """Ridge by generalised least squares per target, its strength and rho by cross-validation.

    Parameters
    ----------
    features, targets, subjects : (n, k), (n, m), (n,) of the training fold; the cross-validation
        divides subjects.
    knees : (n,) knee of each patch. Without it, or where no knee has two patches, rho is 0
        (ordinary least squares).
    """
    repeated = knees is not None and len(np.unique(knees)) < len(knees)
    knees, rhos = (knees, RHOS) if repeated else (np.arange(len(features)), RHOS[:1])
    n_targets, folds = targets.shape[1], GroupKFold(min(5, len(np.unique(subjects))))
    tiled, alphas = np.tile(targets, len(ALPHAS)), np.repeat(ALPHAS, n_targets)  # all at once
    errors, squared = np.zeros((len(rhos), *tiled.shape)), np.zeros((len(rhos), tiled.shape[1]))
    for fit, held_out in folds.split(features, groups=subjects):
        for i, rho in enumerate(rhos):
            weights = _gls_ridge(features[fit], tiled[fit], knees[fit], rho, alphas)
            errors[i, held_out] = _linear(weights, features[held_out]) - tiled[held_out]
            squared[i] += (errors[i, held_out] ** 2).mean(axis=0)
    best = squared.reshape(-1, n_targets).argmin(axis=0)
    weights, chosen, remaining = [], [], []
    for target, candidate in enumerate(best):
        i, j = divmod(candidate, len(ALPHAS))
        column = targets[:, [target]]
        weights.append(_gls_ridge(features, column, knees, rhos[i], ALPHAS[[j]])[:, 0])
        chosen.append(rhos[i])
        remaining.append(errors[i, :, j * n_targets + target])
    correlation = correlation_within(np.transpose(remaining), knees)
    return RidgeFit(np.transpose(weights), np.array(chosen), correlation)


def correlation_within(errors: np.ndarray, knees: np.ndarray) -> np.ndarray:
    """Intraclass correlation of errors (n, m) of one knee: (m,), 0 where no knee has two patches.

    The share of the variance that patches of a knee have in common, by analysis of variance of a
    random intercept per knee (Searle 1992, 3.6), not below 0.
    """
    counts, means = _knee_means(errors, knees)
    n, n_knees = len(errors), (1 / counts).sum()
    if n - n_knees < 0.5:
        return np.zeros(errors.shape[1])
    within = ((errors - means) ** 2).sum(axis=0) / (n - n_knees)
    between = ((means - errors.mean(axis=0)) ** 2).sum(axis=0) / (n_knees - 1)
    per_knee = (n - counts.mean()) / (n_knees - 1)  # patches, corrected for unequal numbers
    share = (between - within) / (between + (per_knee - 1) * within)
    return share.clip(0)


def _knee_means(values: np.ndarray, knees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of patches of each row's knee (n,) and their mean (n, k)."""
    _, codes = np.unique(knees, return_inverse=True)
    counts, sums = np.bincount(codes), np.zeros((codes.max() + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return counts[codes], (sums / counts[:, None])[codes]


def _gls_ridge(
    features: np.ndarray, targets: np.ndarray, knees: np.ndarray, rho: float, alphas: np.ndarray
) -> np.ndarray:
    """Weights (k + 1, m) of a ridge on quasi-demeaned values; alphas (m,) are its strengths.

    Ordinary least squares on y - theta mean(y of the knee), the intercept treated alike, is
    generalised least squares with a random intercept per knee (Wooldridge 2010, 10.4). Divided by
    1 - theta and with its square as the weight of the row, the intercept is an ordinary one.
    """
    scaler, demeaned = StandardScaler().fit(features), []
    for values in (scaler.transform(features), targets):
        counts, means = _knee_means(values, knees)
        kept = 1 - quasi_demeaning(rho, counts)
        demeaned.append(means + (values - means) / kept[:, None])
    ridge = Ridge(alphas).fit(*demeaned, sample_weight=kept**2)
    weights = np.atleast_2d(ridge.coef_).T / scaler.scale_[:, None]
    return np.vstack([ridge.intercept_ - scaler.mean_ @ weights, weights])


def quasi_demeaning(rho: float | np.ndarray, counts: np.ndarray) -> np.ndarray:
    """theta, the share of a knee's mean error that is taken off, by number of its patches.

    rho is the correlation of the errors of a knee's patches. Tensors are taken too.
    """
    return 1 - ((1 - rho) / (1 - rho + counts * rho)) ** 0.5


def apply_ridge(
    weights: np.ndarray, features: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Estimates (n, m) by weights (k + 1, m) from features (n, k), kept within low, high (m,)."""
    return _linear(weights, features).clip(low, high)


def _linear(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    return weights[0] + features @ weights[1:]
