"""What both scanners share: poses, grids, tissues on a grid, and painting them into voxels.

Tissues are evaluated on a coarse grid along the scan's own axes and interpolated while a voxel is
painted; only trabeculae are computed at the resolution of a voxel's sub-samples.
"""

from collections.abc import Iterator, Sequence
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
# design choice: muscle passes into fat over a voxel and this many mm
MUSCLE_RAMP_MM = np.float32(0.8)
SLAB = 16  # planes painted together: their trabeculae lie close in memory
BEND_MM = 8.0  # design choice: soft tissue passes from femur to tibia over about 3 cm
TISSUES = ("air", "fat", "muscle", "fluid", "fibrous", "cartilage", "bone")
TISSUES += ("marrow_fat", "marrow_water")
AIR, FAT, MUSCLE, FLUID, FIBROUS, CARTILAGE, BONE, MARROW_FAT, MARROW_WATER = range(9)
# Channels of `tissue_fields`: signed distance of surfaces; the scanner's own; of bone alone.
IN_UPPER, IN_LOWER, IN_SMALL, IN_CARTILAGE, IN_FIBROUS, IN_MUSCLE, IN_SKIN, IN_FLUID = range(8)
S0, S1, S2, S3 = range(8, 12)
CORTEX, RODNESS, HALF_WIDTH, THETA, WATER, IN_CYST, DEPTH = range(12, 19)
# A product and a sum may be rounded once: faster, and the same to single precision.
ROUNDED_ONCE = {"fastmath": {"contract"}}


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
        k, j, i = np.ix_(*(np.arange(n) * COARSE_MM for n in shape))
        points = np.empty((*shape, 3))
        for axis, (di, dj, dk) in enumerate(self.direction):
            points[..., axis] = (i * di + j * dj) + k * dk + self.origin[axis]
        return points.reshape(-1, 3), shape


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
    values = sample_grid(field, np.arange(1), np.full(3, -REACH_MM), FIELD_MM, points)
    return values.reshape(shape)


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
    fields = subject.fields(points, ("femur", "tibia"))
    femur = fields["femur"]
    reference = (femur + fields["tibia"]).min()
    for _ in range(3):
        tibia = subject.fields(apply(np.linalg.inv(bend), points), ("tibia",))["tibia"]
        gap = (femur + tibia).min()
        bend = bend @ _rigid(0, 0, 0, np.array([0, 0, gap - reference]))
    return bend


def tissue_fields(
    subject: Subject, poses: dict, grid: Grid, scanner: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Channels of `paint` on the coarse grid of a scan: (k, j, i, channels) float32.

    Signed distances (mm) of femur and patella, tibia and fibula, patella and fibula, cartilage,
    fibrous tissue, muscle, skin, fluid; the scanner's own, at most four of the coarse grid's shape,
    else 0; thickness of the cortex (mm), c, w, theta, marrow water, signed distance of cysts,
    distance from the farther of the two bearings (mm).
    """
    points, shape = grid.coarse()
    place = {bone: apply(np.linalg.inv(poses[bone]), points) for bone in BONES}
    femur = subject.fields(place["femur"], ("femur", "patella"))
    tibia = subject.fields(place["tibia"], ("tibia", "fibula"))
    below = 1 / (1 + np.exp(place["femur"][:, 2:] / BEND_MM))
    soft_place = place["femur"] * (1 - below) + place["tibia"] * below
    soft_place += displacement(poses["soft"], soft_place)
    soft = subject.fields(soft_place, ("fibrous", "muscle", "skin"))

    upper_bones = np.minimum(femur["femur"], femur["patella"])
    lower_bones = np.minimum(tibia["tibia"], tibia["fibula"])
    small_bones = np.minimum(femur["patella"], tibia["fibula"])
    cartilage = np.minimum(femur["femur_cartilage"], femur["patella_cartilage"])
    cartilage = np.minimum(cartilage, tibia["tibia_cartilage"])
    fluid = femur["femur"] - 8 + np.minimum(tibia["tibia"], femur["patella"])
    depth = np.maximum(femur["femur_depth"], tibia["tibia_depth"])
    bones = [upper_bones, lower_bones, small_bones]
    soft_tissues = [cartilage, soft["fibrous"], soft["muscle"], soft["skin"], fluid]
    own = [channel.ravel() for channel in scanner] + [0.0] * (CORTEX - S0 - len(scanner))

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
    coarse = np.empty((len(points), len(channels)), np.float32)
    for n, channel in enumerate(channels):
        coarse[:, n] = channel
    return coarse.reshape(*shape, -1)


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


@compiled(inline="always")
def _between(rows, p, c, i, t):
    """Channel c of plane p at a share t of the way from coarse voxel i to the next."""
    return rows[p, i, c] + t * (rows[p, i + 1, c] - rows[p, i, c])


@compiled(inline="always")
def _to_tile(maps, n, axis, i, j, k):
    """Tile voxel along an axis of image voxel (i, j, k) in bone n."""
    m = maps
    return np.float32(m[n, axis, 0] * i + m[n, axis, 1] * j + m[n, axis, 2] * k + m[n, axis, 3])


@compiled(forceinline=True)
def _is_plain(rows, p, i, edge) -> bool:
    """Whether no surface of bone or soft tissue passes between coarse voxels i and i + 1.

    Distances are linear between them, so that a share that is 0 or 1 at both ends is so throughout.
    """
    for c in (IN_UPPER, IN_LOWER):
        if rows[p, i, c] < edge / 2 or rows[p, i + 1, c] < edge / 2:
            return False
    for c in range(IN_CARTILAGE, IN_FLUID + 1):
        width = edge + MUSCLE_RAMP_MM if c == IN_MUSCLE else edge
        share = _fraction(rows[p, i, c], width)
        if 0 < share < 1 or share != _fraction(rows[p, i + 1, c], width):
            return False
    return True


@compiled(forceinline=True, **ROUNDED_ONCE)
def _soft_signal(rows, p, i, t, water, fat, edge) -> tuple[float, float]:
    """Signal of water and fat of soft tissue.

    Muscle over fat; fluid, fibrous tissue and cartilage over both; air outside.
    """
    muscle = _fraction(_between(rows, p, IN_MUSCLE, i, t), edge + MUSCLE_RAMP_MM)
    w = muscle * water[MUSCLE] + (1 - muscle) * water[FAT]
    f = (1 - muscle) * fat[FAT]
    fluid = _fraction(_between(rows, p, IN_FLUID, i, t), edge)
    fibrous = _fraction(_between(rows, p, IN_FIBROUS, i, t), edge)
    cartilage = _fraction(_between(rows, p, IN_CARTILAGE, i, t), edge)
    w += fluid * (water[FLUID] - w)
    w += fibrous * (water[FIBROUS] - w)
    w += cartilage * (water[CARTILAGE] - w)
    f *= (1 - fluid) * (1 - fibrous) * (1 - cartilage)
    skin = _fraction(_between(rows, p, IN_SKIN, i, t), edge)
    return water[AIR] + skin * (w - water[AIR]), skin * f


@compiled(forceinline=True, **ROUNDED_ONCE)
def _bone_signal(rows, p, i, t, trabecular, water, fat, edge) -> tuple[float, float]:
    """Signal of water and fat of bone tissue and marrow, at a fraction of trabecular bone."""
    bone = min(_between(rows, p, IN_UPPER, i, t), _between(rows, p, IN_LOWER, i, t))
    cortex = _fraction(-bone - _between(rows, p, CORTEX, i, t), edge)
    cyst = _fraction(_between(rows, p, IN_CYST, i, t), edge)
    solid = (cortex + (1 - cortex) * trabecular) * (1 - cyst)
    wet = _between(rows, p, WATER, i, t)
    wet += cyst * (1 - wet)
    marrow = wet * water[MARROW_WATER] + (1 - wet) * water[MARROW_FAT]
    w = (1 - solid) * marrow + solid * water[BONE] * _between(rows, p, S1, i, t)
    return w, (1 - solid) * (1 - wet) * fat[MARROW_FAT]


@compiled(**ROUNDED_ONCE)
def paint(
    image,
    labels,
    plane,
    hole,
    coarse,
    start,
    ratio,
    tile,
    maps,
    samples,
    ends,
    soft,
    water,
    fat,
    is_ct,
    edge,
    widening,
) -> None:
    """Paint planes of a complex image and bone labels (k, j, i); labels 1 femur, 2 tibia.

    Parameters
    ----------
    image, labels : written; what lies in the hole keeps its values.
    plane : index of the first of these planes in the scan.
    hole : (2, 3) first voxel and end (k, j, i) of a box that need not be painted.
    coarse : channels of `tissue_fields`.
    start, ratio : coarse voxel of the scan's first voxel, coarse voxels per voxel (k, j, i).
    tile, maps : the microstructure, and by bone (2, 3, 4) image index (i, j, k) to tile voxels.
    samples, ends : (2, n, 4) sub-samples by bone, first those near the joint and then those deep in
        it; first of each and their end (3,).
    soft : (2, 2) edges of these sub-samples.
    water, fat, is_ct, edge, widening : as in `Rendering`.
    """
    n_planes, n_rows, n_columns = image.shape
    w, f = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    share = np.empty(n_columns, np.float32)
    rows = np.empty((n_planes, *coarse.shape[2:]), np.float32)
    # The voxels between coarse voxels i and i + 1 are those from first[i] to first[i + 1].
    first = np.zeros(coarse.shape[2], np.int64)
    for i in range(n_columns):
        place = start[2] + i * ratio[2]
        share[i] = place - int(place)
        first[int(place) + 1 :] = i + 1
    for j in range(n_rows):
        j0 = int(start[1] + j * ratio[1])
        tj = np.float32(start[1] + j * ratio[1] - j0)
        for p in range(n_planes):
            k_place = start[0] + (plane + p) * ratio[0]
            k0 = int(k_place)
            tk = np.float32(k_place - k0)
            for i in range(rows.shape[1]):
                for c in range(rows.shape[2]):
                    a, a_next = coarse[k0, j0, i, c], coarse[k0, j0 + 1, i, c]
                    b, b_next = coarse[k0 + 1, j0, i, c], coarse[k0 + 1, j0 + 1, i, c]
                    a, b = a + tj * (a_next - a), b + tj * (b_next - b)
                    rows[p, i, c] = a + tk * (b - a)
        # Few voxels of a row in all planes, then the next few.
        for i0 in range(first.size - 1):
            begin, end = first[i0], first[i0 + 1]
            in_hole = hole[0, 1] <= j < hole[1, 1] and hole[0, 2] <= begin and end <= hole[1, 2]
            for p in range(n_planes):
                k = plane + p
                if in_hole and hole[0, 0] <= k < hole[1, 0]:
                    continue
                if _is_plain(rows, p, i0, edge):
                    w_soft, f_soft = _soft_signal(rows, p, i0, np.float32(0), water, fat, edge)
                    for i in range(begin, end):
                        w[i], f[i], labels[p, j, i] = w_soft, f_soft, 0
                else:
                    for i in range(begin, end):
                        t = share[i]
                        upper = _between(rows, p, IN_UPPER, i0, t)
                        lower = _between(rows, p, IN_LOWER, i0, t)
                        bone = min(upper, lower)
                        inside = _fraction(bone, edge)
                        w[i], f[i], labels[p, j, i] = np.float32(0), np.float32(0), 0
                        if inside < 1:
                            w_soft, f_soft = _soft_signal(rows, p, i0, t, water, fat, edge)
                            w[i], f[i] = (1 - inside) * w_soft, (1 - inside) * f_soft
                        if inside > 0:
                            n, trabecular = 0 if upper < lower else 1, np.float32(0)
                            if bone + _between(rows, p, CORTEX, i0, t) < edge / 2:
                                depth = 0 if _between(rows, p, DEPTH, i0, t) < DENSE_MM else 1
                                half_width = _between(rows, p, HALF_WIDTH, i0, t) + widening
                                trabecular = bone_fraction(
                                    tile,
                                    _to_tile(maps, n, 0, i, j, k),
                                    _to_tile(maps, n, 1, i, j, k),
                                    _to_tile(maps, n, 2, i, j, k),
                                    samples,
                                    ends[depth],
                                    ends[depth + 1],
                                    n,
                                    soft[n, depth],
                                    _between(rows, p, RODNESS, i0, t),
                                    max(half_width, np.float32(0)),
                                    _between(rows, p, THETA, i0, t),
                                )
                            w_bone, f_bone = _bone_signal(
                                rows, p, i0, t, trabecular, water, fat, edge
                            )
                            w[i] += inside * w_bone
                            f[i] += inside * f_bone
                            other = _between(rows, p, IN_SMALL, i0, t)
                            if inside >= 0.5 and other > bone + np.float32(1e-3):
                                labels[p, j, i] = n + 1
                s0, s1, s2, s3 = rows[p, i0, S0], rows[p, i0, S1], rows[p, i0, S2], rows[p, i0, S3]
                d0, d1 = rows[p, i0 + 1, S0] - s0, rows[p, i0 + 1, S1] - s1
                d2, d3 = rows[p, i0 + 1, S2] - s2, rows[p, i0 + 1, S3] - s3
                for i in range(begin, end):
                    t = share[i]
                    if is_ct:
                        image[p, j, i] = w[i] + (s0 + t * d0)
                    else:
                        real = w[i] * (s0 + t * d0) + f[i] * (s2 + t * d2)
                        imaginary = w[i] * (s1 + t * d1) + f[i] * (s3 + t * d3)
                        image[p, j, i] = complex(real, imaginary)


def painted(
    subject: Subject,
    poses: dict,
    grid: Grid,
    coarse: np.ndarray,
    coarse_grid: Grid,
    rendering: Rendering,
    hole: tuple = ((0, 0, 0), (0, 0, 0)),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run `paint` on a grid: complex image and bone labels (j, i) of one plane after the other.

    Each is overwritten by the next: new memory costs as much time as painting it.

    coarse, coarse_grid: `tissue_fields`, and the grid it was evaluated for, which holds `grid`;
    hole: first voxel and end (i, j, k) of a box that need not be painted.
    """
    maps, samples, edges = [], [], []
    profile = rendering.profile_mm / grid.spacing[2]
    for bone, micro in subject.bones.items():
        matrix = micro.to_tile @ (np.linalg.inv(poses[bone]) @ grid.to_lps())
        near, near_edge = sub_samples(matrix[:, :3], rendering.steps[0], profile)
        deep, deep_edge = sub_samples(matrix[:, :3], rendering.steps[1], profile)
        maps.append(matrix)
        samples.append(np.concatenate([near, deep]))
        edges.append([near_edge, deep_edge])
    n_planes = int(grid.size[2])
    shape = (min(SLAB, n_planes), int(grid.size[1]), int(grid.size[0]))
    image, labels = np.zeros(shape, np.complex64), np.zeros(shape, np.uint8)
    for plane in range(0, n_planes, SLAB):
        n = min(SLAB, n_planes - plane)
        paint(
            image[:n],
            labels[:n],
            plane,
            np.array(hole)[:, ::-1].copy(),
            coarse,
            ((grid.origin - coarse_grid.origin) @ grid.direction / COARSE_MM)[::-1].copy(),
            np.array(grid.spacing[::-1]) / COARSE_MM,
            subject.tile,
            np.stack(maps),
            np.stack(samples),
            np.array([0, len(near), len(near) + len(deep)]),
            np.array(edges, np.float32),
            np.array([rendering.water.get(tissue, 0.0) for tissue in TISSUES], np.float32),
            np.array([rendering.fat.get(tissue, 0.0) for tissue in TISSUES], np.float32),
            rendering.is_ct,
            np.float32(rendering.edge_mm),
            np.float32(rendering.widening),
        )
        yield from zip(image[:n], labels[:n], strict=True)
