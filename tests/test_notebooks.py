"""The whole study on the tiny profile, by the command that users type; then the numbers the notebooks wrote."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest

from ctsma import report, study
from ctsma.cohort import BIOMARKERS, BONES
from ctsma.simulation import protocol_sha256

HEADER = {
    "schema_version",
    "profile",
    "seed",
    "protocol_sha256",
    "manifest_sha256",
    "git_commit",
    "packages",
    "seconds",
}
CT_ARMS = ("hu_regression", "ruler_regression", "ct_only", "ct_residual", "ct_sma", "ct_sma_plus")


def ctsma(*arguments, cwd):
    command = [sys.executable, "-m", "ctsma.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of one finished tiny run, shared by the session."""
    base = tmp_path_factory.mktemp("study")
    done = ctsma("run", "--profile", "tiny", cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    return base / "runs" / "tiny"


def results(run, stage):
    return json.loads((run / "results" / f"{stage}.json").read_text())


def test_every_notebook_ran_to_its_end(tiny):
    for stage in study.stages():
        notebook = nbformat.read(tiny / "notebooks" / f"{stage}.ipynb", as_version=4)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1)), stage
        assert (tiny / "report" / f"{stage}.html").stat().st_size > 10_000
    assert len(list((tiny / "figures").glob("*.png"))) >= 10


def test_results_carry_their_origin(tiny):
    for stage in ("cohort", "registration", "distillation", "agreement", "diagnosis"):
        found = results(tiny, stage)
        assert set(found) >= HEADER, stage
        assert (found["profile"], found["seed"]) == ("tiny", 0)
        assert found["protocol_sha256"] == protocol_sha256()


def test_pairs_of_a_registered_cohort_match(tiny):
    found = results(tiny, "distillation")
    assert found["match_of_pairs"]["mean"] > 0.95  # another patch's MR: 0.18 on 160 simulated pairs
    assert found["settings"]["weighed"] == []


def test_cohort_numbers(tiny):
    found = results(tiny, "cohort")
    assert found["n_knees"] == 8
    assert found["n_faulty_images"] == 0
    calibration = found["calibration"]
    assert set(calibration["hu_r2"]) == set(BIOMARKERS)
    assert all(
        -1 <= calibration["mr_rescan_icc"][b] <= 1 and calibration["mr_rescan_cv_pct"][b] > 0 for b in BIOMARKERS
    )
    assert 0 <= calibration["auc_mr_reference"] <= 1


def test_registration_numbers(tiny):
    found = results(tiny, "registration")
    for bone in BONES:
        tre = found["tre_mm"][bone]
        assert 0 < tre["median"] <= tre["p95"] <= tre["max"]
        # one transform for the whole knee cannot follow a flexion that differs: each bone apart must be closer
        assert tre["median"] < found["stages"]["whole_knee"]["tre_mm"][bone]["median"]
    assert found["tre_mm"]["femur"]["median"] < 0.5  # mm; a small field of view, yet below a CT voxel
    assert 0 <= found["success_rate"] <= 1


def test_agreement_numbers(tiny):
    found = results(tiny, "agreement")
    for arm in (*CT_ARMS, "mr_teacher"):
        for name in (*BIOMARKERS, "mean"):
            value = found["icc"][arm][name]
            assert -1 <= value["ci_low"] <= value["icc"] <= value["ci_high"] <= 1, (arm, name)
    whole = [row | {"biomarker": "mean"} for row in found["gain"].values()]
    for row in [*whole, *found["gain_by_biomarker"]]:
        one, other = (found["icc"][row[side]][row["biomarker"]]["icc"] for side in ("arm", "against"))
        assert row["difference"] == pytest.approx(one - other, abs=1e-9)
    known = [pair for pair in report.GAINS if set(pair) <= set(found["icc"])]
    assert set(report.GAINS) - set(known) == {("ct_oracle", "ct_sma_plus")}  # it was measured on another cohort
    assert len(found["gain_by_biomarker"]) == len(BIOMARKERS) * len(known)
    assert set(found["ceiling"]) == set(BIOMARKERS)
    assert "mr_reference" in found["icc_truth"]
    assert set(found["definitions"]) == {"plate", "direct", "paper"}
    assert all(set(rows) == set(BIOMARKERS) for rows in found["definitions"].values())


def test_diagnosis_numbers(tiny):
    found = results(tiny, "diagnosis")
    for arm in (*CT_ARMS, "mr_teacher", "mr_reference"):
        value = found["auc"][arm]
        assert 0 <= value["ci_low"] <= value["auc"] <= value["ci_high"] <= 1
    assert 0 <= found["delong"]["ct_sma_vs_ct_only"]["p"] <= 1
    assert 0 <= found["control"]["permuted_labels"]["auc"] <= 1
    assert set(found["control"]) >= {f"without {name}" for name in ("position", *BIOMARKERS)}
    assert all(0 <= test["p_holm"] <= 1 for test in found["delong"].values() if test["p"] is not None)
    assert set(found) >= {"comparators", "sensitivity", "calibration", "subgroups", "compartments"}


def test_a_second_run_has_nothing_to_do(tiny):
    before = {file: file.stat().st_mtime_ns for file in (tiny / "results").iterdir()}
    again = ctsma("run", "--profile", "tiny", cwd=tiny.parents[1])
    assert again.returncode == 0
    assert again.stdout.count("unchanged, skipped") == len(study.stages())
    assert before == {file: file.stat().st_mtime_ns for file in (tiny / "results").iterdir()}


def test_the_results_table_comes_from_the_results_files(tiny, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    report.update_readme(readme, tiny / "results")
    text = readme.read_text()
    icc, auc = results(tiny, "agreement")["icc"]["ct_sma"], results(tiny, "diagnosis")["auc"]["ct_sma"]["auc"]
    row = next(line for line in text.splitlines() if line.startswith("| CT network, distilled (CT-SMA)"))
    assert len(row.split(" | ")) == 7
    assert f" | {icc['bv_tv']['icc']:.3f} (" in row and f" | {auc:.3f} (" in row
    assert "| *paper: CT network, distilled (CT-SMA)* | 0.804 | 0.773 | 0.711 | 0.622 | 0.742 | 0.883 |" in text
    assert f"| femur | {results(tiny, 'registration')['tre_mm']['femur']['median']:.3f} |" in text
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")


def test_parameter_defaults_are_the_quick_profile():
    assert study.profiles()["quick"]["parameters"] == {}
    for name, profile in study.profiles().items():
        known = {p for stage in study.stages() for p in study.declared(stage)}
        assert set(profile["parameters"]) <= known, name
        assert set(profile["minutes"]) == set(study.stages()), name


def test_knees_with_ct_alone_are_read_and_diagnosed(tiny, tmp_path):
    """The tiny run, two knees of which have lost their MR: notebooks 3 and 5 again."""
    copy = tmp_path / "run"
    shutil.copytree(tiny, copy)
    knees = pd.read_csv(copy / "cohort" / "simulated.csv")
    bare = knees.groupby("oa")["knee_id"].last().tolist()
    knees.loc[knees["knee_id"].isin(bare), ["mr", "mr_sha256", "mr_rescan"]] = None
    knees.to_csv(copy / "cohort" / "simulated.csv", index=False)
    given = study.profiles()["tiny"]["parameters"] | {"run_dir": str(copy), "profile": "tiny", "n_jobs": 1}
    for stage in ("03_distillation_training", "05_roc_diagnosis"):
        own = {name: value for name, value in given.items() if name in study.declared(stage)}
        page = study.NOTEBOOKS / f"{stage}.ipynb"
        options = {"cwd": str(page.parent), "progress_bar": False, "kernel_name": "python3"}
        papermill.execute_notebook(str(page), str(tmp_path / "page.ipynb"), own, **options)
    before = results(tiny, "diagnosis")
    trained, judged = results(copy, "distillation"), results(copy, "diagnosis")
    assert trained["n_knees"] == results(tiny, "distillation")["n_knees"] - 2
    assert set(bare) <= set(trained["knees_read_by_ct_alone"])
    assert judged["n_knees"] == before["n_knees"] - 2
    assert set(bare) <= set(judged["ct_only_knees"]["probability"])
    assert all(0 <= p <= 1 for p in judged["ct_only_knees"]["probability"].values())
    assert 0 <= judged["ct_only_knees"]["auc_all"]["auc"] <= 1


def test_the_studys_model_reads_a_ct(tiny):
    base = tiny.parents[1]
    done = ctsma("export-model", "--name", "tiny", "--out", "model", "--jobs", "1", cwd=base)
    assert done.returncode == 0, done.stderr
    about = json.loads((base / "model" / "model.json").read_text())
    assert about["metrics"]["icc"] == results(tiny, "agreement")["icc"][about["arm"]]
    assert about["training"]["parameters"]["epochs"] == 1
    knee = (tiny / "cohort" / "simulated.csv").read_text().splitlines()[1].split(",")
    given = f"{tiny / 'cohort' / 'images' / knee[0]}_ct.nii.gz:{knee[2]}"
    done = ctsma("predict", given, "--model", "model", "--out", "out", "--jobs", "1", cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (base / "out" / f"{knee[0]}-ct" / "report.html").exists()
