"""The whole study on the tiny profile, by the users' command, and what the notebooks wrote."""

import json
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from ctsma.arms import COMPARISONS
from ctsma.cohort import splits_path
from ctsma.common import BIOMARKERS, BONES
from ctsma.patches import load_patches
from ctsma_lab import cli, explore, runner
from ctsma_lab.run import RESULTS
from ctsma_lab.tutorials import data, make_data
from kneesim import protocol_sha256

ORIGIN = {"schema_version", "profile", "seed", "protocol_sha256", "manifest_sha256"}
ORIGIN |= {"git_commit", "packages", "seconds", "parameters"}
CT_ARMS = ("hu_regression", "hu_regression_calibrated", "ct_only", "ct_sma", "ct_residual")
CT_ARMS += ("ct_sma_plus",)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of one finished tiny run, by the command in a process of its own.

    One job: another process of the tests has the other core, and each worker would have to load all
    libraries. Workers train in test_distillation.py and compute knees in test_cache.py.
    """
    base = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "ctsma.cli", "run", "--profile", "tiny", "--jobs", "1"]
    done = subprocess.run(command, cwd=base, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return base / "runs" / "tiny"


def results(run, name):
    return json.loads((run / "results" / f"{name}.json").read_text())


def test_every_notebook_ran_to_its_end(tiny):
    shown = 0
    for stage in RESULTS:
        notebook = nbformat.read(tiny / "notebooks" / f"{stage}.ipynb", as_version=4)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1)), stage
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output.text for output in outputs if output.get("name") == "stderr"], stage
        shown += sum("image/png" in output.get("data", {}) for output in outputs)
        assert (tiny / "report" / f"{stage}.html").stat().st_size > 10_000
    assert len(list((tiny / "figures").glob("*.png"))) >= 10
    drawn, tables = (
        {f.stem for f in (tiny / "figures").glob(f"*.{end}")} for end in ("png", "csv")
    )
    assert drawn == tables and shown == len(drawn)
    assert "<b>Figure 3.</b>" in (tiny / "report" / "explore.html").read_text()


def test_results_carry_their_origin(tiny):
    for name in RESULTS.values():
        found = results(tiny, name)
        assert set(found) >= ORIGIN, name
        assert (found["profile"], found["seed"]) == ("tiny", 0)
        assert found["protocol_sha256"] == protocol_sha256()


def test_cohort_numbers(tiny):
    found = results(tiny, "cohort")
    assert found["n_knees"] == 6
    assert found["n_faulty_images"] == 0
    calibration = found["calibration"]
    assert set(calibration["hu_r2"]) == set(BIOMARKERS)
    for name in BIOMARKERS:
        assert -1 <= calibration["mr_rescan_icc"][name] <= 1
        assert calibration["mr_rescan_cv_pct"][name] > 0
    assert 0 <= calibration["auc_mr_reference"] <= 1


def test_registration_numbers(tiny):
    found = results(tiny, "registration")
    for bone in BONES:
        tre = found["tre_mm"][bone]
        assert 0 < tre["median"] <= tre["p95"] <= tre["max"]
        # One transform for the whole knee cannot follow a changed flexion: each bone is closer.
        assert tre["median"] < found["stages"]["whole_knee"]["tre_mm"][bone]["median"]
    assert found["tre_mm"]["femur"]["median"] < 0.5  # mm; a small field of view, below a CT voxel
    assert 0 <= found["success_rate"] <= 1
    assert found["patch_correlation"]["mean"] > 0.95  # another patch's MR: 0.18 on 160 pairs


def test_agreement_numbers(tiny):
    found = results(tiny, "agreement")
    for arm in (*CT_ARMS, "mr_teacher"):
        for name in (*BIOMARKERS, "mean"):
            value = found["icc"][arm][name]
            value = value if name == "mean" and not isinstance(value, dict) else value
            assert -1 <= value["ci_low"] <= value["icc"] <= value["ci_high"] <= 1, (arm, name)
        for name in BIOMARKERS:
            assert set(found["within_between"][arm][name]) >= {"r_within", "r_between"}
    for pair, row in found["difference"].items():
        one, other = pair.split("_vs_")
        expected = found["icc"][one]["mean"]["icc"] - found["icc"][other]["mean"]["icc"]
        assert row["difference"] == pytest.approx(expected, abs=1e-9)
    known = [f"{a}_vs_{b}" for a, b in COMPARISONS if {a, b} <= set(found["icc"])]
    assert list(found["difference"]) == known
    assert set(found["ceiling"]) == set(BIOMARKERS)
    assert "mr_reference" in found["icc_truth"]


def test_diagnosis_numbers(tiny):
    found = results(tiny, "diagnosis")
    for arm in (*CT_ARMS, "mr_teacher", "mr_reference"):
        value = found["auc"][arm]
        assert 0 <= value["ci_low"] <= value["auc"] <= value["ci_high"] <= 1
    assert 0 <= found["delong"]["ct_sma_vs_ct_only"]["p"] <= 1
    assert 0 <= found["control"]["permuted_labels"]["auc"] <= 1
    for test in found["delong"].values():
        assert test["p"] is None or 0 <= test["p_holm"] <= 1
    assert set(found) >= {"comparators", "sensitivity", "calibration"}


def test_a_second_run_has_nothing_to_do(tiny, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in (tiny / "results").iterdir()}
    monkeypatch.chdir(tiny.parents[1])
    # The report of the first run stays: test_report.py writes reports again.
    monkeypatch.setattr("ctsma_lab.commands.run.write_report", lambda run, *_: run / "report")
    assert cli.main(["run", "--profile", "tiny", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == len(RESULTS)
    assert before == {file: file.stat().st_mtime_ns for file in (tiny / "results").iterdir()}


def parameters_of(stage, run, **given):
    """The tiny profile's parameters of one notebook, as a user would set them."""
    parameters = runner.profiles()["tiny"]["parameters"] | {"run_dir": str(run), "n_jobs": 1}
    parameters |= {"profile": "tiny"} | given
    declared = runner.notebook_parameters(stage)
    return {name: value for name, value in parameters.items() if name in declared}


@pytest.mark.slow
def test_a_knee_with_ct_alone_is_predicted_and_diagnosed(tiny, tmp_path, run_notebook):
    """The tiny run and a knee without MR: notebooks 2, 3 and 5 again, with few arms."""
    copy = tmp_path / "run"
    shutil.copytree(tiny, copy)
    path = copy / "cohort" / "simulated.csv"
    knees = pd.read_csv(path)
    lacking = dict.fromkeys(["mr", "mr_sha256", "mr_rescan"])
    bare = knees[knees["oa"] == 1].tail(1).assign(knee_id="bare", subject_id="bare", **lacking)
    pd.concat([knees, bare]).to_csv(path, index=False)
    splits = pd.read_csv(splits_path(path))
    pd.concat([splits, pd.DataFrame({"subject_id": ["bare"], "fold": [1]})]).to_csv(
        splits_path(path), index=False
    )
    few = {"arms": ["hu_regression", "ct_only"], "epochs": 1, "n_permutations": 2}
    for stage in ("02_registration_qa", "03_distillation_training", "05_roc_diagnosis"):
        given = parameters_of(stage, copy, overwrite=True, **few)
        run_notebook(runner.NOTEBOOKS / f"{stage}.ipynb", **given)
    trained, judged = results(copy, "distillation"), results(copy, "diagnosis")
    assert trained["n_knees"] == results(tiny, "distillation")["n_knees"]
    assert "bare" in trained["knees_read_by_ct_alone"]
    assert judged["n_knees"] == results(tiny, "diagnosis")["n_knees"]
    assert 0 <= judged["ct_only_knees"]["probability"]["bare"] <= 1
    assert 0 <= judged["ct_only_knees"]["auc_all"]["auc"] <= 1


@pytest.mark.slow  # test_prediction.py exports and reads with a model of its own
def test_the_studys_model_reads_a_ct(tiny, tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tiny.parents[1])
    model, out = tmp_path / "model", tmp_path / "out"
    assert cli.main(["export-model", "--name", "tiny", "--out", str(model), "--jobs", "1"]) == 0
    about = json.loads((model / "model.json").read_text())
    assert about["metrics"]["icc"] == results(tiny, "agreement")["icc"][about["arm"]]
    knee = (tiny / "cohort" / "simulated.csv").read_text().splitlines()[1].split(",")
    given = f"{tiny / 'cohort' / 'images' / knee[0]}_ct.nii:{knee[2]}"
    options = ("--model", str(model), "--out", str(out), "--jobs", "1")
    assert cli.main(["predict", given, *options]) == 0
    assert (out / f"{knee[0]}-ct" / "report.html").exists()


def test_the_data_of_the_tutorials_are_cut_from_any_run(tiny, tmp_path):
    make_data.main([str(tiny), "--out", str(tmp_path)])
    ct, mr, labels, facts = data.read_knee(tmp_path)
    assert ct.GetSize() == labels.GetSize()
    assert set(facts["stages"]) == {"centre", "whole_knee", "per_bone", "trabeculae"}
    assert all(len(facts["targets"][bone]) > 20 for bone in BONES)
    assert mr.GetSpacing() == ct.GetSpacing()
    patches = data.read_patches(tmp_path)
    assert patches["bv_tv_reference"].between(0, 1).all()
    knees = data.read_knees(tmp_path)
    assert set(knees["knee_id"]) >= set(patches["knee_id"])
    assert knees["ct_fwhm_mm"].between(0.5, 1.4).all()
    small, stored = data.read_patch_images(tmp_path), load_patches(tiny / "patches")
    assert len(small.table) == len(small.ct) == len(small.mr) > 0
    first = small.table.iloc[0]
    same = (stored.table[["knee_id", "patch_id"]] == first[["knee_id", "patch_id"]]).all(axis=1)
    row = int(np.flatnonzero(same)[0])
    assert (small.voi[0] == stored.voi[row]).all()
    assert np.abs(small.ct[0] - stored.ct[row].astype(float)).max() <= 0.51
    assert np.ptp(small.mr[0]) == pytest.approx(np.ptp(stored.mr[row].astype(float)), rel=1e-3)
    assert first["bv_tv"] == pytest.approx(stored.table.loc[row, "bv_tv"], abs=1e-4)


def test_the_explorer_opens_a_finished_run(tiny):
    study = explore.open_study(tiny)
    assert set(study.arms) == {*CT_ARMS, "mr_teacher"}
    assert "ct_noise_hu" in study.knees
    for name, figure in explore.static_figures(study).items():
        assert "run tiny, simulated knees" in figure.get_suptitle(), name
        plt.close(figure)
    images = study.patch_images(study.with_patches[0])
    assert len(images.bone) == len(images.ct)
    assert 0 < images.bone[0].mean() < 1
