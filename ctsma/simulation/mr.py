"""The MR scanner: balanced SSFP steady state, k-space sampling, coil, off-resonance and noise."""

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from scipy.fft import fft2, ifft2, next_fast_len

from .painting import COARSE_MM, DENSE_MM, SCAN, Grid, draw_field, field_on, painted, tissue_fields
from .subject import Subject

MR_AXES = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # columns: i back, j down, k to the right
PROTON_DENSITY = {"muscle": 0.9, "cartilage": 0.8, "fibrous": 0.7}  # relative to water, our choice
MR_TISSUES = ("fat", "muscle", "fluid", "cartilage", "marrow", "fibrous")
STEPS = (1, 1, 5), (1, 1, 3)  # sub-samples of a voxel near the joint and deep in the bone (our choice)
EDGE_MM = 0.35  # width of the ramp between tissues: the diagonal of a voxel's face (our choice)
SEAM = 6  # voxels beside the seam of a k-space cut that are not taken (our choice: its ringing falls to about 5 %)


def bssfp_signal(t1_ms: float, t2_ms: float, tr_ms: float, te_ms: float, flip_deg: float, phase_rad=0.0) -> np.ndarray:
    """Complex bSSFP steady state, M0 = 1, alternating RF (Freeman and Hill 1971, J Magn Reson 4:366).

    phase_rad (any shape): precession by off-resonance in one TR; 0 is the middle of the pass band, pi the dark band.
    On resonance: sin a (1 - E1) / (1 - (E1 - E2) cos a - E1 E2) exp(-TE / T2).
    """
    e1, e2, a = np.exp(-tr_ms / t1_ms), np.exp(-tr_ms / t2_ms), np.deg2rad(flip_deg)
    turned = np.asarray(phase_rad) + np.pi  # the alternating RF puts the pass band here
    below = (1 - e1 * np.cos(a)) - (e1 - np.cos(a)) * e2**2 - e2 * (1 - e1) * (1 + np.cos(a)) * np.cos(turned)
    echo = np.exp((1j * np.asarray(phase_rad) - tr_ms / t2_ms) * te_ms / tr_ms)
    return np.sin(a) * (1 - e1) * (1 - e2 * np.exp(-1j * turned)) / below * echo


def mr_signals(mr: dict) -> tuple[dict, dict]:
    """On-resonance signal of each tissue by species (water, fat), relative to fatty marrow."""
    signal = {t: PROTON_DENSITY.get(t, 1.0) * abs(_steady(mr, t, 0.0)) for t in MR_TISSUES}
    signal = {t: s / signal["marrow"] for t, s in signal.items()}
    water = {t: signal[t] for t in ("muscle", "fluid", "fibrous", "cartilage")} | {"marrow_water": signal["muscle"]}
    return water, {"fat": signal["fat"], "marrow_fat": signal["marrow"]}


def _steady(mr: dict, tissue: str, phase_rad) -> np.ndarray:
    sequence = mr["repetition_time"].value, mr["echo_time"].value, mr["flip"].value
    return bssfp_signal(mr[f"t1_{tissue}"].value, mr[f"t2_{tissue}"].value, *sequence, phase_rad)


def draw_mr(mr: dict, rng: np.random.Generator) -> dict:
    """All that an MR scan draws but its noise: coil, off-resonance (Hz) and its shim, SNR, scale, widening."""
    numbers = {name: mr[name].draw(rng) for name in ("full_scale", "snr", "shim", "susceptibility_scan")}
    return {"mr": mr, "coil": draw_field(0.5, rng), "off_hz": draw_field(mr["off_resonance"].value, rng), **numbers}


def scan_mr(subject: Subject, poses: dict, grid: Grid, drawn: dict, rng: np.random.Generator) -> sitk.Image:
    """bSSFP magnitude image (int16, 0..2047); `drawn` by `draw_mr`, `rng` for the noise.

    Water and fat under one off-resonance field (their phases and the dark bands follow from the steady state),
    trabeculae widened by susceptibility, slice profile, k-space sampling in plane, coil bias, Rician noise.
    """
    mr, coarse = drawn["mr"], tissue_fields(subject, poses, grid)
    coil = drawn["full_scale"] * (1 + mr["bias"].value * np.tanh(field_on(drawn["coil"], grid)))
    off_hz = drawn["shim"] + field_on(drawn["off_hz"], grid)
    for n, (tissue, shift) in enumerate((("cartilage", 0.0), ("marrow", mr["fat_shift"].value))):
        phase = 2e-3 * np.pi * mr["repetition_time"].value * (off_hz + shift)
        seen = coil * _steady(mr, tissue, phase) / abs(_steady(mr, tissue, 0.0))
        coarse[SCAN + 2 * n : SCAN + 2 * n + 2] = seen.real, seen.imag
    widening = max(subject.drawn["susceptibility"] + drawn["susceptibility_scan"], 0.0)
    setting = mr_signals(mr), False, STEPS, mr["slice_profile"].value, EDGE_MM, widening
    image = _k_space_sampled(subject, poses, grid, coarse, setting)
    sigma = np.float32(drawn["full_scale"] / drawn["snr"])
    magnitude = np.empty(image.shape, np.float32)
    for plane, out in zip(image, magnitude, strict=True):
        real, imaginary = rng.standard_normal((2, *plane.shape), dtype=np.float32) * sigma
        np.hypot(plane.real + real, plane.imag + imaginary, out=out)
    return grid.image(np.clip(np.rint(magnitude, out=magnitude), 0, 2047, out=magnitude).astype(np.int16))


def _k_space_sampled(subject: Subject, poses: dict, grid: Grid, coarse: np.ndarray, setting: tuple) -> np.ndarray:
    """Complex image: near the joint painted twice as fine in plane and cut in k-space, elsewhere point-sampled."""
    image, _ = painted(subject, poses, grid, coarse, grid, *setting)
    low, high = _near_joint(coarse, grid)
    spacing = np.array(grid.spacing) / (2, 2, 1)
    origin = grid.origin + grid.direction @ (low * grid.spacing - np.array([0.5, 0.5, 0.0]) * spacing)
    fine = replace(grid, size=tuple((high - low) * (2, 2, 1)), spacing=tuple(spacing), origin=origin)
    part = np.stack([k_space_cut(p) for p in painted(subject, poses, grid, coarse, fine, *setting)[0]])
    # The cut wraps around: what a seam rings into is not taken, unless the scan itself ends there.
    first, last = np.where(low > 0, SEAM, 0), np.where(high < grid.size, SEAM, 0)
    (i, j, _), (p, q, _) = first, np.array(part.shape[::-1]) - last
    image[low[2] : high[2], low[1] + j : low[1] + q, low[0] + i : low[0] + p] = part[:, j:q, i:p]
    return image


def k_space_cut(plane: np.ndarray) -> np.ndarray:
    """Image (j, i) that k-space sampling makes of a plane (2 j, 2 i) sampled twice as fine: low frequencies alone."""
    kept = [np.rint(np.fft.fftfreq(n // 2, 2 / n)).astype(int) for n in plane.shape]  # -n/4 .. n/4 - 1
    # A voxel's centre lies half a fine sample behind its first one: a shift by phase.
    shift = [np.exp(1j * np.pi * k / n) for k, n in zip(kept, plane.shape, strict=True)]
    spectrum = fft2(plane)[np.ix_(*kept)] * np.multiply.outer(*shift).astype(np.complex64)
    return ifft2(spectrum) / 4


def _near_joint(coarse: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Index box (low, high; i, j, k) of the bone less than DENSE_MM from both bearings, in sizes an FFT likes."""
    near = (coarse[:2].min(axis=0) < 1) & (coarse[-1] < DENSE_MM)
    bounds = [np.flatnonzero(near.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] for a in (2, 1, 0)]
    voxels = [COARSE_MM / s * b for s, b in zip(grid.spacing, bounds, strict=True)]
    low = np.array([max(int(v[0]) - SEAM - 3, 0) for v in voxels])
    size = [next_fast_len(int(v[1]) + SEAM + 3 - a) for v, a in zip(voxels, low, strict=True)]
    high = np.minimum(low + size, grid.size)
    return low, high
