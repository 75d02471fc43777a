"""Difficulty figures: closed forms of their parts; the whole is walked by the tiny study."""

import numpy as np
import pandas as pd
import pytest

from ctsma.difficulty import TARGETS, _cv_pct, _interval, nested


def test_cv_is_the_within_knee_sd_over_the_mean():
    # Pairs 9, 11: within-pair SD is sqrt(2), the mean 10.
    assert _cv_pct(np.array([9.0, 11.0]), np.array([11.0, 9.0])) == pytest.approx(100 * np.sqrt(2) / 10)
    assert _cv_pct(np.full(5, 3.0), np.full(5, 3.0)) == 0


def test_interval_draws_whole_knees():
    rng = np.random.default_rng(1)
    level = rng.normal(0, 1, 50)
    table = pd.DataFrame({"knee_id": np.repeat(np.arange(50), 20), "x": np.repeat(level, 20)})
    value, low, high = _interval(table, ("x",), np.mean, 2000)
    # 50 knees, not 1000 patches: standard error of the mean is SD / sqrt(50).
    assert value == pytest.approx(level.mean())
    assert high - low == pytest.approx(2 * 1.96 * level.std() / np.sqrt(50), rel=0.1)


def test_targets_are_ranges_with_a_source_and_groups_are_nested_by_biomarker():
    assert all(low < high and source for low, high, source in TARGETS.values())
    found = pd.DataFrame({"value": [0.5, 0.6, 0.7]}, index=["hu_r2.bv_tv", "hu_r2.tb_th_mm", "auc_mean_hu"])
    assert nested(found, "hu_r2") == {"bv_tv": 0.5, "tb_th_mm": 0.6}
    assert nested(pd.DataFrame(), "hu_r2") == {}
