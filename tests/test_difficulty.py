"""Difficulty of a simulated cohort: closed forms of its parts, the whole on synthetic patches."""

import numpy as np
import pandas as pd
import pytest

from ctsma.agreement import icc
from ctsma.common import BIOMARKERS, COMPARTMENTS
from ctsma.patches import CT_SHAPE, MR_SHAPE, Patches
from kneesim.difficulty import TARGETS, bootstrap, cv_pct, difficulty, group_values, icc_a1


def test_cv_is_the_within_patch_sd_over_the_mean():
    # Pairs 9, 11: within-pair SD is sqrt(2), the mean 10.
    first, second = np.array([9.0, 11.0]), np.array([11.0, 9.0])
    assert cv_pct(first, second) == pytest.approx(100 * np.sqrt(2) / 10)
    assert cv_pct(np.full(5, 3.0), np.full(5, 3.0)) == 0


def test_icc_of_the_bootstrap_is_that_of_the_agreement_module():
    a = np.random.default_rng(2).normal(0, 1, 40)
    b = 0.8 * a + np.random.default_rng(3).normal(0.3, 0.4, 40)
    assert icc_a1(a, b) == pytest.approx(icc(a, b)["icc"], rel=1e-10)
    assert icc_a1(a, a) == pytest.approx(1)


def test_bootstrap_resamples_whole_knees():
    level = np.random.default_rng(1).normal(0, 1, 50)
    table = pd.DataFrame({"knee_id": np.repeat(np.arange(50), 20), "x": np.repeat(level, 20)})
    value, low, high = bootstrap(table, ("x",), np.mean, 2000)
    # 50 knees, not 1000 patches: standard error of the mean is SD / sqrt(50).
    assert value == pytest.approx(level.mean())
    assert high - low == pytest.approx(2 * 1.96 * level.std() / np.sqrt(50), rel=0.1)


def test_targets_are_ranges_with_a_source():
    assert all(low < high and source for low, high, source in TARGETS.values())


def test_values_are_grouped_by_biomarker():
    names = ["hu_r2.bv_tv", "hu_r2.tb_th_mm", "auc_mean_hu"]
    found = pd.DataFrame({"value": [0.5, 0.6, 0.7]}, index=names)
    assert group_values(found, "hu_r2") == {"bv_tv": 0.5, "tb_th_mm": 0.6}
    assert group_values(pd.DataFrame(), "hu_r2") == {}


@pytest.fixture(scope="module")
def cohort() -> tuple[Patches, pd.Series, pd.DataFrame]:
    """20 knees with a patch per compartment; mean HU of a patch gives its BV/TV, and no more."""
    rng = np.random.default_rng(0)
    rows = []
    for knee in range(20):
        for patch, compartment in enumerate(COMPARTMENTS):
            names = {"knee_id": f"k{knee}", "subject_id": f"s{knee}", "patch_id": patch}
            rows.append(names | {"compartment": compartment, "oa": knee % 2})
    table = pd.DataFrame(rows)
    for name in BIOMARKERS:
        table[f"true_{name}"] = rng.uniform(0.2, 0.4, len(table))
        table[name] = table[f"true_{name}"] + 0.2 * table["oa"]  # the MR tells who is ill
        table[f"rescan_{name}"] = table[name]
    ct = 1000 * table["true_bv_tv"].to_numpy()[:, None, None, None] * np.ones(CT_SHAPE)
    ct = ct + rng.normal(0, 5, ct.shape)
    table["mean_hu"] = ct.mean((1, 2, 3))
    table["threshold_bv_tv"] = 2 * table["true_bv_tv"]
    table.loc[::7, [f"true_{name}" for name in BIOMARKERS]] = np.nan  # not measured
    voi = np.ones((len(table), *MR_SHAPE), bool)
    patches = Patches(table, mr=np.zeros((len(table), 1)), ct=ct.astype(np.float16), voi=voi)
    splits = pd.DataFrame({"subject_id": [f"s{n}" for n in range(20)]})
    splits["fold"] = np.arange(20) // 7  # each fold holds both labels
    return patches, table.groupby("knee_id")["oa"].first(), splits


def test_difficulty_finds_what_was_put_in(cohort):
    patches, labels, splits = cohort
    found = difficulty(patches, labels, splits, seed=0, n_resamples=20)
    value = found["value"]
    assert value["hu_r2.bv_tv"] > 0.95 and value["hu_r2.tb_n_per_mm"] < 0.2
    assert value["ct_threshold_bv_tv_ratio"] == pytest.approx(2)
    assert value["mr_rescan_cv_pct.bv_tv"] == 0 and value["mr_rescan_icc.bv_tv"] == 1
    assert value["auc_mr_reference"] > 0.95  # the MR tells who is ill, the CT does not
    assert value["auc_mean_hu"] < 0.85
    assert set(TARGETS) <= set(found.index)
    assert (found["ci_low"] <= value + 1e-12).all() and (found["ci_high"] >= value - 1e-12).all()


def test_without_a_second_mr_there_is_no_repeatability(cohort):
    patches, labels, splits = cohort
    table = patches.table.drop(columns=[f"rescan_{name}" for name in BIOMARKERS])
    once = Patches(table, patches.mr, patches.ct, patches.voi)
    found = difficulty(once, labels, splits, seed=0, n_resamples=2)
    assert not found.index.str.startswith("mr_rescan").any()
