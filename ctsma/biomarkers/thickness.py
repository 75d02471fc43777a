"""Local thickness after Hildebrand and Rueegsegger (J Microsc 1997;185:67), from its definition."""

import numpy as np

from ctsma.common import InputError
from ctsma.compiled import compiled

# Squared distance where no surface is in reach, voxel^2. Its sum with any squared step fits int32.
FAR = 2**30


@compiled()
def _lower_envelope(values, result):
    """Along the middle axis (k, n, m): result[i] <- min over j of values[j] + (i - j)^2.

    The last axis is contiguous, so that the processor takes several lines at once.
    """
    n = values.shape[1]
    for k in range(values.shape[0]):
        for i in range(n):
            best, step, largest = result[k, i], 1, np.int32(FAR)
            best[:] = values[k, i]
            while step < n and step * step < largest:
                # Past an end, a farther distance from the end is harmless.
                before, after = values[k, max(i - step, 0)], values[k, min(i + step, n - 1)]
                square, largest = np.int32(step * step), np.int32(0)
                for x in range(len(best)):
                    best[x] = min(best[x], np.int32(min(before[x], after[x]) + square))
                    largest = max(largest, best[x])
                step += 1


def squared_distance(surface: np.ndarray, axes: tuple[int, ...] = (2, 1, 0)) -> np.ndarray:
    """Exact squared distance (int32, voxel^2) along `axes` to the next True voxel; FAR if none."""
    distance = np.where(surface, np.int32(0), np.int32(FAR))
    for axis in axes:
        lines = np.ascontiguousarray(np.moveaxis(distance, axis, 1))
        _lower_envelope(lines, result := np.empty_like(lines))
        distance = np.moveaxis(result, 1, axis)
    return np.ascontiguousarray(np.minimum(distance, FAR))


def _covering_radius2(largest: int) -> np.ndarray:
    """Squared radius from which a ball 0, 1, sqrt 2 or sqrt 3 voxels away contains a given ball.

    Returns (4, > largest), by the squared radius of the contained ball. Counted on the lattice:
    the voxel p farthest from (1, 0, 0) is |p|^2 + 2 |x| + 1 away; the other steps alike.
    """
    y, x = np.indices((int(np.sqrt(largest)) + 1,) * 2)
    cover = np.zeros((4, 3 * x.max() ** 2 + 1), np.int64)
    for z in range(len(x)):
        norm2 = z**2 + y**2 + x**2
        for k, along in enumerate((x, x + y, x + y + z), 1):
            np.maximum.at(cover[k], norm2, norm2 + 2 * along + k)
    cover[0] = FAR
    return np.maximum.accumulate(cover, axis=1).astype(np.int32)


@compiled()
def _ridge(radius2, cover):
    """Whether no neighbour's ball contains a voxel's ball: only these need painting."""
    nz, ny, nx = radius2.shape
    kept = np.empty(radius2.shape, np.bool_)
    for z, y in np.ndindex(nz, ny):
        margin = radius2[z, y].copy()  # below the nearest bound
        bounds = cover[:, margin]
        for k in range(max(z - 1, 0), min(z + 2, nz)):
            for j in range(max(y - 1, 0), min(y + 2, ny)):
                for step in (-1, 0, 1):
                    row, bound = radius2[k, j], bounds[abs(k - z) + abs(j - y) + abs(step)]
                    for x in range(max(-step, 0), nx - max(step, 0)):
                        margin[x] = min(margin[x], np.int32(bound[x] - row[x + step]))
        kept[z, y] = margin > 0
    return kept


@compiled()
def _paint(radius2, centres):
    """Squared radius of the largest ball over each voxel, from centres in order of falling radius.

    The first write counts. `following[z, y, x]` is the next unpainted voxel of the row from x on.
    """
    nz, ny, nx = radius2.shape
    painted = np.zeros_like(radius2)
    following = np.full((nz, ny, nx + 1), nx, np.int32)
    for z, y, x in np.ndindex(radius2.shape):
        if radius2[z, y, x] > 0:
            following[z, y, x] = x
    for x in range(nx - 1, -1, -1):
        following[:, :, x] = np.minimum(following[:, :, x], following[:, :, x + 1])
    roots = np.sqrt(np.arange(radius2.max() + 1)).astype(np.int32)
    for centre in centres:
        cz, cy, cx = centre // (ny * nx), centre // nx % ny, centre % nx
        size = radius2[cz, cy, cx]
        reach = roots[size]
        for z in range(max(cz - reach, 0), min(cz + reach + 1, nz)):
            for y in range(max(cy - reach, 0), min(cy + reach + 1, ny)):
                rest = size - (z - cz) ** 2 - (y - cy) ** 2
                if rest < 0:
                    continue
                half = roots[rest]
                row, x = following[z, y], max(cx - half, 0)
                while True:
                    while row[x] != x:
                        row[x] = row[row[x]]
                        x = row[x]
                    if x >= nx or x > cx + half:
                        break
                    painted[z, y, x] = size
                    row[x] = row[x + 1]
    return painted


@compiled()
def _clean_surface(thickness, surface):
    """Give each surface voxel the mean of its face neighbours inside the phase, if any."""
    cleaned, (nz, ny, nx) = thickness.copy(), thickness.shape
    for z, y, x in np.ndindex(thickness.shape):
        total, count = np.float32(0), np.float32(0)
        for axis in range(3 if surface[z, y, x] else 0):
            for step in (1, -1):
                k, j, i = z + step * (axis == 0), y + step * (axis == 1), x + step * (axis == 2)
                if 0 <= k < nz and 0 <= j < ny and 0 <= i < nx and not surface[k, j, i]:
                    total += thickness[k, j, i]
                    count += thickness[k, j, i] > 0
        if total > 0:
            cleaned[z, y, x] = total / count
    return cleaned


def largest_balls(phase: np.ndarray, opposite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared radius of each voxel's own ball, and of the largest ball that covers the voxel.

    Both in voxel^2, 0 outside the phase; neither phase may be empty.
    """
    radius2 = np.where(phase, squared_distance(opposite), 0)
    centres = np.flatnonzero(_ridge(radius2, _covering_radius2(int(radius2.max()))))
    order = np.argsort(-radius2.ravel()[centres], kind="stable")
    return radius2, _paint(radius2, centres[order])


def diameters(radius2: np.ndarray, covering: np.ndarray, clean_up: bool = True) -> np.ndarray:
    """Local thickness (float32, voxels) from the result of `largest_balls`."""
    thickness = 2 * np.sqrt(covering, dtype=np.float32)
    return _clean_surface(thickness, radius2 == 1) if clean_up else thickness


def mean_thickness(phase: np.ndarray, opposite: np.ndarray) -> float:
    """Mean local thickness of a phase bounded by `opposite`, voxels; NaN where one is empty."""
    if not phase.any() or not opposite.any():
        return np.nan
    return float(diameters(*largest_balls(phase, opposite))[phase].mean(dtype=float))


def local_thickness(mask, spacing_mm, voi=None, clean_up=True) -> np.ndarray:
    """Diameter, at each voxel of a phase, of the largest ball that fits into it and covers it.

    thickness(x) = 2 max{ r(c) : |x - c| <= r(c) } over centres c in the phase, with r(c) the
    distance to the next voxel centre of the opposite phase. With `clean_up=False` the result equals
    this definition on every voxel.

    Parameters
    ----------
    mask : (z, y, x) bool or two-valued; the phase to measure. Give ``~mask`` for spacing.
    spacing_mm : isotropic voxel size, float or (z, y, x). Anisotropic voxels are refused:
        resampling a binary mask would decide its surface, and that is the caller's decision.
    voi : (z, y, x) bool, volume of interest; of numbers, 0 and NaN are outside. Edge rule: what
        lies outside it (or outside the array) is unknown and belongs to neither phase; its border
        is no surface and holds no centre. A box `voi` therefore equals cropping.
    clean_up : surface voxels take the mean of their inner face neighbours, as in BoneJ's last
        step. The mean then lies within 0.5 % of BoneJ's (without it 2.5 % below) on a human
        specimen of 7 voxels per strut.

    Returns
    -------
    (z, y, x) float32, mm; 0 outside the phase.

    Remaining bias, from voxels, at any thickness: about +0.5 voxel on plates (0.3 to 0.9 oblique
    to the grid), 0 on rods (within 0.25), about -0.8 on spheres (0 to -1).

    Raises
    ------
    InputError : not 3D, one slice, NaN or grey values, anisotropic voxels, `voi` of another shape.

    Source: Hildebrand and Rueegsegger, J Microsc 1997;185:67. Balls contained in a neighbour's
    ball are left out and painted voxels are skipped, which changes the time and not the result.
    """
    mask, voi, spacing = check_mask(mask, spacing_mm, voi)
    phase, opposite = mask & voi, ~mask & voi
    if not phase.any() or not opposite.any():
        problem = "has one phase only in the volume of interest"
        raise InputError("mask", problem, "give a mask of bone and marrow")
    return diameters(*largest_balls(phase, opposite), clean_up) * np.float32(spacing)


def inside(voi) -> np.ndarray:
    """A volume of interest as bool: 0 and NaN are outside."""
    voi = np.asarray(voi)
    return (voi != 0) & (voi == voi)  # NaN differs from itself


def check_mask(mask, spacing_mm, voi) -> tuple[np.ndarray, np.ndarray, float]:
    """(mask, voi, voxel size in mm): bool arrays of one shape and a float, or an InputError."""
    mask = np.asarray(mask)
    if mask.ndim != 3 or min(mask.shape) < 2:
        remedy = "give a 3D volume of at least two slices"
        raise InputError("mask", f"has the shape {mask.shape}", remedy)
    if mask.dtype != bool and not ((mask == 0) | (mask == mask.max())).all():
        raise InputError("mask", "has more than two values, or NaN", "threshold it first")
    spacing = np.asarray(spacing_mm, float)
    isotropic = spacing.min() > 0 and np.ptp(spacing) <= 0.01 * spacing.min()
    if spacing.shape not in ((), (3,)) or not isotropic:
        remedy = "give isotropic voxels (within 1 %), in mm"
        raise InputError("spacing_mm", f"is {spacing.tolist()}", remedy)
    voi = np.ones(mask.shape, bool) if voi is None else inside(voi)
    if voi.shape != mask.shape:
        problem = f"has the shape {voi.shape} beside a mask of {mask.shape}"
        raise InputError("voi", problem, "give both in one shape")
    return mask != 0, voi, float(spacing.mean())
