"""Morphometry of a binary mask at high resolution (micro-CT, simulated truth), and what coarse voxels do to it."""

from itertools import product

import numpy as np
from scipy.ndimage import gaussian_filter

from .thickness import checked_mask, diameters, largest_balls

AXIS_SHARE = 0.8  # our choice: on the mid-axis, a voxel's own ball is at least 0.8 of the largest that covers it
PERIODS = 3  # our choice: fewer than three Tb.Th + Tb.Sp across the volume of interest raise the flag
# Solid-angle shares of the 13 lattice directions (Ohser and Muecklich, Statistical Analysis of Microstructures, 2000)
DIRECTIONS = [d for d in product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]
SHARES = np.array([{1: 0.0915564, 2: 0.0739613, 3: 0.0703913}[sum(map(abs, d))] for d in DIRECTIONS])


def morphometry(
    mask: np.ndarray, spacing_mm: float | tuple, voi: np.ndarray | None = None, further: bool = True
) -> dict:
    """Trabecular morphometry of a binary mask, model-free, in 3D.

    Parameters
    ----------
    mask : (z, y, x) bool or two-valued, bone is True.
    spacing_mm : isotropic voxel size, float or (z, y, x); mm.
    voi : (z, y, x) bool, volume of interest; the whole array when None. Nothing outside it is used (edge rule
        of `local_thickness`): a mask with an empty margin needs one, or Tb.Sp means nothing.
    further : False computes the four biomarkers only.

    Returns
    -------
    dict of float and `flag` (str, "" when good):
    ``bv_tv`` bone volume / total volume, 0..1, counted;
    ``tb_th_mm``, ``tb_sp_mm`` mean local thickness of bone and of marrow, > 0 (bias: see `local_thickness`);
    ``tb_n_per_mm`` 1 / mean distance of mid-axes: local thickness between bone voxels whose own ball has at
    least 0.8 of the covering radius (within 7 % on oblique plates; up to +20 % on plates along the grid);
    and, if `further`,
    ``tb_n_mil_per_mm`` boundary crossings per length of test line, mean over 13 directions (plate model BS/2TV);
    ``anisotropy`` longest / shortest axis of the mean-intercept-length ellipsoid, >= 1;
    ``conn_d_per_mm3`` (1 - Euler number) / total volume, bone 26-connected, cells on the border of the volume
    of interest shared with its neighbours;
    ``smi`` structure model index 6 BV BS' / BS^2: plates 0, rods 3, spheres 4.
    Values that do not exist are NaN, and then `flag` says why.

    Raises
    ------
    InputFault : as `local_thickness`.

    Sources: Hildebrand et al., J Bone Miner Res 1999;14:1167; Odgaard and Gundersen, Bone 1993;14:173;
    Harrigan and Mann, J Mater Sci 1984;19:761; Hildebrand and Rueegsegger, CMBBE 1997;1:15.
    """
    mask, voi, spacing = checked_mask(mask, spacing_mm, voi)
    bone, marrow, volume = mask & voi, ~mask & voi, int(voi.sum())
    result = dict.fromkeys(("bv_tv", "tb_th_mm", "tb_sp_mm", "tb_n_per_mm"), np.nan)
    if further:
        result |= dict.fromkeys(("tb_n_mil_per_mm", "anisotropy", "conn_d_per_mm3", "smi"), np.nan)
    if volume:
        result["bv_tv"] = bone.sum() / volume
    if not bone.any() or not marrow.any():
        return result | {"flag": "no bone" if not bone.any() and volume else "no marrow" if volume else "empty voi"}
    th, sp, axes = _lengths(bone, marrow)
    result |= {"tb_th_mm": th * spacing, "tb_sp_mm": sp * spacing, "tb_n_per_mm": 1 / (axes * spacing)}
    if further:
        by_direction = crossings(bone, voi)
        tb_n_mil = float(by_direction @ SHARES) / spacing
        result |= {"tb_n_mil_per_mm": tb_n_mil, "anisotropy": _anisotropy(by_direction)}
        result["conn_d_per_mm3"] = (1 - _euler_number(bone, voi)) / (volume * spacing**3)
        result["smi"] = _structure_model_index(bone, voi)
    small = th + sp > volume ** (1 / 3) / PERIODS
    return {k: float(v) for k, v in result.items()} | {"flag": "volume of interest too small" if small else ""}


def _lengths(bone, marrow) -> tuple[float, float, float]:
    """Mean thickness, separation and distance of mid-axes, in voxels."""
    radius2, painted = largest_balls(bone, marrow)
    axis = bone & (radius2 >= AXIS_SHARE**2 * painted)
    between = (bone | marrow) & ~axis
    thickness = diameters(radius2, painted)[bone]
    separation = diameters(*largest_balls(marrow, bone))[marrow]
    distance = diameters(*largest_balls(between, axis), clean_up=False)[between]
    return thickness.mean(dtype=float), separation.mean(dtype=float), distance.mean(dtype=float)


def _pair(volume: np.ndarray, direction: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Two views of `volume`: each voxel, and its neighbour along the lattice direction."""
    here = tuple(slice(max(-d, 0), n - max(d, 0)) for d, n in zip(direction, volume.shape, strict=True))
    there = tuple(slice(max(d, 0), n - max(-d, 0)) for d, n in zip(direction, volume.shape, strict=True))
    return volume[here], volume[there]


def crossings(bone: np.ndarray, voi: np.ndarray, directions: list = DIRECTIONS) -> np.ndarray:
    """Boundary crossings per voxel length of test line within the volume of interest, by lattice direction."""
    counts = []
    for direction in directions:
        (a, b), (u, v) = _pair(bone, direction), _pair(voi, direction)
        counts.append(((a ^ b) & u & v).sum() / (max((u & v).sum(), 1) * np.linalg.norm(direction)))
    return np.array(counts)


def _anisotropy(by_direction: np.ndarray) -> float:
    """Longest / shortest axis of the ellipsoid 1 / MIL(n)^2 = n'Mn, fitted with weights of solid angle."""
    n = np.array(DIRECTIONS) / np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
    terms = np.column_stack([n**2, 2 * n[:, [0, 0, 1]] * n[:, [1, 2, 2]]])
    weight = np.sqrt(SHARES)
    xx, yy, zz, xy, xz, yz = np.linalg.lstsq(terms * weight[:, None], by_direction**2 * weight, rcond=None)[0]
    values = np.linalg.eigvalsh([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return float(np.sqrt(values[2] / max(values[0], 1e-4 * values[2])))  # perfect plates: capped at 100


def _euler_number(bone: np.ndarray, voi: np.ndarray) -> float:
    """Vertices - edges + faces - voxels of the closed voxels; a cell weighs as the share of it in the volume."""
    euler = 0.0
    for low in product((False, True), repeat=3):
        any_bone, share = np.pad(bone, 1), np.pad(voi, 1).astype(np.float32)
        for axis in np.flatnonzero(low):
            step = tuple(int(k == axis) for k in range(3))
            any_bone = np.logical_or(*_pair(any_bone, step))
            share = np.add(*_pair(share, step)) / 2
        euler += (-1) ** (3 - sum(low)) * share[any_bone].sum(dtype=float)
    return euler


def _structure_model_index(bone: np.ndarray, voi: np.ndarray) -> float:
    """6 V S' / S^2 with S' = S dS/dV, by level sets of the smoothed mask one voxel either side of the surface."""
    inside = gaussian_filter(voi.astype(np.float32), 1)
    smooth = gaussian_filter(bone.astype(np.float32), 1) / np.maximum(inside, 1e-3)
    sets = [(smooth > level) & voi for level in (0.25, 0.75)]
    (v_out, s_out), (v_in, s_in) = ((s.sum() / voi.sum(), 2 * crossings(s, voi) @ SHARES) for s in sets)
    v, s = bone.sum() / voi.sum(), 2 * crossings(bone, voi) @ SHARES
    return float(6 * v * (s_out - s_in) / (s * (v_out - v_in))) if v_out > v_in else np.nan


def resolution_series(
    mask: np.ndarray, voxel_mm: float, factors: tuple = (1, 2, 3, 4, 5, 6, 8, 10), psf_voxels: float = 0.0
) -> list[dict]:
    """The same bone at coarser voxels: blurred, binned with partial volume, thresholded at one half, measured.

    Parameters
    ----------
    mask : (z, y, x) bool, fine. voxel_mm : its isotropic voxel size, mm.
    factors : whole numbers of fine voxels per coarse voxel (1..10 of 45.6 um spans 46..456 um).
    psf_voxels : FWHM of a Gaussian point spread before binning, in coarse voxels (0 none; 1.5 a real scanner).

    Returns
    -------
    list of dict: ``voxel_mm``, ``psf_mm``, and what `morphometry` (four biomarkers, flag) gives.
    """
    fine, voxel_mm = checked_mask(mask, voxel_mm, None)[::2]
    rows = []
    for factor in factors:
        # FWHM = 2 sqrt(2 ln 2) SD of a Gaussian.
        grey = gaussian_filter(fine.astype(np.float32), psf_voxels * factor / 2.3548) if psf_voxels else fine
        n = [size // factor for size in fine.shape]
        blocks = grey[tuple(slice(0, k * factor) for k in n)].reshape(n[0], factor, n[1], factor, n[2], factor)
        coarse = blocks.mean((1, 3, 5), dtype=np.float32) > 0.5
        sizes = {"voxel_mm": voxel_mm * factor, "psf_mm": psf_voxels * voxel_mm * factor}
        rows.append(sizes | morphometry(coarse, voxel_mm * factor, further=False))
    return rows
