"""The simulated cohort: closed forms of its physics, its truth against its own images, its error paths."""

import copy
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from scipy.ndimage import map_coordinates
from scipy.special import ndtr

from ctsma.cohort import BONES, InputFault, read_manifest, read_volume
from ctsma.simulation import (
    bssfp_signal,
    draw_subjects,
    level_half_width,
    load_protocol,
    make_tile,
    protocol_sha256,
    read_labels,
    read_truth,
    write_cohort,
)
from ctsma.simulation.microstructure import FINE_VOXELS, TILE_SIZE, is_bone
from ctsma.simulation.protocol import PROTOCOL

FIELD_MM = (60.0, 40.0, 40.0)


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    return make_tile(np.random.default_rng(3), 1.5, 0.2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two knees, the first with a rescan; seed 5 gives one left and one right knee."""
    root = tmp_path_factory.mktemp("cohort")
    return write_cohort(root, "small", 2, 5, FIELD_MM, n_rescan=1)


@pytest.fixture(scope="module")
def knees(cohort):
    return read_manifest(cohort).set_index("knee_id")


def test_level_set_has_the_bone_volume_fraction_of_the_closed_form():
    bv_tv, rodness = np.meshgrid(np.linspace(0.05, 0.7, 9), np.linspace(0, 1, 5))
    w = level_half_width(bv_tv, rodness)
    assert np.allclose(ndtr(rodness + w) - ndtr(rodness - w), bv_tv, atol=1e-9)  # 40 bisections of 8: 1e-11
    assert np.allclose(ndtr(level_half_width(0.3, 0.0)) * 2 - 1, 0.3)


def test_tile_is_periodic_and_of_unit_variance_where_it_is_looked_up(tile):
    # Positive wrap: the step over the seam is no larger than steps elsewhere.
    inner = np.abs(np.diff(tile, axis=0)).mean()
    assert np.abs(tile[0] - tile[-1]).mean() == pytest.approx(inner, rel=0.1)  # sampling error of one face
    points = np.random.default_rng(0).uniform(0, 4 * TILE_SIZE, (40000, 3))
    for theta in (0.0, 0.7, np.pi / 2):
        below = is_bone(tile, points, *(np.full(len(points), v) for v in (0.0, level_half_width(0.3, 0.0), theta)))
        # A tile holds some 2000 independent wavelengths: standard error about 0.01.
        assert below.mean() == pytest.approx(0.3, abs=0.02)
    spectrum = np.abs(np.fft.rfft(tile[..., 0], axis=2)).mean((0, 1))
    assert spectrum.argmax() <= TILE_SIZE / FINE_VOXELS * 1.2  # projections of an isotropic band lie below its edge


def test_bssfp_signal_has_its_published_limits():
    # T1 = T2 and flip 90 degrees: M = M0 (1 - E1) / (1 - E1^2) = 1 / (1 + E1), no echo decay.
    e1 = np.exp(-5 / 300)
    assert bssfp_signal(300, 300, 5, 0, 90) == pytest.approx(1 / (1 + e1), rel=1e-12)
    assert bssfp_signal(1000, 50, 5, 0, 1e-9) == pytest.approx(0, abs=1e-9)


def test_protocol_is_whole_hashed_and_sourced():
    protocol = load_protocol()
    assert len(protocol_sha256()) == 64
    assert all(q.unit and q.source for group in protocol.values() for q in group.values())
    one, many = draw_subjects(protocol, 1, 5), draw_subjects(protocol, 400, 5)
    assert one.iloc[0].equals(many.iloc[0])  # a knee does not depend on how many there are
    assert 0.5 < many["oa"].mean() < 0.7  # prevalence 0.60, standard error 0.025
    assert abs(many["severity"].std() - 1) < 0.12  # unit variance by construction, standard error 0.035


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
    with pytest.raises(InputFault, match=f"{group}.{name}.*{words}"):
        load_protocol(path)


def test_cohort_comes_in_by_the_hospital_door(cohort, knees):
    assert sorted(knees["side"]) == ["L", "R"]
    assert knees["mr_rescan"].notna().tolist() == [True, False]
    ct, mr = (read_volume(cohort.parent / knees.loc["k0000", s], s.upper()) for s in ("ct", "mr"))
    assert np.allclose(ct.GetSpacing(), (0.45, 0.45, 0.625), atol=1e-4)
    assert np.allclose(mr.GetSpacing(), (0.21875, 0.21875, 0.75), atol=1e-5)
    # Sagittal: columns go to the back, rows to the feet, slices to the patient's right.
    assert np.allclose(np.array(mr.GetDirection()).reshape(3, 3), [[0, 0, -1], [1, 0, 0], [0, -1, 0]], atol=1e-6)
    extent = np.abs(np.array(mr.GetDirection()).reshape(3, 3)) @ (np.array(mr.GetSize()) * mr.GetSpacing())
    assert np.allclose(extent, FIELD_MM, atol=0.75)  # whole voxels
    stored = sitk.GetArrayViewFromImage(mr)
    assert stored.min() >= 0 and stored.max() <= 2047


def _values_at(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    index = np.array([image.TransformPhysicalPointToContinuousIndex(p) for p in points.tolist()])
    index = index[:, ::-1].T
    return map_coordinates(sitk.GetArrayViewFromImage(image), index, order=1, mode="nearest")


@pytest.mark.parametrize("scan", ["mr", "mr_rescan"])
def test_true_transforms_bring_marrow_and_bone_of_the_truth_onto_the_mr(cohort, knees, scan):
    truth = read_truth(cohort.parent, "k0000")
    mr = sitk.ReadImage(str(cohort.parent / knees.loc["k0000", scan]), sitk.sitkFloat32)
    transforms = truth.transforms if scan == "mr" else truth.rescan_transforms
    for bone in BONES:
        points = truth.target_points_lps(bone)
        assert len(points) > 200
        around = points[:, None] + np.random.default_rng(1).uniform(-0.15, 0.15, (1, 12, 3))
        bony = truth.microstructure(bone, around.reshape(-1, 3)).reshape(-1, 12).mean(1)
        aligned, shifted = (
            np.corrcoef(bony, _values_at(mr, np.array([transforms[bone].TransformPoint(q) for q in points + move])))[
                0, 1
            ]
            for move in (np.zeros(3), np.array([0, 1.0, 1.0]))
        )
        # Bone is dark; a voxel 0.75 mm thick and noise leave about -0.6. A shift of 1.4 mm leaves none of it.
        assert aligned < -0.4
        assert abs(shifted) < 0.25


def test_labels_hold_the_targets_and_leave_the_joint_open(cohort):
    for knee_id in ("k0000", "k0001"):
        truth = read_truth(cohort.parent, knee_id)
        labels = sitk.GetArrayViewFromImage(truth.labels)
        assert set(np.unique(labels)) == {0, 1, 2}
        for bone, value in BONES.items():
            points = truth.target_points_lps(bone).tolist()
            assert all(truth.labels[truth.labels.TransformPhysicalPointToIndex(p)] == value for p in points)
        femur = sitk.SignedMaurerDistanceMap(truth.labels == 1, squaredDistance=False, useImageSpacing=True)
        gap = sitk.GetArrayViewFromImage(femur)[labels == 2].min()
        assert 2.5 < gap < 6  # 4.3 mm by protocol, warped by a few tenths and measured to a voxel


def test_medial_is_to_the_left_of_a_right_knee_and_to_the_right_of_a_left_one(cohort, knees):
    for knee_id, side in knees["side"].items():
        truth = read_truth(cohort.parent, knee_id)
        points = truth.target_points_lps("tibia")
        own = truth.bone_points("tibia", points)
        assert (np.corrcoef(points[:, 0], own[:, 0])[0, 1] > 0.9) == (side == "R")
        assert np.corrcoef(points[:, 0], own[:, 0])[0, 1] * (1 if side == "R" else -1) > 0.9


def test_one_seed_gives_the_same_bytes_and_a_kept_record_is_reused(cohort, tmp_path):
    again = write_cohort(tmp_path, "small", 1, 5, FIELD_MM, n_rescan=1)
    names = [p for f in ("images", "truth") for p in sorted((tmp_path / f).glob("k0000*"))]
    assert len(names) == 9
    for path in names:
        assert path.read_bytes() == (cohort.parent / path.relative_to(tmp_path)).read_bytes(), path.name
    stamp = (tmp_path / "images/k0000_ct.nii.gz").stat().st_mtime_ns
    assert write_cohort(tmp_path, "small", 1, 5, FIELD_MM, n_rescan=1) == again
    assert (tmp_path / "images/k0000_ct.nii.gz").stat().st_mtime_ns == stamp


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
    with pytest.raises(InputFault, match=words):
        read_labels(_label_map(tmp_path / "labels.nii.gz", **given))


def test_a_knee_that_fails_stops_the_cohort_with_its_reason(tmp_path):
    with pytest.raises(InputFault, match="no femur"):
        image = sitk.GetImageFromArray(np.zeros((20, 20, 20), np.uint8))
        sitk.WriteImage(image, str(tmp_path / "empty.nrrd"))
        write_cohort(tmp_path, "small", 1, 5, FIELD_MM, anatomy=tmp_path / "empty.nrrd")
    assert not (tmp_path / "small.csv").exists()


def test_the_real_knee_becomes_a_template_in_its_own_axes(real_data):
    labels = read_labels(real_data / "knee_labels.nrrd")
    array = sitk.GetArrayViewFromImage(labels)
    voxel_cm3 = np.prod(labels.GetSpacing()) / 1000
    # Volumes counted in the file itself; resampling by nearest neighbour keeps them, the box cuts none.
    for label, volume in {1: 11.8, 5: 142.6, 6: 101.4, 7: 13.4}.items():
        assert (array == label).sum() * voxel_cm3 == pytest.approx(volume, rel=0.02)
    z, _, x = (labels.GetOrigin()[2 - a] + np.argwhere(array > 0)[:, a] * 0.625 for a in range(3))
    femur, tibia = (array[array > 0] == v for v in (5, 6))
    assert z[femur].min() > -5 and z[tibia].max() < 12  # the joint line is the origin; spines reach above it
    assert x[array[array > 0] == 2].mean() > x[array[array > 0] == 3].mean()  # medial is +x
