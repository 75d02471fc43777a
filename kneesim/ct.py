"""The CT scanner: HU of a mix of tissues, point spread function, noise, and errors of scale."""

import numpy as np
import SimpleITK as sitk
from scipy.fft import irfft2, rfft2, rfftfreq
from scipy.ndimage import gaussian_filter1d

from .painting import Grid, Rendering, draw_field, field_on, painted, tissue_fields
from .subject import Subject

SIGMA_PER_FWHM = 1 / np.sqrt(8 * np.log(2))
CT_AXES = np.eye(3)
# Sub-samples (i, j, k) of a voxel near the joint, and deep in the bone; design choice.
STEPS = (3, 3, 4), (2, 2, 2)
EDGE_MM = 0.5  # design choice: width of the ramp between tissues, about a voxel


def draw_ct(ct: dict, rng: np.random.Generator) -> dict:
    """All that a CT scan draws but its noise: HU of tissues, smooth fields, kernel, and errors."""
    tissues = ("air", "fat", "muscle", "fluid", "fibrous", "cartilage")
    hu = {tissue: ct[tissue].draw(rng) for tissue in tissues}
    hu["bone"] = ct["tissue_mineral"].draw(rng) * ct["hu_per_mineral"].draw(rng)
    hu["marrow_fat"] = ct["marrow_fat"].draw(rng)
    hu["marrow_water"] = ct["marrow_red"].draw(rng)
    drawn = {"hu": hu}
    for name in ("shading", "mineral_regional"):
        drawn[name] = draw_field(ct[name].value, rng)
    for name in ("fwhm_slice", "fwhm_in_plane", "noise", "noise_cut", "scale", "offset"):
        drawn[name] = ct[name].draw(rng)
    return drawn


def scan_ct(
    subject: Subject, poses: dict, grid: Grid, drawn: dict, rng: np.random.Generator
) -> tuple[sitk.Image, sitk.Image]:
    """CT in HU (int16) and bone labels (uint8, BONES); `drawn` by `draw_ct`, `rng` for the noise.

    HU is a mix of tissues with smoothly varying mineral, blurred by a Gaussian PSF of drawn FWHM,
    with noise of power |f| MTF(f)^2 in plane (ramp times kernel, zero beyond the published cut), a
    scale, an offset and smooth shading.
    """
    shading = field_on(drawn["shading"], grid)
    mineral = 1 + field_on(drawn["mineral_regional"], grid)
    coarse = tissue_fields(subject, poses, grid, [shading, mineral])
    rendering = Rendering(water=drawn["hu"], fat={}, is_ct=True, steps=STEPS, edge_mm=EDGE_MM)
    hu, labels = np.empty(grid.size[::-1], np.float32), np.empty(grid.size[::-1], np.uint8)
    for k, (plane, bone_labels) in enumerate(
        painted(subject, poses, grid, coarse, grid, rendering)
    ):
        hu[k], labels[k] = plane.real, bone_labels
    spacing = np.array(grid.spacing[::-1])
    fwhm = np.array([drawn["fwhm_slice"], drawn["fwhm_in_plane"], drawn["fwhm_in_plane"]])
    psf_mm = fwhm * SIGMA_PER_FWHM
    # The painted footprint is already a box of one voxel: its variance is part of the PSF.
    sigma = np.sqrt(np.maximum(psf_mm**2 - spacing**2 / 12, 1e-4)) / spacing
    for axis in range(3):
        hu = gaussian_filter1d(hu, sigma[axis], axis=axis, truncate=3, mode="nearest")
    hu += _noise(hu.shape, spacing, psf_mm, drawn, rng)
    hu *= np.float32(drawn["scale"])
    hu += np.float32(drawn["offset"])
    np.clip(np.rint(hu, out=hu), -1024, 3071, out=hu)
    return grid.image(hu.astype(np.int16)), grid.image(labels)


def _noise(
    shape: tuple, spacing: np.ndarray, psf_mm: np.ndarray, drawn: dict, rng: np.random.Generator
) -> np.ndarray:
    """Noise (HU) of the drawn SD, power |f| exp(-(2 pi sigma f)^2) in plane, smooth along z."""
    fy, fx = np.fft.fftfreq(shape[1], spacing[1]), rfftfreq(shape[2], spacing[2])
    f = np.hypot(fy[:, None], fx[None, :])
    power = f * np.exp(-((2 * np.pi * psf_mm[1] * f) ** 2))
    power = np.where(f < drawn["noise_cut"], power, 0)
    white = rng.standard_normal(shape, dtype=np.float32)
    spectrum = rfft2(white)
    spectrum *= np.sqrt(power).astype(np.float32)
    noise = irfft2(spectrum, s=shape[1:], overwrite_x=True)
    noise = gaussian_filter1d(noise, psf_mm[0] / spacing[0] / 2, axis=0, truncate=3)
    noise *= np.float32(drawn["noise"] / noise.std())
    return noise
