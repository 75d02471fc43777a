"""The CT scanner: HU of a mix of tissues, point spread function, noise, and errors of scale."""

import numpy as np
import SimpleITK as sitk
from scipy.fft import irfft2, rfft2, rfftfreq
from scipy.ndimage import gaussian_filter1d

from .painting import SCAN, Grid, draw_field, field_on, painted, tissue_fields
from .subject import Subject

SIGMA_PER_FWHM = 1 / np.sqrt(8 * np.log(2))
CT_AXES = np.eye(3)
STEPS = (3, 3, 4), (2, 2, 2)  # sub-samples of a voxel near the joint and deep in the bone (our choice)
DRAWN = ("fwhm_slice", "fwhm_in_plane", "noise", "noise_cut", "scale", "offset")


def draw_ct(ct: dict, rng: np.random.Generator) -> dict:
    """All that a CT scan draws but its noise: HU of tissues, kernel, errors, smooth fields of shading and mineral."""
    hu = {name: ct[name].draw(rng) for name in ("air", "fat", "muscle", "fluid", "fibrous", "cartilage")}
    hu["bone"] = ct["tissue_mineral"].draw(rng) * ct["hu_per_mineral"].draw(rng)
    hu |= {"marrow_fat": ct["marrow_fat"].draw(rng), "marrow_water": ct["marrow_red"].draw(rng)}
    fields = {name: draw_field(ct[name].value, rng) for name in ("shading", "mineral_regional")}
    return {"hu": hu, **fields, **{name: ct[name].draw(rng) for name in DRAWN}}


def scan_ct(
    subject: Subject, poses: dict, grid: Grid, drawn: dict, rng: np.random.Generator
) -> tuple[sitk.Image, sitk.Image]:
    """CT in HU (int16) and bone labels (uint8, BONES); `drawn` by `draw_ct`, `rng` for the noise.

    HU = mix of tissues, mineral varying smoothly; Gaussian PSF of drawn FWHM in plane and along slices; noise with
    power |f| MTF(f)^2 in plane (ramp times kernel, zero beyond the published cut); HU scale, offset, smooth shading.
    """
    coarse = tissue_fields(subject, poses, grid)
    coarse[SCAN] = field_on(drawn["shading"], grid)
    coarse[SCAN + 1] = 1 + field_on(drawn["mineral_regional"], grid)
    image, labels = painted(subject, poses, grid, coarse, grid, (drawn["hu"], {}), True, STEPS, 0.0, 0.5, 0.0)
    image, spacing = image.real.copy(), np.array(grid.spacing[::-1])
    spread = np.array([drawn["fwhm_slice"], *[drawn["fwhm_in_plane"]] * 2]) * SIGMA_PER_FWHM
    # The painted footprint is already a box of one voxel: its variance is part of the point spread function.
    sigma = np.sqrt(np.maximum(spread**2 - spacing**2 / 12, 1e-4)) / spacing
    for axis in range(3):
        image = gaussian_filter1d(image, sigma[axis], axis=axis, truncate=3, mode="nearest")
    image += _noise(image.shape, spacing, spread, drawn, rng)
    image = image * np.float32(drawn["scale"]) + np.float32(drawn["offset"])
    return grid.image(np.clip(np.rint(image), -1024, 3071).astype(np.int16)), grid.image(labels)


def _noise(shape: tuple, spacing: np.ndarray, sigma: np.ndarray, drawn: dict, rng: np.random.Generator) -> np.ndarray:
    """Noise (HU) with power |f| exp(-(2 pi sigma f)^2) in plane, smoothed along slices, of the drawn SD."""
    fy, fx = np.fft.fftfreq(shape[1], spacing[1]), rfftfreq(shape[2], spacing[2])
    f = np.hypot(fy[:, None], fx[None, :])
    power = np.where(f < drawn["noise_cut"], f * np.exp(-((2 * np.pi * sigma[1] * f) ** 2)), 0)
    white = rng.standard_normal(shape, dtype=np.float32)
    noise = irfft2(rfft2(white) * np.sqrt(power).astype(np.float32), s=shape[1:])
    noise = gaussian_filter1d(noise, sigma[0] / spacing[0] / 2, axis=0, truncate=3)
    return noise * np.float32(drawn["noise"] / noise.std())
