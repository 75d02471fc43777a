"""What both scanners share: poses, grids, the tissue fields that a scan sees, and painting them into voxels.

Fields are evaluated on a coarse grid along the scan's own axes and interpolated while a voxel is painted; only
trabeculae are computed at the resolution of the footprint's sub-samples.
"""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from numba import njit

from ctsma.cohort import BONES

from .anatomy import sample_grid
from .microstructure import bone_fraction, smooth_field, sub_samples
from .subject import Subject, displacement, draw_warp

COARSE_MM = 1.25  # our choice, see anatomy.SPACING_MM
SCAN, MICRO = 8, 12  # first of the scanner's four channels, first of the bone's own: see tissue_fields
DENSE_MM = 18.0  # from both bearings: as deep as a patch reaches; sub-samples 0.11-0.26 mm apart there (our choice)
FIELD_MM, REACH_MM = 8.0, 104.0  # grid and half width of a scanner's smooth fields around the isocentre (our choice)
FIELD_LENGTH_MM = 20.0  # kernel SD of these fields (our choice: coils, shims and beam hardening vary over centimetres)
TISSUES = ("air", "fat", "muscle", "fluid", "fibrous", "cartilage", "bone", "marrow_fat", "marrow_water")


@dataclass(frozen=True)
class Grid:
    """Scanner grid: size and spacing along image axes (i, j, k), direction columns, origin; LPS mm."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    direction: np.ndarray
    origin: np.ndarray

    def image(self, array: np.ndarray) -> sitk.Image:
        """A (k, j, i) array with this geometry."""
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing)
        image.SetDirection(self.direction.ravel().tolist())
        image.SetOrigin(self.origin.tolist())
        return image

    def index(self, points: np.ndarray) -> np.ndarray:
        """Continuous index (n, 3: i, j, k) of LPS points (n, 3)."""
        return (points - self.origin) @ self.direction / self.spacing

    def to_lps(self) -> np.ndarray:
        """Affine (4, 4) from index (i, j, k) to LPS mm."""
        matrix = np.eye(4)
        matrix[:3] = np.c_[self.direction * self.spacing, self.origin]
        return matrix

    def coarse(self) -> tuple[np.ndarray, tuple]:
        """LPS points (n, 3) of the coarse grid in (k, j, i) order, and its shape."""
        counts = [int(np.ceil((n - 1) * s / COARSE_MM)) + 2 for n, s in zip(self.size, self.spacing, strict=True)]
        k, j, i = np.meshgrid(*(np.arange(n) * COARSE_MM for n in counts[::-1]), indexing="ij")
        along = np.stack([i.ravel(), j.ravel(), k.ravel()], axis=1)
        return along @ self.direction.T + self.origin, tuple(counts[::-1])


def make_grid(field_mm: tuple, spacing: tuple, direction: np.ndarray, centre: np.ndarray) -> Grid:
    """Grid over a field of view (left-right, front-back, head-foot mm) around an LPS centre."""
    extent = np.abs(direction.T) @ np.array(field_mm, float)
    size = tuple(int(round(e / s)) for e, s in zip(extent, spacing, strict=True))
    origin = centre - direction @ ((np.array(size) - 1) * spacing / 2)
    return Grid(size, spacing, direction, origin)


def draw_poses(subject: Subject, pose: dict, flexion_deg: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rigid (4, 4) per bone from its own frame to the scanner's LPS mm; `soft`: the flesh's own displacement.

    Whole knee: offset and three rotations. Tibia besides: flexion about the condylar axis (+ bends the shank
    back), a small rotation about the shank, and a shift that restores the reference clearance of the joint.
    """
    angles = [pose["rotation"].draw(rng) for _ in range(3)]
    offset = np.array([pose["offset"].draw(rng) for _ in range(3)])
    turn = pose["tibial_rotation"].draw(rng)
    mirror = np.diag([-1.0 if subject.left else 1.0, 1, 1, 1])
    angles[0] -= flexion_deg / 2  # the thigh rises as the shank falls
    whole = _rigid(*angles, offset) @ mirror
    axis = np.array([0, *subject.template.axis_mm]) * subject.scale
    bend = _about(axis, _rigid(flexion_deg, 0, 0, np.zeros(3))) @ _rigid(0, 0, turn, np.zeros(3))
    soft = draw_warp(pose["soft_tissue"].value, pose["soft_wavelength"].value, rng)
    return {"femur": whole, "tibia": whole @ _cleared(subject, bend), "soft": soft}


def draw_field(amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field of the given SD in scanner space, to be read by `field_on`."""
    n = int(2 * REACH_MM / FIELD_MM) + 1
    return (amplitude * smooth_field(rng, (n, n, n), FIELD_LENGTH_MM / FIELD_MM))[..., None].astype(np.float32)


def field_on(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Values (k, j, i) of a drawn field on the coarse grid of a scan."""
    points, shape = grid.coarse()
    return sample_grid(field, np.full(3, -REACH_MM), FIELD_MM, points)[:, 0].reshape(shape)


def _rigid(x_deg: float, y_deg: float, z_deg: float, offset: np.ndarray) -> np.ndarray:
    transform = sitk.Euler3DTransform((0, 0, 0), *np.deg2rad([x_deg, y_deg, z_deg]).tolist())
    matrix = np.eye(4)
    matrix[:3] = np.c_[np.array(transform.GetMatrix()).reshape(3, 3), offset]
    return matrix


def _about(centre: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    moved = matrix.copy()
    moved[:3, 3] = centre - matrix[:3, :3] @ centre + matrix[:3, 3]
    return moved


def _cleared(subject: Subject, bend: np.ndarray) -> np.ndarray:
    """Shift the bent tibia along its shaft until its clearance from the femur is what it was unbent."""
    x, y, z = np.meshgrid(np.arange(-32, 33, 2.0), np.arange(-26, 27, 2.0), np.arange(-8, 12, 1.0), indexing="ij")
    points = np.c_[x.ravel(), y.ravel(), z.ravel()][np.abs(x.ravel()) > 11] * subject.scale
    femur = subject.fields(points)
    reference = (femur["femur"] + femur["tibia"]).min()
    for _ in range(3):
        gap = (femur["femur"] + subject.fields(apply(np.linalg.inv(bend), points))["tibia"]).min()
        bend = bend @ _rigid(0, 0, 0, np.array([0, 0, gap - reference]))
    return bend


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Affine (4, 4) on points (n, 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def tissue_fields(subject: Subject, poses: dict, grid: Grid) -> np.ndarray:
    """Channels of `paint` on the coarse grid of a scan: (channels, k, j, i) float32.

    Channels: femur and patella, tibia and fibula, patella and fibula, cartilage, fibrous, muscle, skin, fluid
    (signed distances, mm), four that the scanner fills in, cortex (mm), c, w, theta, marrow water, cysts, distance from
    the farther of the two bearings (mm).
    """
    points, shape = grid.coarse()
    place = {bone: apply(np.linalg.inv(poses[bone]), points) for bone in BONES}
    femur, tibia = subject.fields(place["femur"]), subject.fields(place["tibia"])
    below = 1 / (1 + np.exp(place["femur"][:, 2:] / 8.0))  # soft tissue bends over about 3 cm (our choice)
    flesh = place["femur"] * (1 - below) + place["tibia"] * below
    soft = subject.fields(flesh + displacement(poses["soft"], flesh))
    groups = np.minimum(femur["femur"], femur["patella"]), np.minimum(tibia["tibia"], tibia["fibula"])
    cartilage = np.minimum.reduce([femur["femur_cartilage"], femur["patella_cartilage"], tibia["tibia_cartilage"]])
    fluid = femur["femur"] - 8 + np.minimum(tibia["tibia"], femur["patella"])
    upper = groups[0] < groups[1]
    cortex = np.where(upper, *(_cortex(subject, b, f, place[b]) for b, f in (("femur", femur), ("tibia", tibia))))
    parameters = np.where(upper[:, None], *(subject.bones[b].at(place[b]) for b in BONES))
    cysts = np.minimum.reduce([_balls(subject.cysts[b], place[b]) for b in BONES])
    others = np.minimum(femur["patella"], tibia["fibula"])
    distances = [*groups, others, cartilage, soft["fibrous"], soft["muscle"], soft["skin"], fluid]
    far = np.maximum(femur["femur_depth"], tibia["tibia_depth"])
    channels = [*distances, *np.zeros((MICRO - SCAN, len(points))), cortex, *parameters.T, cysts, far]
    return np.stack(channels).astype(np.float32).reshape(-1, *shape)


def _cortex(subject: Subject, bone: str, fields: dict, place: np.ndarray) -> np.ndarray:
    """Thickness (mm): subchondral plate under cartilage, else the cortex, growing towards the shaft."""
    drawn, z = subject.drawn, place[:, 2] / subject.scale
    up = (z - 45) / 40 if bone == "femur" else (-z - 25) / 45
    cortex = drawn["cortex_epiphysis"] + (drawn["cortex_shaft"] - drawn["cortex_epiphysis"]) * np.clip(up, 0, 1)
    medial = 1 / (1 + np.exp(-place[:, 0] / 3.0))
    plate = drawn["plate"] + drawn["plate_oa"] * medial
    return plate + (np.maximum(cortex, plate) - plate) * np.clip((fields[f"{bone}_depth"] - 1.5) / 3, 0, 1)


def _balls(balls: np.ndarray, points: np.ndarray) -> np.ndarray:
    away = [np.linalg.norm(points - ball[:3], axis=1) - ball[3] for ball in balls]
    return np.minimum.reduce([np.full(len(points), 99.0), *away])


@njit(cache=True, inline="always")
def _fraction(distance, edge):
    """Share of a footprint `edge` mm wide that lies inside a surface at signed distance `distance`."""
    return min(max(np.float32(0.5) - distance / edge, np.float32(0)), np.float32(1))


@njit(cache=True)
def paint(
    coarse, start, ratio, tile, maps, dense, sparse, soft, water, fat, additive, edge, widening, image, labels
) -> None:
    """Paint a complex image (k, j, i) from coarse channels, the microstructure tile and tissue signals.

    start, ratio: coarse voxel of the first voxel, coarse voxels per voxel (k, j, i). maps (2 bones, 3, 4): index
    (i, j, k) to tile voxels. dense, sparse (2, n, 4) and soft (2, 2): sub-samples and their edges near the joint and
    deep in the bone. water, fat: signal of each of TISSUES by chemical species. The scanner's channels s: additive
    (CT) signal + s0, bone times s1; else (MR) water (s0 + i s1) + fat (s2 + i s3). widening: added to w.
    """
    channels = coarse.shape[0]
    row = np.empty((channels, coarse.shape[3]), np.float32)
    v = np.empty(channels, np.float32)
    for k in range(image.shape[0]):
        k0 = int(start[0] + k * ratio[0])
        tk = np.float32(start[0] + k * ratio[0] - k0)
        for j in range(image.shape[1]):
            j0 = int(start[1] + j * ratio[1])
            tj = np.float32(start[1] + j * ratio[1] - j0)
            for c in range(channels):
                for i in range(row.shape[1]):
                    a = coarse[c, k0, j0, i] + tj * (coarse[c, k0, j0 + 1, i] - coarse[c, k0, j0, i])
                    b = coarse[c, k0 + 1, j0, i] + tj * (coarse[c, k0 + 1, j0 + 1, i] - coarse[c, k0 + 1, j0, i])
                    row[c, i] = a + tk * (b - a)
            for i in range(image.shape[2]):
                i0 = int(start[2] + i * ratio[2])
                ti = np.float32(start[2] + i * ratio[2] - i0)
                v[0] = row[0, i0] + ti * (row[0, i0 + 1] - row[0, i0])
                v[1] = row[1, i0] + ti * (row[1, i0 + 1] - row[1, i0])
                bone = min(v[0], v[1])
                inside = _fraction(bone, edge)
                for c in range(2 if inside < 1 else SCAN, MICRO if inside == 0 else channels):
                    v[c] = row[c, i0] + ti * (row[c, i0 + 1] - row[c, i0])
                w_sum, f_sum = np.float32(0), np.float32(0)
                if inside < 1:
                    flesh = _fraction(v[5], edge + np.float32(0.8))
                    w_out, f_out = flesh * water[2] + (1 - flesh) * water[1], (1 - flesh) * fat[1]
                    for t, c in ((3, 7), (4, 4), (5, 3)):
                        share = _fraction(v[c], edge)
                        w_out, f_out = w_out + share * (water[t] - w_out), f_out * (1 - share)
                    share = _fraction(v[6], edge)
                    w_sum = (1 - inside) * (water[0] + share * (w_out - water[0]))
                    f_sum = (1 - inside) * share * f_out
                if inside > 0:
                    solid = _fraction(-bone - v[12], edge)
                    n = 0 if v[0] < v[1] else 1
                    if solid < 1:
                        m = maps[n]
                        x = np.float32(m[0, 0] * i + m[0, 1] * j + m[0, 2] * k + m[0, 3])
                        y = np.float32(m[1, 0] * i + m[1, 1] * j + m[1, 2] * k + m[1, 3])
                        z = np.float32(m[2, 0] * i + m[2, 1] * j + m[2, 2] * k + m[2, 3])
                        half, near = max(v[14] + widening, np.float32(0)), v[18] < DENSE_MM
                        samples, blur = (dense[n], soft[n, 0]) if near else (sparse[n], soft[n, 1])
                        solid += (1 - solid) * bone_fraction(tile, x, y, z, samples, blur, v[13], half, v[15])
                    hole = _fraction(v[17], edge)
                    solid *= 1 - hole
                    wet = v[16] + hole * (1 - v[16])
                    w_sum += inside * (1 - solid) * (wet * water[8] + (1 - wet) * water[7])
                    w_sum += inside * solid * water[6] * v[9]
                    f_sum += inside * (1 - solid) * (1 - wet) * fat[7]
                    if inside >= 0.5 and row[2, i0] + ti * (row[2, i0 + 1] - row[2, i0]) > bone + np.float32(1e-3):
                        labels[k, j, i] = n + 1
                if additive:
                    image[k, j, i] = w_sum + v[8]
                else:
                    image[k, j, i] = complex(w_sum * v[8] + f_sum * v[10], w_sum * v[9] + f_sum * v[11])


def painted(subject, poses, whole, coarse, grid, signals, additive, steps, profile, edge, widening) -> tuple:
    """Run `paint` on a grid inside the whole one: complex image and bone labels (k, j, i).

    coarse: `tissue_fields` of the whole grid, scanner's channels filled in; signals: by tissue, of water and fat;
    steps: sub-samples (i, j, k) near the joint and deep; profile: FWHM along k (mm, 0 for a box).
    """
    maps = np.stack([m.to_tile @ _homogeneous(poses[b], grid) for b, m in subject.bones.items()])
    near, deep = ([sub_samples(m[:, :3], s, profile / grid.spacing[2]) for m in maps] for s in steps)
    samples = (np.stack([o for o, _ in part]) for part in (near, deep))
    soft = np.array([[a[1], b[1]] for a, b in zip(near, deep, strict=True)], np.float32)
    water, fat = (np.array([s.get(t, 0.0) for t in TISSUES], np.float32) for s in signals)
    image, ratio = np.empty(grid.size[::-1], np.complex64), np.array(grid.spacing[::-1]) / COARSE_MM
    start = ((grid.origin - whole.origin) @ grid.direction / COARSE_MM)[::-1].copy()
    labels, numbers = np.zeros(image.shape, np.uint8), (np.float32(n) for n in (edge, widening))
    paint(coarse, start, ratio, subject.tile, maps, *samples, soft, water, fat, additive, *numbers, image, labels)
    return image, labels


def _homogeneous(pose: np.ndarray, grid: Grid) -> np.ndarray:
    """Affine (4, 4) from image index to the bone's own frame."""
    return np.linalg.inv(pose) @ grid.to_lps()
