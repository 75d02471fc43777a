"""Parallel work over knees and its records: what is reused, what is computed again, what fails."""

import ast
import json
import platform
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from worker_tasks import die_once, fill_disk

from ctsma.cache import imported_modules, map_knees, source_sha256
from ctsma.common import InputError
from ctsma.files import write_json
from ctsma_lab.views import recorded_seconds


def knees_of(*numbers):
    """Manifest rows, each with a CT that has a checksum."""
    rows = [{"knee_id": f"K{n}", "ct": "ct.nii.gz", "ct_sha256": "0" * 64} for n in numbers]
    return pd.DataFrame(rows)


def power_of(knee, folder, *, power):
    """Writes a file, appends each call to a list, and fails on one knee."""
    with (folder / "calls.txt").open("a") as stream:
        stream.write(knee["knee_id"] + "\n")
    if knee["knee_id"] == "K2":
        raise ZeroDivisionError("no bone")
    name = f"{knee['knee_id']}_out.txt"
    (folder / name).write_text(str(power))
    return {"value": int(knee["knee_id"][1:]) ** power, "files": [name]}


def with_root(knee, folder, root):
    return power_of(knee, folder, power=1)


def calls(folder):
    return sorted((folder / "calls.txt").read_text().split())


def test_one_bad_knee_is_a_row_and_finished_knees_are_not_computed_again(tmp_path):
    progress = []
    table = map_knees(
        power_of,
        knees_of(0, 1, 2, 3),
        tmp_path,
        {"power": 2},
        report=lambda line, done, total: progress.append((done, total)),
    )
    assert list(table["knee_id"]) == ["K0", "K1", "K2", "K3"]
    assert list(table["value"].dropna()) == [0, 1, 9]
    assert "ZeroDivisionError" in table["error"][2]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    map_knees(power_of, knees_of(0, 1, 2, 3), tmp_path, {"power": 2})
    assert calls(tmp_path) == ["K0", "K1", "K2", "K2", "K3"]
    assert list(recorded_seconds(tmp_path).index) == ["K0", "K1", "K2", "K3"]


def test_changed_parameters_and_damaged_files_are_computed_again(tmp_path):
    map_knees(power_of, knees_of(1, 3), tmp_path, {"power": 2})
    (tmp_path / "K3_out.txt").write_text("damaged")
    (tmp_path / "K1.json").write_text('{"half": ')
    map_knees(power_of, knees_of(1, 3), tmp_path, {"power": 2})
    assert calls(tmp_path) == ["K1", "K1", "K3", "K3"]
    assert list(map_knees(power_of, knees_of(1, 3), tmp_path, {"power": 3})["value"]) == [1, 27]


def test_a_changed_earlier_record_is_a_changed_input(tmp_path):
    for power in (2, 3, 3):
        map_knees(power_of, knees_of(1), tmp_path / "a", {"power": power})
        map_knees(power_of, knees_of(1), tmp_path / "b", {"power": 1}, after=[tmp_path / "a"])
    assert calls(tmp_path / "b") == ["K1", "K1"]


def test_a_replaced_image_without_checksum_is_a_changed_input(tmp_path):
    knees = knees_of(1).assign(ct_sha256=None)
    for content in (b"one", None, b"longer"):
        if content:
            (tmp_path / "ct.nii.gz").write_bytes(content)
        map_knees(with_root, knees, tmp_path, {"root": str(tmp_path)})
    assert calls(tmp_path) == ["K1", "K1"]


def test_a_moved_folder_is_not_computed_again(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ct.nii.gz").write_bytes(b"one")
    for name in ("old", "new"):
        root = tmp_path / name
        map_knees(with_root, knees_of(1).assign(ct_sha256=None), root, {"root": str(root)})
        if name == "old":
            root.rename(tmp_path / "new")
    assert calls(tmp_path / "new") == ["K1"]


def test_a_worker_that_dies_costs_no_finished_knee(tmp_path):
    knees = knees_of(0, 1, 2, 3)
    map_knees(die_once, knees[:1], tmp_path, {})
    before = (tmp_path / "K0.json").stat().st_mtime_ns
    with pytest.raises(RuntimeError, match="worker process .* was unexpectedly terminated"):
        map_knees(die_once, knees, tmp_path, {}, n_jobs=2)
    assert list(map_knees(die_once, knees, tmp_path, {}, n_jobs=2)["error"]) == [""] * 4
    assert (tmp_path / "K0.json").stat().st_mtime_ns == before


def test_the_hash_of_code_follows_imports():
    source = "from . import dicom\nfrom ..cohort.images import x\nimport ctsma.cohort, numpy"
    expected = {"ctsma.cohort.dicom", "ctsma.cohort.images", "ctsma.cohort"}
    assert imported_modules(ast.parse(source), "ctsma.cohort") == expected
    assert source_sha256("ctsma.cohort.manifest") != source_sha256("ctsma.common")


def test_json_is_written_whole_with_plain_values(tmp_path):
    values = {"x": np.float32(0.5), "n": np.nan, "v": np.arange(2), "p": tmp_path}
    path = write_json(tmp_path / "a.json", values)
    plain = {"x": 0.5, "n": None, "v": [0, 1], "p": str(tmp_path)}
    assert json.loads(path.read_text()) == plain
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == plain
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_full_disk_stops_the_work_and_keeps_finished_knees(tmp_path, n_jobs):
    map_knees(fill_disk, knees_of(0), tmp_path, {}, n_jobs=n_jobs)
    with pytest.raises(InputError) as caught:
        map_knees(fill_disk, knees_of(0, 1), tmp_path, {}, n_jobs=n_jobs)
    machine = re.escape(platform.node())
    assert re.fullmatch(
        f".+: cannot be written, as the disk of {machine} is full; .+", str(caught.value)
    )
    assert [file.name for file in tmp_path.glob("*.json")] == ["K0.json"]
