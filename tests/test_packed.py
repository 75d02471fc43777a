"""Packed patches: file, networks, statistics, training and measurements with torch and numpy."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import pack_patches
import packed
import packed_networks
import packed_statistics

from ctsma import agreement
from ctsma.common import BIOMARKERS
from ctsma.distillation import prepare
from ctsma.models import build as ctsma_build
from ctsma.models import ridge_estimates
from ctsma.patches import load_patches

ENDS = "ci_low", "ci_high"
EACH = 9  # patches of a knee: more than one part of a batch


def knee_folder(path, n_knees=8, seed=0):
    """A folder of scanned knees: stripes of drawn width, sharp in MR, averaged in CT."""
    rng = np.random.default_rng(seed)
    tables = []
    for number in range(n_knees):
        share, period = rng.uniform(0.2, 0.6, (2, EACH))
        bone = np.mod(np.arange(48)[None] / (6 + 10 * period[:, None]), 1) < share[:, None]
        bone = np.broadcast_to(bone[:, None, None], (EACH, 12, 48, 48))
        mr = (400 * (1 - bone) + rng.normal(60, 20, bone.shape)).astype(np.float16)
        ct_bone = bone.reshape(-1, 12, 24, 2, 24, 2).mean((3, 5))
        hu = (900 * ct_bone + rng.normal(0, 20, ct_bone.shape)).astype(np.float16)
        voi = np.ones(bone.shape, bool)
        voi[:, :, :6] = False
        np.savez(path / f"k{number}.npz", mr=mr, ct=hu, voi=voi)
        width = 0.2 * (6 + 10 * period)
        targets = (share, share * width, (1 - share) * width, 1 / width)
        table = pd.DataFrame({"patch_id": range(EACH)})
        table = table.assign(knee_id=f"k{number}", subject_id=f"s{number}", flag="")
        table = table.assign(**dict(zip(BIOMARKERS, targets, strict=True)))
        hu = rng.uniform(900, 1300)
        tables.append(table.assign(cortical_hu_femur=hu, cortical_hu_tibia=hu + 100))
    pd.concat(tables).to_csv(path / "patches.csv", index=False)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return knee_folder(tmp_path_factory.mktemp("knees"))


@pytest.fixture(scope="module")
def file(folder):
    path = folder / "patches.npz.xz"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack_patches, "N_FOLDS", 2)
        pack_patches.pack(folder, path)
    return path


@pytest.fixture(scope="module")
def data(file):
    return packed.read_packed(file)


def part_of(data):
    """Fields of a packed file, of its first patches alone."""
    names = set(packed.Packed.__dataclass_fields__) - {"about", "ridge", "rho"}
    rows = {name: getattr(data, name)[:EACH] for name in names}
    return rows | {"ridge": data.ridge[:, :EACH], "rho": data.rho}


def test_a_packed_file_holds_the_patches(folder, data):
    patches = load_patches(folder)
    original = prepare(patches)
    a, b = (values[:, None, None, None] for values in data.relative_mr())
    error = a + b * data.mr - original.mr
    assert error.std() < 0.01 * original.mr.astype(float).std()
    assert np.abs(data.ct - original.ct).max() <= 0.5
    assert np.array_equal(data.voi, original.voi)
    assert np.array_equal(data.targets, original.targets)
    assert np.array_equal(data.cortical_hu, original.cortical_hu)
    assert list(data.knee_id) == list(original.knees)
    assert data.about["precision_loss"]["mr"] < 0.01
    assert data.about["schema"] == packed.SCHEMA


def test_the_packed_ridge_is_that_of_the_training_subjects(folder, data):
    original = prepare(load_patches(folder))
    fit, test = data.fold != 1, data.fold == 1
    assert not set(data.subject_id[fit]) & set(data.subject_id[test])
    known = original.features[fit], original.targets[fit], original.subjects[fit]
    expected = ridge_estimates(*known, original.features[test], original.knees[fit])
    assert np.allclose(data.ridge[1][test], expected, rtol=1e-5)
    assert data.rho.shape == (2, len(packed.RHO_OF), 4)


def test_a_damaged_or_foreign_file_is_refused(file, tmp_path, data, capsys):
    content = file.read_bytes()
    for name, other in (("cut", content[:-999]), ("text", b"hello")):
        (tmp_path / name).write_bytes(other)
        with pytest.raises(packed.BadInput, match="damaged"):
            packed.read_packed(tmp_path / name)
    with pytest.raises(packed.BadInput, match="does not exist"):
        packed.read_packed(tmp_path / "nothing")
    arrays = part_of(data)
    moved = tmp_path / "moved"
    moved.write_bytes(packed.packed_bytes(arrays, {}))
    assert packed.read_packed(moved).n_folds == 2

    def fail():
        packed.read_packed(tmp_path / "text")

    with pytest.raises(SystemExit) as stopped:
        packed.run_main(fail)
    assert stopped.value.code == packed.BAD_INPUT
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_another_schema_or_split_is_refused(tmp_path, data, monkeypatch):
    arrays = part_of(data)
    with monkeypatch.context() as patched:
        patched.setattr(packed, "SCHEMA", 99)
        (tmp_path / "schema").write_bytes(packed.packed_bytes(arrays, {}))
    with pytest.raises(packed.BadInput, match="schema 99"):
        packed.read_packed(tmp_path / "schema")
    with monkeypatch.context() as patched:
        patched.setattr(packed, "split_hash", lambda *_: "other")
        (tmp_path / "split").write_bytes(packed.packed_bytes(arrays, {}))
    with pytest.raises(packed.BadInput, match="another split"):
        packed.read_packed(tmp_path / "split")


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("size", ["compact", "paper"])
def test_networks_equal_those_of_the_package(role, size):
    arm_input = "mr" if role == "teacher" else "ct"
    own_size = "published" if size == "paper" else size
    original = ctsma_build(arm_input, size, torch.Generator().manual_seed(0)).eval()
    own = packed_networks.build(own_size, role, 2, sigmoid=size == "paper", seed=1).eval()
    values, state = list(original.state_dict().values()), own.state_dict()
    own.load_state_dict(dict(zip(state, values, strict=True)))
    side = 48 if role == "teacher" else 24
    x = torch.rand(1, 2, 12, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = original(x), own(x)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_both_networks_have_equal_maps_on_the_native_grid():
    shapes = []
    for role, side, channels in (("teacher", 48, 2), ("student", 24, 3)):
        network = packed_networks.build("native", role, channels, sigmoid=True, seed=0).eval()
        with torch.no_grad():
            _, maps = network(torch.rand(1, channels, 12, side, side))
        shapes.append([m.shape for m in maps])
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == packed_networks.N_STAGES["native"]


def test_statistics_equal_those_of_the_package():
    rng = np.random.default_rng(0)
    knees = np.repeat([f"k{i}" for i in rng.permutation(8)], 5)
    subjects = np.array([f"s{9 - int(k[1:]) // 2}" for k in knees])
    reference = rng.normal(size=(40, 4))
    one, other = (reference + rng.normal(size=(40, 4)) for _ in range(2))
    frame = pd.DataFrame({"arm": "a", "knee_id": knees, "subject_id": subjects})
    frame = frame.assign(patch_id=np.arange(40), **dict(zip(BIOMARKERS, one.T, strict=True)))
    frame = frame.assign(**{f"{b}_reference": reference[:, i] for i, b in enumerate(BIOMARKERS)})
    rows = agreement.agreement_table(frame, np.random.default_rng(1), n_resamples=50)
    options = subjects, knees, np.random.default_rng(1), 50
    found = packed_statistics.agreement(reference, one, *options)
    for row in rows.to_dict("records"):
        for name in packed_statistics.STATISTICS:
            mine = found[name][row["biomarker"]]
            expected = row[name], row[f"{name}_ci_low"], row[f"{name}_ci_high"]
            assert np.allclose(list(mine.values()), expected)
    pairs = reference, one, other, subjects, knees
    table = agreement.bootstrap_differences(*pairs, np.random.default_rng(1), 50)
    mine = packed_statistics.differences(*pairs, np.random.default_rng(1), 50)
    for row in table.to_dict("records"):
        values = mine[row["statistic"]][row["biomarker"]]
        assert np.allclose(list(values.values()), [row[n] for n in ("difference", *ENDS)])
