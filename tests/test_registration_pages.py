"""Pages of registration: images of a knee, order of the knees, no script needed, small files."""

import re

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from PIL import Image

from ctsma.common import BONES
from ctsma.registration.transforms import rigid_transform
from dicom_import import registration_pages

KNEE = {"knee_id": "k1", "side": "R"}
GOOD = {"error": "", "flagged": "", "flexion_deg": 3.0}
GOOD |= {f"{name}_{bone}": 0.6 for name in ("correlation", "overlap") for bone in BONES}


def volume(array, spacing_mm=1.5):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([spacing_mm] * 3)
    return image


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Folder with the images of a knee of noise: two boxes of bone, the MR shifted by 6 mm."""
    folder, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    labels = np.zeros((64, 64, 64), np.uint8)
    labels[36:60, 16:48, 16:48], labels[4:28, 16:48, 16:48] = BONES["femur"], BONES["tibia"]
    noise = rng.normal(300, 200, labels.shape).astype(np.float32)
    place = {"compartment": "femur_medial", "x": 48.0, "y": 48.0, "z": 60.0}
    transforms = dict.fromkeys(BONES, rigid_transform(np.eye(3), (0, 0, 0), (6, 0, 0)))
    images = [volume(one) for one in (noise, np.roll(noise, 4, axis=2), labels)]
    centres = pd.DataFrame([place])
    registration_pages.draw_images(KNEE, *images, transforms, folder / "images", centres)
    return folder


def test_images_show_three_planes_of_each_bone(pages):
    opened = {file.stem: Image.open(file) for file in (pages / "images").iterdir()}
    assert sorted(opened) == ["k1_before", "k1_ct", "k1_mr", "k1_outlines"]
    outlines = np.array(opened.pop("k1_outlines"))
    assert outlines.shape == (600, 900)
    for view in (outlines[:300, :300], outlines[300:, :300]):
        assert {1, 2, 4} <= set(np.unique(view))  # both bones and letters
    axial = outlines[:300, 600:], outlines[300:, 600:]
    assert (axial[0] == 3).any() and not (axial[1] == 3).any()  # the patch is in the femur
    assert all(image.size == (450, 300) for image in opened.values())
    grey = {name: np.array(image.convert("L"), float) for name, image in opened.items()}
    inside = np.s_[60:100, 60:100]
    aligned = np.corrcoef(grey["k1_ct"][inside].ravel(), grey["k1_mr"][inside].ravel())[0, 1]
    before = np.corrcoef(grey["k1_ct"][inside].ravel(), grey["k1_before"][inside].ravel())[0, 1]
    assert aligned > 0.5 > 0.2 > before


def test_a_knee_without_a_joint_surface_is_drawn_through_its_bones():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0, 0, 0], labels[7, 7, 7] = BONES["femur"], BONES["tibia"]
    assert registration_pages._places(volume(labels), "L").empty


def test_a_page_of_a_knee_is_small_and_needs_no_script(pages):
    index = registration_pages.write_pages(pages, [KNEE | GOOD], ["simulated"], "../index.html")
    text = (pages / "k1.html").read_text()
    assert "<script" not in text and not re.search(r"https?:", text)
    assert ":hover .over" in text and 'name="viewport"' in text and "simulated" in text
    for target in re.findall(r'(?:src|href)="([^"]+)"', text):
        assert target == "data:," or (pages / target).is_file(), target
    images = sum(file.stat().st_size for file in (pages / "images").iterdir())
    assert images + len(text) < 60_000
    group = index.read_text()
    assert 'href="../index.html"' in group and 'href="k1.html"' in group
    assert "none was flagged" in group and "What to do" in group


def test_the_worst_knee_is_first(tmp_path):
    rows = [
        {"knee_id": "good", "side": "L"} | GOOD,
        {"knee_id": "low", "side": "L"} | GOOD | {"correlation_tibia": 0.2, "tre_femur": 0.1},
        {"knee_id": "flag", "side": "R"} | GOOD | {"flagged": "it <differs>"},
        {"knee_id": "none", "side": "R", "error": "the CT is damaged"},
    ]
    group = registration_pages.write_pages(tmp_path, rows).read_text()
    table = group.partition("<tbody>")[2].partition("</tbody>")[0]
    assert re.findall(r'href="(\w+)\.html"', table) == ["none", "flag", "low", "good"]
    assert "1 flagged and excluded" in " ".join(group.split()) and "it &lt;differs&gt;" in group
    assert "TRE, femur" in group and "There are no images" in (tmp_path / "low.html").read_text()
    none = (tmp_path / "none.html").read_text()
    assert "Not registered: the CT is damaged" in none and "<h2>Metrics" not in none
