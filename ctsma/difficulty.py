"""How hard a simulated cohort is, held against published difficulty; nothing of our own method enters."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn.metrics import r2_score

from .agreement import icc
from .cohort import BIOMARKERS
from .diagnosis import auc_delong, compartment_means, cross_validate_tabular
from .distillation import cross_validate
from .patches import Patches

# What is published, and where. Ratios of thresholded CT lie far from 1 on either side: no range to lie within.
TARGETS = {f"hu_r2.{name}": (0.19, 0.65, "direct CT, R2 (Bone 2009, PMID 19442610)") for name in BIOMARKERS}
TARGETS |= {f"mr_rescan_cv_pct.{b}": (1.0, 6.0, "MR scan and rescan, CV (Bolbos 2008, Zuo 2008)") for b in BIOMARKERS}
TARGETS |= {f"mr_rescan_icc.{name}": (0.80, 1.00, "MR scan and rescan, ICC (tibia 3T, n = 8)") for name in BIOMARKERS}
TARGETS |= {
    "auc_mr_reference": (0.843, 0.903, "MR biomarkers by SVM, 0.873 +- 0.03 (J Orthop Surg Res 2022, 88 knees)"),
    "auc_mean_hu": (0.63, 0.73, "HU of the medial tibia, 0.682 (Kang 2025, 753 knees)"),
    "mean.bv_tv": (0.18, 0.44, "micro-CT of the plateau (Rapagna 2021)"),
    "mean.tb_th_mm": (0.111, 0.40, "HR-pQCT at TKA to micro-CT cylinders"),
    "mean.tb_n_per_mm": (1.009, 2.37, "HR-pQCT at TKA, n = 50"),
    "correlation.tb_th_mm": (0.80, 0.90, "BV/TV with Tb.Th, micro-CT cubes"),
    "correlation.tb_sp_mm": (-0.91, -0.62, "BV/TV with Tb.Sp, micro-CT cubes"),
}


def difficulty(
    known: Patches,
    measured: pd.DataFrame,
    labels: pd.Series,
    splits: pd.DataFrame,
    folder: str | Path,
    seed: int,
    n_jobs: int = 1,
    n_resamples: int = 500,
) -> pd.DataFrame:
    """Difficulty figures of a simulated cohort with 95 % intervals, bootstrap over knees (AUC: DeLong).

    Parameters
    ----------
    known : patches cut with the true transforms, with true_<biomarker> (`patches.with_truth`).
    measured : table of all patches; with rescan_<biomarker> columns for the rows about repeatability.
    labels : OA 0 or 1 by knee_id. splits : subject_id, fold. folder : of the ridge's models.

    Returns
    -------
    DataFrame by quantity: value, ci_low, ci_high, low, high (published range) and source. hu_r2: ridge on CT
    statistics against truth, out of fold; ct_threshold_bv_tv_ratio: median BV/TV above 250 HU over truth.
    Raises what `cross_validate` and `cross_validate_tabular` raise.
    """
    rows = _of_ct(known, splits, folder, seed, n_jobs, n_resamples) | _of_truth(known.table, n_resamples)
    if "rescan_bv_tv" in measured:
        rows |= _of_rescan(measured.dropna(subset=["rescan_bv_tv"]), n_resamples)
    rows |= _of_labels(measured, labels, splits, seed)
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "ci_low", "ci_high"])
    published = [TARGETS.get(name, (np.nan, np.nan, "")) for name in found.index]
    return found.assign(**dict(zip(("low", "high", "source"), zip(*published, strict=True), strict=True)))


def nested(found: pd.DataFrame, group: str) -> dict[str, float]:
    """Values of a group of quantities (`group.<biomarker>`) by biomarker; empty where there are none."""
    rows = found[found.index.astype(str).str.startswith(f"{group}.")]
    return {name.split(".")[1]: float(value) for name, value in rows.get("value", pd.Series(dtype=float)).items()}


def _of_ct(known: Patches, splits, folder, seed, n_jobs, n_resamples) -> dict:
    target = replace(known, table=known.table.assign(**{b: known.table[f"true_{b}"] for b in BIOMARKERS}))
    fitted = cross_validate(target, splits, ["hu_regression"], {}, [seed], folder, n_jobs)
    pair = fitted.merge(target.table, on=["knee_id", "patch_id"], suffixes=("", "_true"))
    rows = {f"hu_r2.{b}": _interval(pair, (f"true_{b}", b), r2_score, n_resamples) for b in BIOMARKERS}
    ratio = ("threshold_bv_tv", "true_bv_tv")
    return rows | {"ct_threshold_bv_tv_ratio": _interval(known.table, ratio, _median_ratio, n_resamples)}


def _of_truth(table: pd.DataFrame, n_resamples: int) -> dict:
    first = "true_bv_tv"
    rows = {f"mean.{b}": _interval(table, (f"true_{b}",), np.mean, n_resamples) for b in BIOMARKERS}
    pairs = {f"correlation.{b}": (first, f"true_{b}") for b in BIOMARKERS[1:]}
    return rows | {name: _interval(table, pair, _correlation, n_resamples) for name, pair in pairs.items()}


def _of_rescan(table: pd.DataFrame, n_resamples: int) -> dict:
    measures = {"mr_rescan_cv_pct": _cv_pct, "mr_rescan_icc": lambda a, b: icc(a, b)["icc"]}
    return {
        f"{name}.{b}": _interval(table, (b, f"rescan_{b}"), measure, n_resamples)
        for name, measure in measures.items()
        for b in BIOMARKERS
    }


def _of_labels(table: pd.DataFrame, labels: pd.Series, splits: pd.DataFrame, seed: int) -> dict:
    rows, table = {}, table[table["knee_id"].isin(labels.index)]
    medial_tibia = table[table["compartment"] == "tibia_medial"]
    inputs_of = {
        "mr_reference": compartment_means(table, list(BIOMARKERS)),
        "mean_hu": compartment_means(medial_tibia, ["mean_hu"]),  # one number a knee, as published
        "mean_hu_of_compartments": compartment_means(table, ["mean_hu"]),
    }
    for name, inputs in inputs_of.items():
        scores = cross_validate_tabular(inputs, labels[inputs.index], splits, "svm", seed)
        found = auc_delong(labels[scores["knee_id"]], scores["score"])
        rows[f"auc_{name}"] = found["auc"], found["ci_low"], found["ci_high"]
    return rows


def _interval(table: pd.DataFrame, columns: Sequence[str], statistic: Callable, n_resamples: int) -> tuple:
    """Value of a statistic of columns, and its 95 % percentile interval over knees drawn with replacement."""
    arrays = [table[column].to_numpy() for column in columns]
    groups, rng = list(table.groupby("knee_id").indices.values()), np.random.default_rng(0)
    draws = []
    for _ in range(n_resamples):
        rows = np.concatenate([groups[k] for k in rng.integers(len(groups), size=len(groups))])
        draws.append(statistic(*(a[rows] for a in arrays)))
    return float(statistic(*arrays)), *(float(q) for q in np.quantile(draws, (0.025, 0.975)))


def _median_ratio(a: ndarray, b: ndarray) -> float:
    return float(np.median(a / b))


def _correlation(a: ndarray, b: ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _cv_pct(a: ndarray, b: ndarray) -> float:
    """Root mean square within-knee SD of two measurements over their mean, in %."""
    return float(100 * np.sqrt(((a - b) ** 2).mean() / 2) / (0.5 * (a + b).mean()))
