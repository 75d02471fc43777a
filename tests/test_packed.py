"""Packed patches: file, networks, statistics, training and measurements with torch and numpy."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import pack_patches
import packed
import packed_networks
import packed_statistics
import packed_training
import train_packed
from packed_training import Arm, Resident

from ctsma import agreement
from ctsma.common import BIOMARKERS
from ctsma.distillation import ARMS, fit_normalisation, prepare
from ctsma.distillation.data import make_input
from ctsma.distillation.losses import knee_level_mse
from ctsma.models import build as ctsma_build
from ctsma.patches import load_patches
from kneesim.difficulty import ridge_estimates

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


def test_patches_packed_again_are_known_as_the_same(tmp_path, data):
    arrays, found = part_of(data), []
    darker = arrays | {"ct": arrays["ct"] - 1}
    for about, content in (
        ({"git_commit": "a"}, arrays),
        ({"git_commit": "b"}, arrays),
        ({}, darker),
    ):
        (tmp_path / "file").write_bytes(packed.packed_bytes(content, about))
        found.append(packed.read_packed(tmp_path / "file").images_sha256())
    assert found[0] == found[1] != found[2]


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
    if size == "paper":
        assert own.grid == (original.edge,) * 3
        original.edge //= 2  # an eighth of the voxels, for speed
        own.grid = (original.edge,) * 3
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


@pytest.mark.parametrize("arm", [train_packed.TEACHER, Arm("student", cortex=True)])
@pytest.mark.parametrize("flips", packed_training.FLIPS)
def test_inputs_equal_those_of_the_package(folder, data, arm, flips):
    original = prepare(load_patches(folder))
    patches, fit = Resident(data, "cpu"), np.flatnonzero(data.fold != 0)
    patches.use_fold(0)
    scale = fit_normalisation(original, fit, ARMS["mr_teacher"])
    scale["input"] = "mr" if arm.role == "teacher" else "ct+cortex"
    axes = [axis for axis, flip in zip((1, 3), flips, strict=True) if flip]
    expected = make_input(original, fit[:4], scale, "cpu", axes)
    member = packed_training.Member(arm, "compact", "cpu", packed_training.Speed(False))
    x = patches.input(arm.role, torch.from_numpy(fit[:4]), torch.tensor(flips), augment=False)
    found = member.own_input(x)
    assert torch.allclose(found, expected, atol=0.03)
    assert (patches.target[fit].amin(0) == 0).all()
    assert (patches.target[fit].amax(0) == 1).all()


def test_augmentation_has_the_drawn_size():
    torch.manual_seed(0)
    hu = torch.full((400, 12, 24, 24), 300.0)
    changed = packed_training.augmented(hu) - hu
    level = changed.mean((1, 2, 3)).std()
    expected = np.hypot(300 * packed_training.GAIN_SD, packed_training.SHIFT_HU)
    assert abs(level - expected) < 0.15 * expected
    noise = changed.std((1, 2, 3)).mean()
    assert abs(noise - packed_training.NOISE_HU / 2) < 0.5


def test_batches_hold_whole_parts_of_knees_and_every_patch():
    knees = np.repeat(["a", "b", "c"], [16, 9, 3])
    rows = np.arange(len(knees))
    batches = packed_training.epoch_batches(knees, rows, 2, np.random.default_rng(0))
    assert batches.shape == (3, 16)
    assert set(batches.ravel()) == set(rows)
    for part in batches.reshape(-1, packed_training.PER_KNEE):
        assert len(set(knees[part])) == 1


def small(file, out, **changes):
    """Arguments of a short training on the CPU."""
    options = {"network": "compact", "device": "cpu", "precision": "float32", "epochs": 2}
    options |= {"seeds": 1, "knees": 2, "minutes": 5} | changes
    given = [str(file), "--out", str(out)]
    for name, value in options.items():
        given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return given


SHORT = ["ct_only", "l1_0.1", "last_0.1_cortex", "residual_l1_0.1"]


def test_training_is_complete_resumed_and_compared(file, tmp_path, capsys):
    options = small(file, tmp_path, arms=SHORT, epochs=1)
    train_packed.main([*options, "--minutes", "0"])
    assert len(json.loads((tmp_path / "compact.json").read_text())["missing"]) == 10
    train_packed.main(options)
    found = json.loads((tmp_path / "compact.json").read_text())
    assert found["missing"] == []
    assert found["complete"]
    assert set(found["icc"]) == {"teacher", *SHORT, train_packed.RIDGE}
    assert found["optimisation_done"] == (found["relative_error"]["ct_only"]["mean"] < 0.8)
    pairs = {(row["arm"], row["against"]) for row in found["differences"]}
    assert ("l1_0.1", "ct_only") in pairs
    assert not list(tmp_path.rglob("*.pt"))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*fold*.npz")}
    next(path for path in files if path.name.startswith("l1_0.1_fold1")).unlink()
    train_packed.main(options)
    assert "the teacher is trained again" in capsys.readouterr().out
    anew = "l1_0.1_fold1", "teacher_fold1"
    kept = [path for path in files if not path.name.startswith(anew)]
    assert all(path.stat().st_mtime_ns == files[path] for path in kept)
    assert json.loads((tmp_path / "compact.json").read_text())["missing"] == []


def test_a_stop_leaves_complete_folds(file, tmp_path):
    study_options = small(file, tmp_path, arms=["ct_only"], seeds=2, epochs=1)
    train_packed.main(study_options)
    for path in tmp_path.rglob("ct_only_fold1_seed*.npz"):
        path.unlink()
    train_packed.main([*study_options, "--minutes", "0"])
    found = json.loads((tmp_path / "compact.json").read_text())
    assert found["folds"] == [0]
    assert not found["complete"]
    assert found["missing"] == ["ct_only, fold 1, seed 0", "ct_only, fold 1, seed 1"]


def test_bad_input_is_one_sentence(file, tmp_path, monkeypatch, data):
    with pytest.raises(packed.BadInput, match="not available"):
        packed_training.check_device("cuda", True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        with pytest.raises(packed.BadInput, match="no bfloat16"):
            packed_training.check_device("cuda", True)
    source = {"schema": packed.SCHEMA, "split_sha256": "x"} | data.about
    (tmp_path / "source.json").write_text(json.dumps(source | {"split_sha256": "other"}))
    with pytest.raises(packed.BadInput, match="another split"):
        train_packed.main(small(file, tmp_path))
    (tmp_path / "source.json").write_text(json.dumps(source | {"protocol_sha256": "other"}))
    with pytest.raises(packed.BadInput, match="another protocol"):
        train_packed.main(small(file, tmp_path))
    with pytest.raises(packed.BadInput, match="patches that are reported"):
        train_packed.check_other_patches(data, data)


def test_too_little_memory_names_the_batch_that_fits(data, monkeypatch):
    patches = Resident(data, "cpu")
    patches.use_fold(0)
    speed = packed_training.Speed(False, False, False)
    for n_arms, remedy in ((1, "a batch of 8 fits, use --knees 1"), (3, "use --together 1")):
        group = packed_training.Group([Arm("ct_only")] * n_arms, "compact", patches, 4, speed)
        step = group.step

        def limited(group=group, step=step):
            if len(group.at) > 8:
                raise torch.OutOfMemoryError("full")
            step()

        monkeypatch.setattr(group, "step", limited)
        with pytest.raises(packed.BadInput, match=remedy):
            group.prepare()


def test_members_of_a_group_learn_as_they_do_alone(data):
    patches = Resident(data, "cpu")
    patches.use_fold(0)
    speed, choice = packed_training.Speed(False), {"rate": 1e-3, "warm_up": 0.3}
    arms, rows = [Arm("ct_only"), Arm("calibrated", cortex=True)], patches.rows(0)[1]
    options = "compact", patches, 2, speed
    both = packed_training.Group(arms, *options)
    both.train(0, 0, 1, [choice] * 2)
    for arm, member in zip(arms, both.members, strict=True):
        alone = packed_training.Group([arm], *options)
        alone.train(0, 0, 1, [choice])
        expected = alone.predict(alone.members[0], rows)
        assert np.allclose(both.predict(member, rows), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 1, 1), 1), ((1, 1, 1), 2), ((1, 7, 7), (1, 2, 2)), ((3, 3, 3), 1)]
)
def test_every_form_of_a_convolution_gives_the_same(kernel, stride, monkeypatch):
    torch.manual_seed(0)
    padding = [k // 2 for k in kernel]
    layer = packed_networks.Convolution(3, 5, kernel, stride, padding).double()
    x = torch.rand(2, 3, 4, 8, 8, dtype=torch.double)
    fast = layer(x)
    monkeypatch.setattr(packed_networks.Convolution, "SPLIT", False)
    assert torch.allclose(fast, layer(x))


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (1, 1, 1)])
def test_every_form_of_an_upsampling_gives_the_same(factors, monkeypatch):
    torch.manual_seed(0)
    layer = packed_networks.Upsampling(3, 5, factors, factors).double()
    x = torch.rand(2, 3, 4, 6, 6, dtype=torch.double)
    fast = layer(x)
    monkeypatch.setattr(packed_networks.Convolution, "SPLIT", False)
    assert torch.allclose(fast, layer(x))


def test_the_loss_is_that_of_the_package(data):
    rng, rho = torch.Generator().manual_seed(0), torch.tensor([0.0, 0.3, 0.6, 0.75])
    error = torch.rand(24, 4, generator=rng)
    knees = torch.arange(24) // packed_training.PER_KNEE
    theta = 1 - ((1 - rho) / (1 - rho + packed_training.PER_KNEE * rho)).sqrt()
    grouped = error.view(-1, packed_training.PER_KNEE, 4)
    own = packed_training.knee_level_loss(grouped, theta)
    assert torch.allclose(own, knee_level_mse(error, knees, rho))


def test_tuning_uses_other_knees(file, tmp_path, tmp_path_factory, monkeypatch):
    others = knee_folder(tmp_path_factory.mktemp("others"), n_knees=4, seed=1)
    tune = others / "others.npz.xz"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack_patches, "N_FOLDS", 2)
        pack_patches.pack(others, tune)
    options = small(file, tmp_path, arms=["ct_only"], epochs=1, tune=tune, rates=[1e-4, 1e-2])
    monkeypatch.setattr(train_packed, "steady", lambda found: found[1])
    train_packed.main(options)
    found = json.loads((tmp_path / "compact.json").read_text())
    assert found["tuned"]
    candidates = found["settings"]["student"]["candidates"]
    assert [row["rate"] for row in candidates] == [1e-4, 1e-2]
    teacher, student = (found["settings"][role] for role in ("teacher", "student"))
    assert teacher["rate"] == student["rate"] == 1e-2
    assert teacher["tuning_error"] != student["tuning_error"]


def test_a_rate_below_one_that_diverges_is_not_chosen():
    errors = {1e-4: 0.8, 3e-4: 0.7, 1e-3: 0.6, 3e-3: 2.0}
    rows = [{"rate": r, "warm_up": 0.3, "tuning_error": e} for r, e in errors.items()]
    assert train_packed.steady(rows)["rate"] == 3e-4
    with pytest.raises(packed.BadInput, match="--rates"):
        train_packed.steady(rows[3:])


def test_speed_is_measured_and_missing_rows_are_named(file, tmp_path):
    out = tmp_path / "speed.json"
    options = [str(file), "--out", str(out), "--device", "cpu", "--sizes", "compact"]
    options += ["--knees", "1", "--precision", "float32"]
    gpu.main([*options, "--minutes", "0"])
    assert len(json.loads(out.read_text())["missing"]) == len(gpu.cases(["compact"], [1]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu, "MODES", {"eager": (False, False)})
        gpu.main(options)
    found = json.loads(out.read_text())
    assert found["missing"] == []
    for row in found["rows"]:
        assert row["patches_per_s"] > 0
        assert row["share_of_plain"] > 0
        assert any("convolution" in kernel["name"] for kernel in row["kernels"])
        assert 0.5 < sum(kernel["share"] for kernel in row["kernels"]) <= 1
    with pytest.raises(packed.BadInput, match="not available"):
        gpu.main([str(file), "--out", str(out)])
