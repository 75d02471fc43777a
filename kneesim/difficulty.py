"""How hard a simulated cohort is, compared with published difficulty, without our method."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import r2_score

from ctsma.common import BIOMARKERS
from ctsma.diagnosis import auc_delong, compartment_means, cross_validate_tabular
from ctsma.patches import Patches
from ctsma.ridge import apply_ridge, ct_features, fit_ridge

DIRECT_CT = (0.19, 0.65, "direct CT, R2 (Bone 2009, PMID 19442610)")
RESCAN_CV = (1.0, 6.0, "MR scan and rescan, CV (Bolbos 2008, Zuo 2008)")
RESCAN_ICC = (0.80, 1.00, "MR scan and rescan, ICC (tibia 3T, n = 8)")
# Published range and source of each quantity. Ratios of thresholded CT lie far from 1 on either
# side, so that there is no range for them.
TARGETS = {
    **{f"hu_r2.{biomarker}": DIRECT_CT for biomarker in BIOMARKERS},
    **{f"mr_rescan_cv_pct.{biomarker}": RESCAN_CV for biomarker in BIOMARKERS},
    **{f"mr_rescan_icc.{biomarker}": RESCAN_ICC for biomarker in BIOMARKERS},
    "auc_mr_reference": (
        0.843,
        0.903,
        "MR biomarkers by SVM, 0.873 +- 0.03 (J Orthop Surg Res 2022, 88 knees)",
    ),
    "auc_mean_hu": (0.63, 0.73, "HU of the medial tibia, 0.682 (Kang 2025, 753 knees)"),
    "mean.bv_tv": (0.18, 0.44, "micro-CT of the plateau (Rapagna 2021)"),
    "mean.tb_th_mm": (0.111, 0.40, "HR-pQCT at TKA to micro-CT cylinders"),
    "mean.tb_n_per_mm": (1.009, 2.37, "HR-pQCT at TKA, n = 50"),
    "correlation.tb_th_mm": (0.80, 0.90, "BV/TV with Tb.Th, micro-CT cubes"),
    "correlation.tb_sp_mm": (-0.91, -0.62, "BV/TV with Tb.Sp, micro-CT cubes"),
}


def difficulty(
    patches: Patches, labels: pd.Series, splits: pd.DataFrame, seed: int, n_resamples: int = 500
) -> pd.DataFrame:
    """Difficulty of a simulated cohort with 95 % intervals, bootstrap over knees (AUC: DeLong).

    Parameters
    ----------
    patches : usable patches, cut at ground-truth positions. Their table has true_<biomarker> (NaN
        where not measured) and may have rescan_<biomarker> (NaN where a knee has no second MR).
    labels : OA 0 or 1 by knee_id. splits : subject_id, fold.

    Returns
    -------
    DataFrame by quantity: value, ci_low, ci_high, low, high (published range) and source.
    hu_r2: ridge on CT statistics against ground truth, out of fold. ct_threshold_bv_tv_ratio:
    median BV/TV of the thresholded CT over the true one.

    Raises
    ------
    InputError : subjects without fold, or labels of one class; see `cross_validate_tabular`.
    """
    table = patches.table
    is_known = table["true_bv_tv"].notna().to_numpy()
    truth = table[is_known].reset_index(drop=True)
    estimates = _ridge_estimates(patches, is_known, splits)
    rows = {}
    for biomarker in BIOMARKERS:
        pair = truth.assign(estimate=estimates[biomarker])
        columns = f"true_{biomarker}", "estimate"
        rows[f"hu_r2.{biomarker}"] = bootstrap(pair, columns, r2_score, n_resamples)
    columns = "threshold_bv_tv", "true_bv_tv"
    rows["ct_threshold_bv_tv_ratio"] = bootstrap(truth, columns, median_ratio, n_resamples)
    for biomarker in BIOMARKERS:
        columns = (f"true_{biomarker}",)
        rows[f"mean.{biomarker}"] = bootstrap(truth, columns, np.mean, n_resamples)
    for biomarker in BIOMARKERS[1:]:
        columns = "true_bv_tv", f"true_{biomarker}"
        rows[f"correlation.{biomarker}"] = bootstrap(truth, columns, correlation, n_resamples)
    if "rescan_bv_tv" in table:
        twice = table.dropna(subset=["rescan_bv_tv"])
        for name, statistic in (("mr_rescan_cv_pct", cv_pct), ("mr_rescan_icc", icc_a1)):
            for biomarker in BIOMARKERS:
                columns = biomarker, f"rescan_{biomarker}"
                rows[f"{name}.{biomarker}"] = bootstrap(twice, columns, statistic, n_resamples)
    rows |= _auc(table, labels, splits, seed)
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "ci_low", "ci_high"])
    published = [TARGETS.get(name, (np.nan, np.nan, "")) for name in found.index]
    found["low"], found["high"], found["source"] = zip(*published, strict=True)
    return found


def group_values(found: pd.DataFrame, group: str) -> dict[str, float]:
    """Values of the quantities `<group>.<biomarker>` by biomarker; empty where there are none."""
    values = {}
    for biomarker in BIOMARKERS:
        if f"{group}.{biomarker}" in found.index:
            values[biomarker] = float(found.loc[f"{group}.{biomarker}", "value"])
    return values


def bootstrap(
    table: pd.DataFrame, columns: Sequence[str], statistic: Callable, n_resamples: int
) -> tuple[float, float, float]:
    """Statistic of some columns, and its 95 % percentile interval over resampled knees."""
    arrays = [table[column].to_numpy() for column in columns]
    knees = list(table.groupby("knee_id").indices.values())
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(n_resamples):
        drawn = rng.integers(len(knees), size=len(knees))
        rows = np.concatenate([knees[k] for k in drawn])
        draws.append(statistic(*(array[rows] for array in arrays)))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(statistic(*arrays)), float(low), float(high)


def median_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Median of a / b."""
    return float(np.median(a / b))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation."""
    return float(np.corrcoef(a, b)[0, 1])


def cv_pct(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square SD of two measurements of the same patch over their mean, in %."""
    return float(100 * np.sqrt(((a - b) ** 2).mean() / 2) / (0.5 * (a + b).mean()))


def icc_a1(a: np.ndarray, b: np.ndarray) -> float:
    """ICC(A,1) as `ctsma.agreement.icc`, from the mean squares (McGraw and Wong 1996).

    Without the interval it is fast enough for a bootstrap.
    """
    both = np.stack([a, b])
    n = both.shape[1]
    targets, raters = both.mean(axis=0), both.mean(axis=1)
    ms_targets = 2 * targets.var(ddof=1)
    ms_raters = n * raters.var(ddof=1)
    residual = both - targets - raters[:, None] + both.mean()
    ms_error = (residual**2).sum() / (n - 1)
    total = ms_targets + ms_error + 2 * (ms_raters - ms_error) / n
    return float((ms_targets - ms_error) / total)


def ridge_estimates(
    features: np.ndarray,
    targets: np.ndarray,
    subjects: np.ndarray,
    unseen: np.ndarray,
    knees: np.ndarray | None = None,
) -> np.ndarray:
    """Estimates (m, 4) of `fit_ridge` for unseen (m, k), kept within the range of the targets."""
    weights = fit_ridge(features, targets, subjects, knees).weights
    return apply_ridge(weights, unseen, targets.min(0), targets.max(0))


def _ridge_estimates(patches: Patches, is_known: np.ndarray, splits: pd.DataFrame) -> pd.DataFrame:
    """Out-of-fold ridge estimates from CT statistics, for the patches with ground truth."""
    table = patches.table[is_known]
    features = ct_features(patches.ct[is_known].astype(np.float32), patches.voi[is_known])
    targets = table[[f"true_{biomarker}" for biomarker in BIOMARKERS]].to_numpy(float)
    subjects = table["subject_id"].to_numpy(str)
    folds = splits.set_index("subject_id")["fold"].loc[subjects].to_numpy()
    estimates = np.empty_like(targets)
    for fold in np.unique(folds):
        test = folds == fold
        estimates[test] = ridge_estimates(
            features[~test], targets[~test], subjects[~test], features[test]
        )
    return pd.DataFrame(estimates, columns=list(BIOMARKERS))


def _auc(table: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, seed: int) -> dict:
    """AUC for OA of an SVM on compartment means: MR biomarkers, and mean HU."""
    table = table[table["knee_id"].isin(labels.index)]
    medial_tibia = table[table["compartment"] == "tibia_medial"]
    inputs = {
        "auc_mr_reference": compartment_means(table, list(BIOMARKERS)),
        "auc_mean_hu": compartment_means(
            medial_tibia, ["mean_hu"]
        ),  # one number per knee, as published
        "auc_mean_hu_of_compartments": compartment_means(table, ["mean_hu"]),
    }
    rows = {}
    for name, features in inputs.items():
        known = labels[features.index]
        scores = cross_validate_tabular(features, known, splits, model="svm", seed=seed)
        auc = auc_delong(labels[scores["knee_id"]], scores["score"])
        rows[name] = auc["auc"], auc["ci_low"], auc["ci_high"]
    return rows
