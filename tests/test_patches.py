"""Patches: geometry in closed form, direction of transforms, region of interest, and tables."""

import re

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from ctsma import patches
from ctsma.common import BIOMARKERS, BONES, COMPARTMENTS, InputError
from ctsma.patches import CT_SHAPE, MR_SHAPE


def ramp(
    coefficients=(1.0, 10.0, 100.0),
    size=(80, 80, 60),
    spacing=(0.5, 0.5, 0.6),
    origin=(-20.0, -20.0, -18.0),
):
    """Image whose value at a point is the scalar product of coefficients and point (LPS mm)."""
    image = sitk.Image(size, sitk.sitkFloat32)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    points = patches.grid_points(image)
    filled = sitk.GetImageFromArray((points @ np.array(coefficients)).astype(np.float32))
    filled.CopyInformation(image)
    return filled


@pytest.mark.parametrize("side", ["L", "R"])
def test_a_linear_image_is_sampled_at_the_right_points(side):
    centre, coefficients = (1.3, -2.1, 0.7), np.array([1.0, 10.0, 100.0])
    for shape, spacing in (
        (patches.MR_SHAPE, patches.MR_SPACING_MM),
        (patches.CT_SHAPE, patches.CT_SPACING_MM),
    ):
        points = patches.grid_points(patches.patch_grid(centre, side, shape, spacing))
        np.testing.assert_allclose(points.reshape(-1, 3).mean(axis=0), centre, atol=1e-9)
        sampled = patches.sample_patch(ramp(), centre, side, shape, spacing)
        # cubic B-splines reproduce a linear image; float32 values up to 2000 leave 1e-3
        np.testing.assert_allclose(sampled, points @ coefficients, atol=5e-3)


def test_slices_run_to_medial_rows_down_and_columns_back():
    for side, medial in (("R", 1), ("L", -1)):
        points = patches.grid_points(
            patches.patch_grid((0, 0, 0), side, patches.MR_SHAPE, patches.MR_SPACING_MM)
        )
        np.testing.assert_allclose(
            points[1, 0, 0] - points[0, 0, 0], [medial * 0.75, 0, 0], atol=1e-12
        )
        np.testing.assert_allclose(points[0, 1, 0] - points[0, 0, 0], [0, 0, -0.21875], atol=1e-12)
        np.testing.assert_allclose(points[0, 0, 1] - points[0, 0, 0], [0, 0.21875, 0], atol=1e-12)


def test_ct_and_mr_patches_cover_the_same_volume():
    mr = np.multiply(patches.MR_SHAPE, patches.MR_SPACING_MM)
    np.testing.assert_allclose(mr, np.multiply(patches.CT_SHAPE, patches.CT_SPACING_MM))
    np.testing.assert_allclose(mr, (9.0, 10.5, 10.5))


def test_the_transform_maps_ct_points_to_mr_points():
    shift = sitk.Euler3DTransform()
    shift.SetTranslation((2.0, -3.0, 1.5))
    plain = patches.sample_patch(ramp(), (0, 0, 0), "R", patches.MR_SHAPE, patches.MR_SPACING_MM)
    moved = patches.sample_patch(
        ramp(), (0, 0, 0), "R", patches.MR_SHAPE, patches.MR_SPACING_MM, shift
    )
    np.testing.assert_allclose(moved - plain, 2.0 - 30.0 + 150.0, atol=5e-3)


def test_outside_the_image_is_nan_not_zero():
    sampled = patches.sample_patch(
        ramp(), (19.0, 0, 0), "R", patches.MR_SHAPE, patches.MR_SPACING_MM
    )
    assert np.isnan(sampled).any()
    assert np.isfinite(sampled).any()
    assert np.isnan(
        patches.sample_patch(ramp(), (500.0, 0, 0), "R", patches.MR_SHAPE, patches.MR_SPACING_MM)
    ).all()


def knee_masks(spacing=(1.0, 1.0, 1.0), gap_mm=5.0):
    """Femur above z = gap / 2, tibia below - gap / 2: two slabs 70 x 50 mm, 25 mm high."""
    image = sitk.Image([90, 70, 70], sitk.sitkUInt8)
    image.SetSpacing(spacing)
    image.SetOrigin((-45.0, -35.0, -35.0))
    x, y, z = np.moveaxis(patches.grid_points(image), -1, 0)
    inside = (abs(x) < 35) & (abs(y) < 25) & (abs(z) < 30)
    labels = np.where(
        inside & (z > gap_mm / 2),
        BONES["femur"],
        np.where(inside & (z < -gap_mm / 2), BONES["tibia"], 0),
    )
    masks = sitk.GetImageFromArray(labels.astype(np.uint8))
    masks.CopyInformation(image)
    return masks


@pytest.mark.parametrize("side", ["L", "R"])
def test_centres_lie_in_their_compartment_below_the_surface(side):
    found = patches.patch_centres(knee_masks(), side, 5, np.random.default_rng(0))
    assert set(found["compartment"]) == set(COMPARTMENTS)
    assert (found.groupby("compartment").size() == 5).all()
    medial = found["compartment"].str.endswith("medial")
    sign = 1 if side == "R" else -1
    assert (np.sign(found["x"]) == np.where(medial, sign, -sign)).all()
    femur = found["compartment"].str.startswith("femur")
    assert found.loc[femur, "z"].tolist() == pytest.approx(
        [3 + 5.25] * 10
    )  # first femur voxel at z = 3
    assert found.loc[~femur, "z"].tolist() == pytest.approx([-3 - 5.25] * 10)
    assert (found["x"].abs() > patches.MIDLINE_MM).all()
    assert (found["x"].abs() < 35 - patches.RIM_MM + 1).all()
    for _, rows in found.groupby("compartment"):
        distance = np.hypot(
            *(rows[["x", "y"]].to_numpy()[:, None] - rows[["x", "y"]].to_numpy()[None]).T
        )
        assert distance[~np.eye(5, dtype=bool)].min() >= patches.APART_MM


def test_centres_do_not_depend_on_the_storage_order_of_the_image():
    masks = knee_masks()
    turned = sitk.DICOMOrient(masks, "PIR")
    first, second = (
        patches.patch_centres(m, "R", 3, np.random.default_rng(4)) for m in (masks, turned)
    )
    pd.testing.assert_frame_equal(first, second)


def test_bones_that_do_not_face_each_other_are_refused():
    with pytest.raises(InputError, match="no femur facing a tibia"):
        patches.patch_centres(knee_masks(gap_mm=20.0), "R", 3, np.random.default_rng(0))


def test_trabecular_mask_starts_below_the_plate():
    masks = knee_masks()
    region = patches.trabecular_mask(masks, "tibia", (15.0, 0.0, -2.5 - 5.25), "R")
    points = patches.grid_points(
        patches.patch_grid((15.0, 0.0, -2.5 - 5.25), "R", patches.MR_SHAPE, patches.MR_SPACING_MM)
    )
    top = points[..., 2][region].max()
    assert top == pytest.approx(
        -2.5 - patches.PLATE_MM, abs=0.5 + 0.22
    )  # half a mask voxel and one patch row
    assert not patches.trabecular_mask(masks, "femur", (15.0, 0.0, -7.75), "R").any()


def write_patches(folder, knee_id, flags):
    """Files of one knee as `cut_and_measure` writes them; patch k holds the value k."""
    folder.mkdir(exist_ok=True)
    n = len(flags)
    table = pd.DataFrame({"knee_id": knee_id, "subject_id": "S1", "patch_id": range(n)})
    table.assign(flag=flags).to_csv(folder / f"{knee_id}_table.csv", index=False)
    values = np.arange(n, dtype=np.float16)[:, None, None, None]
    mr, ct = (np.broadcast_to(values, (n, *shape)) for shape in (MR_SHAPE, CT_SHAPE))
    np.savez(folder / f"{knee_id}.npz", mr=mr, ct=ct, voi=np.ones((n, *MR_SHAPE), bool))


def test_tables_are_collected_and_read_back_without_flagged_patches(tmp_path):
    for knee_id in ("K2", "K1", "K0"):
        write_patches(tmp_path, knee_id, ["", "bad"] if knee_id == "K1" else ["", ""])
    table = patches.collect_tables(tmp_path, ["K2", "K1"])  # K0 is of an earlier manifest
    assert table["knee_id"].tolist() == ["K1", "K1", "K2", "K2"]
    table.to_csv(tmp_path / "patches.csv", index=False)
    assert patches.load_table(tmp_path)["patch_id"].tolist() == [0, 0, 1]
    assert len(patches.load_table(tmp_path, usable=False)) == 4
    data = patches.load_patches(tmp_path)
    assert data.mr[:].max(axis=(1, 2, 3)).tolist() == [0, 0, 1]
    last = np.array([2, 0])
    assert data.ct[last].shape == (2, *CT_SHAPE) and data.ct[last][:, 0, 0, 0].tolist() == [1, 0]
    assert data.voi[1].shape == MR_SHAPE and data.voi[:0].shape == (0, *MR_SHAPE)
    assert data.take(last).table["knee_id"].tolist() == ["K2", "K1"]
    with pytest.raises(InputError, match="does not exist"):
        patches.load_table(tmp_path / "none")


def test_patches_of_knees_with_ct_alone_may_be_none(tmp_path):
    patches.collect_tables(tmp_path, []).to_csv(tmp_path / "ct_only.csv", index=False)
    nothing = patches.load_ct_only_patches(tmp_path)
    assert nothing.table.empty and nothing.ct[:].shape == (0, *patches.CT_SHAPE)
    write_patches(tmp_path / "ct_only", "K1", ["bad", ""])
    table = patches.collect_tables(tmp_path / "ct_only", ["K1"])
    table.to_csv(tmp_path / "ct_only.csv", index=False)
    only = patches.load_ct_only_patches(tmp_path)
    assert only.ct[:].max(axis=(1, 2, 3)).tolist() == [1] and not only.mr[0].any()


def test_a_patch_of_noise_among_good_ones_is_flagged_and_not_measured():
    rng = np.random.default_rng(0)
    bone = rng.random((4, *patches.MR_SHAPE)) < 0.3
    signal = (
        np.where(bone, 0.0, 500.0) * np.array([1.0, 0.8, 1.2, 0.0])[:, None, None, None]
    )  # the last has no marrow
    mr = np.hypot(
        signal + 30 * rng.standard_normal(bone.shape), 30 * rng.standard_normal(bone.shape)
    )
    found = patches.measure_reference(mr, np.ones(bone.shape, bool), "plate", "")
    assert list(found["flag"]) == ["", "", "", patches.NO_MARROW]
    assert np.isnan(found["bv_tv"][3]) and np.isfinite(found["bv_tv"][:3]).all()


def shafts(tibia_hu=1200, femur_hu=900, spacing=(1.0, 1.0, 1.0)):
    """Femur above tibia, both 30 mm long: cortex around marrow, denser at the far ends."""
    hu, labels = np.full((70, 24, 24), -100, np.float32), np.zeros((70, 24, 24), np.uint8)
    for value, rows, cortex in (
        (BONES["tibia"], slice(2, 32), tibia_hu),
        (BONES["femur"], slice(38, 68), femur_hu),
    ):
        labels[rows, 4:20, 4:20] = value
        hu[rows, 4:20, 4:20], hu[rows, 6:18, 6:18] = 500, 0
        hu[slice(2, 12) if value == BONES["tibia"] else slice(58, 68), 4, 4:20] = cortex
    images = [sitk.GetImageFromArray(a) for a in (hu, labels)]
    for image in images:
        image.SetSpacing(spacing)
    return images


def test_cortical_hu_is_that_of_the_densest_bone_far_from_the_joint():
    ct, masks = shafts()
    assert patches.shaft_slices(masks, "tibia") == slice(2, 12)
    assert patches.shaft_slices(masks, "femur") == slice(58, 68)
    # a sixteenth of the bone's voxels hold the dense value, more than half a per cent
    assert patches.cortical_hu(ct, masks) == {
        "cortical_hu_femur": 900.0,
        "cortical_hu_tibia": 1200.0,
    }
    thick = [sitk.DICOMOrient(image, "LPI") for image in (ct, masks)]
    assert patches.cortical_hu(*thick) == patches.cortical_hu(
        ct, masks
    )  # however the file is ordered
    table = pd.DataFrame([patches.cortical_hu(ct, masks)] * 2)
    np.testing.assert_array_equal(patches.mean_cortical_hu(table), [1050.0, 1050.0])
    with pytest.raises(InputError, match="hold no femur"):
        patches.cortical_hu(ct, masks * (masks == BONES["tibia"]))


def test_cortical_hu_scales_with_the_scanner():
    ct, masks = shafts()
    before, after = patches.cortical_hu(ct, masks), patches.cortical_hu(ct * 1.2, masks)
    assert after == pytest.approx({name: 1.2 * hu for name, hu in before.items()}, rel=1e-6)


# ---------------------------------------------------------------- compartments by anatomy
def condyles(closed_medial=False):
    """`knee_masks` with a notch of 18 mm in the femur; closed: medial of it no gap is left."""
    masks = knee_masks()
    x, _, z = np.moveaxis(patches.grid_points(masks), -1, 0)
    labels = sitk.GetArrayFromImage(masks)
    labels[(abs(x) < 9) & (z > 0) & (z < 20)] = 0
    if closed_medial:
        labels[(x > 0) & (z == 4) & (labels > 0)] = BONES["tibia"]  # within the femur
    cut = sitk.GetImageFromArray(labels)
    cut.CopyInformation(masks)
    return cut


def test_the_notch_names_the_compartments_of_a_partly_cut_knee():
    whole = patches.bearing_surface(condyles(), "R")
    assert set(whole["place"]) == {"medial", "lateral"}
    assert whole["u"].tolist() == pytest.approx(whole["x"].tolist())  # the notch is at x = 0
    for part in (condyles()[:68, :, :], condyles()[23:, :, :]):  # 13 mm of 26 mm of a condyle
        found = whole.merge(patches.bearing_surface(part, "R"), on=["x", "y"])
        assert len(found) > 0.6 * len(whole)
        assert (found["place_x"] == found["place_y"]).all()


@pytest.mark.parametrize("half", [slice(0, 45), slice(45, 90), slice(0, 52)])
@pytest.mark.parametrize("padded", [False, True])
def test_half_a_knee_in_view_is_refused(half, padded):
    masks = condyles()
    part = masks[half, :, :]
    if padded:  # the image goes on, without the bone
        part = sitk.Resample(part, masks, sitk.Transform(), sitk.sitkNearestNeighbor)
    reason = "(at least 60 mm)" if padded else "that a side of the image cuts"
    words = f"no notch between two condyles, and .. mm of a tibia {re.escape(reason)}"
    with pytest.raises(InputError, match=words):
        patches.patch_centres(part, "R", 3, np.random.default_rng(0))


@pytest.mark.parametrize(("side", "open_place"), [("R", "lateral"), ("L", "medial")])
def test_a_closed_gap_leaves_its_compartment_out_and_names_the_other(side, open_place):
    found = patches.patch_centres(condyles(True), side, 3, np.random.default_rng(0))
    assert set(found["compartment"]) == {f"femur_{open_place}", f"tibia_{open_place}"}
    assert (found["x"] < -9).all()


def test_centres_lie_below_the_surface_of_a_turned_grid():
    masks = condyles()
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.0, 0.0, 0.3)
    masks.SetDirection(turn.GetMatrix())
    masks.SetOrigin(turn.TransformPoint(masks.GetOrigin()))
    found = patches.patch_centres(masks, "R", 5, np.random.default_rng(0))
    assert len(found) == 20
    for row in found.to_dict("records"):
        bone, place = row["compartment"].split("_")
        x, _, z = turn.GetInverse().TransformPoint((row["x"], row["y"], row["z"]))
        assert 9 < (x if place == "medial" else -x) < 35
        assert z == pytest.approx(8.25 if bone == "femur" else -8.25)


def test_a_patch_that_leaves_the_ct_is_flagged_also_where_the_mr_goes_on(tmp_path):
    masks = condyles()
    marrow = 500.0 * (np.random.default_rng(0).random((70, 70, 90)) < 0.7)
    mr = sitk.GetImageFromArray(marrow.astype(np.float32))
    mr.CopyInformation(masks)
    ct, masks = mr[:, :35, :], masks[:, :35, :]
    knee = {"knee_id": "K1", "subject_id": "S1", "side": "R"}
    scans = {"": (mr, dict.fromkeys(BONES, sitk.Transform(3, sitk.sitkIdentity)))}
    patches.cut_and_measure(knee, tmp_path, ct, masks, scans, 4, 0, "plate")
    table = patches.read_table(tmp_path / "K1_table.csv")
    outside = (table["y"] + 5.25 > 0).to_numpy()  # the CT ends at y = 0
    assert (table["flag"] == np.where(outside, patches.OUTSIDE_CT, "")).all(), table["flag"]
    assert 0 < outside.sum() < len(table)

    patches.cut_and_measure(
        knee | {"has_reference": 0.0}, tmp_path, ct, masks, scans, 4, 0, "plate"
    )
    without = patches.read_table(tmp_path / "K1_table.csv")
    assert without[list(BIOMARKERS)].isna().all(axis=None)  # its images are kept
    pd.testing.assert_frame_equal(*(t.drop(columns=list(BIOMARKERS)) for t in (table, without)))
