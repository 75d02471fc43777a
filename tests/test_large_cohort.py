"""Study of many knees by CT alone: its questions, corrections, groups of knees and controls."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from ctsma import diagnosis
from ctsma.common import BIOMARKERS, InputError
from ctsma_lab import tables
from kneesim import protocol_sha256

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import calibration
import large_cohort

N = 120


@pytest.fixture(scope="module")
def judged():
    """Labels, and scores of two arms that agree closely and one that is useless."""
    rng = np.random.default_rng(0)
    truth = np.arange(N) % 2
    good = truth + rng.normal(0, 1, N)
    scores = {"ct_only": good, "ct_sma": good + rng.normal(0, 0.02, N)}
    scores |= {"ct_sma_plus": good + rng.normal(0, 0.5, N), "mr_reference": rng.normal(0, 1, N)}
    return truth, pd.DataFrame(scores)


def test_questions_are_those_of_the_protocol(judged):
    page = Path(large_cohort.__file__).parents[1] / "docs" / "large_cohort_protocol.md"
    text = page.read_text(encoding="utf-8")
    for a, b in large_cohort.QUESTIONS:
        assert f"`{a}` minus `{b}`" in text


def test_answers_are_paired_delong_tests_with_holms_correction(judged):
    truth, scores = judged
    rows = large_cohort.answers(truth, scores)  # without residual and ridge: two questions
    assert [(row["a"], row["b"]) for row in rows] == [
        ("ct_sma", "ct_only"),
        ("mr_reference", "ct_sma_plus"),
    ]
    assert {row["model"] for row in rows} == {"Transformer"}
    for row in rows:
        single = diagnosis.compare_delong(truth, scores[row["a"]], scores[row["b"]])
        assert row["difference"] == single["difference"] and row["p"] == single["p"]
        a, b = (diagnosis.auc_delong(truth, scores[row[arm]])["auc"] for arm in ("a", "b"))
        assert row["difference"] == pytest.approx(a - b)
    low, high = sorted(rows, key=lambda row: row["p"])  # Holm 1979: 2 p of the least, then 1 p
    assert low["p_holm"] == pytest.approx(min(1, 2 * low["p"]))
    assert high["p_holm"] == pytest.approx(max(low["p_holm"], high["p"]))
    assert rows[0]["within_0.05"] and not rows[1]["within_0.05"]


def test_groups_of_knees_are_disjoint_and_complete(judged):
    truth, scores = judged
    values = pd.Series(np.random.default_rng(1).uniform(0.5, 1.5, N))
    groups = large_cohort.thirds(values, "kernel FWHM", "mm")
    assert (np.sum(list(groups.values()), axis=0) == 1).all()
    assert [mask.sum() for mask in groups.values()] == [N // 3] * 3
    assert all("mm" in name for name in groups)
    scanner = pd.DataFrame({"kernel": values, "noise": values[::-1].to_numpy()})
    rows = large_cohort.subgroups(truth, scores, scanner)
    assert {row["arm"] for row in rows} == {"ct_only", "ct_sma_plus", "mr_reference"}
    assert {sum(row["n_oa"] for row in rows if row["arm"] == "ct_only")} == {2 * truth.sum()}


def test_intervals_of_auc_hold_it(judged):
    truth, scores = judged
    found = large_cohort.auc_of(truth, scores, np.arange(N))
    assert set(found) == set(scores)
    for row in found.values():
        assert row["bootstrap_low"] < row["auc"] < row["bootstrap_high"]
        assert row["ci_low"] < row["auc"] < row["ci_high"]


def test_one_row_per_patch_is_selected():
    rows = pd.DataFrame({"arm": ["a", "a", "b", "b"], "patch_id": [0, 1, 0, 1]})
    assert large_cohort.one_arm(rows).to_dict("list") == {"arm": ["a", "a"], "patch_id": [0, 1]}


@dataclass
class Trained:
    """What `checked_run` asks of a run."""

    path: Path
    protocol: str = ""
    seed: int = 0

    def results(self, name):
        return {"cohort": {"protocol_sha256": self.protocol}, "distillation": {"seed": self.seed}}[
            name
        ]


@pytest.mark.parametrize(
    ("protocol", "seed", "words"),
    [("other", 0, "another simulation protocol"), (None, large_cohort.SEED, "as the knees here")],
)
def test_knees_of_training_are_refused(monkeypatch, protocol, seed, words):
    run = Trained(Path("run"), protocol or protocol_sha256(), seed)
    monkeypatch.setattr(large_cohort, "Run", lambda path: run)
    with pytest.raises(InputError, match=words):
        large_cohort.checked_run(run.path)


def test_permuted_labels_are_scored_once_per_draw(monkeypatch):
    monkeypatch.setattr(large_cohort, "N_PERMUTATIONS", 8)
    knees = [f"k{i}" for i in range(N)]
    labels = pd.Series(np.arange(N) % 2, index=knees)
    subjects = pd.Series(knees, index=knees)
    splits = pd.DataFrame({"subject_id": knees, "fold": np.arange(N) // 2 % 5})
    asked = []

    def scores(name, tokens, given, seeds):
        asked.append((name, tuple(seeds), tuple(given)))
        rng = np.random.default_rng(seeds[0])
        return pd.DataFrame({"knee_id": knees, "score": rng.uniform(size=N)})

    scorer = SimpleNamespace(labels=labels, splits=splits, scores=scores)
    found = large_cohort.permuted(scorer, pd.DataFrame(), subjects)
    assert found["n"] == len(asked) == len(set(asked)) == 8
    assert all(sorted(given) == sorted(labels) for _, _, given in asked)
    assert found["mean_low"] < 0.5 < found["mean_high"]


def test_the_cohort_without_effects_keeps_labels_alone(tmp_path):
    content = yaml.safe_load(calibration.without_effects(tmp_path / "null.yaml").read_text())
    for name, entry in content["disease"].items():
        if "value" in entry:
            assert (entry["value"] == 0) or name.startswith(calibration.NO_EFFECT), name


def test_agreement_compares_the_arms_of_the_questions(monkeypatch):
    monkeypatch.setattr(large_cohort, "N_RESAMPLES", 50)
    rng = np.random.default_rng(0)
    place = {
        "knee_id": np.repeat([f"k{i}" for i in range(20)], 3),
        "patch_id": np.tile(range(3), 20),
    }
    reference = pd.DataFrame(rng.normal(size=(60, 4)), columns=list(BIOMARKERS))
    parts = []
    for arm, noise in (("ct_only", 0.5), ("ct_sma", 0.1)):
        own = (reference + rng.normal(0, noise, (60, 4))).assign(arm=arm, **place)
        parts.append(own.join(reference.add_suffix("_reference")))
    table = pd.concat(parts).assign(subject_id=lambda rows: rows["knee_id"])
    found = large_cohort.agreement_of(table)
    assert set(found["arms"]) == {"ct_only", "ct_sma"}
    row = {r["statistic"]: r for r in found["differences"]}["r"]
    assert (row["arm"], row["against"]) == ("ct_sma", "ct_only") and row["difference"] > 0


def test_the_summary_has_one_claim_a_sentence():
    interval = {"ci_low": 0.8, "ci_high": 0.9}
    row = {"model": "Transformer", "a": "ct_sma", "b": "ct_only", "difference": -0.003}
    row |= {"ci_low": -0.005, "ci_high": -0.001, "p_holm": 0.02}
    found = {"n_knees": 720, "n_pairs": 80, "auc": {"ct_only": {"auc": 0.85} | interval}}
    found["questions"] = [row, row | {"model": "svm"}]
    assert tables.large_cohort_sentences({}) == []
    auc, difference = tables.large_cohort_sentences(found)
    assert auc == "AUC, CT network: 0.850 (0.800 to 0.900)."
    assert "720 other simulated knees" in tables.large_cohort_title(found)
    assert difference == (
        "The published distillation loss lowers the AUC of the CT network by 0.003 (95 % CI 0.001 "
        "to 0.005), Holm p = 0.02."
    )
    around = {"auc": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    models = dict.fromkeys(tables.CONTROLLED, around)
    models["ct_only"] = {"auc": 0.58, "ci_low": 0.51, "ci_high": 0.65}
    found["zero_effect"] = {
        "n_knees": 90,
        "auc": models | {"ct_only, svm": interval | {"auc": 0.9}},
    }
    assert tables.large_cohort_sentences(found)[-1] == (
        "Control, 90 knees whose bone has no effect of disease: the AUC of 5 models is 0.50 to "
        "0.58, and 4 of their 5 intervals contain 0.5."
    )
