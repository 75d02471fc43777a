"""Registration: known motions come back, the same bits every run, faults are said, wrong MR is noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from ctsma.cohort import BONES, InputFault, write_volume
from ctsma.registration import (
    bone_masks,
    flexion_deg,
    isotropic,
    mapped,
    read_stages,
    read_transforms,
    register_knee,
    register_pair,
    stage_errors_mm,
    starting_transforms,
    target_registration_error_mm,
    write_registration,
)
from ctsma.registration.quality import MIN_MATCH
from ctsma.registration.stages import align_trabeculae, bone_depths_mm, centre_of, recentred, rigid
from ctsma.registration.synthesis import Recipe, ct_beside_mr, grey_slices, learn_synthesis, synthetic_ct
from ctsma.registration.synthesis import mutual_information as soft_information
from ctsma.registration.trabeculae import FEWEST, matched, trabeculae
from ctsma.simulation import protocol_sha256

CT_SPACING_MM, MR_SPACING_MM = (0.9, 0.9, 1.0), (0.5, 0.5, 1.0)
STAGES = ("centre", "whole_knee", "per_bone", "trabeculae")
ELLIPSOIDS = {  # centre and radii in mm, LPS: two condyles and a shaft, a plateau and a shaft, a patella
    "femur": [((-13, 2, 14), (12, 17, 12)), ((13, -1, 13), (11, 19, 11)), ((0, -4, 34), (17, 13, 24))],
    "tibia": [((0, 0, -14), (26, 17, 13)), ((1, -3, -36), (13, 12, 26))],
    "patella": [((0, -29, 18), (9, 5, 9))],
}


def depth_mm(bone, points, gap_mm=0.0):
    def one(centre, radii):
        q = np.linalg.norm((points - centre - [0, 0, gap_mm]) / np.array(radii), axis=-1)
        return (1 - q) * min(radii)

    return np.max([one(*ellipsoid) for ellipsoid in ELLIPSOIDS[bone]], axis=0)


def make_grid(spacing, size, direction, centre):
    image = sitk.Image(size, sitk.sitkFloat32)
    image.SetSpacing(spacing)
    image.SetDirection(np.ravel(direction).tolist())
    image.SetOrigin((np.array(centre) - centre_of(image)).tolist())
    return image


def points_of(image):
    index = np.moveaxis(np.indices(image.GetSize()[::-1]), 0, -1)[..., ::-1]
    axes = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    return index @ axes.T + image.GetOrigin()


def filled_like(image, array):
    out = sitk.GetImageFromArray(np.asarray(array, np.float32))
    out.CopyInformation(image)
    return out


def texture(points, seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((60, 60, 60)), 0.8)
    return ndimage.map_coordinates(noise / noise.std(), np.moveaxis(points / 1.5 + 30, -1, 0), order=1, mode="wrap")


def scan(image, motions, soft, marrow, cortex, seed=0, gap_mm=0.0):
    """Grey values: each bone is where its motion took it."""
    points, out = points_of(image), np.full(image.GetSize()[::-1], soft, float)
    for bone in ELLIPSOIDS:
        motion = motions["tibia" if bone == "tibia" else "femur"].GetInverse()
        turned = np.reshape(motion.GetMatrix(), (3, 3))
        at = (points - motion.GetCenter()) @ turned.T + motion.GetCenter() + motion.GetTranslation()
        depth = depth_mm(bone, at, gap_mm if bone == "tibia" else 0.0)
        inside = marrow[0] + marrow[1] * texture(at, seed)
        grey = inside + (cortex - inside) * np.clip(1.5 - depth, 0, 1)
        out += (grey - out) * np.clip(depth + 0.5, 0, 1)
    return out


def make_ct(gap_mm=0.0):
    image = make_grid(CT_SPACING_MM, (80, 84, 76), np.eye(3), (0, 0, 0))
    still = dict.fromkeys(BONES, rigid(np.eye(3), (0, 0, 0), (0, 0, 0)))
    grey = scan(image, still, 50, (260, 70), 1200, gap_mm=gap_mm)
    grey[np.linalg.norm(points_of(image)[..., :2], axis=-1) > 36] = -100
    return filled_like(image, ndimage.gaussian_filter(grey, 0.5) + np.random.default_rng(1).normal(0, 20, grey.shape))


def make_mr(motions, seed=0):
    axes = [[0, 0, 1], [1, 0, 0], [0, -1, 0]]  # sagittal: columns run to the back, rows to the foot, slices to the left
    image = make_grid(MR_SPACING_MM, (144, 140, 70), axes, mapped(motions["femur"], [[2.0, 0.0, 0.0]])[0])
    grey = scan(image, motions, 250, (700, -90), 40, seed)
    return filled_like(image, np.abs(grey + np.random.default_rng(2).normal(0, 30, grey.shape)))


def turn(axis, degrees):
    return sitk.VersorTransform(axis, np.deg2rad(degrees)).GetMatrix()


@pytest.fixture(scope="module")
def knee(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    femur = rigid(turn((1.0, 2.0, 2.0), 10.0), (0, 0, 0), (6, -4, 5))
    bent = np.reshape(femur.GetMatrix(), (3, 3)) @ np.reshape(turn((1.0, 0.0, 0.0), 8.0), (3, 3))
    true = {"femur": femur, "tibia": rigid(bent, (0, 0, 0), (6, -4, 5))}
    ct, mr = make_ct(), make_mr(true)
    write_volume(ct, root / "ct.nii.gz")
    write_volume(mr, root / "mr.nii.gz")
    row = {"knee_id": "k0", "ct": "ct.nii.gz", "mr": "mr.nii.gz", "mr_rescan": None}
    outcome = register_pair(row, root, root=root, seed=3)
    return {"root": root, "row": row, "outcome": outcome, "ct": ct, "mr": mr, "true": true}


def targets(bone):
    points = np.random.default_rng(5).uniform(-30, 30, (4000, 3))
    return points[depth_mm(bone, points) > 1]


@pytest.mark.parametrize("bone", BONES)
def test_a_known_motion_of_each_bone_comes_back(knee, bone):
    errors = target_registration_error_mm(read_transforms(knee["root"], "k0")[bone], knee["true"][bone], targets(bone))
    assert np.median(errors) < 0.22  # a quarter of the CT's 0.9 mm voxel; the phantom's texture is 1.5 mm coarse


def test_the_stages_come_closer_and_the_flexion_is_found(knee):
    points = {bone: targets(bone) for bone in BONES}
    errors = stage_errors_mm(read_stages(knee["root"], "k0"), knee["true"], points)
    mean = [np.mean([e.mean() for e in errors[stage].values()]) for stage in STAGES]
    assert mean == sorted(mean, reverse=True)
    assert knee["outcome"]["flagged"] == ""
    assert knee["outcome"]["flexion_deg"] == pytest.approx(8.0, abs=0.5)  # 0.2 mm at 25 mm


def test_equal_seeds_give_equal_bits(knee, tmp_path):
    again = register_pair(knee["row"], tmp_path, root=knee["root"], seed=3)
    for bone in BONES:
        assert (tmp_path / f"k0_{bone}.tfm").read_bytes() == (knee["root"] / f"k0_{bone}.tfm").read_bytes()
    assert {k: v for k, v in again.items() if "seconds" not in k}.items() <= knee["outcome"].items()


def test_transforms_on_disk_are_those_of_the_last_stage(knee):
    stages, transforms = read_stages(knee["root"], "k0"), read_transforms(knee["root"], "k0")
    for bone in BONES:  # matrices pass through angles and text: rounding of doubles, nothing more
        error = target_registration_error_mm(stages["trabeculae"][bone], transforms[bone], targets(bone))
        assert error.max() < 1e-9


def test_an_unrelated_mr_is_flagged_and_passes_no_transform_on(knee, tmp_path):
    grid = knee["mr"]
    noise = ndimage.gaussian_filter(np.random.default_rng(4).uniform(0, 900, grid.GetSize()[::-1]), 2)
    found = register_knee(knee["ct"], filled_like(grid, noise), bone_masks(knee["ct"]), seed=3)
    assert "the MR" in found.flagged or "bent" in found.flagged
    (tmp_path / "k1_femur.tfm").write_text("of an earlier run")
    write_registration(found, tmp_path, "k1")
    with pytest.raises(InputFault, match="flagged"):
        read_transforms(tmp_path, "k1")


def upside_down(mr):
    out = sitk.Image(mr)
    turned = np.diag([-1.0, 1.0, -1.0]) @ np.reshape(mr.GetDirection(), (3, 3))
    out.SetDirection(turned.ravel().tolist())
    out.SetOrigin((np.array(mr.GetOrigin()) + centre_of(mr) - centre_of(out)).tolist())
    return out


def femur_alone(mr):
    return sitk.RegionOfInterest(mr, [mr.GetSize()[0], 55, mr.GetSize()[2]], [0, 0, 0])  # rows run to the foot


@pytest.mark.parametrize(("spoil", "reason"), [(upside_down, ""), (femur_alone, "tibia")])
def test_an_mr_upside_down_or_of_one_bone_is_flagged_with_the_reason(knee, spoil, reason):
    found = register_knee(knee["ct"], spoil(knee["mr"]), bone_masks(knee["ct"]), seed=3)
    assert found.flagged and reason in found.flagged


def mirrored(mr):
    out = sitk.Image(mr)
    flip = np.diag([-1.0, 1.0, 1.0])
    out.SetDirection((flip @ np.reshape(mr.GetDirection(), (3, 3))).ravel().tolist())
    out.SetOrigin((flip @ np.array(mr.GetOrigin())).tolist())
    return out


def test_the_mr_of_another_knee_or_of_the_other_side_is_flagged_with_the_reason(knee):
    for mr in (make_mr(knee["true"], seed=8), mirrored(knee["mr"])):  # the same shape, other trabeculae
        found = register_knee(knee["ct"], mr, bone_masks(knee["ct"]), seed=3)
        assert "trabeculae of the femur do not match" in found.flagged
        assert found.checks["femur"]["match"] < MIN_MATCH < knee["outcome"]["match_femur"]


@pytest.mark.parametrize("first_row", [0, 45])
def test_a_bone_that_half_left_the_field_of_view_is_as_close_as_a_whole_one(knee, first_row):
    mr = knee["mr"]  # 140 rows of 0.5 mm run to the foot
    cut = sitk.RegionOfInterest(mr, [mr.GetSize()[0], 95, mr.GetSize()[2]], [0, first_row, 0])
    found = register_knee(knee["ct"], cut, bone_masks(knee["ct"]), seed=3)
    worst = [target_registration_error_mm(found.transforms[b], knee["true"][b], targets(b)).mean() for b in BONES]
    assert found.flagged == "" and max(worst) < 0.4
    assert min(c["overlap"] for c in found.checks.values()) < 0.7


def test_slices_of_3_mm_are_aligned_and_yet_flagged_as_too_thick(knee, tmp_path):
    thick = sitk.BinShrink(knee["mr"], [1, 1, 3])
    found = register_knee(knee["ct"], thick, bone_masks(knee["ct"]), seed=3)
    worst = [target_registration_error_mm(found.transforms[b], knee["true"][b], targets(b)).mean() for b in BONES]
    assert max(worst) < 0.5 and "slices every 3.0 mm" in found.flagged
    write_registration(found, tmp_path, "k2")
    assert not list(tmp_path.glob("*.tfm"))


def test_trabeculae_bring_a_bone_back_from_1_mm_and_match_nothing_where_it_is_not(knee):
    fine = [trabeculae(isotropic(image, 0.5)) for image in (knee["ct"], knee["mr"])]
    depth, true, rows = bone_depths_mm(bone_masks(knee["ct"])), knee["true"]["femur"], []
    moved = rigid(true.GetMatrix(), true.GetCenter(), np.add(true.GetTranslation(), (1.0, 0.7, -0.9)))
    found, checks = align_trabeculae(*fine, depth["femur"], moved, 0, rows, "femur")
    assert target_registration_error_mm(found, true, targets("femur")).mean() < 0.25
    assert checks["match"] > MIN_MATCH and checks["overlap"] > 0.9 and rows[0]["iterations"] > 0
    gone = rigid(np.eye(3), (0, 0, 0), (500, 0, 0))
    assert align_trabeculae(*fine, depth["femur"], gone, 0, rows, "femur")[1] == {"match": 0.0, "overlap": 0.0}


def test_the_match_is_minus_the_correlation_of_what_is_seen():
    a, b = np.random.default_rng(0).standard_normal((2, 2 * FEWEST))
    b[::2] = np.nan
    assert matched(a, -3 * a + 5) == pytest.approx(1.0)
    assert matched(a, b) == pytest.approx(-np.corrcoef(a[1::2], b[1::2])[0, 1])
    assert matched(a, np.full_like(a, 7.0)) == 0.0
    assert matched(a[:FEWEST], b[:FEWEST]) == 0.0  # half as many as it takes are seen


@pytest.mark.parametrize("recipe", [Recipe(steps=3), Recipe(edges=False, information=False, steps=3)])
def test_synthesis_is_ct_like_on_the_mr_grid_and_repeats_bit_for_bit(knee, recipe):
    (mr, grid), (ct, _) = grey_slices(knee["mr"], "MR"), grey_slices(knee["ct"], "CT")
    made = [synthetic_ct(learn_synthesis([mr], [ct], recipe, seed=1), knee["mr"]) for _ in range(2)]
    np.testing.assert_array_equal(*(sitk.GetArrayFromImage(image) for image in made))
    assert made[0].GetSize() == grid.GetSize() and made[0].GetOrigin() == grid.GetOrigin()
    assert -200 <= sitk.GetArrayFromImage(made[0]).min() <= sitk.GetArrayFromImage(made[0]).max() <= 1000


def test_synthesis_from_aligned_pairs_lowers_their_difference(knee):
    mr, grid = grey_slices(knee["mr"], "MR")
    ct = ct_beside_mr(knee["ct"], grid, knee["true"], bone_depths_mm(bone_masks(knee["ct"])))
    misses = []
    for steps in (1, 40):
        generator = learn_synthesis([mr], [ct], Recipe(paired=True, steps=steps), seed=0)
        made, _ = grey_slices(synthetic_ct(generator, knee["mr"]), "CT")
        misses.append(np.nanmean(np.abs(made - ct)))
    assert misses[1] < 0.7 * misses[0]
    with pytest.raises(InputFault, match="pairs differ"):
        learn_synthesis([mr], [ct[:-1]], Recipe(paired=True), seed=0)
    with pytest.raises(InputFault, match="no training knee"):
        learn_synthesis([], [], Recipe(), seed=0)


def test_mutual_information_for_learning_is_entropy_of_a_copy_and_its_gradient_is_finite():
    values = torch.linspace(-1, 1, 16).repeat(50).requires_grad_()
    assert soft_information(values, -values).item() == pytest.approx(np.log(16), abs=1e-3)  # sixteen equal levels
    soft_information(values, torch.rand(800, generator=torch.Generator().manual_seed(0))).backward()
    assert torch.isfinite(values.grad).all()


def test_the_start_stands_a_shift_of_40_mm_and_a_turn_of_30_degrees():
    motion = rigid(turn((1.0, 0.0, 1.0), 30.0), (0, 0, 0), (25, -20, 25))
    start = starting_transforms(make_ct(), make_mr(dict.fromkeys(BONES, motion)))[0][1]
    points = np.concatenate([targets(bone) for bone in BONES])
    # half the 18 degree step at 25 mm plus a 4 mm voxel is 8 mm, which the next level captures
    assert np.median(target_registration_error_mm(start, motion, points)) < 8


def test_masks_are_femur_above_tibia_without_patella():
    ct = make_ct()
    labels, points = sitk.GetArrayFromImage(bone_masks(ct)), points_of(ct)
    for bone, value in BONES.items():
        truth = depth_mm(bone, points) > 0
        dice = 2 * (truth & (labels == value)).sum() / (truth.sum() + (labels == value).sum())
        assert dice > 0.93  # a third of a 0.9 mm voxel on surfaces of 25 mm bones
    assert not labels[depth_mm("patella", points) > 0].any()
    heights = [points[labels == value][:, 2].mean() for value in (BONES["femur"], BONES["tibia"])]
    assert heights[0] > heights[1]


def test_touching_bones_are_split():
    ct = make_ct(gap_mm=3.4)  # the plateau now reaches into both condyles
    labels, points = sitk.GetArrayFromImage(bone_masks(ct)), points_of(ct)
    assert (labels[(depth_mm("femur", points) > 2) & (points[..., 2] > 6)] == BONES["femur"]).mean() > 0.99
    assert (labels[(depth_mm("tibia", points, 3.4) > 2) & (points[..., 2] < -3)] == BONES["tibia"]).mean() > 0.99


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda hu, z: np.minimum(hu, 90), "no bone"),
        (lambda hu, z: np.where(z < 2, 50, hu), "femur above tibia"),
        (lambda hu, z: np.where(z > 0, 50, hu), "femur above tibia"),
        (lambda hu, z: hu + 1024, "Hounsfield"),
    ],
)
def test_a_ct_without_both_bones_in_hu_is_refused(spoil, reason):
    ct = make_ct()
    with pytest.raises(InputFault, match=reason):
        bone_masks(filled_like(ct, spoil(sitk.GetArrayFromImage(ct), points_of(ct)[..., 2])))


def test_an_empty_mask_is_refused():
    ct = make_ct()
    masks = bone_masks(ct)
    with pytest.raises(InputFault, match="no tibia"):
        register_knee(ct, ct, sitk.Cast(masks == BONES["femur"], sitk.sitkUInt8), seed=0)


def test_target_registration_error_of_a_translation_is_its_length():
    points = np.random.default_rng(0).uniform(-50, 50, (20, 3))
    moved = rigid(np.eye(3), (0, 0, 0), (3, 4, 12))
    np.testing.assert_allclose(target_registration_error_mm(moved, rigid(np.eye(3), (0, 0, 0), (0, 0, 0)), points), 13)


def test_rotation_between_bones_is_the_flexion():
    a, b = rigid(turn((0.0, 1.0, 0.0), 20.0), (0, 0, 0), (1, 2, 3)), rigid(np.eye(3), (5, 5, 5), (0, 0, 0))
    assert flexion_deg(a, b) == pytest.approx(20.0)
    np.testing.assert_allclose(mapped(recentred(a, (9, 8, 7)), [[1, 2, 3]]), mapped(a, [[1, 2, 3]]))


def test_isotropic_keeps_physical_coordinates():
    image = make_grid((0.3, 0.7, 3.0), (60, 40, 12), [[0, 0, 1], [1, 0, 0], [0, -1, 0]], (5, -3, 11))
    ramp = isotropic(filled_like(image, points_of(image)[..., 2]), 0.8)
    inner = (slice(3, -3),) * 3  # beyond the outermost centres the ramp is extrapolated
    np.testing.assert_allclose(sitk.GetArrayFromImage(ramp)[inner], points_of(ramp)[inner][..., 2], atol=1e-3)


def test_the_published_study_of_the_flag_is_of_the_frozen_protocol_and_rises_with_the_error():
    found = json.loads((Path(__file__).parents[1] / "docs" / "results" / "registration_flag.json").read_text())
    assert found["protocol_sha256"] == protocol_sha256()
    shares = [part["flagged"] for part in found["by_error"]]
    assert shares == sorted(shares)
    assert shares[0] <= 0.05 and shares[-1] >= 0.95  # aligned knees pass, those off by 5 mm do not
    areas = found["auc_of_error_above_1_mm"]
    assert areas["match"]["ci_low"] > 0.9 and areas["match"]["auc"] > areas["mi"]["auc"]
    assert all(area["ci_low"] > 0.5 for area in areas.values())
    assert found["flag"]["sensitivity"] == 1.0 and found["flag"]["false_alarms"] < 0.1


def test_of_the_published_stress_set_99_of_100_starts_are_aligned_and_what_is_not_is_flagged():
    found = json.loads((Path(__file__).parents[1] / "docs" / "results" / "registration_stress.json").read_text())
    assert found["protocol_sha256"] == protocol_sha256()
    every = found["all_starts"]
    assert every["n"] >= 200 and every["success"] >= 0.99
    assert every["failed_and_flagged"] == every["failed"] == len(found["not_aligned"])
    assert {"pose", "noise", "partial", "metal", "all", "soft"} <= set(found["by_condition"])
    assert found["by_condition"]["pose"]["success"] == found["by_condition"]["metal"]["success"] == 1.0
