"""The MR scanner: balanced SSFP steady state, k-space sampling, coil, off-resonance and noise."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import SimpleITK as sitk
from scipy.fft import fft, ifft2, next_fast_len

from ctsma.compiled import compiled

from .painting import (
    COARSE_MM,
    DENSE_MM,
    Grid,
    Rendering,
    draw_field,
    field_on,
    painted,
    tissue_fields,
)
from .subject import Subject

# Columns: i back, j down, k to the right.
MR_AXES = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
MR_TISSUES = ("fat", "muscle", "fluid", "cartilage", "marrow", "fibrous")
# Proton density relative to water; design choice.
PROTON_DENSITY = {"muscle": 0.9, "cartilage": 0.8, "fibrous": 0.7}
# Sub-samples (i, j, k) of a voxel near the joint, and deep in the bone; design choice.
STEPS = (1, 1, 5), (1, 1, 3)
EDGE_MM = 0.35  # design choice: ramp between tissues, the diagonal of a voxel's face
# Voxels beside the seam of a k-space cut that are not used; its ringing falls to about 5 %.
SEAM = 6  # design choice
MAX_GREY = 2047


def bssfp_signal(
    t1_ms: float, t2_ms: float, tr_ms: float, te_ms: float, flip_deg: float, phase_rad=0.0
) -> np.ndarray:
    """Complex bSSFP steady state, M0 = 1, alternating RF (Freeman and Hill 1971, JMR 4:366).

    phase_rad (any shape): precession by off-resonance in one TR; 0 is the middle of the pass band,
    pi the dark band. On resonance: sin a (1 - E1) / (1 - (E1 - E2) cos a - E1 E2) exp(-TE / T2).
    """
    e1, e2, a = np.exp(-tr_ms / t1_ms), np.exp(-tr_ms / t2_ms), np.deg2rad(flip_deg)
    cos_a = np.cos(a)
    phase = np.asarray(phase_rad)
    turned = phase + np.pi  # the alternating RF puts the pass band here
    below = (1 - e1 * cos_a) - (e1 - cos_a) * e2**2
    below = below - e2 * (1 - e1) * (1 + cos_a) * np.cos(turned)
    echo = np.exp((1j * phase - tr_ms / t2_ms) * te_ms / tr_ms)
    return np.sin(a) * (1 - e1) * (1 - e2 * np.exp(-1j * turned)) / below * echo


def mr_signals(mr: dict) -> tuple[dict, dict]:
    """On-resonance signal of each tissue by species (water, fat), relative to fatty marrow."""
    signal = {}
    for tissue in MR_TISSUES:
        signal[tissue] = PROTON_DENSITY.get(tissue, 1.0) * abs(_steady_state(mr, tissue, 0.0))
    signal = {tissue: value / signal["marrow"] for tissue, value in signal.items()}
    water = {tissue: signal[tissue] for tissue in ("muscle", "fluid", "fibrous", "cartilage")}
    water["marrow_water"] = signal["muscle"]
    return water, {"fat": signal["fat"], "marrow_fat": signal["marrow"]}


def _steady_state(mr: dict, tissue: str, phase_rad) -> np.ndarray:
    return bssfp_signal(
        t1_ms=mr[f"t1_{tissue}"].value,
        t2_ms=mr[f"t2_{tissue}"].value,
        tr_ms=mr["repetition_time"].value,
        te_ms=mr["echo_time"].value,
        flip_deg=mr["flip"].value,
        phase_rad=phase_rad,
    )


def draw_mr(mr: dict, rng: np.random.Generator) -> dict:
    """All that an MR scan draws but its noise: scale, SNR, shim, widening, coil, off-resonance."""
    drawn = {"mr": mr}
    for name in ("full_scale", "snr", "shim", "susceptibility_scan"):
        drawn[name] = mr[name].draw(rng)
    drawn["coil"] = draw_field(0.5, rng)
    drawn["off_hz"] = draw_field(mr["off_resonance"].value, rng)
    return drawn


def scan_mr(
    subject: Subject, poses: dict, grid: Grid, drawn: dict, rng: np.random.Generator
) -> sitk.Image:
    """bSSFP magnitude image (int16, 0..2047); `drawn` by `draw_mr`, `rng` for the noise.

    Water and fat under one off-resonance field (their phases and the dark bands follow from the
    steady state), trabeculae widened by susceptibility, slice profile, k-space sampling in plane,
    coil bias, Rician noise.
    """
    mr = drawn["mr"]
    coil = 1 + mr["bias"].value * np.tanh(field_on(drawn["coil"], grid))
    coil = drawn["full_scale"] * coil
    off_hz = drawn["shim"] + field_on(drawn["off_hz"], grid)
    channels = []  # real and imaginary part of the signal of water, then of fat
    for tissue, shift_hz in (("cartilage", 0.0), ("marrow", mr["fat_shift"].value)):
        phase = 2e-3 * np.pi * mr["repetition_time"].value * (off_hz + shift_hz)
        signal = coil * _steady_state(mr, tissue, phase) / abs(_steady_state(mr, tissue, 0.0))
        channels += [signal.real, signal.imag]
    coarse = tissue_fields(subject, poses, grid, channels)
    widening = max(subject.drawn["susceptibility"] + drawn["susceptibility_scan"], 0.0)
    water, fat = mr_signals(mr)
    profile_mm = mr["slice_profile"].value
    rendering = Rendering(water, fat, False, STEPS, EDGE_MM, profile_mm, widening)
    sigma = np.float32(drawn["full_scale"] / drawn["snr"])
    stored = np.empty(grid.size[::-1], np.int16)
    planes = _k_space_sampled(subject, poses, grid, coarse, rendering)
    for plane, out in zip(planes, stored, strict=True):
        noise = rng.standard_normal((2, *plane.shape), dtype=np.float32)
        _store_magnitude(plane, noise, sigma, out)
    return grid.image(stored)


@compiled()
def _store_magnitude(plane, noise, sigma, out) -> None:
    """Write the magnitude of a complex plane with noise (2, j, i) of SD sigma, in whole numbers."""
    for j in range(plane.shape[0]):
        for i in range(plane.shape[1]):
            real = plane[j, i].real + noise[0, j, i] * sigma
            imaginary = plane[j, i].imag + noise[1, j, i] * sigma
            # Squares of single precision are exact in double precision.
            square = np.float64(real) * np.float64(real) + np.float64(imaginary) ** 2
            out[j, i] = min(np.rint(np.float32(np.sqrt(square))), np.float32(MAX_GREY))


def _k_space_sampled(
    subject: Subject, poses: dict, grid: Grid, coarse: np.ndarray, rendering: Rendering
) -> Iterator[np.ndarray]:
    """Complex planes (j, i): near the joint sampled in k-space, elsewhere point-sampled.

    Near the joint the image is painted twice as fine in plane and cut in k-space. Each plane is
    overwritten by a later one.
    """
    low, high = _near_joint(coarse, grid)
    spacing = np.array(grid.spacing) / (2, 2, 1)
    first_voxel = low * grid.spacing - np.array([0.5, 0.5, 0.0]) * spacing
    fine = Grid(
        size=tuple((high - low) * (2, 2, 1)),
        spacing=tuple(spacing),
        direction=grid.direction,
        origin=grid.origin + grid.direction @ first_voxel,
    )
    # The cut wraps around: voxels near its seam are not used, unless the scan itself ends there.
    seam = np.array([SEAM, SEAM, 0])
    first = low + np.where(low > 0, seam, 0)
    end = high - np.where(high < grid.size, seam, 0)
    columns, rows = (slice(first[n] - low[n], end[n] - low[n]) for n in range(2))
    outside = painted(subject, poses, grid, coarse, grid, rendering, hole=(first, end))
    near = painted(subject, poses, fine, coarse, grid, rendering)
    for k, (plane, _) in enumerate(outside):
        if low[2] <= k < high[2]:
            fine_plane, _ = next(near)
            plane[first[1] : end[1], first[0] : end[0]] = k_space_cut(fine_plane)[rows, columns]
        yield plane


def k_space_cut(plane: np.ndarray) -> np.ndarray:
    """Image (j, i) that k-space sampling makes of a plane (2 j, 2 i) sampled twice as fine.

    Only the low frequencies are kept.
    """
    rows, columns, shift = _kept_frequencies(plane.shape)
    spectrum = fft(fft(plane, axis=1)[:, columns], axis=0)[rows]
    return ifft2(spectrum * shift, overwrite_x=True) / np.float32(4)


@lru_cache(maxsize=2)
def _kept_frequencies(shape: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the low frequencies of a plane (2 j, 2 i), and their phase shift (j, i)."""
    rows, columns = (np.rint(np.fft.fftfreq(n // 2, 2 / n)).astype(int) for n in shape)
    # A voxel's centre lies half a fine sample behind its first one: a shift by phase.
    row_shift = np.exp(1j * np.pi * rows / shape[0])
    column_shift = np.exp(1j * np.pi * columns / shape[1])
    return rows, columns, np.multiply.outer(row_shift, column_shift).astype(np.complex64)


def _near_joint(coarse: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Index box (low, high; i, j, k) of the bone less than DENSE_MM from both bearings.

    Its sizes are such that an FFT of them is fast.
    """
    near = (coarse[..., :2].min(axis=-1) < 1) & (coarse[..., -1] < DENSE_MM)
    low, high = np.zeros(3, int), np.zeros(3, int)
    for axis in range(3):  # i, j, k
        others = tuple({0, 1, 2} - {2 - axis})
        indices = np.flatnonzero(near.any(axis=others))
        first, last = COARSE_MM / grid.spacing[axis] * indices[[0, -1]]
        low[axis] = max(int(first) - SEAM - 3, 0)
        size = next_fast_len(int(last) + SEAM + 3 - int(low[axis]))
        high[axis] = min(low[axis] + size, grid.size[axis])
    return low, high
