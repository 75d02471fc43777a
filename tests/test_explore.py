"""The explorer: figures of the shipped data, filters, intervals."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import SimpleITK as sitk

from ctsma.agreement import icc
from ctsma_lab import bones, explore
from ctsma_lab.tutorials.data import read_patches


@pytest.fixture(scope="module")
def study():
    return explore.open_study()


def test_static_figures_show_the_knee_the_patch_and_the_agreement(study):
    figures = explore.static_figures(study)
    assert list(figures) == ["knee", "patch", "agreement"]
    for figure in figures.values():
        assert "simulated" in figure.get_suptitle()
        figure.savefig(io.BytesIO())
        plt.close(figure)


@pytest.mark.parametrize("plane", explore.PLANES)
def test_planes_have_the_head_or_the_front_on_top(study, plane):
    ct = study.knee(study.with_images[0]).ct
    points = explore.plane_points(ct, plane, 0.5)
    normal, row, column = explore.PLANES[plane]
    assert np.ptp(points[..., normal]) == 0
    down, along = points[1, 0] - points[0, 0], points[0, 1] - points[0, 0]
    assert down[row] == pytest.approx(-explore.PIXEL_MM if row == 2 else explore.PIXEL_MM)
    assert along[column] == pytest.approx(explore.PIXEL_MM)
    size_mm = np.multiply(ct.GetSize(), ct.GetSpacing())
    assert points.shape[:2] == pytest.approx(size_mm[[row, column]] / explore.PIXEL_MM, abs=2)


def test_the_last_stage_aligns_the_knee_and_the_figure_says_so(study):
    images = study.knee(study.with_images[0])
    assert isinstance(images.ct, sitk.Image)
    figure = explore.draw_knee(study, study.with_images[0], "coronal", 0.5, "femur", "trabeculae")
    femur, tibia = map(float, re.findall(r"[\d.]+(?=,| mm)", figure.axes[-1].get_title()))
    assert 0 < femur < 0.1 and 0 < tibia < 0.1  # mm
    plt.close(figure)


def test_a_knee_without_ground_truth_has_no_registration_error(study, monkeypatch):
    known = study.knee(study.with_images[0])
    images = explore.KneeImages(known.ct, known.mr, known.labels, known.stages)
    monkeypatch.setattr(explore.Study, "knee", lambda self, knee_id: images)
    figure = explore.draw_knee(study, study.with_images[0], "axial", 0.6, "tibia", "centre")
    assert "unknown" in figure.axes[-1].texts[0].get_text()
    plt.close(figure)


def test_intervals_of_all_arms_cover_nine_of_ten_references(study):
    table = read_patches().sample(40, random_state=0)
    covered = []
    for row in table.to_dict("records"):
        rows = explore.interval_rows(study, "tb_n_per_mm", row["knee_id"], row["patch_id"])
        reference = row["tb_n_per_mm_reference"]
        covered += ((rows["low"] <= reference) & (reference <= rows["high"])).tolist()
        assert rows["value"].between(rows["low"], rows["high"]).all()
    assert len(rows) == len(study.arms) == 7
    assert 0.8 < np.mean(covered) < 1


def test_filters_choose_patches_and_knees(study):
    patches, knees = explore.selected(study)
    assert (len(patches), len(knees)) == (len(read_patches()), 80)
    patches, knees = explore.selected(study, bone="tibia", side="medial", oa="OA")
    assert set(patches["compartment"]) == {"tibia_medial"}
    assert set(knees["oa"]) == {1}
    assert set(patches["knee_id"]) <= set(knees["knee_id"])
    sharp = explore.selected(study, ct_fwhm_mm="sharp kernel", ct_noise_hu="low noise")[1]
    assert (sharp["ct_fwhm_mm"] <= study.knees["ct_fwhm_mm"].median()).all()
    assert (sharp["ct_noise_hu"] <= study.knees["ct_noise_hu"].median()).all()


def test_agreement_follows_the_filters(study):
    everything = explore.draw_agreement(study, "ct_sma_plus", "bv_tv")
    table = read_patches()
    expected = icc(table["bv_tv_reference"], table["bv_tv_ct_sma_plus"])["icc"]
    assert everything.axes[0].get_title().startswith(f"ICC(A,1) {expected:.2f}")
    one_class = explore.draw_agreement(study, "ct_sma_plus", "bv_tv", oa="OA", bone="femur")
    assert one_class.axes[0].get_title() != everything.axes[0].get_title()
    assert "with and without OA" in one_class.axes[2].texts[0].get_text()
    plt.close("all")


def test_no_patch_left_is_said(study):
    few = explore.Study("one knee", study.patches[:3], study.knees, study.arms, [], [])
    figure = explore.draw_agreement(few, "ct_sma_plus", "bv_tv", bone="tibia")
    assert "fewer than two subjects" in figure.axes[0].texts[0].get_text()
    plt.close(figure)


def test_each_static_figure_has_the_numbers_behind_it(study):
    tables = explore.static_tables(study)
    assert list(tables) == ["knee", "patch", "agreement"]
    last = tables["knee"].groupby("stage", sort=False)["mean_tre_mm"].max()
    assert last.iloc[-1] < 0.1 < last.iloc[0]
    assert len(tables["patch"]) == 4 * len(study.arms)
    assert len(tables["agreement"]) == len(study.patches)


def test_a_patch_number_beyond_the_last_shows_the_last(study):
    figure = explore.draw_patch(study, study.with_patches[0], 99)
    assert "patch 4 of 4" in figure.get_suptitle()
    plt.close(figure)


def ball(label=1, radius_mm=15.0, spacing_mm=1.0):
    """Labels of a ball in the middle of a cube of 60 mm."""
    at = (np.indices((60, 60, 60)) - 29.5) * spacing_mm
    inside = np.linalg.norm(at, axis=0) < radius_mm
    image = sitk.GetImageFromArray((label * inside).astype(np.uint8))
    image.SetSpacing([spacing_mm] * 3)
    return image


@pytest.mark.parametrize(("turn_deg", "tilt_deg"), [(0, 0), (75, -30)])
def test_the_surface_of_a_ball_has_its_depth_and_its_light_from_any_side(turn_deg, tilt_deg):
    labels, radius_mm = ball(), 15.0
    grid, turn = bones.view(labels, turn_deg, tilt_deg)
    depth, light = bones.surface(labels == 1, grid, turn)
    mm = grid.GetSpacing()[0]
    rows, columns = (np.indices(depth.shape) - (bones.N_PIXELS - 1) / 2) * mm
    beside = np.hypot(rows, columns)
    assert np.isnan(depth[beside > radius_mm + 1]).all()
    core = beside < 0.8 * radius_mm
    expected = (bones.N_PIXELS - 1) / 2 * mm - np.sqrt(radius_mm**2 - beside[core] ** 2)
    assert depth[core] == pytest.approx(expected, abs=0.8)  # mm; voxels of 1 mm
    normal = np.stack([columns, -np.sqrt(np.maximum(radius_mm**2 - beside**2, 0)), -rows])
    towards = np.einsum("i,i...->...", np.array(bones.LIGHT), normal)[core]
    assert np.corrcoef(light[core], np.clip(towards, 0, None))[0, 1] > 0.9


def test_the_edges_of_a_view_are_named():
    for (turn_deg, tilt_deg), names in {
        (0, 0): ["R", "L", "S", "I"],
        (90, 0): ["A", "P", "S", "I"],  # from the patient's left
        (180, 0): ["L", "R", "S", "I"],
        (0, 90): ["R", "L", "P", "A"],  # from above
        (45, 0): ["", "", "S", "I"],
    }.items():
        assert bones.edges(bones.view(ball(), turn_deg, tilt_deg)[1]) == names


def test_the_bone_in_front_is_seen():
    labels = sitk.GetArrayFromImage(ball())
    labels[:, 30:][labels[:, 30:] > 0] = 2  # the back half (y) is tibia
    image = sitk.GetImageFromArray(labels)
    blue_share = {}
    for turn_deg in (0, 180):
        figure = bones.draw_bones(image, turn_deg, 0, "a ball of two halves")
        picture = figure.axes[0].images[0].get_array()
        blue_share[turn_deg] = np.mean(picture[..., 2] > picture[..., 0])
        plt.close(figure)
    assert blue_share[180] < 0.1 < 0.6 < blue_share[0]


def test_without_the_viewer_the_notebook_says_what_it_needs(study, monkeypatch):
    monkeypatch.setattr(bones, "find_spec", lambda name: None)
    assert "pip install -e .[view3d]" in explore.viewer(study).value
