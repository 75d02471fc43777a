"""What a careful engineer does without a network: ridge regression on CT intensity and texture statistics."""

import numpy as np
from scipy.ndimage import uniform_filter
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

LAGS = {1: (1, 2), 2: (1, 2, 3, 4), 3: (1, 2, 3, 4)}  # voxels along slices, rows, columns: to 1.75 mm (our choice)
BOXES = (2, 3, 5)  # in-plane voxels of the band-pass filters (our choice)
N_RULER = 3  # last columns of `ridge_features`, which need the ruler
LAYERS = 4  # of depth below the joint surface (our choice)
ALPHAS = np.logspace(-1, 4, 11)  # ridge strengths tried (our choice)


def ct_features(ct: np.ndarray, voi: np.ndarray) -> np.ndarray:
    """Statistics of the trabecular region of CT patches (n, 12, 24, 24) HU; voi (n, 12, 48, 48) bool: (n, 45).

    Mean, SD, shape, percentiles, share covered; autocorrelation and mean absolute difference along each axis and lag;
    energy in bands of in-plane frequency; level and SD by depth.
    """
    hu, weight = ct.astype(np.float64), on_ct_grid(voi) >= 0.5
    weight[~weight.any((1, 2, 3))] = True  # nothing selected: the whole patch rather than NaN
    mean = _mean(hu, weight)
    centred = hu - mean[:, None, None, None]
    sd = np.sqrt(_mean(centred**2, weight)) + 1e-6
    shape = [_mean(centred**p, weight) / sd**p for p in (3, 4)]
    percentiles = np.array([np.percentile(h[w], (2, 10, 25, 50, 75, 90, 98)) for h, w in zip(hu, weight, strict=True)])
    columns = [mean, sd, np.log(sd), sd / (np.abs(mean) + 100), *shape, *percentiles.T, weight.mean((1, 2, 3))]
    return np.column_stack(columns + _texture(centred, weight, sd) + _bands(hu, weight) + _layers(centred, weight))


def on_ct_grid(fine: np.ndarray) -> np.ndarray:
    """Mean of an MR patch or mask (n, 12, 48, 48) over each CT voxel: (n, 12, 24, 24) float32."""
    return fine.reshape(len(fine), 12, 24, 2, 24, 2).mean((3, 5), dtype=np.float32)


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (values * weight).sum((1, 2, 3)) / np.maximum(weight.sum((1, 2, 3)), 1)


def _texture(centred: np.ndarray, weight: np.ndarray, sd: np.ndarray) -> list[np.ndarray]:
    columns = []
    for axis, lag in ((axis, lag) for axis, lags in LAGS.items() for lag in lags):
        (a, inside_a), (b, inside_b) = (
            [np.take(array, range(start, array.shape[axis] - lag + start), axis) for array in (centred, weight)]
            for start in (0, lag)
        )
        both = inside_a & inside_b
        columns += [_mean(a * b, both) / sd**2, _mean(np.abs(a - b), both)]
    return columns


def _bands(hu: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    smooth = [hu] + [uniform_filter(hu, (0, 1, size, size), mode="nearest") for size in BOXES]
    return [np.log(_mean((a - b) ** 2, weight) + 1e-6) / 2 for a, b in zip(smooth[:-1], smooth[1:], strict=True)]


def _layers(centred: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    layers = zip(np.array_split(centred, LAYERS, 2), np.array_split(weight, LAYERS, 2), strict=True)
    levels = [(_mean(layer, inside), _mean(layer**2, inside)) for layer, inside in layers]
    return [column for level, square in levels for column in (level, np.sqrt(np.maximum(square - level**2, 0)))]


def ridge_features(ct: np.ndarray, voi: np.ndarray, ruler_hu: np.ndarray) -> np.ndarray:
    """`ct_features`, then the knee's ruler (n,) HU, one over it, and the mean HU over it: (n, 45 + N_RULER)."""
    features = ct_features(ct, voi)
    return np.column_stack([features, ruler_hu, 1000 / ruler_hu, features[:, 0] / ruler_hu])


def fit_ridge(features: np.ndarray, targets: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Ridge per target, its strength by cross-validation over subjects: (k + 1, m) weights, the intercepts first.

    features (n, k), targets (n, m), subjects (n,) of the training fold.
    """
    groups = GroupKFold(min(5, len(np.unique(subjects))))
    pipeline, grid = make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": ALPHAS}
    search = GridSearchCV(pipeline, grid, cv=groups, scoring="neg_mean_squared_error")
    scaler, columns = StandardScaler().fit(features), []
    for target in targets.T:
        ridge = search.fit(features, target, groups=subjects).best_estimator_["ridge"]
        weights = ridge.coef_ / scaler.scale_
        columns.append([ridge.intercept_ - weights @ scaler.mean_, *weights])
    return np.transpose(columns)


def read_ridge(weights: np.ndarray, features: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Estimates (n, m) of the ridge with weights (k + 1, m) from features (n, k), kept within low and high (m,)."""
    return (weights[0] + features @ weights[1:]).clip(low, high)


def hu_regression(features: np.ndarray, targets: np.ndarray, subjects: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Estimates (m, 4) of `fit_ridge` for unseen (m, k), kept within the range of the targets as the networks' are."""
    return read_ridge(fit_ridge(features, targets, subjects), unseen, targets.min(0), targets.max(0))
