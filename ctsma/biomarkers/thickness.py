"""Local thickness after Hildebrand and Rueegsegger (J Microsc 1997;185:67), from its definition."""

import numpy as np

from ctsma.common import InputError
from ctsma.compiled import compiled

# Squared distance where no surface is in reach, voxel^2. Its sum with any squared step fits int32.
FAR = 2**30


@compiled()
def _sweep(surface, result):
    """Along the middle axis (k, n, m): result <- squared distance to a True voxel, if less."""
    for k in range(surface.shape[0]):
        last = np.full(surface.shape[2], np.int32(FAR**0.5))
        for step in range(2 * surface.shape[1]):  # there and back
            i = min(step, 2 * surface.shape[1] - 1 - step)
            for x in range(last.size):
                last[x] = 0 if surface[k, i, x] else min(last[x] + 1, np.int32(FAR**0.5))
                result[k, i, x] = min(result[k, i, x], last[x] ** 2)


@compiled()
def _lower_envelope(values, result):
    """Along the middle axis (k, n, m): result[i] <- min over j of values[j] + (i - j)^2, if less.

    The last axis is contiguous, so that the processor takes several lines at once.
    """
    n = values.shape[1]
    for k in range(values.shape[0]):
        for i in range(n):
            best, step, largest = result[k, i], 0, np.int32(FAR)
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
    distance, kernel = surface, _sweep
    for axis in axes:
        lines = np.ascontiguousarray(np.moveaxis(distance, axis, 1))
        kernel(lines, result := np.full(lines.shape, FAR, np.int32))
        distance, kernel = np.moveaxis(result, 1, axis), _lower_envelope
    return np.ascontiguousarray(distance)


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
    return np.maximum.accumulate(cover, axis=1).astype(np.int32)


@compiled()
def _ridge(radius2, cover):
    """Whether no neighbour's ball contains a voxel's ball: only these need painting."""
    nz, ny, nx = radius2.shape
    kept = np.empty(radius2.shape, np.bool_)
    for z, y in np.ndindex(nz, ny):
        # Largest squared radius of this row, and of the rows one and two steps away.
        largest = np.zeros((3, nx + 2), np.int32)
        for k in range(max(z - 1, 0), min(z + 2, nz)):
            for j in range(max(y - 1, 0), min(y + 2, ny)):
                row, near = radius2[k, j], largest[abs(k - z) + abs(j - y)]
                for x in range(nx):
                    near[x + 1] = max(near[x + 1], row[x])
        for x in range(nx):
            face = max(largest[1, x + 1], largest[0, x], largest[0, x + 2])
            edge = max(largest[2, x + 1], largest[1, x], largest[1, x + 2])
            corner = max(largest[2, x], largest[2, x + 2])
            bound = cover[:, radius2[z, y, x]]
            kept[z, y, x] = bound[1] > face and bound[2] > edge and bound[3] > corner
    return kept


@compiled()
def _paint(radius2, roots, centres, unpainted, painted):
    """painted <- squared radius of the largest ball, from centres in order of falling radius.

    The first write counts. `roots` are the square roots, rounded down, of the squared radii from 0;
    `unpainted` holds a bit for each voxel of the phase, eight of a row in a byte.
    """
    nz, ny, nx = radius2.shape
    for centre in centres:
        cz, cy, cx = centre // (ny * nx), centre // nx % ny, centre % nx
        size = np.int64(radius2[cz, cy, cx])
        for z in range(max(cz - roots[size], 0), min(cz + roots[size] + 1, nz)):
            in_plane = size - (z - cz) ** 2
            reach = roots[in_plane]
            for y in range(max(cy - reach, 0), min(cy + reach + 1, ny)):
                half, row = roots[in_plane - (y - cy) ** 2], unpainted[z, y]
                first, last = max(cx - half, 0), min(cx + half, nx - 1)
                for byte in range(first // 8, last // 8 + 1):
                    low, high = max(first - byte * 8, 0), min(last - byte * 8, 7)
                    bits = row[byte] & ((2 << high) - (1 << low))
                    if bits:
                        row[byte] ^= bits
                        for x in range(low, high + 1):
                            if bits >> x & 1:
                                painted[z, y, byte * 8 + x] = size


def _clean_surface(thickness: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Give each surface voxel the mean of its face neighbours inside the phase, if any."""
    inner = np.pad(np.where(surface, np.float32(0), thickness), 1)
    places = np.flatnonzero(np.pad(surface, 1))
    total, count = np.zeros((2, places.size), np.float32)
    for step in np.outer(inner.strides, (1, -1)).ravel() // inner.itemsize:
        neighbour = inner.ravel()[places + step]
        total, count = total + neighbour, count + (neighbour > 0)
    cleaned = thickness.copy()
    cleaned[surface] = np.where(total > 0, total / np.maximum(count, 1), thickness[surface])
    return cleaned


def largest_balls(phase: np.ndarray, opposite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared radius of each voxel's own ball, and of the largest ball that covers the voxel.

    Both in voxel^2, 0 outside the phase; neither phase may be empty.
    """
    radius2 = np.where(phase, squared_distance(opposite), 0)
    centres = np.flatnonzero(_ridge(radius2, _covering_radius2(radius2.max())) & (radius2 > 1))
    order = np.argsort(-radius2.ravel()[centres], kind="stable")
    unpainted = np.packbits(phase, axis=-1, bitorder="little")
    roots = np.sqrt(np.arange(radius2.max() + 1)).astype(np.int64)
    painted = np.minimum(radius2, 1)  # voxels that no ball covers have one of radius 1
    _paint(radius2, roots, centres[order], unpainted, painted)
    return radius2, painted


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
