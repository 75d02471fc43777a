"""Differences of other trainings of the same networks, on the shipped run with few epochs."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import training_variation

from ctsma.common import InputError

REPOSITORY = Path(__file__).parents[1]
PAIR = "ct_sma_vs_ct_only"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def run(tmp_path):
    """The shipped run, whose estimates stand for two training seeds, one epoch, few resamples."""
    path = tmp_path / "run"
    shutil.copytree(REPOSITORY / "notebooks" / "data" / "run", path)
    file = path / "models" / "predictions.csv"
    one = pd.read_csv(file, dtype={"knee_id": str, "subject_id": str})
    both = pd.concat([one.assign(seed=seed) for seed in (0, 1)])
    both.to_csv(path / "models" / "predictions_by_seed.csv", index=False)
    few = {"n_seeds": 1, "diagnosis_epochs": 1, "n_resamples": 20}
    diagnosis = path / "results" / "diagnosis.json"
    parameters = json.loads(diagnosis.read_text())["parameters"]
    change(diagnosis, parameters=parameters | few)
    return path


def test_every_training_has_its_differences(run, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out.json"
    shutil.copytree(run, other)
    given = [str(run), "--other", str(other), "--out", str(out), "--jobs", "1"]
    training_variation.main(given)
    found = json.loads(out.read_text())["trainings"]
    names = ["seed 0", "seed 1", "mean of 2 seeds", "mean of 2 seeds, another machine"]
    assert [row["training"] for row in found] == names
    one, same, mean, elsewhere = (row["difference_in_r"][PAIR]["difference"] for row in found)
    assert one == same == mean == elsewhere  # all have the same estimates
    for row in found[:2]:
        auc, change_in_auc = row["auc"], row["difference_in_auc"][PAIR]
        assert change_in_auc["difference"] == pytest.approx(auc["ct_sma"] - auc["ct_only"])
        assert change_in_auc["ci_low"] <= change_in_auc["difference"] <= change_in_auc["ci_high"]
    assert found[2]["auc"] == found[3]["auc"]


def test_a_run_of_another_study_is_refused(run):
    own = json.loads((run / "results" / "cohort.json").read_text())
    training_variation.checked_other(run, own)
    change(run / "results" / "cohort.json", protocol_sha256="another")
    with pytest.raises(InputError, match="differs from the run in protocol_sha256"):
        training_variation.checked_other(run, own)
