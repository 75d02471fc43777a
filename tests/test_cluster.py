"""Work on a Dask cluster of this machine: equal results, nothing lost, one sentence a problem."""

import os
from pathlib import Path

import distributed
import joblib
import pandas as pd
import pytest

from ctsma.cache import map_knees
from ctsma.common import InputError
from ctsma_lab import cluster


@pytest.fixture(scope="module")
def dask():
    """Two worker processes of one thread."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local:
        yield local


def knees_of(n):
    return pd.DataFrame({"knee_id": [f"K{i}" for i in range(n)]})


def square(knee, folder):
    """Counts its calls; the first time, knee K1 ends its process if the folder says so."""
    with (Path(folder) / "calls.txt").open("a") as stream:
        stream.write(knee["knee_id"] + "\n")
    deadly = Path(folder) / "deadly.txt"
    if knee["knee_id"] == "K1" and deadly.exists():
        deadly.unlink()
        os._exit(9)
    return {"value": int(knee["knee_id"][1:]) ** 2}


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


def test_the_backend_is_this_machine_again_after_the_block(tmp_path):
    with cluster.on_cluster(None, tmp_path) as client:
        assert client is None and cluster.ADDRESS not in os.environ
    assert joblib.parallel.get_active_backend()[0].__class__.__name__ == "LokyBackend"
