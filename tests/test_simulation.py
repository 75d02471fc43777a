"""The simulated cohort: closed forms of its physics, ground truth against images, error paths."""

import argparse
import copy
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import yaml
from scipy.ndimage import map_coordinates
from scipy.special import ndtr

from ctsma.biomarkers import morphometry
from ctsma.cohort import read_manifest, read_volume, write_volume
from ctsma.common import BIOMARKERS, BONES, InputError
from ctsma.patches import collect_tables
from kneesim import (
    bone_cube,
    bssfp_signal,
    command,
    draw_subjects,
    extract_true_patches,
    ground_truth_slice,
    level_half_width,
    load_ground_truth,
    load_protocol,
    make_tile,
    measure_ground_truth,
    painting,
    protocol_sha256,
    read_calibration,
    read_labels,
    read_truth,
    simulate_knee,
    write_cohort,
)
from kneesim.anatomy import FIELDS, LOW_MM, SPACING_MM
from kneesim.ct import CT_AXES
from kneesim.difficulty import TARGETS
from kneesim.knees import cut_short, settings
from kneesim.microstructure import FINE_VOXELS, TILE_SIZE, is_bone, sub_samples
from kneesim.mr import MR_AXES, k_space_cut
from kneesim.painting import TISSUES, Rendering, apply, make_grid, painted, tissue_fields
from kneesim.protocol import CALIBRATION, PROTOCOL
from kneesim.subject import load_template, make_subject

FIELD_MM = (60.0, 40.0, 40.0)
# The protocol may change only with an entry in docs/deviations.md and a rerun of all results.
FROZEN = "e669fc733cb28164318b1ab794eb6824e81c8062b7dcfdb53e035d8880531921"
SPECIMEN_MM = 0.0456  # voxel of the micro-CT specimen


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    return make_tile(np.random.default_rng(3), 1.5, 0.2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two knees, the first with a second MR; seed 5 gives one left and one right knee."""
    root = tmp_path_factory.mktemp("cohort")
    return write_cohort(root, "small", 2, 5, FIELD_MM, n_rescan=1)


@pytest.fixture(scope="module")
def knees(cohort) -> pd.DataFrame:
    return read_manifest(cohort).set_index("knee_id", drop=False)


# ---- protocol


def test_protocol_is_complete_sourced_and_draws_a_population():
    protocol = load_protocol()
    assert all(q.unit and q.source for group in protocol.values() for q in group.values())
    one, many = draw_subjects(protocol, 1, 5), draw_subjects(protocol, 400, 5)
    assert one.iloc[0].equals(many.iloc[0])  # a knee does not depend on how many there are
    assert 0.5 < many["oa"].mean() < 0.7  # prevalence 0.60, standard error 0.025
    # Unit variance by construction, standard error 0.035.
    assert abs(many["severity"].std() - 1) < 0.12


@pytest.mark.parametrize(
    ("group", "name", "change", "words"),
    [
        ("anatomy", "plate", {"low": -0.1}, "negative"),
        ("microstructure", "bv_tv_tibia_medial", {"value": 1.2}, "fraction above 1"),
        ("ct", "noise", {"low": 90}, "low above high"),
        ("mr", "snr", {"source": None}, "source"),
    ],
)
def test_an_impossible_protocol_value_is_refused(tmp_path, group, name, change, words):
    content = copy.deepcopy(yaml.safe_load(PROTOCOL.read_text()))
    content[group][name] |= change
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"{group}.{name}.*{words}"):
        load_protocol(path)


def test_a_protocol_without_an_entry_is_refused(tmp_path):
    content = yaml.safe_load(PROTOCOL.read_text())
    del content["ct"]["noise"]
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="entries of ct missing.*noise"):
        load_protocol(tmp_path / "protocol.yaml")


def test_the_protocol_is_frozen_and_its_calibration_meets_the_published_ranges():
    assert protocol_sha256() == FROZEN
    frozen = read_calibration()
    assert frozen["knees"] >= 300
    for name, (low, high, source) in TARGETS.items():
        assert low <= frozen["figures"][name]["value"] <= high, f"{name}: {source}"
    for name in ("auc_mr_reference", "auc_mean_hu"):  # no effect of disease, no classifier
        null = frozen["null"]["without_effects"][name]
        assert null["ci_low"] <= 0.5 <= null["ci_high"], name


def test_a_calibration_of_another_protocol_is_refused(tmp_path, monkeypatch):
    (tmp_path / CALIBRATION.name).write_text('{"protocol_sha256": "0"}')
    monkeypatch.setattr("kneesim.protocol.CALIBRATION", tmp_path / CALIBRATION.name)
    with pytest.raises(InputError, match="another protocol"):
        read_calibration()


# ---- microstructure


def test_level_set_has_the_bone_volume_fraction_of_the_closed_form():
    bv_tv, rodness = np.meshgrid(np.linspace(0.05, 0.7, 9), np.linspace(0, 1, 5))
    w = level_half_width(bv_tv, rodness)
    # 40 bisections of 8 leave 1e-11.
    assert np.allclose(ndtr(rodness + w) - ndtr(rodness - w), bv_tv, atol=1e-9)
    assert np.allclose(ndtr(level_half_width(0.3, 0.0)) * 2 - 1, 0.3)


def test_tile_is_periodic_and_of_unit_variance_where_it_is_sampled(tile):
    # The step over the seam is no larger than steps elsewhere, to the sampling error of one face.
    inner = np.abs(np.diff(tile, axis=0)).mean()
    assert np.abs(tile[-2] - tile[-1]).mean() == pytest.approx(inner, rel=0.1)
    for axis in range(3):
        ends = np.take(tile, [0, TILE_SIZE], axis)
        assert (np.diff(ends, axis=axis) == 0).all()  # the last voxel repeats the first
    points = np.random.default_rng(0).uniform(0, 4 * TILE_SIZE, (40000, 3))
    w = np.full(len(points), level_half_width(0.3, 0.0))
    for theta in (0.0, 0.7, np.pi / 2):
        bony = is_bone(tile, points, np.zeros(len(points)), w, np.full(len(points), theta))
        # A tile holds some 2000 independent wavelengths: standard error about 0.01.
        assert bony.mean() == pytest.approx(0.3, abs=0.02)
    spectrum = np.abs(np.fft.rfft(tile[:, :, :-1, 0], axis=2)).mean((0, 1))
    # Projections of an isotropic band lie below its edge.
    assert spectrum.argmax() <= TILE_SIZE / FINE_VOXELS * 1.2


def test_sub_samples_of_a_slice_profile_have_its_width():
    samples, _ = sub_samples(np.eye(3), (1, 1, 41), profile=1.2)
    assert samples[:, 3].sum() == pytest.approx(1, abs=1e-6)
    sd = np.sqrt((samples[:, 3] * samples[:, 2] ** 2).sum())
    # A Gaussian of FWHM 1.2 has SD 0.51; cut at twice its half width, 2.35 SD, it keeps 0.94 of it.
    assert sd == pytest.approx(0.94 * 1.2 / np.sqrt(8 * np.log(2)), rel=0.01)
    box, _ = sub_samples(np.eye(3), (3, 3, 4))
    assert np.abs(box[:, :3]).max() < 0.5 and np.allclose(box[:, 3], 1 / 36)


def test_simulated_bone_has_the_microstructure_of_a_real_specimen(real_data):
    image = sitk.ReadImage(str(real_data / "microct_trabecular.nii.gz"))
    real = sitk.GetArrayFromImage(image)[25:-25, 25:-25, 25:-25] > 0
    cube = bone_cube(float(real.mean()), real.shape, SPECIMEN_MM, seed=0)
    specimen, simulated = morphometry(real, SPECIMEN_MM), morphometry(cube, SPECIMEN_MM)
    for name in ("tb_th_mm", "tb_sp_mm", "tb_n_per_mm", "anisotropy"):
        # Sampling error of one cube of 6 mm: 3 %.
        assert simulated[name] == pytest.approx(specimen[name], rel=0.10), name
    # Known limitation: a level set has about a quarter of the connections of bone.
    assert 0.15 < simulated["conn_d_per_mm3"] / specimen["conn_d_per_mm3"] < 0.5
    stored = read_calibration()["microstructure"]
    stored_thickness = stored["specimen"]["morphometry"]["tb_th_mm"]
    assert stored_thickness == pytest.approx(specimen["tb_th_mm"], rel=1e-6)
    difference = np.subtract(stored["specimen"]["two_point"], stored["simulated"]["two_point"])
    assert np.abs(difference).max() < 0.05


# ---- scanners


def test_bssfp_signal_has_its_published_limits():
    # T1 = T2 and flip 90 degrees: M = M0 (1 - E1) / (1 - E1^2) = 1 / (1 + E1), no echo decay.
    e1 = np.exp(-5 / 300)
    assert bssfp_signal(300, 300, 5, 0, 90) == pytest.approx(1 / (1 + e1), rel=1e-12)
    assert bssfp_signal(1000, 50, 5, 0, 1e-9) == pytest.approx(0, abs=1e-9)


def test_bssfp_off_resonance_has_its_dark_band_and_refocuses_at_half_the_repetition_time():
    phase = np.linspace(-np.pi, np.pi, 201)
    signal = bssfp_signal(1200, 40, 9, 4.5, 45, phase)
    on = bssfp_signal(1200, 40, 9, 4.5, 45)
    e1, e2, c = np.exp(-9 / 1200), np.exp(-9 / 40), np.cos(np.pi / 4)
    closed = np.sin(np.pi / 4) * (1 - e1) / (1 - (e1 - e2) * c - e1 * e2) * np.exp(-4.5 / 40)
    assert abs(on) == pytest.approx(closed, rel=1e-12)  # the published on-resonance formula
    assert abs(signal).argmin() in (0, 200)  # half a turn in a repetition: the dark band
    assert abs(signal[0]) < 0.3 * abs(on)
    # TE = TR / 2 acts as a spin echo but for T2 decay (Scheffler and Hennig 2003): a few degrees
    # over the pass band.
    assert np.abs(np.angle(signal[40:161])).max() < np.deg2rad(15)


def test_k_space_sampling_keeps_what_is_below_nyquist_and_rings_at_an_edge():
    j, i = np.meshgrid((np.arange(48) - 0.5) / 2, (np.arange(60) - 0.5) / 2, indexing="ij")

    def wave(y, x):
        rows, columns = np.cos(2 * np.pi * 2 * y / 24), np.sin(2 * np.pi * 5 * x / 30)
        return np.cos(2 * np.pi * 3 * y / 24) + columns * rows

    cut = k_space_cut(wave(j, i).astype(np.complex64))
    voxels = np.meshgrid(np.arange(24.0), np.arange(30.0), indexing="ij")
    assert np.abs(cut - wave(*voxels)).max() < 1e-5  # single precision
    step = np.zeros((128, 128), np.complex64)
    step[:, 33:97] = 1
    edge = k_space_cut(step).real[32]
    # Gibbs: 9 % of the step at any resolution; a step of one sample a little more.
    assert 1.03 < edge.max() < 1.11
    assert -0.11 < edge.min() < -0.03


@pytest.mark.parametrize(("scan", "axes"), [("ct", CT_AXES), ("mr", MR_AXES)])
def test_painting_leaves_out_nothing_that_is_seen(monkeypatch, scan, axes):
    protocol, streams = load_protocol(), [5, 0]
    knee = draw_subjects(protocol, 1, 5).iloc[0].to_dict()
    subject = make_subject(knee, protocol, streams, None)
    poses, _ = settings(subject, protocol, streams, [scan], FIELD_MM)
    # From the bearing of a condyle over the flesh beside it to the air.
    centre = apply(poses[scan]["femur"], np.array([[46.0, 0.0, 8.0]]))[0]
    grid = make_grid((48, 12, 8), (1.5, 1.1, 1.3), axes, centre)
    coarse = tissue_fields(subject, poses[scan], grid, [np.full(1, 2.0)] * 4)
    tissues = {name: float(n) for n, name in enumerate(TISSUES, 1)}
    rendering = Rendering(tissues, tissues, scan == "ct", ((1, 1, 5), (1, 1, 3)), 0.5)

    def planes(**options):
        given = subject, poses[scan], grid, coarse, grid, rendering
        image, labels = zip(
            *((i.copy(), n.copy()) for i, n in painted(*given, **options)), strict=True
        )
        return np.stack(image), np.stack(labels)

    fast, labels = planes()
    assert len(np.unique(fast)) > 100 and labels.any()
    hole = (2, 1, 1), (grid.size[0] - 2, grid.size[1] - 1, grid.size[2])
    seen = np.ones(fast.shape, bool)
    seen[hole[0][2] : hole[1][2], hole[0][1] : hole[1][1], hole[0][0] : hole[1][0]] = False
    around, _ = planes(hole=hole)
    assert np.array_equal(around[seen], fast[seen])
    # The same function, not compiled, that takes no cell for plain.
    monkeypatch.setattr(painting, "_is_plain", lambda *_: False)
    monkeypatch.setattr(painting, "paint", painting.paint.py_func)
    slow, slow_labels = planes()
    assert np.abs(slow - fast).max() < 1e-5 * np.abs(fast).max()  # single precision
    assert np.array_equal(slow_labels, labels)


def test_some_scans_lose_one_face_of_their_field_of_view_and_nothing_else():
    pose, rng = load_protocol()["pose"], np.random.default_rng(0)
    field, centre = np.full(3, 90.0), np.zeros(3)
    cuts = [cut_short(field, centre, pose, rng) for _ in range(600)]
    short = [(size, middle) for size, middle in cuts if (size != field).any()]
    share = pose["partial_field"].value
    assert len(short) / 600 == pytest.approx(share, abs=0.05)  # standard error 0.015
    for size, middle in short:
        faces = np.concatenate([middle - size / 2, middle + size / 2])
        assert (np.abs(faces) <= 45 + 1e-9).all()
        assert (np.abs(faces) > 44.9).sum() == 5  # five faces stay
        assert size[0] == 90  # left and right are never cut: both compartments are seen


# ---- cohort on disk


def test_images_are_stored_as_a_clinic_stores_them(cohort, knees):
    assert sorted(knees["side"]) == ["L", "R"]
    assert knees["mr_rescan"].notna().tolist() == [True, False]
    ct = read_volume(cohort.parent / knees.loc["k0000", "ct"], "CT")
    mr = read_volume(cohort.parent / knees.loc["k0000", "mr"], "MR")
    assert np.allclose(ct.GetSpacing(), (0.45, 0.45, 0.625), atol=1e-4)
    assert np.allclose(mr.GetSpacing(), (0.21875, 0.21875, 0.75), atol=1e-5)
    # Sagittal: columns go to the back, rows to the feet, slices to the patient's right.
    direction = np.array(mr.GetDirection()).reshape(3, 3)
    assert np.allclose(direction, [[0, 0, -1], [1, 0, 0], [0, -1, 0]], atol=1e-6)
    extent = np.abs(direction) @ (np.array(mr.GetSize()) * mr.GetSpacing())
    assert np.allclose(extent, FIELD_MM, atol=0.75)  # whole voxels
    stored = sitk.GetArrayViewFromImage(mr)
    assert stored.min() >= 0 and stored.max() <= 2047


def test_a_knee_is_written_whole_once_and_the_same_bytes_from_one_seed(
    cohort, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kneesim.knees.write_truth", full)
        with pytest.raises(InputError, match="disk of .* is full"):
            write_cohort(tmp_path, "small", 1, 5, (30.0, 30.0, 30.0))
    assert not (tmp_path / "small.csv").exists()
    path = write_cohort(tmp_path, "small", 1, 5, FIELD_MM, n_rescan=1)
    files = [*tmp_path.glob("images/k0000*"), *tmp_path.glob("truth/k0000*")]
    assert len(files) == 9
    for file in files:
        other = cohort.parent / file.relative_to(tmp_path)
        assert file.read_bytes() == other.read_bytes(), file.name
    before = (tmp_path / "images/k0000_ct.nii").stat().st_mtime_ns
    assert write_cohort(tmp_path, "small", 1, 5, FIELD_MM, n_rescan=1) == path
    assert (tmp_path / "images/k0000_ct.nii").stat().st_mtime_ns == before


def test_an_image_that_the_disk_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    image = sitk.Image(30, 40, 50, sitk.sitkInt16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # of any file, as if full
    try:
        with pytest.raises(OSError, match="No space left"):
            write_volume(image, tmp_path / "images" / "k0000_ct.nii")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "images").iterdir())


def test_a_knee_that_fails_stops_the_cohort_with_its_reason(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((20, 20, 20), np.uint8))
    sitk.WriteImage(image, str(tmp_path / "empty.nrrd"))
    with pytest.raises(InputError, match="no femur"):
        write_cohort(tmp_path, "small", 1, 5, FIELD_MM, anatomy=tmp_path / "empty.nrrd")
    assert not (tmp_path / "small.csv").exists()


def test_the_command_passes_its_options_on(tmp_path, monkeypatch):
    given, lines = {}, []

    def write(**options):
        given.update(options)
        return tmp_path / "simulated.csv"

    monkeypatch.setattr("kneesim.command.write_cohort", write)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--out", str(tmp_path), "--knees", "3", "--rescans", "1"])
    assert command.run(arguments, lines.append) == 0
    assert (given["n_knees"], given["n_rescan"], given["seed"]) == (3, 1, 0)
    assert "simulated.csv" in lines[-1]


# ---- ground truth


def _values_at(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    index = [image.TransformPhysicalPointToContinuousIndex(p) for p in points.tolist()]
    array = sitk.GetArrayViewFromImage(image)
    return map_coordinates(array, np.array(index)[:, ::-1].T, order=1, mode="nearest")


@pytest.mark.parametrize("scan", ["mr", "mr_rescan"])
def test_true_transforms_map_bone_of_the_ground_truth_onto_the_mr(cohort, knees, scan):
    truth = read_truth(cohort.parent, "k0000")
    mr = sitk.ReadImage(str(cohort.parent / knees.loc["k0000", scan]), sitk.sitkFloat32)
    transforms = truth.transforms if scan == "mr" else truth.rescan_transforms
    for bone in BONES:
        points = truth.target_points_lps(bone)
        assert len(points) > 200
        around = points[:, None] + np.random.default_rng(1).uniform(-0.15, 0.15, (1, 12, 3))
        bony = truth.microstructure(bone, around.reshape(-1, 3)).reshape(-1, 12).mean(1)
        correlation = {}
        for shift in ((0, 0, 0), (0, 1.0, 1.0)):
            moved = [transforms[bone].TransformPoint(q) for q in points + np.array(shift)]
            correlation[shift] = np.corrcoef(bony, _values_at(mr, np.array(moved)))[0, 1]
        # Bone is dark; a voxel 0.75 mm thick and noise leave about -0.6, a shift of 1.4 mm nothing.
        assert correlation[0, 0, 0] < -0.4
        assert abs(correlation[0, 1.0, 1.0]) < 0.25


def test_labels_hold_the_targets_and_leave_the_joint_open(cohort):
    for knee_id in ("k0000", "k0001"):
        truth = read_truth(cohort.parent, knee_id)
        labels = sitk.GetArrayViewFromImage(truth.labels)
        assert set(np.unique(labels)) == {0, 1, 2}
        for bone, value in BONES.items():
            for point in truth.target_points_lps(bone).tolist():
                assert truth.labels[truth.labels.TransformPhysicalPointToIndex(point)] == value
        femur = sitk.SignedMaurerDistanceMap(
            truth.labels == 1, squaredDistance=False, useImageSpacing=True
        )
        gap = sitk.GetArrayViewFromImage(femur)[labels == 2].min()
        assert 2.5 < gap < 6  # 4.3 mm by protocol, warped by a few tenths and measured to a voxel


def test_medial_is_to_the_left_of_a_right_knee_and_to_the_right_of_a_left_one(cohort, knees):
    for knee_id, side in knees["side"].items():
        truth = read_truth(cohort.parent, knee_id)
        points = truth.target_points_lps("tibia")
        own = truth.bone_points("tibia", points)
        correlation = np.corrcoef(points[:, 0], own[:, 0])[0, 1]
        assert correlation * (1 if side == "R" else -1) > 0.9


def test_without_effects_an_ill_knee_is_the_healthy_one_bit_for_bit(tmp_path):
    """Nothing but the effects that the protocol names can carry the label into the images."""
    content = yaml.safe_load(PROTOCOL.read_text())
    for name, entry in content["disease"].items():
        if "value" in entry and not name.startswith(("severity_", "kl_")):
            entry["value"] = 0.0
    null = tmp_path / "null.yaml"
    null.write_text(yaml.safe_dump(content))
    knee = draw_subjects(load_protocol(), 1, 5).iloc[0].to_dict()
    healthy = {"oa": 0, "kl_grade": 0, "severity": -1.5, "age": 45.0, "bmi": 22.0}
    ill = {"oa": 1, "kl_grade": 4, "severity": 2.0, "age": 75.0, "bmi": 35.0}

    def images(change: dict, protocol: Path | None) -> list[bytes]:
        root = tmp_path / f"{change['oa']}_{protocol is None}"
        given = {"root": root, "seed": 5, "field_of_view_mm": (50, 35, 35), "protocol": protocol}
        simulate_knee(knee | change, root, **given)
        return [(root / f"images/k0000_{scan}.nii").read_bytes() for scan in ("ct", "mr")]

    without = images(ill, null)
    assert images(healthy, null) == without
    for image, other in zip(images(ill, None), without, strict=True):
        assert image != other


def test_true_patches_are_measured_once_and_agree_with_the_ground_truth_slice(
    cohort, knees, tmp_path
):
    root = str(cohort.parent)
    knee = knees.loc["k0000"].to_dict()
    options = {"root": root, "n_per_compartment": 3, "n_truth": 2, "seed": 0, "definition": "plate"}
    row = extract_true_patches(knee, tmp_path, **options)
    table = collect_tables(tmp_path, ["k0000"])
    assert len(table) == row["n_patches"] > 0
    assert "rescan_bv_tv" in table  # the second MR
    some = load_ground_truth(tmp_path)
    n_usable = int((table["flag"] == "").sum())
    assert len(some) == min(2, n_usable) > 0
    (tmp_path / "all").mkdir()
    options = {"root": root, "patches_folder": str(tmp_path), "n_truth": 99, "seed": 0}
    measure_ground_truth(knee, tmp_path / "all", **options)
    every = load_ground_truth(tmp_path / "all").set_index("patch_id")
    assert len(every) == n_usable
    for patch in some.to_dict("records"):
        for name in BIOMARKERS:
            assert every.loc[patch["patch_id"], f"true_{name}"] == patch[f"true_{name}"]
    # The middle plane holds about as much bone as the patch (6 % of it: regional variation 0.1).
    truth, first = read_truth(root, "k0000"), every.index[0]
    bone = ground_truth_slice(truth, table.set_index("patch_id").loc[first].to_dict(), knee["side"])
    assert bone.mean() == pytest.approx(every.loc[first, "true_bv_tv"], abs=0.15)
    assert load_ground_truth(tmp_path / "nothing").empty


def test_a_clinical_cohort_has_no_ground_truth(tmp_path):
    with pytest.raises(InputError, match="a clinical one has no ground truth"):
        read_truth(tmp_path, "k0000")


# ---- a label map as template


def _label_map(path: Path, femur_z: float, spacing: float = 2.0, tibia: bool = True) -> Path:
    z, y, x = np.mgrid[-40:41, -30:31, -30:31] * 2.0
    femur = (np.hypot(x / 40, y / 28) < 1) & (np.abs(z - femur_z) < 25)
    labels = 5 * femur + 6 * tibia * ((np.hypot(x / 38, y / 25) < 1) & (np.abs(z + femur_z) < 25))
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing((spacing,) * 3)
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"femur_z": 30.0, "tibia": False}, "no tibia"),
        ({"femur_z": 30.0, "spacing": 20.0}, "spacing"),
        ({"femur_z": -30.0}, "does not lie below"),
    ],
)
def test_a_label_map_that_cannot_be_a_knee_is_refused(tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        read_labels(_label_map(tmp_path / "labels.nii.gz", **given))


def test_the_real_knee_becomes_a_template_in_its_own_axes(real_data):
    labels = read_labels(real_data / "knee_labels.nrrd")
    array = sitk.GetArrayViewFromImage(labels)
    voxel_cm3 = np.prod(labels.GetSpacing()) / 1000
    # Volumes counted in the file itself; resampling by nearest neighbour keeps them, the box cuts
    # none.
    for label, volume in {1: 11.8, 5: 142.6, 6: 101.4, 7: 13.4}.items():
        assert (array == label).sum() * voxel_cm3 == pytest.approx(volume, rel=0.02)
    x0, _, z0 = labels.GetOrigin()
    z = {label: z0 + np.argwhere(array == label)[:, 0] * 0.625 for label in (5, 6)}
    # The joint line is the origin; spines reach above it.
    assert z[5].min() > -5 and z[6].max() < 12
    x = {label: x0 + np.argwhere(array == label)[:, 2] * 0.625 for label in (2, 3)}
    assert x[2].mean() > x[3].mean()  # medial is +x


def _posterior_radii(template) -> list[float]:
    """Radius (mm at 80 mm breadth) of the circle through the back of each condyle in side view."""
    femur, scale = template.fields[..., 0], 80 / template.width_mm
    ticks = [(LOW_MM[a] + np.arange(femur.shape[2 - a]) * SPACING_MM) * scale for a in (2, 1, 0)]
    z, y, x = np.meshgrid(*ticks, indexing="ij")
    radii = []
    for side in (1, -1):
        back = (np.abs(femur) < 0.8) & (np.abs(side * x - 22) < 4) & (y > 10) & (z > 0) & (z < 40)
        design = np.c_[2 * y[back], 2 * z[back], np.ones(back.sum())]
        centre = np.linalg.lstsq(design, y[back] ** 2 + z[back] ** 2, rcond=None)[0]
        radii.append(np.sqrt(centre[2] + centre[0] ** 2 + centre[1] ** 2))
    return radii


def test_the_built_in_knee_has_the_proportions_of_a_real_one(real_data):
    protocol = load_protocol()
    built_in = load_template(protocol, None)
    real = load_template(protocol, real_data / "knee_labels.nrrd")
    volumes = []
    for template in (built_in, real):
        scale = 80 / template.width_mm
        z = (np.arange(template.fields.shape[0]) * SPACING_MM + LOW_MM[2]) * scale
        part = template.fields[np.abs(z) < 50]  # the real map ends in mid-shaft
        bones = ("femur", "tibia", "patella")
        volumes.append([(part[..., FIELDS.index(n)] < 0).sum() * scale**3 for n in bones])
    assert volumes[0] == pytest.approx(volumes[1], rel=0.25)  # as much as between two people
    assert _posterior_radii(built_in) == pytest.approx(_posterior_radii(real), rel=0.12)
