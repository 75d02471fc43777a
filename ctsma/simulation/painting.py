"""Two scanners: poses, grids, tissue fields seen by a scan, CT in HU and bSSFP MR.

Fields are evaluated on a coarse grid along the scan's own axes and interpolated while a voxel is painted; only
trabeculae are computed at the resolution of the footprint's sub-samples.
"""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from numba import njit
from scipy.fft import irfft2, rfft2, rfftfreq
from scipy.ndimage import gaussian_filter1d

from ctsma.cohort import BONES

from .microstructure import bone_fraction, smooth_field, sub_samples
from .subject import Subject

COARSE_MM = 1.25  # our choice, see anatomy.SPACING_MM
SIGMA_PER_FWHM = 1 / np.sqrt(8 * np.log(2))
GAIN = 8  # channel of the scanner's own field, see tissue_fields
DENSE_MM = 14.0  # below the bearing surface: as deep as a patch reaches, sub-samples 0.11-0.16 mm apart (our choice)
TISSUES = ("air", "fat", "muscle", "fluid", "fibrous", "cartilage", "bone", "marrow_fat", "marrow_water")
MR_AXES = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # columns: i back, j down, k to the right
PROTON_DENSITY = {"muscle": 0.9, "cartilage": 0.8, "fibrous": 0.7}  # relative to water, our choice


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
    """Rigid (4, 4) per bone from its own frame to the scanner's LPS mm.

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
    return {"femur": whole, "tibia": whole @ _cleared(subject, bend)}


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


def tissue_fields(subject: Subject, poses: dict, grid: Grid) -> tuple[np.ndarray, tuple]:
    """Channels of `paint` on the coarse grid of a scan: (channels, k, j, i) float32.

    Channels: femur and patella, tibia and fibula, patella and fibula, cartilage, fibrous, muscle, skin, fluid
    (signed distances, mm), gain (1), cortex (mm), c, w, theta, marrow water, cysts, depth below the bearing (mm).
    """
    points, shape = grid.coarse()
    place = {bone: apply(np.linalg.inv(poses[bone]), points) for bone in BONES}
    femur, tibia = subject.fields(place["femur"]), subject.fields(place["tibia"])
    below = 1 / (1 + np.exp(place["femur"][:, 2:] / 8.0))  # soft tissue bends over about 3 cm (our choice)
    soft = subject.fields(place["femur"] * (1 - below) + place["tibia"] * below)
    groups = np.minimum(femur["femur"], femur["patella"]), np.minimum(tibia["tibia"], tibia["fibula"])
    cartilage = np.minimum.reduce([femur["femur_cartilage"], femur["patella_cartilage"], tibia["tibia_cartilage"]])
    fluid = femur["femur"] - 8 + np.minimum(tibia["tibia"], femur["patella"])
    upper = groups[0] < groups[1]
    cortex = np.where(upper, *(_cortex(subject, b, f, place[b]) for b, f in (("femur", femur), ("tibia", tibia))))
    parameters = np.where(upper[:, None], *(subject.bones[b].at(place[b]) for b in BONES))
    cysts = np.minimum.reduce([_balls(subject.cysts[b], place[b]) for b in BONES])
    others = np.minimum(femur["patella"], tibia["fibula"])
    distances = [*groups, others, cartilage, soft["fibrous"], soft["muscle"], soft["skin"], fluid]
    depth = np.where(upper, femur["femur_depth"], tibia["tibia_depth"])
    channels = [*distances, np.ones(len(points)), cortex, *parameters.T, cysts, depth]
    return np.stack(channels).astype(np.float32).reshape(-1, *shape), shape


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


@njit(cache=True, fastmath=True)
def paint(coarse, ratio, tile, maps, dense, sparse, soft, water, fat, phase, edge, widening, image, labels) -> None:
    """Paint an image (k, j, i) from coarse channels, the microstructure tile and tissue signals.

    ratio: coarse voxels per image voxel (k, j, i). maps (2 bones, 3, 4): index (i, j, k) to tile voxels. dense,
    sparse (2, n, 3) and soft (2, 2): sub-samples and their edges near the joint and deep in the bone.
    water, fat: signal of each of TISSUES by chemical species; phase: angle between them (rad), or negative to add
    them up and to add, not multiply, the gain (CT). widening: added to w (MR susceptibility).
    """
    channels = coarse.shape[0]
    row = np.empty((channels, coarse.shape[3]), np.float32)
    v = np.empty(channels, np.float32)
    along, across = np.float32(np.cos(phase)), np.float32(np.sin(phase))
    for k in range(image.shape[0]):
        k0 = int(k * ratio[0])
        tk = np.float32(k * ratio[0] - k0)
        for j in range(image.shape[1]):
            j0 = int(j * ratio[1])
            tj = np.float32(j * ratio[1] - j0)
            for c in range(channels):
                for i in range(row.shape[1]):
                    a = coarse[c, k0, j0, i] + tj * (coarse[c, k0, j0 + 1, i] - coarse[c, k0, j0, i])
                    b = coarse[c, k0 + 1, j0, i] + tj * (coarse[c, k0 + 1, j0 + 1, i] - coarse[c, k0 + 1, j0, i])
                    row[c, i] = a + tk * (b - a)
            for i in range(image.shape[2]):
                i0 = int(i * ratio[2])
                ti = np.float32(i * ratio[2] - i0)
                v[0] = row[0, i0] + ti * (row[0, i0 + 1] - row[0, i0])
                v[1] = row[1, i0] + ti * (row[1, i0 + 1] - row[1, i0])
                bone = min(v[0], v[1])
                inside = _fraction(bone, edge)
                for c in range(2 if inside < 1 else GAIN, GAIN + 1 if inside == 0 else channels):
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
                    solid = _fraction(-bone - v[9], edge)
                    n = 0 if v[0] < v[1] else 1
                    if solid < 1:
                        m = maps[n]
                        x = np.float32(m[0, 0] * i + m[0, 1] * j + m[0, 2] * k + m[0, 3])
                        y = np.float32(m[1, 0] * i + m[1, 1] * j + m[1, 2] * k + m[1, 3])
                        z = np.float32(m[2, 0] * i + m[2, 1] * j + m[2, 2] * k + m[2, 3])
                        half, near = max(v[11] + widening, np.float32(0)), v[15] < DENSE_MM
                        samples, blur = (dense[n], soft[n, 0]) if near else (sparse[n], soft[n, 1])
                        solid += (1 - solid) * bone_fraction(tile, x, y, z, samples, blur, v[10], half, v[12])
                    hole = _fraction(v[14], edge)
                    solid *= 1 - hole
                    wet = v[13] + hole * (1 - v[13])
                    w_sum += inside * (solid * water[6] + (1 - solid) * (wet * water[8] + (1 - wet) * water[7]))
                    f_sum += inside * (1 - solid) * (1 - wet) * fat[7]
                    if inside >= 0.5 and row[2, i0] + ti * (row[2, i0 + 1] - row[2, i0]) > bone + np.float32(1e-3):
                        labels[k, j, i] = n + 1
                if phase < 0:
                    image[k, j, i] = w_sum + v[GAIN]
                else:
                    real, imaginary = w_sum + f_sum * along, f_sum * across
                    image[k, j, i] = v[GAIN] * np.sqrt(real * real + imaginary * imaginary)


def _painted(subject, poses, grid, signals, phase, steps, edge, widening, gain):
    """Run `paint` for a scan; steps: sub-samples (i, j, k) near the joint and deep; gain: shape -> gain channel."""
    coarse, shape = tissue_fields(subject, poses, grid)
    coarse[GAIN] = gain(shape)
    maps = np.stack([m.to_tile @ _homogeneous(poses[b], grid) for b, m in subject.bones.items()])
    near, deep = ([sub_samples(m[:, :3], s) for m in maps] for s in steps)
    samples = (np.stack([o for o, _ in part]) for part in (near, deep))
    soft = np.array([[a[1], b[1]] for a, b in zip(near, deep, strict=True)], np.float32)
    water, fat = (np.array([s.get(t, 0.0) for t in TISSUES], np.float32) for s in signals)
    image, ratio = np.empty(grid.size[::-1], np.float32), np.array(grid.spacing[::-1]) / COARSE_MM
    labels, numbers = np.zeros(image.shape, np.uint8), (np.float32(n) for n in (phase, edge, widening))
    paint(coarse, ratio, subject.tile, maps, *samples, soft, water, fat, *numbers, image, labels)
    return image, labels


def _homogeneous(pose: np.ndarray, grid: Grid) -> np.ndarray:
    """Affine (4, 4) from image index to the bone's own frame."""
    return np.linalg.inv(pose) @ grid.to_lps()


def scan_ct(
    subject: Subject, poses: dict, grid: Grid, ct: dict, rng: np.random.Generator
) -> tuple[sitk.Image, sitk.Image]:
    """CT in HU (int16) and bone labels (uint8, BONES).

    HU = mix of tissues; Gaussian PSF of drawn FWHM in plane and along slices; noise with power |f| MTF(f)^2 in
    plane (ramp times kernel, zero beyond the published cut); HU scale, offset and smooth shading.
    """
    hu = {name: ct[name].draw(rng) for name in ("air", "fat", "muscle", "fluid", "fibrous", "cartilage")}
    hu["bone"] = ct["tissue_mineral"].draw(rng) * ct["hu_per_mineral"].value
    hu |= {"marrow_fat": ct["marrow_fat"].draw(rng), "marrow_water": ct["marrow_red"].draw(rng)}
    shading = _smooth_gain(rng, ct["shading"].value)
    image, labels = _painted(subject, poses, grid, (hu, {}), -1.0, ((3, 3, 4), (2, 2, 2)), 0.5, 0.0, shading)
    fwhm = np.array([ct["fwhm_slice"].draw(rng), *[ct["fwhm_in_plane"].draw(rng)] * 2])
    spacing = np.array(grid.spacing[::-1])
    # The painted footprint is already a box of one voxel: its variance is part of the point spread function.
    sigma = np.sqrt(np.maximum((fwhm * SIGMA_PER_FWHM) ** 2 - spacing**2 / 12, 1e-4)) / spacing
    for axis in range(3):
        image = gaussian_filter1d(image, sigma[axis], axis=axis, truncate=3, mode="nearest")
    image += _ct_noise(image.shape, spacing, fwhm * SIGMA_PER_FWHM, ct, rng)
    image = image * np.float32(ct["scale"].draw(rng)) + np.float32(ct["offset"].draw(rng))
    return grid.image(np.clip(np.rint(image), -1024, 3071).astype(np.int16)), grid.image(labels)


def _ct_noise(shape: tuple, spacing: np.ndarray, sigma: np.ndarray, ct: dict, rng: np.random.Generator) -> np.ndarray:
    """Noise (HU) with power |f| exp(-(2 pi sigma f)^2) in plane, smoothed along slices, of the drawn SD."""
    fy, fx = np.fft.fftfreq(shape[1], spacing[1]), rfftfreq(shape[2], spacing[2])
    f = np.hypot(fy[:, None], fx[None, :])
    power = np.where(f < ct["noise_cut"].value, f * np.exp(-((2 * np.pi * sigma[1] * f) ** 2)), 0)
    white = rng.standard_normal(shape, dtype=np.float32)
    noise = irfft2(rfft2(white) * np.sqrt(power).astype(np.float32), s=shape[1:])
    noise = gaussian_filter1d(noise, sigma[0] / spacing[0] / 2, axis=0, truncate=3)
    return noise * np.float32(ct["noise"].draw(rng) / noise.std())


def _smooth_gain(rng: np.random.Generator, amplitude: float):
    """A smooth random field of the given SD on a coarse grid, kernel SD 20 mm (our choice)."""

    def field(shape: tuple) -> np.ndarray:
        low = smooth_field(rng, tuple(n // 8 + 2 for n in shape), 2.0)
        image = sitk.GetImageFromArray(low)
        steps = [8.0 / 8.0 * (low.shape[2 - a] - 1.01) / shape[2 - a] for a in range(3)]
        fine = sitk.Resample(image, shape[::-1], sitk.Transform(), sitk.sitkBSpline, (0.0,) * 3, steps)
        return amplitude * sitk.GetArrayFromImage(fine)

    return field


def bssfp_signal(t1_ms: float, t2_ms: float, tr_ms: float, te_ms: float, flip_deg: float) -> float:
    """On-resonance bSSFP steady state: sin a (1 - E1) / (1 - (E1 - E2) cos a - E1 E2) exp(-TE / T2), M0 = 1."""
    e1, e2, a = np.exp(-tr_ms / t1_ms), np.exp(-tr_ms / t2_ms), np.deg2rad(flip_deg)
    return float(np.sin(a) * (1 - e1) / (1 - (e1 - e2) * np.cos(a) - e1 * e2) * np.exp(-te_ms / t2_ms))


def mr_signals(mr: dict) -> tuple[dict, dict]:
    """Signal of each tissue by species (water, fat), relative to fatty marrow."""
    times = {
        t: (mr[f"t1_{t}"].value, mr[f"t2_{t}"].value)
        for t in ("fat", "muscle", "fluid", "cartilage", "marrow", "fibrous")
    }
    sequence = mr["repetition_time"].value, mr["echo_time"].value, mr["flip"].value
    signal = {t: PROTON_DENSITY.get(t, 1.0) * bssfp_signal(*both, *sequence) for t, both in times.items()}
    signal = {t: s / signal["marrow"] for t, s in signal.items()}
    water = {t: signal[t] for t in ("muscle", "fluid", "fibrous", "cartilage")} | {"marrow_water": signal["muscle"]}
    return water, {"fat": signal["fat"], "marrow_fat": signal["marrow"]}


def scan_mr(subject: Subject, poses: dict, grid: Grid, mr: dict, rng: np.random.Generator) -> sitk.Image:
    """bSSFP magnitude image (int16, 0..2047): water and fat with a phase between them, trabeculae widened by
    susceptibility, smooth coil bias times banding, Rician noise of drawn SNR."""
    scale, snr, band = mr["full_scale"].draw(rng), mr["snr"].draw(rng), mr["banding"].draw(rng)
    phase, widening = mr["fat_phase"].draw(rng), mr["susceptibility"].draw(rng)
    bias, shift = _smooth_gain(rng, 0.5), _smooth_gain(rng, 1.0)

    def gain(shape) -> np.ndarray:
        coil = 1 + mr["bias"].value * np.tanh(bias(shape))
        return scale * coil * (1 - band * np.cos(1.5 * shift(shape)) ** 8)

    image, _ = _painted(subject, poses, grid, mr_signals(mr), phase, ((2, 2, 5), (1, 1, 3)), 0.35, widening, gain)
    sigma = np.float32(scale / snr)
    for plane in image:
        real, imaginary = rng.standard_normal((2, *plane.shape), dtype=np.float32) * sigma
        np.hypot(plane + real, imaginary, out=plane)
    return grid.image(np.clip(np.rint(image, out=image), 0, 2047, out=image).astype(np.int16))
