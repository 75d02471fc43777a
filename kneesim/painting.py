"""What both scanners share: poses, grids, tissues on a grid, and painting them into voxels.

Tissues are evaluated on a coarse grid along the scan's own axes and interpolated while a voxel is
painted; only trabeculae are computed at the resolution of a voxel's sub-samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from ctsma.common import BONES
from ctsma.compiled import compiled

from .anatomy import FAR_MM, SPACING_MM, sample_grid
from .microstructure import bone_fraction, smooth_field, sub_samples
from .subject import Subject, displacement, draw_warp, medial_share

COARSE_MM = SPACING_MM  # of the coarse grid of a scan, as fine as the template
# Sub-samples are 0.11-0.26 mm apart this deep below both bearings, as deep as a patch reaches.
DENSE_MM = 18.0  # design choice
# Grid and half width of a scanner's smooth fields around the isocentre, and their kernel SD:
# coils, shims and beam hardening vary over centimetres (design choice).
FIELD_MM, REACH_MM, FIELD_LENGTH_MM = 8.0, 104.0, 20.0
BEND_MM = 8.0  # design choice: soft tissue passes from femur to tibia over about 3 cm
TISSUES = ("air", "fat", "muscle", "fluid", "fibrous", "cartilage", "bone")
TISSUES += ("marrow_fat", "marrow_water")
AIR, FAT, MUSCLE, FLUID, FIBROUS, CARTILAGE, BONE, MARROW_FAT, MARROW_WATER = range(9)
# Channels of `tissue_fields`: signed distance of surfaces; the scanner's own; of bone alone.
IN_UPPER, IN_LOWER, IN_SMALL, IN_CARTILAGE, IN_FIBROUS, IN_MUSCLE, IN_SKIN, IN_FLUID = range(8)
S0, S1, S2, S3 = range(8, 12)
CORTEX, RODNESS, HALF_WIDTH, THETA, WATER, IN_CYST, DEPTH = range(12, 19)


@dataclass(frozen=True)
class Grid:
    """Scanner grid in LPS mm.

    Attributes
    ----------
    size, spacing : along the image axes (i, j, k).
    direction : (3, 3), one column per image axis.
    origin : (3,) of the first voxel's centre.
    """

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
        extent = [(n - 1) * s for n, s in zip(self.size, self.spacing, strict=True)]
        counts = [int(np.ceil(mm / COARSE_MM)) + 2 for mm in extent]
        shape = tuple(reversed(counts))
        k, j, i = np.meshgrid(*(np.arange(n) * COARSE_MM for n in shape), indexing="ij")
        along = np.stack([i.ravel(), j.ravel(), k.ravel()], axis=1)
        return along @ self.direction.T + self.origin, shape


@dataclass(frozen=True)
class Rendering:
    """How a scanner renders tissue.

    Attributes
    ----------
    water, fat : signal by tissue and chemical species; 0 where a tissue is not named.
    is_ct : signal + S0, with the signal of bone times S1; else (MR) water (S0 + i S1) + fat
        (S2 + i S3).
    steps : sub-samples (i, j, k) of a voxel near the joint, and deep in the bone.
    edge_mm : width of the ramp between tissues.
    profile_mm : FWHM of the footprint along k; 0 for a box of one voxel.
    widening : added to w of the trabeculae.
    """

    water: dict[str, float]
    fat: dict[str, float]
    is_ct: bool
    steps: tuple
    edge_mm: float
    profile_mm: float = 0.0
    widening: float = 0.0


def make_grid(field_mm: tuple, spacing: tuple, direction: np.ndarray, centre: np.ndarray) -> Grid:
    """Grid over a field of view (left-right, front-back, head-foot mm) around an LPS centre."""
    extent = np.abs(direction.T) @ np.array(field_mm, float)
    size = tuple(int(round(e / s)) for e, s in zip(extent, spacing, strict=True))
    origin = centre - direction @ ((np.array(size) - 1) * spacing / 2)
    return Grid(size, spacing, direction, origin)


def draw_poses(
    subject: Subject, pose: dict, flexion_deg: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Rigid (4, 4) per bone from its own frame to the scanner's LPS mm; displacement `soft`.

    Whole knee: offset and three rotations. Tibia besides: flexion about the condylar axis (+ bends
    the shank back), a small rotation about the shank, and a shift that restores the clearance of
    the joint.
    """
    angles = [pose["rotation"].draw(rng) for _ in range(3)]
    offset = np.array([pose["offset"].draw(rng) for _ in range(3)])
    shank_deg = pose["tibial_rotation"].draw(rng)
    mirror = np.diag([-1.0 if subject.left else 1.0, 1, 1, 1])
    angles[0] -= flexion_deg / 2  # the thigh rises as the shank falls
    whole = _rigid(*angles, offset) @ mirror

    axis = np.array([0, *subject.template.axis_mm]) * subject.scale
    bend = _rigid(flexion_deg, 0, 0, np.zeros(3))
    bend[:3, 3] = axis - bend[:3, :3] @ axis + bend[:3, 3]  # about the condylar axis
    bend = bend @ _rigid(0, 0, shank_deg, np.zeros(3))
    tibia = whole @ _restore_clearance(subject, bend)
    soft = draw_warp(pose["soft_tissue"].value, pose["soft_wavelength"].value, rng)
    return {"femur": whole, "tibia": tibia, "soft": soft}


def draw_field(amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field of the given SD in scanner space, to be read by `field_on`."""
    n = int(2 * REACH_MM / FIELD_MM) + 1
    field = amplitude * smooth_field(rng, (n, n, n), FIELD_LENGTH_MM / FIELD_MM)
    return field[..., None].astype(np.float32)


def field_on(field: np.ndarray, grid: Grid) -> np.ndarray:
    """Values (k, j, i) of a drawn field on the coarse grid of a scan."""
    points, shape = grid.coarse()
    return sample_grid(field, np.full(3, -REACH_MM), FIELD_MM, points)[:, 0].reshape(shape)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Affine (4, 4) on points (n, 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _rigid(x_deg: float, y_deg: float, z_deg: float, offset: np.ndarray) -> np.ndarray:
    """Rigid (4, 4) of rotations about the axes through the origin, then an offset in mm."""
    angles = np.deg2rad([x_deg, y_deg, z_deg]).tolist()
    transform = sitk.Euler3DTransform((0, 0, 0), *angles)
    matrix = np.eye(4)
    matrix[:3] = np.c_[np.array(transform.GetMatrix()).reshape(3, 3), offset]
    return matrix


def _restore_clearance(subject: Subject, bend: np.ndarray) -> np.ndarray:
    """Shift the bent tibia along its shaft until its clearance from the femur is as before."""
    axes = np.arange(-32, 33, 2.0), np.arange(-26, 27, 2.0), np.arange(-8, 12, 1.0)
    x, y, z = (coordinate.ravel() for coordinate in np.meshgrid(*axes, indexing="ij"))
    points = np.c_[x, y, z][np.abs(x) > 11] * subject.scale
    fields = subject.fields(points)
    femur = fields["femur"]
    reference = (femur + fields["tibia"]).min()
    for _ in range(3):
        tibia = subject.fields(apply(np.linalg.inv(bend), points))["tibia"]
        gap = (femur + tibia).min()
        bend = bend @ _rigid(0, 0, 0, np.array([0, 0, gap - reference]))
    return bend


def tissue_fields(
    subject: Subject, poses: dict, grid: Grid, scanner: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Channels of `paint` on the coarse grid of a scan: (channels, k, j, i) float32.

    Signed distances (mm) of femur and patella, tibia and fibula, patella and fibula, cartilage,
    fibrous tissue, muscle, skin, fluid; the scanner's own, at most four of the coarse grid's shape,
    else 0; thickness of the cortex (mm), c, w, theta, marrow water, signed distance of cysts,
    distance from the farther of the two bearings (mm).
    """
    points, shape = grid.coarse()
    place = {bone: apply(np.linalg.inv(poses[bone]), points) for bone in BONES}
    femur, tibia = subject.fields(place["femur"]), subject.fields(place["tibia"])
    below = 1 / (1 + np.exp(place["femur"][:, 2:] / BEND_MM))
    soft_place = place["femur"] * (1 - below) + place["tibia"] * below
    soft = subject.fields(soft_place + displacement(poses["soft"], soft_place))

    upper_bones = np.minimum(femur["femur"], femur["patella"])
    lower_bones = np.minimum(tibia["tibia"], tibia["fibula"])
    small_bones = np.minimum(femur["patella"], tibia["fibula"])
    cartilage = np.minimum(femur["femur_cartilage"], femur["patella_cartilage"])
    cartilage = np.minimum(cartilage, tibia["tibia_cartilage"])
    fluid = femur["femur"] - 8 + np.minimum(tibia["tibia"], femur["patella"])
    depth = np.maximum(femur["femur_depth"], tibia["tibia_depth"])
    bones = [upper_bones, lower_bones, small_bones]
    soft_tissues = [cartilage, soft["fibrous"], soft["muscle"], soft["skin"], fluid]
    own = np.zeros((CORTEX - S0, len(points)))
    for n, channel in enumerate(scanner):
        own[n] = channel.ravel()

    is_upper = upper_bones < lower_bones
    femur_cortex = _cortex_mm(subject, "femur", femur, place["femur"])
    tibia_cortex = _cortex_mm(subject, "tibia", tibia, place["tibia"])
    cortex = np.where(is_upper, femur_cortex, tibia_cortex)
    femur_micro = subject.bones["femur"].at(place["femur"])
    tibia_micro = subject.bones["tibia"].at(place["tibia"])
    micro = np.where(is_upper[:, None], femur_micro, tibia_micro)
    femur_cysts = _balls(subject.cysts["femur"], place["femur"])
    cysts = np.minimum(femur_cysts, _balls(subject.cysts["tibia"], place["tibia"]))
    channels = [*bones, *soft_tissues, *own, cortex, *micro.T, cysts, depth]
    return np.stack(channels).astype(np.float32).reshape(-1, *shape)


def _cortex_mm(subject: Subject, bone: str, fields: dict, place: np.ndarray) -> np.ndarray:
    """Thickness: subchondral plate under cartilage, else the cortex, growing towards the shaft."""
    drawn, z = subject.drawn, place[:, 2] / subject.scale
    towards_shaft = (z - 45) / 40 if bone == "femur" else (-z - 25) / 45
    thin, thick = drawn["cortex_epiphysis"], drawn["cortex_shaft"]
    cortex = thin + (thick - thin) * np.clip(towards_shaft, 0, 1)
    plate = drawn["plate"] + drawn["plate_oa"] * medial_share(place, 3.0)
    beyond_bearing = np.clip((fields[f"{bone}_depth"] - 1.5) / 3, 0, 1)
    return plate + (np.maximum(cortex, plate) - plate) * beyond_bearing


def _balls(balls: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Signed distance (n,) mm from the nearest of balls (m, 4: x, y, z, radius)."""
    distance = np.full(len(points), FAR_MM)
    for ball in balls:
        distance = np.minimum(distance, np.linalg.norm(points - ball[:3], axis=1) - ball[3])
    return distance


@compiled(inline="always")
def _fraction(distance, edge):
    """Share of a footprint `edge` mm wide that lies inside a surface at a signed distance."""
    return min(max(np.float32(0.5) - distance / edge, np.float32(0)), np.float32(1))


@compiled()
def paint(
    shape, coarse, start, ratio, tile, maps, dense, sparse, soft, water, fat, is_ct, edge, widening
) -> tuple[np.ndarray, np.ndarray]:
    """Paint a complex image and bone labels, both of `shape` (k, j, i); labels 1 femur, 2 tibia.

    Parameters
    ----------
    coarse : channels of `tissue_fields`.
    start, ratio : coarse voxel of the first voxel, coarse voxels per voxel (k, j, i).
    tile, maps : the microstructure, and by bone (2, 3, 4) image index (i, j, k) to tile voxels.
    dense, sparse : (2, n, 4) sub-samples near the joint and deep in the bone.
    soft : (2, 2) edges of these sub-samples.
    water, fat, is_ct, edge, widening : as in `Rendering`.
    """
    image, labels = np.empty(shape, np.complex64), np.zeros(shape, np.uint8)
    layers = (FLUID, IN_FLUID), (FIBROUS, IN_FIBROUS), (CARTILAGE, IN_CARTILAGE)
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
                    a, a_next = coarse[c, k0, j0, i], coarse[c, k0, j0 + 1, i]
                    b, b_next = coarse[c, k0 + 1, j0, i], coarse[c, k0 + 1, j0 + 1, i]
                    a, b = a + tj * (a_next - a), b + tj * (b_next - b)
                    row[c, i] = a + tk * (b - a)
            for i in range(image.shape[2]):
                i0 = int(start[2] + i * ratio[2])
                ti = np.float32(start[2] + i * ratio[2] - i0)
                v[IN_UPPER] = row[IN_UPPER, i0] + ti * (row[IN_UPPER, i0 + 1] - row[IN_UPPER, i0])
                v[IN_LOWER] = row[IN_LOWER, i0] + ti * (row[IN_LOWER, i0 + 1] - row[IN_LOWER, i0])
                bone = min(v[IN_UPPER], v[IN_LOWER])
                inside = _fraction(bone, edge)
                # Only the channels that this voxel needs: soft tissue outside bone, bone inside.
                first = IN_SMALL if inside < 1 else S0
                last = CORTEX if inside == 0 else channels
                for c in range(first, last):
                    v[c] = row[c, i0] + ti * (row[c, i0 + 1] - row[c, i0])
                w_sum, f_sum = np.float32(0), np.float32(0)
                if inside < 1:
                    # Muscle over fat; fluid, fibrous tissue and cartilage over both; air outside.
                    muscle = _fraction(v[IN_MUSCLE], edge + np.float32(0.8))
                    w_soft = muscle * water[MUSCLE] + (1 - muscle) * water[FAT]
                    f_soft = (1 - muscle) * fat[FAT]
                    for tissue, c in layers:
                        share = _fraction(v[c], edge)
                        w_soft += share * (water[tissue] - w_soft)
                        f_soft *= 1 - share
                    share = _fraction(v[IN_SKIN], edge)
                    w_sum = (1 - inside) * (water[AIR] + share * (w_soft - water[AIR]))
                    f_sum = (1 - inside) * share * f_soft
                if inside > 0:
                    solid = _fraction(-bone - v[CORTEX], edge)  # the cortex
                    n = 0 if v[IN_UPPER] < v[IN_LOWER] else 1
                    if solid < 1:
                        m = maps[n]
                        x = np.float32(m[0, 0] * i + m[0, 1] * j + m[0, 2] * k + m[0, 3])
                        y = np.float32(m[1, 0] * i + m[1, 1] * j + m[1, 2] * k + m[1, 3])
                        z = np.float32(m[2, 0] * i + m[2, 1] * j + m[2, 2] * k + m[2, 3])
                        near = v[DEPTH] < DENSE_MM
                        samples = dense[n] if near else sparse[n]
                        blur = soft[n, 0] if near else soft[n, 1]
                        rodness, theta = v[RODNESS], v[THETA]
                        w = max(v[HALF_WIDTH] + widening, np.float32(0))
                        solid += (1 - solid) * bone_fraction(
                            tile, x, y, z, samples, blur, rodness, w, theta
                        )
                    cyst = _fraction(v[IN_CYST], edge)
                    solid *= 1 - cyst
                    wet = v[WATER] + cyst * (1 - v[WATER])
                    marrow = wet * water[MARROW_WATER] + (1 - wet) * water[MARROW_FAT]
                    w_sum += inside * (1 - solid) * marrow
                    w_sum += inside * solid * water[BONE] * v[S1]
                    f_sum += inside * (1 - solid) * (1 - wet) * fat[MARROW_FAT]
                    other = row[IN_SMALL, i0] + ti * (row[IN_SMALL, i0 + 1] - row[IN_SMALL, i0])
                    if inside >= 0.5 and other > bone + np.float32(1e-3):
                        labels[k, j, i] = n + 1
                if is_ct:
                    image[k, j, i] = w_sum + v[S0]
                else:
                    real = w_sum * v[S0] + f_sum * v[S2]
                    image[k, j, i] = complex(real, w_sum * v[S1] + f_sum * v[S3])
    return image, labels


def painted(
    subject: Subject,
    poses: dict,
    grid: Grid,
    coarse: np.ndarray,
    coarse_grid: Grid,
    rendering: Rendering,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `paint` on a grid: complex image and bone labels (k, j, i).

    coarse, coarse_grid: `tissue_fields`, and the grid it was evaluated for, which holds `grid`.
    """
    maps, dense, sparse, edges = [], [], [], []
    profile = rendering.profile_mm / grid.spacing[2]
    for bone, micro in subject.bones.items():
        matrix = micro.to_tile @ (np.linalg.inv(poses[bone]) @ grid.to_lps())
        near, near_edge = sub_samples(matrix[:, :3], rendering.steps[0], profile)
        deep, deep_edge = sub_samples(matrix[:, :3], rendering.steps[1], profile)
        maps.append(matrix)
        dense.append(near)
        sparse.append(deep)
        edges.append([near_edge, deep_edge])
    return paint(
        grid.size[::-1],
        coarse,
        ((grid.origin - coarse_grid.origin) @ grid.direction / COARSE_MM)[::-1].copy(),
        np.array(grid.spacing[::-1]) / COARSE_MM,
        subject.tile,
        np.stack(maps),
        np.stack(dense),
        np.stack(sparse),
        np.array(edges, np.float32),
        np.array([rendering.water.get(tissue, 0.0) for tissue in TISSUES], np.float32),
        np.array([rendering.fat.get(tissue, 0.0) for tissue in TISSUES], np.float32),
        rendering.is_ct,
        np.float32(rendering.edge_mm),
        np.float32(rendering.widening),
    )
