"""Which CTs a model may be used on: measures of a CT, their range in training, and the limits.

Inside the range of the training CTs nothing is said. Outside it the user is warned. Beyond the
limits the CT is refused with the reason. Ranges and limits are stored with the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import yaml
from numpy import ndarray
from scipy import ndimage
from sklearn.covariance import LedoitWolf

from ctsma.common import BONES, InputError
from ctsma.ridge import ct_features

METAL_HU = 3000.0  # cortical bone stays below 2500 HU (design choice)
SOFT_HU = (-150.0, 150.0)  # fat and muscle, where noise is measured (design choice)
CONTRAST_HU = 400.0  # an edge that rises by less is too thin to measure (design choice)
PROFILE_MM = np.arange(-4.0, 4.01, 0.1)  # outside to inside of the bone (design choice)
N_EDGES = 4000  # profiles per CT (design choice)
FWHM_OF_SLOPE = np.sqrt(8 * np.log(2) / (2 * np.pi))  # FWHM x steepest slope of a blurred unit step
MEASURES = yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text("utf-8"))


@dataclass(frozen=True)
class OutOfDistribution:
    """Out-of-distribution detector: centre (45,) and whitening (45, 45) of `ct_features`."""

    centre: ndarray
    whitening: ndarray

    def distance(self, ct: ndarray, voi: ndarray) -> ndarray:
        """Mahalanobis distance / sqrt(45) per patch, about 1 in training.

        ct : (n, 12, 24, 24) HU. voi : (n, 12, 48, 48) bool. Returns (n,).
        """
        whitened = (ct_features(ct, voi) - self.centre) @ self.whitening
        return np.sqrt((whitened**2).mean(axis=1))


def fit_out_of_distribution(ct: ndarray, voi: ndarray) -> OutOfDistribution:
    """Fit the detector to training patches, with the shrunk covariance of Ledoit & Wolf (2004)."""
    features = ct_features(ct, voi)
    centre, sd = features.mean(axis=0), features.std(axis=0) + 1e-9
    values, vectors = np.linalg.eigh(LedoitWolf().fit((features - centre) / sd).covariance_)
    return OutOfDistribution(centre, vectors / np.sqrt(values) / sd[:, None])


def scan_measures(ct: sitk.Image, masks: sitk.Image) -> dict[str, float]:
    """Resolution, noise, metal and bone size of a CT (HU, any orientation) with its bone labels."""
    ct, masks = sitk.DICOMOrient(ct, "LPS"), sitk.DICOMOrient(masks, "LPS")
    hu, labels = sitk.GetArrayViewFromImage(ct), sitk.GetArrayViewFromImage(masks)
    spacing = np.array(ct.GetSpacing()[::-1])
    femur, tibia = labels == BONES["femur"], labels == BONES["tibia"]
    return {
        "slice_mm": float(spacing.max()),
        "pixel_mm": float(np.median(spacing)),
        "edge_mm": edge_width_mm(hu, labels > 0, spacing),
        "noise_hu": noise_hu(hu),
        "metal_mm3": float((hu >= METAL_HU).sum() * spacing.prod()),
        "femur_width_mm": _extent(femur.any(axis=(0, 1))) * float(spacing[2]),
        "depth_ratio": _extent(femur.any(axis=(0, 2))) / _extent(tibia.any(axis=(0, 2))),
    }


def patch_measures(ct: ndarray, voi: ndarray, detector: OutOfDistribution) -> dict[str, float]:
    """Mean HU of trabecular bone and median Mahalanobis distance of one CT's patches."""
    means = [hu[inside].mean() for hu, inside in zip(ct, voi[:, :, ::2, ::2], strict=True)]
    return {
        "mean_hu": float(np.mean(means)),
        "distance": float(np.median(detector.distance(ct, voi))),
    }


def fit_limits(measures: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Range and limits of every measure from the training CTs, one row each.

    Returns low, high, refuse_below and refuse_above by measure; None: no limit.
    """
    limits = {}
    for name, margin in MEASURES.items():
        low, high = float(measures[name].min()), float(measures[name].max())
        below = low * margin["below"] if "below" in margin else None
        above = high * margin["above"] if "above" in margin else margin.get("above_mm3")
        if "width" in margin:
            width = margin["width"] * (high - low)
            below, above = low - width, high + width
        limits[name] = {"low": low, "high": high, "refuse_below": below, "refuse_above": above}
    return limits


def check_limits(measures: Mapping[str, float], limits: Mapping[str, Mapping]) -> list[str]:
    """Warnings about measures outside the range of training; InputError for one beyond a limit.

    An end of the range without a limit gives no warning.
    """
    warnings = []
    for name, value in measures.items():
        limit, label = limits[name], MEASURES[name]["label"]
        low, high = limit["low"], limit["high"]
        least = -np.inf if limit["refuse_below"] is None else limit["refuse_below"]
        most = np.inf if limit["refuse_above"] is None else limit["refuse_above"]
        seen = f"{label} is {value:.3g}, in training {low:.3g} to {high:.3g}"
        if not least <= value <= most:  # also where it is NaN
            limit = f"at least {least:.3g}" if value < least else f"at most {most:.3g}"
            problem = f"is unlike the CTs that the model was trained on ({seen}, {limit})"
            raise InputError("CT", problem, MEASURES[name]["remedy"])
        # 0.1 %: a spacing equal to that of training must not warn because of its last bit
        lower = np.isfinite(least) and value < 0.999 * low
        higher = np.isfinite(most) and value > 1.001 * high
        if lower or higher:
            warnings.append(f"{seen}; errors may be larger than the intervals")
    return warnings


def edge_width_mm(hu: ndarray, bone: ndarray, spacing_mm: Sequence[float]) -> float:
    """In-plane sharpness: FWHM of the blur at outer bone surfaces; NaN without such an edge.

    hu, bone : (z, y, x), the latter bool. On profiles across the surface, the rise of HU over the
    steepest slope. At a thick cortex a Gaussian blur of FWHM w gives rise / slope = w / 0.94, at a
    thin one less: the value compares CTs of the same bone, no more.
    """
    spacing = np.asarray(spacing_mm)
    inner = ndimage.binary_erosion(bone, np.ones((1, 3, 3)), border_value=1)
    surface = np.argwhere(bone & ~inner)
    surface = surface[:: max(1, len(surface) // N_EDGES)]
    smooth = ndimage.gaussian_filter(bone.astype(np.float32), [0, *(1.0 / spacing[1:])])  # 1 mm
    slopes = np.gradient(smooth, *spacing[1:], axis=(1, 2))
    normal = np.stack([slope[tuple(surface.T)] for slope in slopes], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    points = np.repeat(surface[:, None].astype(float), len(PROFILE_MM), axis=1)
    points[..., 1:] += PROFILE_MM[:, None] * normal[:, None] / spacing[1:]
    index = points.transpose(2, 0, 1)
    profiles = ndimage.map_coordinates(hu, index, order=1, mode="nearest", output=np.float32)
    surface_at = len(PROFILE_MM) // 2
    soft_tissue = np.median(profiles[:, : surface_at - 20], axis=1)  # more than 2 mm outside
    rise = profiles[:, surface_at - 5 :].max(axis=1) - soft_tissue
    slope = np.gradient(profiles, PROFILE_MM[1] - PROFILE_MM[0], axis=1).max(axis=1)
    sharp = rise > CONTRAST_HU
    return float(np.median(FWHM_OF_SLOPE * rise[sharp] / slope[sharp])) if sharp.any() else np.nan


def noise_hu(hu: ndarray) -> float:
    """SD of noise from the median absolute difference of adjacent slices in soft tissue.

    hu : (z, y, x). NaN where there is no soft tissue.
    """
    first, second = hu[:-1:2], hu[1::2]
    soft = (
        (first > SOFT_HU[0]) & (first < SOFT_HU[1]) & (second > SOFT_HU[0]) & (second < SOFT_HU[1])
    )
    difference = np.abs(first[soft] - second[soft])
    return float(np.median(difference) * 1.4826 / np.sqrt(2)) if soft.any() else np.nan


def _extent(profile: ndarray) -> int:
    """Voxels from the first to the last true one of a profile (n,)."""
    return int(np.ptp(np.flatnonzero(profile))) + 1
