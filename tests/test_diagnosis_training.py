"""Ways of training the Transformer: the rule that chooses one, and every way on a toy cohort."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import diagnosis_training as ways

from ctsma.common import BIOMARKERS, COMPARTMENTS
from ctsma.diagnosis.transformer import TransformerSettings, pad_tokens


def row(candidate, cohort, log_loss, sd, seconds):
    found = {"candidate": candidate, "cohort": cohort, "log_loss": log_loss}
    return found | {"sd_single": sd, "cpu_seconds": seconds}


def test_the_rule_takes_the_stable_way_among_those_of_least_loss():
    rows = []
    for cohort, shift in (("1", 0.00), ("2", 0.10), ("3", 0.02)):
        rows.append(row("least loss", cohort, 0.50 + shift, sd=0.04, seconds=1.0))
        rows.append(row("worse", cohort, 0.60 + shift, sd=0.001, seconds=1.0))
    # Excess losses -0.03, 0.03 and 0.02: mean 0.0067, standard error 0.0186
    for cohort, loss in (("1", 0.47), ("2", 0.63), ("3", 0.54)):
        rows.append(row("as good, stable", cohort, loss, sd=0.03, seconds=1.0))
        rows.append(row("as good, costly", cohort, loss, sd=0.02, seconds=9.0))
    assert ways.chosen(pd.DataFrame(rows)) == "as good, stable"


@pytest.fixture(scope="module")
def toy():
    """16 knees of eight patches; OA lowers every biomarker by three SD."""
    rng, n = np.random.default_rng(0), 16
    rows = pd.DataFrame({"knee_id": np.repeat([f"k{k:02d}" for k in range(n)], 8)})
    rows["subject_id"] = rows["knee_id"].str.replace("k", "s")
    rows["compartment"] = np.tile(np.repeat(COMPARTMENTS, 2), n)
    oa = np.repeat(np.arange(n) % 2, 8)
    for name in BIOMARKERS:
        rows[name] = rng.normal(size=len(rows)) - 3 * oa
    labels = pd.Series(np.arange(n) % 2, index=rows["knee_id"].unique())
    folds = {"subject_id": rows["subject_id"].unique(), "fold": np.arange(n) // 2 % 2}
    return pad_tokens(rows, labels, pd.DataFrame(folds), TransformerSettings())


ONE_OF_EACH = {way.train.__name__: way for way in ways.CANDIDATES}


@pytest.mark.parametrize("way", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_every_way_of_training_finds_a_plain_effect(monkeypatch, toy, way):
    monkeypatch.setattr(ways, "N_SEEDS", 4)
    monkeypatch.setattr(ways, "GROUP", 2)
    found = ways.diagnosed(toy, replace(way, epochs=30), n_jobs=1)
    assert found["auc"] > 0.9 and found["cpu_seconds"] > 0
    assert found["log_loss"] <= found["log_loss_single"]  # the loss is convex in the score
    assert found["log_loss"] < np.log(2)  # of a constant score
