"""Knee templates: signed distance (mm, negative inside) of every tissue on one grid.

Template frame: a right knee with LPS directions, +x medial; the origin is on the joint line between
the condyles. Left knees are mirrored in x when they are put into a scanner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import yaml

from ctsma.compiled import compiled

from .microstructure import smooth_field

# design choice: linear interpolation of distances errs below 0.02 mm on these curvatures
SPACING_MM = 1.25
# Corners of the template box (x, y, z).
LOW_MM = np.array([-62.5, -66.25, -75.0])
HIGH_MM = np.array([62.5, 66.25, 80.0])
SHAPES = Path(__file__).with_name("anatomy.yaml")
CONDYLAR_AXIS_MM = (8.0, 24.6)  # (y, z) of the posterior condyles' centres in anatomy.yaml
WIDTH_MM = 80.0  # epicondylar width of anatomy.yaml
BONE_NAMES = ("femur", "tibia", "patella", "fibula")
CARTILAGE = ("femur_cartilage", "tibia_cartilage", "patella_cartilage")
FIELDS = (*BONE_NAMES, *CARTILAGE, "fibrous", "muscle", "skin", "femur_depth", "tibia_depth")
FAR_MM = 99.0  # distance from a tissue that is absent


@dataclass(frozen=True)
class Template:
    """A knee before it is scaled and warped.

    Attributes
    ----------
    fields : (z, y, x, FIELDS) float32 on the template box, mm.
    axis_mm : (y, z) of the condylar axis, about which the knee flexes.
    width_mm : breadth of the femur.
    """

    fields: np.ndarray
    axis_mm: tuple[float, float]
    width_mm: float

    def sample(self, points: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Some fields at template points (n, 3) xyz mm; beyond the box its faces continue."""
        channels = np.array([FIELDS.index(name) for name in names])
        values = sample_grid(self.fields, channels, LOW_MM, SPACING_MM, points)
        return dict(zip(names, values, strict=True))


@compiled(inline="always")
def place_in_grid(grid, origin, spacing, x, y, z) -> tuple:
    """Voxel (i, j, k) of a grid (z, y, x, channels) below a point xyz mm, and share to the next.

    Points beyond the grid move to its face.
    """
    x = min(max((x - origin[0]) / spacing, 0.0), grid.shape[2] - 1.001)
    y = min(max((y - origin[1]) / spacing, 0.0), grid.shape[1] - 1.001)
    z = min(max((z - origin[2]) / spacing, 0.0), grid.shape[0] - 1.001)
    i, j, k = int(x), int(y), int(z)
    return i, j, k, x - i, y - j, z - k


@compiled(inline="always")
def trilinear(grid, c, i, j, k, x, y, z) -> float:
    """Channel c of a grid at the place that `place_in_grid` gives."""
    low = (1 - y) * ((1 - x) * grid[k, j, i, c] + x * grid[k, j, i + 1, c])
    low += y * ((1 - x) * grid[k, j + 1, i, c] + x * grid[k, j + 1, i + 1, c])
    high = (1 - y) * ((1 - x) * grid[k + 1, j, i, c] + x * grid[k + 1, j, i + 1, c])
    high += y * ((1 - x) * grid[k + 1, j + 1, i, c] + x * grid[k + 1, j + 1, i + 1, c])
    return (1 - z) * low + z * high


@compiled()
def sample_grid(grid, channels, origin, spacing, points) -> np.ndarray:
    """Trilinear values (channels, n) of a grid (z, y, x, all channels) at points (n, 3) xyz mm.

    Points beyond the grid take the value at its face.
    """
    out = np.empty((len(channels), len(points)), np.float32)
    for n in range(len(points)):
        p = points[n]
        i, j, k, x, y, z = place_in_grid(grid, origin, spacing, p[0], p[1], p[2])
        for place, c in enumerate(channels):
            out[place, n] = trilinear(grid, c, i, j, k, x, y, z)
    return out


def lattice_points(low: np.ndarray, high: np.ndarray, spacing: float) -> tuple[np.ndarray, tuple]:
    """Points (n, 3) xyz mm that fill a box in (z, y, x) order, and their shape."""
    z, y, x = (np.arange(low[a], high[a] + 1e-6, spacing) for a in (2, 1, 0))
    zz, yy, xx = np.meshgrid(z, y, x, indexing="ij")
    return np.stack([xx.ravel(), yy.ravel(), zz.ravel()], axis=1), zz.shape


def template_coordinates() -> list[np.ndarray]:
    """x, y and z (mm, float32, each of the template's shape) of every point of the template box."""
    points, shape = lattice_points(LOW_MM, HIGH_MM, SPACING_MM)
    return [coordinate.astype(np.float32).reshape(shape) for coordinate in points.T]


@lru_cache(maxsize=2)
def own_template(gap_mm: float, femur_mm: float, tibia_mm: float, patella_mm: float) -> Template:
    """The built-in procedural right knee (every radius in anatomy.yaml is a design choice).

    gap_mm is the distance between the subchondral surfaces; the others are the cartilage thickness
    at the centre of femur, tibia and patella.
    """
    p = template_coordinates()
    shapes = yaml.safe_load(SHAPES.read_text("utf-8"))
    level = {name: _join(p, shapes[name]) for name in BONE_NAMES}
    level["tibia"] = smooth_max(level["tibia"], gap_mm - level["femur"], 1.5)
    level["patella"] = smooth_max(level["patella"], gap_mm + 1.9 - level["femur"], 3)
    level["fibula"] = smooth_max(level["fibula"], 1.5 - level["tibia"], 1)
    fields = {name: signed_distance(field) for name, field in level.items()}
    for name, centre_mm in (("femur", femur_mm), ("tibia", tibia_mm), ("patella", patella_mm)):
        fields[f"{name}_cartilage"] = fields[name] - _cartilage_thickness(p, centre_mm, name)
    # Menisci: wedges between the cartilages along the rim of each plateau.
    radius = np.hypot(np.abs(p[0]) - 19, 0.92 * (p[1] - 2))
    between = np.maximum(0.3 - fields["femur_cartilage"], 0.3 - fields["tibia_cartilage"])
    near_bone = fields["femur"] - 8, fields["tibia"] - 7.5
    fields["meniscus"] = np.maximum.reduce([between, 12.5 - radius, radius - 21, *near_bone])
    return finish_template(fields, p, CONDYLAR_AXIS_MM)


def finish_template(fields: dict, p: list[np.ndarray], axis_mm: tuple) -> Template:
    """Add soft tissue and the depth below the bearing surfaces to bones, cartilage and menisci."""
    inside = np.where((fields["femur"] < 0) & (np.abs(p[2] - 25) < 15), p[0], np.nan)
    width = float(np.nanmax(inside) - np.nanmin(inside))
    scaled = [coordinate * (WIDTH_MM / width) for coordinate in p]
    shapes = yaml.safe_load(SHAPES.read_text("utf-8"))
    fields["fibrous"] = _join(scaled, shapes["fibrous"])
    fields["muscle"] = _join(scaled, shapes["muscle"])
    radius = np.hypot(
        scaled[0] / (60 + 0.04 * scaled[2]), (scaled[1] - 2) / (62 + 0.03 * scaled[2])
    )
    fields["skin"] = smooth_min((radius - 1) * 61, fields["patella"] - 7, 8)
    meniscus = fields.pop("meniscus")
    for bone in ("femur", "tibia"):
        bearing = (np.abs(fields[bone]) < 1) & (fields[bone] - fields[f"{bone}_cartilage"] > 0.6)
        image = sitk.GetImageFromArray(bearing.astype(np.uint8))
        depth = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=False)
        fields[f"{bone}_depth"] = np.maximum(sitk.GetArrayFromImage(depth) * SPACING_MM, 0)
    # The texture of muscle and fat is fixed: every template has the same.
    lumps = smooth_field(np.random.default_rng(1), p[0].shape, 3.0)
    sheets = smooth_field(np.random.default_rng(2), p[0].shape, 3.0)
    fields["muscle"] = fields["muscle"] + 1.5 * lumps
    joint = np.minimum(fields["femur_depth"], fields["tibia_depth"])
    septa = np.maximum.reduce(
        [3 * np.abs(sheets) - 0.45, 1.5 - fields["muscle"], fields["skin"] + 2, 8 - joint]
    )
    fields["fibrous"] = np.minimum.reduce([fields["fibrous"], meniscus, septa])
    stack = np.stack([fields[name].astype(np.float32) for name in FIELDS], axis=-1)
    return Template(np.ascontiguousarray(stack), axis_mm, width)


def signed_distance(level: np.ndarray) -> np.ndarray:
    """Signed distance (mm) to the zero level of a function that is negative inside."""
    # The filter takes whole numbers only; ten thousandths keep the level set below the voxel.
    image = sitk.GetImageFromArray(np.clip(level * 10000, -1e8, 1e8).astype(np.int32))
    distance = sitk.ApproximateSignedDistanceMap(image, -10000.0, 10000.0)
    return sitk.GetArrayFromImage(distance).astype(np.float32) * SPACING_MM


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Smooth union of two signed distances with blending length k mm (polynomial)."""
    h = np.clip(0.5 + 0.5 * (b - a) / max(k, 1e-6), 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def smooth_max(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Smooth intersection of two signed distances."""
    return -smooth_min(-a, -b, k)


def _join(p: list[np.ndarray], parts: list[dict]) -> np.ndarray:
    """Signed distance of parts joined in order; anatomy.yaml explains the keys of a part."""
    # Plane by plane, which stays in the processor's cache.
    return np.stack([_join_at(list(plane), parts) for plane in zip(*p, strict=True)])


def _join_at(p: list[np.ndarray], parts: list[dict]) -> np.ndarray:
    """Signed distance of joined parts at points of any shape."""
    shapes = {"wheel": _wheel, "capsule": _capsule, "ellipsoid": _ellipsoid}
    total = np.full(p[0].shape, FAR_MM)
    for part in parts:
        numbers = {k: v for k, v in part.items() if k not in ("shape", "blend", "cut")}
        distance = shapes[part["shape"]](p, **numbers)
        blend = part.get("blend", 0)
        if part.get("cut"):
            total = smooth_max(total, -distance, blend)
        else:
            total = smooth_min(total, distance, blend)
    return total


def _wheel(p, axis, centre, radius, half, rounding):
    """Rounded cylinder of half width `half` about the x or z axis."""
    x, y, z = (p[n] - centre[n] for n in range(3))
    along = x if axis == "x" else z
    across = np.hypot(y, z) if axis == "x" else np.hypot(x, y)
    radial = across - (radius - rounding)
    axial = np.abs(along) - (half - rounding)
    outside = np.hypot(np.maximum(radial, 0), np.maximum(axial, 0))
    return np.minimum(np.maximum(radial, axial), 0) + outside - rounding


def _capsule(p, ends, radii, stretch=(1, 1, 1)):
    """Round cone between two points; `stretch` widens it along an axis."""
    start, end = np.array(ends, float) / stretch
    axis = end - start
    v = [p[n] / stretch[n] - start[n] for n in range(3)]
    t = np.clip(sum(v[n] * axis[n] for n in range(3)) / (axis @ axis), 0, 1)
    distance = np.sqrt(sum((v[n] - t * axis[n]) ** 2 for n in range(3)))
    return distance - (radii[0] + (radii[1] - radii[0]) * t)


def _ellipsoid(p, centre, radii):
    """Ellipsoid; its distance is exact to first order at the surface."""
    k0 = np.sqrt(sum(((p[n] - centre[n]) / radii[n]) ** 2 for n in range(3)))
    k1 = np.sqrt(sum(((p[n] - centre[n]) / radii[n] ** 2) ** 2 for n in range(3)))
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def _cartilage_thickness(p: list[np.ndarray], centre_mm: float, bone: str) -> np.ndarray:
    """Thickness (mm), tapering over 5 mm to the edge of the bearing surface."""
    x, y, z = p
    if bone == "femur":
        edge = np.minimum(np.where(y > 0, 42 - 0.15 * y, 47) - z, 36 - np.abs(x))
        notch = np.where(y > -8, np.abs(x) - 9, FAR_MM) + np.maximum(0, -2 - y)
        edge = np.minimum(edge, notch)
    elif bone == "tibia":
        edge = np.minimum(20 - np.hypot(np.abs(x) - 20, 0.9 * (y - 2)), z + 8)
    else:
        edge = np.minimum(y + 47, 17 - np.abs(z - 31))
    t = np.clip(edge / 5, 0, 1)
    return centre_mm * t * t * (3 - 2 * t) - 0.3 * (t <= 0)
