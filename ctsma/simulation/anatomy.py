"""Knee templates: signed distances (mm, negative inside) of every tissue, from our own knee or a label map.

Template frame: a right knee in LPS directions, +x medial; origin on the joint line between the condyles.
Left knees are mirrored in x when they are put into a scanner.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import yaml
from numba import njit

from ctsma.cohort import InputFault

from .microstructure import smooth_field

SPACING_MM = 1.25  # our choice: linear interpolation of distances errs below 0.02 mm on these curvatures
LOW_MM, HIGH_MM = np.array([-62.5, -66.25, -75.0]), np.array([62.5, 66.25, 80.0])  # template box (x, y, z)
SHAPES = Path(__file__).with_name("anatomy.yaml")
CONDYLAR_AXIS_MM = (8.0, 24.6)  # (y, z) of the posterior condyles' centres in anatomy.yaml
FIELDS = (
    *("femur", "tibia", "patella", "fibula", "femur_cartilage", "tibia_cartilage", "patella_cartilage"),
    *("fibrous", "muscle", "skin", "femur_depth", "tibia_depth"),
)
LABELS = {"femur": 5, "tibia": 6, "patella": 7, "fibula": 8}
CARTILAGE = {"femur": (1,), "tibia": (2, 3), "patella": (4,)}
MENISCI = (9, 10)


@dataclass(frozen=True)
class Template:
    """Fields (z, y, x, FIELDS) float32 on the template box; (y, z) of the condylar axis; width of the femur."""

    fields: np.ndarray
    axis_mm: tuple[float, float]
    width_mm: float

    def sample(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """All fields at template points (n, 3) xyz mm; beyond the box its faces go on (extruded shafts)."""
        return dict(zip(FIELDS, sample_grid(self.fields, LOW_MM, SPACING_MM, points).T, strict=True))


@njit(cache=True)
def sample_grid(grid, origin, spacing, points) -> np.ndarray:
    """Trilinear values (n, channels) of grid (z, y, x, channels) at points (n, 3) xyz mm, clamped at the faces."""
    out = np.empty((len(points), grid.shape[3]), np.float32)
    for n in range(len(points)):
        x = min(max((points[n, 0] - origin[0]) / spacing, 0.0), grid.shape[2] - 1.001)
        y = min(max((points[n, 1] - origin[1]) / spacing, 0.0), grid.shape[1] - 1.001)
        z = min(max((points[n, 2] - origin[2]) / spacing, 0.0), grid.shape[0] - 1.001)
        i, j, k = int(x), int(y), int(z)
        x, y, z = x - i, y - j, z - k
        for c in range(grid.shape[3]):
            low = (1 - y) * ((1 - x) * grid[k, j, i, c] + x * grid[k, j, i + 1, c])
            low += y * ((1 - x) * grid[k, j + 1, i, c] + x * grid[k, j + 1, i + 1, c])
            high = (1 - y) * ((1 - x) * grid[k + 1, j, i, c] + x * grid[k + 1, j, i + 1, c])
            high += y * ((1 - x) * grid[k + 1, j + 1, i, c] + x * grid[k + 1, j + 1, i + 1, c])
            out[n, c] = (1 - z) * low + z * high
    return out


def grid_points(low: np.ndarray, high: np.ndarray, spacing: float) -> tuple[np.ndarray, tuple]:
    """Points (n, 3) xyz of a box in (z, y, x) order, and that shape."""
    z, y, x = (np.arange(low[a], high[a] + 1e-6, spacing) for a in (2, 1, 0))
    zz, yy, xx = np.meshgrid(z, y, x, indexing="ij")
    return np.stack([xx.ravel(), yy.ravel(), zz.ravel()], axis=1), zz.shape


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Smooth union of two signed distances with blending length k mm (polynomial)."""
    h = np.clip(0.5 + 0.5 * (b - a) / max(k, 1e-6), 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def smooth_max(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Smooth intersection of two signed distances."""
    return -smooth_min(-a, -b, k)


def _wheel(p, axis, centre, radius, half, rounding):
    """Rounded cylinder about the x or z axis."""
    v = [p[n] - centre[n] for n in range(3)]
    across, u, w = (v[0], v[1], v[2]) if axis == "x" else (v[2], v[0], v[1])
    q = np.hypot(u, w) - (radius - rounding), np.abs(across) - (half - rounding)
    return np.minimum(np.maximum(*q), 0) + np.hypot(np.maximum(q[0], 0), np.maximum(q[1], 0)) - rounding


def _capsule(p, ends, radii, stretch=(1, 1, 1)):
    """Round cone between two points; `stretch` widens it along an axis."""
    a, b = np.array(ends, float) / stretch
    v = [p[n] / stretch[n] - a[n] for n in range(3)]
    t = np.clip(sum(v[n] * (b - a)[n] for n in range(3)) / ((b - a) @ (b - a)), 0, 1)
    return np.sqrt(sum((v[n] - t * (b - a)[n]) ** 2 for n in range(3))) - (radii[0] + (radii[1] - radii[0]) * t)


def _ellipsoid(p, centre, radii):
    k0, k1 = (np.sqrt(sum(((p[n] - centre[n]) / radii[n] ** e) ** 2 for n in range(3))) for e in (1, 2))
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def _joined(p: list, parts: list[dict]) -> np.ndarray:
    """Signed distance of parts joined in order (see anatomy.yaml)."""
    total, shapes = np.full(p[0].shape, 99.0), {"wheel": _wheel, "capsule": _capsule, "ellipsoid": _ellipsoid}
    for part in parts:
        numbers = {k: v for k, v in part.items() if k not in ("shape", "blend", "cut")}
        one, blend = shapes[part["shape"]](p, **numbers), part.get("blend", 0)
        total = smooth_max(total, -one, blend) if part.get("cut") else smooth_min(total, one, blend)
    return total


def _cartilage_thickness(p: list, centre_mm: float, name: str) -> np.ndarray:
    """Thickness (mm) tapering over 5 mm to the edge of the bearing surface."""
    x, y, z = p
    if name == "femur":
        edge = np.minimum(np.where(y > 0, 42 - 0.15 * y, 47) - z, 36 - np.abs(x))
        edge = np.minimum(edge, np.where(y > -8, np.abs(x) - 9, 99) + np.maximum(0, -2 - y))
    elif name == "tibia":
        edge = np.minimum(20 - np.hypot(np.abs(x) - 20, 0.9 * (y - 2)), z + 8)
    else:
        edge = np.minimum(y + 47, 17 - np.abs(z - 31))
    t = np.clip(edge / 5, 0, 1)
    return centre_mm * t * t * (3 - 2 * t) - 0.3 * (t <= 0)


def _soft(p: list, bones: dict) -> dict:
    """Tendons and ligaments, muscle and skin (mm); the same for every template."""
    shapes = yaml.safe_load(SHAPES.read_text())
    radius = np.hypot(p[0] / (60 + 0.04 * p[2]), (p[1] - 2) / (62 + 0.03 * p[2]))
    skin = smooth_min((radius - 1) * 61, bones["patella"] - 7, 8)
    return {"fibrous": _joined(p, shapes["fibrous"]), "muscle": _joined(p, shapes["muscle"]), "skin": skin}


def _meniscus(p, fields: dict) -> np.ndarray:
    """Wedges between the cartilages along the rim of each plateau."""
    radius = np.hypot(np.abs(p[0]) - 19, 0.92 * (p[1] - 2))
    between = np.maximum(0.3 - fields["femur_cartilage"], 0.3 - fields["tibia_cartilage"])
    return np.maximum.reduce([between, 12.5 - radius, radius - 21, fields["femur"] - 8, fields["tibia"] - 7.5])


@lru_cache(maxsize=2)
def own_template(gap_mm: float, femur_mm: float, tibia_mm: float, patella_mm: float) -> Template:
    """Our own procedural right knee, epicondylar width about 80 mm (our choice of every radius).

    gap_mm: distance between the subchondral surfaces; the others: cartilage thickness at the centre.
    """
    p, shapes = _box(), yaml.safe_load(SHAPES.read_text())
    raw = {name: _joined(p, shapes[name]) for name in LABELS}
    raw["tibia"] = smooth_max(raw["tibia"], gap_mm - raw["femur"], 1.5)
    raw["patella"] = smooth_max(raw["patella"], gap_mm + 1.9 - raw["femur"], 3)
    raw["fibula"] = smooth_max(raw["fibula"], 1.5 - raw["tibia"], 1)
    fields = {name: _true_distance(field) for name, field in raw.items()}
    for name, centre_mm in {"femur": femur_mm, "tibia": tibia_mm, "patella": patella_mm}.items():
        fields[f"{name}_cartilage"] = fields[name] - _cartilage_thickness(p, centre_mm, name)
    fields["meniscus"] = _meniscus(p, fields)
    return _template(fields, p, CONDYLAR_AXIS_MM)


def _box() -> list[np.ndarray]:
    """x, y, z (mm) of every point of the template box."""
    points, shape = grid_points(LOW_MM, HIGH_MM, SPACING_MM)
    return [c.astype(np.float32).reshape(shape) for c in points.T]


@lru_cache(maxsize=2)
def label_template(path: str, stamp: float) -> Template:
    """Template from any knee label map (labels as in LABELS, CARTILAGE, MENISCI), in its own physical space.

    `stamp` (time of last change) only keeps the cache honest. Raises InputFault (see `read_labels`).
    """
    labels = read_labels(path)
    fields = {name: _label_distance(labels, (label,), path, shaft=name) for name, label in LABELS.items()}
    for name, cartilage in CARTILAGE.items():
        fields[f"{name}_cartilage"] = _label_distance(labels, (LABELS[name], *cartilage), path, shaft=name)
    fields["meniscus"] = _label_distance(labels, MENISCI, path, shaft=None)
    p = _box()
    return _template(fields, p, _condylar_axis(fields["femur"], p))


def read_labels(path: str | Path) -> sitk.Image:
    """Label map resampled to the template box: LPS axes, right knee, origin on the joint line.

    Raises
    ------
    InputFault : unreadable, no femur or tibia, a spacing no knee scan has, or femur not above tibia.
    """
    try:
        image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkUInt8)
    except RuntimeError as error:
        raise InputFault(path, "not a readable label map", "give NRRD or NIfTI labels") from error
    centre = {name: label_points(image, label) for name, label in LABELS.items()}
    for bone in ("femur", "tibia"):
        if not len(centre[bone]):
            raise InputFault(path, f"no {bone} (label {LABELS[bone]})", "give a label map with femur and tibia")
    femur, tibia = centre["femur"], centre["tibia"]
    width, spacing = np.ptp(femur[:, 0]), image.GetSpacing()
    if max(spacing) > 3 or min(spacing) < 0.05 or not 50 < width < 120:
        fault = f"voxels of {spacing} mm make a femur {width:.0f} mm wide"
        raise InputFault(path, fault, "write the true spacing in mm into the header")
    if tibia[:, 2].mean() > femur[:, 2].mean() - 10:
        raise InputFault(path, "the tibia does not lie below the femur", "mend the direction of the head-foot axis")
    joint = 0.5 * (np.quantile(femur[:, 2], 0.01) + np.quantile(tibia[:, 2], 0.99))
    plateau = tibia[tibia[:, 2] > joint - 15]
    origin = np.array([*((plateau.min(0) + plateau.max(0))[:2] / 2), joint])
    return _resample_labels(image, origin, mirrored=_is_left(image, centre, origin))


def _is_left(image, centre, origin) -> bool:
    """Left when the medial tibial cartilage, or else the side away from the fibula, lies at smaller x."""
    medial, lateral = label_points(image, 2), label_points(image, 3)
    if len(medial) and len(lateral):
        return bool(medial[:, 0].mean() < lateral[:, 0].mean())
    return bool(len(centre["fibula"]) and centre["fibula"][:, 0].mean() > origin[0])


def label_points(image: sitk.Image, label: int) -> np.ndarray:
    """LPS points (n, 3) of every voxel of a label."""
    index = np.argwhere(sitk.GetArrayViewFromImage(image) == label)[:, ::-1]
    matrix = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    return index @ matrix.T + np.array(image.GetOrigin())


def _resample_labels(image: sitk.Image, origin: np.ndarray, mirrored: bool) -> sitk.Image:
    """Labels on the template box at half its spacing (nearest), mirrored to a right knee where asked."""
    sign = -1.0 if mirrored else 1.0
    move = sitk.AffineTransform(3)
    move.SetMatrix((sign, 0, 0, 0, 1, 0, 0, 0, 1))
    move.SetTranslation(origin)
    size = [int(n) for n in np.rint((HIGH_MM - LOW_MM) / SPACING_MM * 2) + 1]
    half = (SPACING_MM / 2,) * 3
    direction = np.eye(3).ravel().tolist()
    return sitk.Resample(image, size, move, sitk.sitkNearestNeighbor, LOW_MM.tolist(), half, direction, 0)


def _label_distance(labels: sitk.Image, wanted: tuple, path: str, shaft: str | None) -> np.ndarray:
    """Smooth signed distance (mm) of some labels on the template grid; the shaft goes on past the last whole slice."""
    mask = np.isin(sitk.GetArrayViewFromImage(labels), wanted)
    if not mask.any():
        return np.full([(n + 1) // 2 for n in mask.shape], 99.0, np.float32)
    if shaft in ("femur", "tibia", "fibula"):
        bone = sitk.GetArrayViewFromImage(labels) == LABELS[shaft]
        mask = _extruded(mask, bone, upward=shaft == "femur")
    image = sitk.GetImageFromArray(mask.astype(np.float32))
    image.SetSpacing((SPACING_MM / 2,) * 3)
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.8))
    return _true_distance((0.5 - smooth)[::2, ::2, ::2])


def _extruded(mask: np.ndarray, bone: np.ndarray, upward: bool) -> np.ndarray:
    """Repeat the last slice before the field of view cuts the bone (area below 97 % of that 4 mm inwards)."""
    mask, bone = (mask, bone) if upward else (mask[::-1], bone[::-1])
    area = bone.sum((1, 2)).astype(float)
    steps, usual = int(4 / (SPACING_MM / 2)), np.median(area[area > 0])
    top = np.flatnonzero(area)[-1]
    while top > steps and area[top] < 0.97 * area[top - steps] and area[top - steps] < 1.1 * usual:
        top -= 1
    grown = mask.copy()
    grown[top:] = bone[top]
    return grown if upward else grown[::-1]


def _true_distance(level: np.ndarray) -> np.ndarray:
    """Signed distance (mm) to the zero level of a function negative inside, accurate below the voxel."""
    # The filter takes whole numbers only: ten thousandths keep the level set below the voxel.
    image = sitk.GetImageFromArray(np.clip(level * 10000, -1e8, 1e8).astype(np.int32))
    distance = sitk.ApproximateSignedDistanceMap(image, -10000.0, 10000.0)
    return sitk.GetArrayFromImage(distance).astype(np.float32) * SPACING_MM


def _condylar_axis(femur: np.ndarray, p: list) -> tuple[float, float]:
    """(y, z) of the circle fitted to the posterior and distal condyles, seen from the side (least squares)."""
    condyle = (np.abs(femur) < 0.8) & (np.abs(np.abs(p[0]) - 22) < 4) & (p[1] > -8) & (p[2] < 24)
    y, z = p[1][condyle].astype(float), p[2][condyle].astype(float)
    centre = np.linalg.lstsq(np.c_[2 * y, 2 * z, np.ones_like(y)], y**2 + z**2, rcond=None)[0]
    return float(centre[0]), float(centre[1])


def _template(fields: dict, p: list, axis_mm: tuple) -> Template:
    """Add soft tissue and depth below the bearing surfaces, and stack."""
    inside = np.where((fields["femur"] < 0) & (np.abs(p[2] - 25) < 15), p[0], np.nan)
    width = float(np.nanmax(inside) - np.nanmin(inside))
    fields |= _soft([c * (80 / width) for c in p], fields)
    meniscus = fields.pop("meniscus")
    for bone in ("femur", "tibia"):
        bearing = (np.abs(fields[bone]) < 1) & (fields[bone] - fields[f"{bone}_cartilage"] > 0.6)
        image = sitk.GetImageFromArray(bearing.astype(np.uint8))
        depth = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=False)
        fields[f"{bone}_depth"] = np.maximum(sitk.GetArrayFromImage(depth) * SPACING_MM, 0)
    lumps, sheets = (smooth_field(np.random.default_rng(n), p[0].shape, 3.0) for n in (1, 2))  # fixed texture
    fields["muscle"] = fields["muscle"] + 1.5 * lumps
    joint = np.minimum(fields["femur_depth"], fields["tibia_depth"])
    septa = np.maximum.reduce([3 * np.abs(sheets) - 0.45, 1.5 - fields["muscle"], fields["skin"] + 2, 8 - joint])
    fields["fibrous"] = np.minimum.reduce([fields["fibrous"], meniscus, septa])
    stack = np.stack([fields[name].astype(np.float32) for name in FIELDS], axis=-1)
    return Template(np.ascontiguousarray(stack), axis_mm, width)
