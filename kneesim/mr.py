"""The MR scanner: balanced SSFP steady state, k-space sampling, coil, off-resonance and noise."""

import numpy as np
import SimpleITK as sitk
from scipy.fft import fft2, ifft2, next_fast_len

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
    image = _k_space_sampled(subject, poses, grid, coarse, rendering)
    sigma = np.float32(drawn["full_scale"] / drawn["snr"])
    magnitude = np.empty(image.shape, np.float32)
    for plane, out in zip(image, magnitude, strict=True):
        real, imaginary = rng.standard_normal((2, *plane.shape), dtype=np.float32) * sigma
        np.hypot(plane.real + real, plane.imag + imaginary, out=out)
    return grid.image(np.clip(np.rint(magnitude), 0, MAX_GREY).astype(np.int16))


def _k_space_sampled(
    subject: Subject, poses: dict, grid: Grid, coarse: np.ndarray, rendering: Rendering
) -> np.ndarray:
    """Complex image (k, j, i): near the joint sampled in k-space, elsewhere point-sampled.

    Near the joint the image is painted twice as fine in plane and cut in k-space.
    """
    image, _ = painted(subject, poses, grid, coarse, grid, rendering)
    low, high = _near_joint(coarse, grid)
    spacing = np.array(grid.spacing) / (2, 2, 1)
    first_voxel = low * grid.spacing - np.array([0.5, 0.5, 0.0]) * spacing
    fine = Grid(
        size=tuple((high - low) * (2, 2, 1)),
        spacing=tuple(spacing),
        direction=grid.direction,
        origin=grid.origin + grid.direction @ first_voxel,
    )
    planes, _ = painted(subject, poses, fine, coarse, grid, rendering)
    part = np.stack([k_space_cut(plane) for plane in planes])
    # The cut wraps around: voxels near its seam are not used, unless the scan itself ends there.
    first = np.where(low > 0, SEAM, 0)
    last = np.array(part.shape[::-1]) - np.where(high < grid.size, SEAM, 0)
    rows, columns = slice(first[1], last[1]), slice(first[0], last[0])
    target = image[low[2] : high[2], low[1] : high[1], low[0] : high[0]]
    target[:, rows, columns] = part[:, rows, columns]
    return image


def k_space_cut(plane: np.ndarray) -> np.ndarray:
    """Image (j, i) that k-space sampling makes of a plane (2 j, 2 i) sampled twice as fine.

    Only the low frequencies are kept.
    """
    rows, columns = (np.rint(np.fft.fftfreq(n // 2, 2 / n)).astype(int) for n in plane.shape)
    # A voxel's centre lies half a fine sample behind its first one: a shift by phase.
    row_shift = np.exp(1j * np.pi * rows / plane.shape[0])
    column_shift = np.exp(1j * np.pi * columns / plane.shape[1])
    shift = np.multiply.outer(row_shift, column_shift).astype(np.complex64)
    spectrum = fft2(plane)[np.ix_(rows, columns)] * shift
    return ifft2(spectrum) / 4


def _near_joint(coarse: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Index box (low, high; i, j, k) of the bone less than DENSE_MM from both bearings.

    Its sizes are such that an FFT of them is fast.
    """
    near = (coarse[:2].min(axis=0) < 1) & (coarse[-1] < DENSE_MM)
    low, high = np.zeros(3, int), np.zeros(3, int)
    for axis in range(3):  # i, j, k
        others = tuple({0, 1, 2} - {2 - axis})
        indices = np.flatnonzero(near.any(axis=others))
        first, last = COARSE_MM / grid.spacing[axis] * indices[[0, -1]]
        low[axis] = max(int(first) - SEAM - 3, 0)
        size = next_fast_len(int(last) + SEAM + 3 - int(low[axis]))
        high[axis] = min(low[axis] + size, grid.size[axis])
    return low, high
