"""Work on a Dask cluster of this machine: equal results, nothing lost, one sentence a problem."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import distributed
import joblib
import pandas as pd
import pytest
from test_distillation import TINY, splits_of, toy
from worker_tasks import fill_disk, square, worker_of

from ctsma.cache import map_knees
from ctsma.common import BIOMARKERS, InputError
from ctsma.diagnosis.transformer import TransformerSettings, cross_validate_arms
from ctsma.distillation import cross_validate
from ctsma.parallel import run_tasks
from ctsma_lab import cli, cluster


@pytest.fixture(scope="module")
def dask():
    """Two worker processes of one thread."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local:
        yield local


def knees_of(n):
    return pd.DataFrame({"knee_id": [f"K{i}" for i in range(n)]})


def calls(folder):
    return sorted((folder / "calls.txt").read_text().split())


def test_a_run_resumes_on_a_cluster_and_a_dead_worker_costs_its_task(dask, tmp_path):
    map_knees(square, knees_of(1), tmp_path, {})
    (tmp_path / "deadly.txt").write_text("")
    with cluster.on_cluster(dask.scheduler_address, tmp_path):
        there = map_knees(square, knees_of(6), tmp_path, {})
    assert list(there["value"]) == [0, 1, 4, 9, 16, 25] and not there["error"].any()
    assert calls(tmp_path) == ["K0", "K1", "K1", "K2", "K3", "K4", "K5"]
    again = map_knees(square, knees_of(6), tmp_path, {}, n_jobs=2)
    assert len(calls(tmp_path)) == 7 and again.equals(there)


def test_an_unfit_cluster_is_one_sentence(dask, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 2)
    with pytest.raises(InputError, match="no scheduler or no worker.*docs/cluster.md"):
        cluster.connect("tcp://127.0.0.1:1", tmp_path)
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 60)
    here = cluster.describe()
    monkeypatch.setattr(cluster, "describe", lambda: here | {"numpy": "1.0"})
    with pytest.raises(InputError, match="worker .* with numpy .*, not 1.0; start the workers"):
        cluster.connect(dask.scheduler_address, tmp_path)


@pytest.mark.slow  # every worker loads the libraries of the diagnosis
def test_diagnosis_gives_the_same_bits_on_a_cluster(dask, tmp_path):
    patches = toy()
    splits = splits_of(patches)
    labels = pd.Series({subject: int(subject[1:]) // 2 % 2 for subject in splits["subject_id"]})
    columns = ["subject_id", "knee_id", "patch_id", "compartment", "u", "v", "w", *BIOMARKERS]
    tokens = {"mr_reference": patches.table[columns]}
    settings = TransformerSettings(epochs=3)
    here = cross_validate_arms(tokens, labels, splits, settings)
    with cluster.on_cluster(dask.scheduler_address, tmp_path):
        there = cross_validate_arms(tokens, labels, splits, settings)
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    assert here["score"].nunique() > 1


@pytest.mark.slow  # four workers import MONAI
def test_training_and_diagnosis_give_the_same_bits_on_a_cluster(dask, tmp_path):
    patches, arms = toy(), ["hu_regression", "mr_teacher", "ct_only", "ct_sma_plus"]
    splits = splits_of(patches)
    labels = pd.Series({subject: int(subject[1:]) // 2 % 2 for subject in splits["subject_id"]})
    settings = TransformerSettings(epochs=3)

    def study(name):
        found = cross_validate(patches, splits, arms, TINY, [0], tmp_path / name, n_jobs=2)
        place = patches.table[["knee_id", "patch_id", "compartment", "u", "v", "w"]]
        tokens = found[found["arm"] == "ct_only"].merge(place, on=["knee_id", "patch_id"])
        tokens = {"ct_only": tokens[["subject_id", *place, *BIOMARKERS]]}
        return found, cross_validate_arms(tokens, labels, splits, settings, n_jobs=2)

    with cluster.on_cluster(dask.scheduler_address, tmp_path):
        there = study("there")
    here = study("here")
    for a, b in zip(there, here, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    weights = sorted(file.name for file in (tmp_path / "here").glob("*.safetensors"))
    assert len(weights) == 6
    for name in weights:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert not list((tmp_path / "there").glob(".data-*"))


def test_a_worker_that_joins_late_takes_tasks_that_wait(tmp_path):
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as local,
        cluster.on_cluster(local.scheduler_address, tmp_path) as client,
    ):
        answers = run_tasks(worker_of, [(0.5,)] * 16, ordered=False)
        first = next(answers)
        local.scale(2)
        client.wait_for_workers(2, timeout=60)
        pids = [first, *answers]
    assert len(pids) == 16 and len(set(pids)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_of_a_worker_is_one_sentence_and_loses_nothing(dask, tmp_path):
    with cluster.on_cluster(dask.scheduler_address, tmp_path):
        map_knees(fill_disk, knees_of(1), tmp_path, {})
        with pytest.raises(InputError) as caught:
            map_knees(fill_disk, knees_of(2), tmp_path, {})
    sentence = f"the disk of {re.escape(platform.node())} is full; free space"
    assert re.fullmatch(f"[^\n]+: cannot be written, as {sentence}[^\n]*", str(caught.value))
    assert json.loads((tmp_path / "K0.json").read_text())["value"] == 1


def test_a_folder_that_a_worker_does_not_see_is_one_sentence(dask, tmp_path, monkeypatch):
    read = cluster.describe_worker
    monkeypatch.setattr(cluster, "describe_worker", lambda marker: read(marker + ".elsewhere"))
    with pytest.raises(InputError, match="does not see this folder; put it on a shared file"):
        cluster.connect(dask.scheduler_address, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wrong_address_ends_the_command_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 2)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--profile", "tiny", "--dask", "tcp://127.0.0.1:1"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("--dask tcp://127.0.0.1:1: has no scheduler or no worker")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_study_on_a_cluster_has_the_results_of_one_machine(tmp_path):
    """By the command and papermill, all five notebooks."""
    found = {}
    command = [sys.executable, "-m", "ctsma.cli", "run", "--profile", "tiny"]
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local:
        for where in (["--jobs", "2"], ["--dask", local.scheduler_address]):
            base = tmp_path / where[0].strip("-")
            base.mkdir()
            done = subprocess.run([*command, *where], cwd=base, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            found[where[0]] = results_of(base / "runs" / "tiny")
    assert found["--jobs"] == found["--dask"]


NOT_COMPARED = {"seconds", "seconds_per_knee", "cpu_seconds", "n_jobs"}
NOT_COMPARED |= {"cpu_seconds_per_mr", "cpu_seconds_per_knee"}


def results_of(run):
    """What a run found: the numbers of its results without times, and its tables."""
    found = {}
    for file in sorted((run / "results").glob("*.json")):
        found[file.name] = without_times(json.loads(file.read_text()))
    for name in ("predictions_by_seed.csv", "predictions.csv"):
        found[name] = (run / "models" / name).read_bytes()
    return found


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in NOT_COMPARED}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def test_the_backend_is_this_machine_again_after_the_block(tmp_path):
    with cluster.on_cluster(None, tmp_path) as client:
        assert client is None and cluster.ADDRESS not in os.environ
    assert joblib.parallel.get_active_backend()[0].__class__.__name__ == "LokyBackend"
