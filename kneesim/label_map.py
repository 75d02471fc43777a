"""A knee template from a label map: anatomy of a real knee, with simulated bone inside."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ctsma.common import InputError

from .anatomy import (
    FAR_MM,
    HIGH_MM,
    LOW_MM,
    SPACING_MM,
    Template,
    finish_template,
    signed_distance,
    template_coordinates,
)

LABELS = {"femur": 5, "tibia": 6, "patella": 7, "fibula": 8}
CARTILAGE_LABELS = {"femur": (1,), "tibia": (2, 3), "patella": (4,)}
MENISCUS_LABELS = (9, 10)
TIBIAL_MEDIAL, TIBIAL_LATERAL = CARTILAGE_LABELS["tibia"]
LABEL_MM = SPACING_MM / 2  # labels are resampled on half the template's spacing
SHAFTS = ("femur", "tibia", "fibula")


@lru_cache(maxsize=2)
def label_template(path: str, modified: float) -> Template:
    """Template from any knee label map (labels as in LABELS, CARTILAGE_LABELS, MENISCUS_LABELS).

    `modified`, the time of the file's last change, keeps the cache from returning an older file's
    template. Raises InputError (see `read_labels`).
    """
    labels = read_labels(path)
    fields = {}
    for name, label in LABELS.items():
        fields[name] = _label_distance(labels, (label,), shaft=name)
    for name, cartilage in CARTILAGE_LABELS.items():
        fields[f"{name}_cartilage"] = _label_distance(labels, (LABELS[name], *cartilage), name)
    fields["meniscus"] = _label_distance(labels, MENISCUS_LABELS, shaft=None)
    p = template_coordinates()
    return finish_template(fields, p, _condylar_axis(fields["femur"], p))


def read_labels(path: str | Path) -> sitk.Image:
    """Label map resampled to the template box: LPS axes, right knee, origin on the joint line.

    Raises
    ------
    InputError : unreadable, no femur or tibia, a spacing that no knee scan has, or a tibia that is
        not below the femur.
    """
    try:
        image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkUInt8)
    except RuntimeError as error:
        raise InputError(
            path, "is not a readable label map", "give NRRD or NIfTI labels"
        ) from error
    points = {name: label_points(image, label) for name, label in LABELS.items()}
    for bone in ("femur", "tibia"):
        if not len(points[bone]):
            remedy = "give a label map with femur and tibia"
            raise InputError(path, f"holds no {bone} (label {LABELS[bone]})", remedy)
    femur, tibia = points["femur"], points["tibia"]
    width, spacing = np.ptp(femur[:, 0]), image.GetSpacing()
    if max(spacing) > 3 or min(spacing) < 0.05 or not 50 < width < 120:
        problem = f"has voxels of {spacing} mm, which make a femur {width:.0f} mm wide"
        raise InputError(path, problem, "write the true spacing in mm into the header")
    if tibia[:, 2].mean() > femur[:, 2].mean() - 10:
        problem = "has a tibia that does not lie below the femur"
        raise InputError(path, problem, "correct the direction of the head-foot axis")
    joint = 0.5 * (np.quantile(femur[:, 2], 0.01) + np.quantile(tibia[:, 2], 0.99))
    plateau = tibia[tibia[:, 2] > joint - 15]
    origin = np.array([*((plateau.min(0) + plateau.max(0))[:2] / 2), joint])
    mirror = -1.0 if _is_left(image, points["fibula"], origin) else 1.0
    to_input = sitk.AffineTransform(3)
    to_input.SetMatrix((mirror, 0, 0, 0, 1, 0, 0, 0, 1))
    to_input.SetTranslation(origin)
    resample = sitk.ResampleImageFilter()
    resample.SetSize([int(n) for n in np.rint((HIGH_MM - LOW_MM) / SPACING_MM * 2) + 1])
    resample.SetOutputSpacing((LABEL_MM,) * 3)
    resample.SetOutputOrigin(LOW_MM.tolist())
    resample.SetTransform(to_input)
    resample.SetInterpolator(sitk.sitkNearestNeighbor)
    return resample.Execute(image)


def label_points(image: sitk.Image, label: int) -> np.ndarray:
    """LPS points (n, 3) mm of every voxel of a label."""
    index = np.argwhere(sitk.GetArrayViewFromImage(image) == label)[:, ::-1]
    matrix = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    return index @ matrix.T + np.array(image.GetOrigin())


def _is_left(image: sitk.Image, fibula: np.ndarray, origin: np.ndarray) -> bool:
    """Left when the medial tibial cartilage, or the side away from the fibula, is at smaller x."""
    medial = label_points(image, TIBIAL_MEDIAL)
    lateral = label_points(image, TIBIAL_LATERAL)
    if len(medial) and len(lateral):
        return bool(medial[:, 0].mean() < lateral[:, 0].mean())
    return bool(len(fibula) and fibula[:, 0].mean() > origin[0])


def _label_distance(labels: sitk.Image, wanted: tuple, shaft: str | None) -> np.ndarray:
    """Smooth signed distance (mm) of some labels on the template grid.

    The shaft of a long bone continues past the last slice that the label map shows whole.
    """
    array = sitk.GetArrayViewFromImage(labels)
    mask = np.isin(array, wanted)
    if not mask.any():
        return np.full([(n + 1) // 2 for n in mask.shape], FAR_MM, np.float32)
    if shaft == "femur":
        mask = _extrude_upwards(mask, array == LABELS["femur"])
    elif shaft in SHAFTS:
        mask = _extrude_upwards(mask[::-1], array[::-1] == LABELS[shaft])[::-1]
    image = sitk.GetImageFromArray(mask.astype(np.float32))
    image.SetSpacing((LABEL_MM,) * 3)
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.8))
    return signed_distance((0.5 - smooth)[::2, ::2, ::2])


def _extrude_upwards(mask: np.ndarray, bone: np.ndarray) -> np.ndarray:
    """Repeat the bone's last whole slice to the end of the box.

    A slice is cut by the field of view where its area is below 97 % of that 4 mm inwards.
    """
    area = bone.sum((1, 2)).astype(float)
    steps, usual = int(4 / LABEL_MM), np.median(area[area > 0])
    top = np.flatnonzero(area)[-1]
    while top > steps and area[top] < 0.97 * area[top - steps] and area[top - steps] < 1.1 * usual:
        top -= 1
    extruded = mask.copy()
    extruded[top:] = bone[top]
    return extruded


def _condylar_axis(femur: np.ndarray, p: list[np.ndarray]) -> tuple[float, float]:
    """(y, z) of the circle through the posterior and distal condyles in side view."""
    surface = (np.abs(femur) < 0.8) & (np.abs(np.abs(p[0]) - 22) < 4)
    condyle = surface & (p[1] > -8) & (p[2] < 24)
    y, z = p[1][condyle].astype(float), p[2][condyle].astype(float)
    design = np.c_[2 * y, 2 * z, np.ones_like(y)]
    centre = np.linalg.lstsq(design, y**2 + z**2, rcond=None)[0]
    return float(centre[0]), float(centre[1])
