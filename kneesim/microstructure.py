"""Trabeculae as level sets of a narrow-band Gaussian random field, at any point of a bone.

Bone is where |f - c| < w, with f of unit variance; then BV/TV = Phi(c + w) - Phi(c - w) in closed
form, and w follows from the BV/TV wanted. f = cos(theta) f_fine + sin(theta) f_coarse keeps unit
variance for any mixing angle theta, so that spacing varies over the bone without bending space.
c = 0 gives plates, c > 0 rods.
"""

import numpy as np
from scipy.fft import irfftn, rfftn
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr

from ctsma.compiled import compiled

TILE_SIZE = 128  # voxels of a period, a power of two so that wrapping is one bit mask
FINE_VOXELS = 8.0  # design choice: tile voxels per fine wavelength; trilinear error about 2 %
SOFT_PER_VOXEL = (
    0.18  # half ramp of a sub-sample's edge, SD of the field per tile voxel of distance
)


def make_tile(rng: np.random.Generator, coarse_ratio: float, bandwidth: float) -> np.ndarray:
    """Periodic pair of independent unit-variance Gaussian fields (z, y, x, 2): fine and coarse.

    Wavelengths FINE_VOXELS and coarse_ratio times that; Gaussian band in |k| of relative SD
    `bandwidth`; float32. The last voxel along each axis repeats the first, so that no neighbour
    wraps; an odd number of voxels in a row also spreads them over all of the processor's cache.
    """
    fine = _narrow_band(rng, FINE_VOXELS, bandwidth)
    coarse = _narrow_band(rng, FINE_VOXELS * coarse_ratio, bandwidth)
    return np.pad(np.stack([fine, coarse], axis=-1), (*((0, 1),) * 3, (0, 0)), mode="wrap")


def _narrow_band(rng: np.random.Generator, wavelength: float, bandwidth: float) -> np.ndarray:
    """One field, of unit variance as it is sampled: trilinear, averaged over positions."""
    full, half = np.fft.fftfreq(TILE_SIZE), np.fft.rfftfreq(TILE_SIZE)
    axes = np.meshgrid(full, full, half, indexing="ij", sparse=True)
    fz, fy, fx = (f.astype(np.float32) for f in axes)
    k = np.sqrt(fz**2 + fy**2 + fx**2)
    band = np.exp(-0.5 * ((k * wavelength - 1) / bandwidth) ** 2)
    band[0, 0, 0] = 0
    white = rng.standard_normal((TILE_SIZE,) * 3, dtype=np.float32)
    spectrum = rfftn(white, overwrite_x=True) * band
    # Averaged over positions, linear interpolation keeps (2 + cos k) / 3 of the variance by axis.
    kept_z, kept_y, kept_x = ((2 + np.cos(2 * np.pi * f)) / 3 for f in (fz, fy, fx))
    # Each frequency of a real transform stands for two, but for the first and the last.
    twice = np.where((half == 0) | (half == 0.5), 1.0, 2.0)
    power = np.abs(spectrum) ** 2 * kept_z * kept_y * kept_x * twice
    variance = power.sum(dtype=np.float64) / TILE_SIZE**6
    return (irfftn(spectrum, s=(TILE_SIZE,) * 3) / np.sqrt(variance)).astype(np.float32)


def level_half_width(bv_tv: np.ndarray, rodness: np.ndarray) -> np.ndarray:
    """w with Phi(c + w) - Phi(c - w) = BV/TV, by bisection; c is the rodness. Shapes broadcast."""
    shape = np.broadcast(bv_tv, rodness).shape
    low, high = np.zeros(shape), np.full(shape, 8.0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        above = ndtr(rodness + middle) - ndtr(rodness - middle) > bv_tv
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return 0.5 * (low + high)


def smooth_field(rng: np.random.Generator, shape: tuple, length: float) -> np.ndarray:
    """Smooth Gaussian random field, zero mean and unit variance in expectation.

    length is the SD of the smoothing kernel in voxels.
    """
    pad = int(np.ceil(3 * length))
    noise = rng.standard_normal([n + 2 * pad for n in shape])
    inner = tuple(slice(pad, pad + n) for n in shape)
    field = gaussian_filter(noise, length, truncate=3)[inner]
    # Variance of white noise after a 3D Gaussian kernel of SD s voxels: 1 / (2 sqrt(pi) s)^3.
    return field * (2 * np.sqrt(np.pi) * length) ** 1.5


@compiled(inline="always")
def field_at(tile, x, y, z, cos, sin) -> float:
    """cos * fine + sin * coarse at non-negative tile voxel coordinates, trilinear and periodic."""
    i, j, k = int(x), int(y), int(z)
    x, y, z = x - np.float32(i), y - np.float32(j), z - np.float32(k)
    mask = TILE_SIZE - 1
    i, j, k = i & mask, j & mask, k & mask
    p, q, r = i + 1, j + 1, k + 1
    f = np.float32(0)
    for c in range(2):
        a00 = tile[k, j, i, c] + x * (tile[k, j, p, c] - tile[k, j, i, c])
        a01 = tile[k, q, i, c] + x * (tile[k, q, p, c] - tile[k, q, i, c])
        a10 = tile[r, j, i, c] + x * (tile[r, j, p, c] - tile[r, j, i, c])
        a11 = tile[r, q, i, c] + x * (tile[r, q, p, c] - tile[r, q, i, c])
        low = a00 + y * (a01 - a00)
        f += (cos if c == 0 else sin) * (low + z * (a10 + y * (a11 - a10) - low))
    return f


# `contract` lets a product and a sum be rounded once: the values differ by single precision.
@compiled(forceinline=True, fastmath={"contract"})
def bone_fraction(tile, x, y, z, samples, first, end, bone, soft, c, w, theta) -> float:
    """Bone volume fraction of a footprint: weighted mean over sub-samples of the level set.

    (x, y, z): footprint centre in non-negative tile voxels; samples[bone, first:end]: places
    relative to it, and weight; soft: half width of a sub-sample's edge in SD of the field.
    """
    cos, sin, total = np.cos(theta), np.sin(theta), np.float32(0)
    slope = np.float32(0.5) / soft
    for n in range(first, end):
        dx, dy, dz = samples[bone, n, 0], samples[bone, n, 1], samples[bone, n, 2]
        f = field_at(tile, x + dx, y + dy, z + dz, cos, sin)
        inside = np.float32(0.5) + (w - abs(f - c)) * slope
        total += samples[bone, n, 3] * min(max(inside, np.float32(0)), np.float32(1))
    return total


def sub_samples(
    matrix: np.ndarray, steps: tuple[int, int, int], profile: float = 0.0
) -> tuple[np.ndarray, float]:
    """Sub-samples (n, 4: offset in tile voxels, weight) of a footprint; half width of their edges.

    matrix (3, 3): tile voxels per image index (i, j, k); steps: sub-samples along (i, j, k). The
    footprint is a box of one voxel; with `profile` > 0 a Gaussian of that FWHM (voxels) along k.
    """
    reach = np.array([1.0, 1.0, 2 * profile or 1.0])
    axes = [r * ((np.arange(n) + 0.5) / n - 0.5) for r, n in zip(reach, steps, strict=True)]
    i, j, k = np.meshgrid(*axes)
    weight = np.exp(-4 * np.log(2) * (k / profile) ** 2) if profile else np.ones_like(k)
    weight = weight.ravel() / weight.sum()
    offsets = np.stack([i.ravel(), j.ravel(), k.ravel()], axis=1) @ matrix.T
    distance = np.linalg.norm(matrix, axis=0) * reach / steps
    return np.c_[offsets, weight].astype(np.float32), float(SOFT_PER_VOXEL * distance.mean())


@compiled(inline="always")
def in_level_set(tile, x, y, z, c, w, theta) -> bool:
    """Whether a point in non-negative tile voxels lies in the level set."""
    cos, sin = np.float32(np.cos(theta)), np.float32(np.sin(theta))
    f = field_at(tile, np.float32(x), np.float32(y), np.float32(z), cos, sin)
    return abs(f - c) < w


@compiled()
def is_bone(tile, points, c, w, theta) -> np.ndarray:
    """The level set (bool, n) at points (n, 3) in non-negative tile voxels; c, w, theta (n,)."""
    result = np.empty(len(points), np.bool_)
    for n in range(len(points)):
        p = points[n]
        result[n] = in_level_set(tile, p[0], p[1], p[2], c[n], w[n], theta[n])
    return result
