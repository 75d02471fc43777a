"""What a model may be asked: measures of a CT, their range in training, and the CTs refused or warned about for it.

The limits are stored with the model: the range of every measure over the training CTs, and how far beyond it a CT is
still read. Within the range: silence. Beyond it: a warning. Beyond the margin: refused, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy import ndarray
from scipy import ndimage
from sklearn.covariance import LedoitWolf

from ctsma.cohort import BONES, InputFault
from ctsma.distillation import ct_features

METAL_HU, METAL_MM3 = 3000.0, 20.0  # cortical bone stays below 2500 HU; the head of a small screw (our choice)
SOFT_HU = (-150.0, 150.0)  # fat and muscle, where noise is measured (our choice)
CONTRAST_HU = 400.0  # an edge of bone that rises by less is too thin to measure a width on (our choice)
PROFILE_MM = np.arange(-4.0, 4.01, 0.1)  # across the bone's surface, from outside to inside (our choice)
N_EDGES = 4000  # profiles a CT (our choice)
FWHM_OF_SLOPE = np.sqrt(8 * np.log(2) / (2 * np.pi))  # a step of height 1 under a Gaussian: FWHM x steepest slope


@dataclass(frozen=True)
class Measure:
    """One measure of a CT: how it is called, what to do when it is refused, and how far beyond training it may be."""

    label: str
    mend: str
    below: tuple[str, float] | None = None  # margin below the least of training; None: no limit
    above: tuple[str, float] | None = None


RECONSTRUCT = "reconstruct thin slices with a bone kernel and a small field of view"
NO_KNEE = "give a CT of a knee joint"
# Margins are our choice.
MEASURES = {
    "slice_mm": Measure("slices (mm)", RECONSTRUCT, above=("x", 2.0)),
    "pixel_mm": Measure("pixels (mm)", RECONSTRUCT, above=("x", 2.0)),
    "edge_mm": Measure("width of bone edges in plane (mm)", RECONSTRUCT, ("x", 0.5), ("x", 1.3)),
    "noise_hu": Measure("noise (HU)", "average thin slices, or scan with more dose", above=("x", 2.0)),
    "metal_mm3": Measure(f"volume above {METAL_HU:.0f} HU (mm3)", "give a knee without metal", above=("=", METAL_MM3)),
    "femur_width_mm": Measure("width of the femur (mm)", NO_KNEE, ("x", 0.8), ("x", 1.2)),
    "femur_depth_mm": Measure("depth of the femur (mm)", NO_KNEE, ("x", 0.75), ("x", 1.25)),
    "tibia_width_mm": Measure("width of the tibia (mm)", NO_KNEE, ("x", 0.8), ("x", 1.2)),
    "tibia_depth_mm": Measure("depth of the tibia (mm)", NO_KNEE, ("x", 0.75), ("x", 1.25)),
    "depth_ratio": Measure("depth of the femur over the tibia's", f"{NO_KNEE}, patient's head up", ("x", 0.85)),
    "plateau_mm": Measure("unevenness of the tibia below the femur (mm)", NO_KNEE, above=("x", 1.5)),
    "mean_hu": Measure("mean HU below the plate", "check the rescale slope and intercept", ("+", 1.0), ("+", 1.0)),
    "distance": Measure("distance of its patches from training's", "train on CTs of this kind", above=("x", 2.0)),
}


@dataclass(frozen=True)
class Familiar:
    """Where training patches lie among `ct_features`: centre (45,) and whitening (45, 45)."""

    centre: ndarray
    whitening: ndarray

    def distance(self, ct: ndarray, voi: ndarray) -> ndarray:
        """Mahalanobis distance over sqrt(45) of patches (n, 12, 24, 24) HU, voi (n, 12, 48, 48): (n,), about 1."""
        scaled = (ct_features(ct, voi) - self.centre) @ self.whitening
        return np.sqrt((scaled**2).mean(axis=1))


def familiar_of(ct: ndarray, voi: ndarray) -> Familiar:
    """Centre and whitening of training patches; covariance shrunk (Ledoit & Wolf 2004) on standardised features."""
    features = ct_features(ct, voi)
    centre, sd = features.mean(axis=0), features.std(axis=0) + 1e-9
    values, vectors = np.linalg.eigh(LedoitWolf().fit((features - centre) / sd).covariance_)
    return Familiar(centre, vectors / np.sqrt(values) / sd[:, None])


def scan_measures(ct: sitk.Image, masks: sitk.Image) -> dict[str, float]:
    """Measures of a CT in HU (any orientation) with its bone labels: resolution, noise, metal, size of the bones.

    Those of patches (`mean_hu`, `distance`) are added by `patch_measures`.
    """
    ct, masks = (sitk.DICOMOrient(image, "LPS") for image in (ct, masks))
    hu, labels = sitk.GetArrayViewFromImage(ct), sitk.GetArrayViewFromImage(masks)
    spacing = np.array(ct.GetSpacing()[::-1])
    found = {"slice_mm": spacing.max(), "pixel_mm": np.median(spacing)}
    found |= {"edge_mm": edge_width_mm(hu, labels > 0, spacing), "noise_hu": noise_hu(hu)}
    found |= {"metal_mm3": float((hu >= METAL_HU).sum() * spacing.prod())} | _sizes(labels, spacing)
    return {name: float(value) for name, value in found.items()}


def patch_measures(ct: ndarray, voi: ndarray, familiar: Familiar) -> dict[str, float]:
    """Mean HU of the trabecular region over a CT's patches, and the median of their distance from training's."""
    inside = voi[:, :, ::2, ::2]
    mean_hu = [patch[region].mean() for patch, region in zip(ct, inside, strict=True) if region.any()]
    return {"mean_hu": float(np.mean(mean_hu)), "distance": float(np.median(familiar.distance(ct, voi)))}


def limits_of(measures: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Limits from the training CTs, one row each: low and high of training, refuse_below, refuse_above, by measure."""
    limits = {}
    for name, measure in MEASURES.items():
        low, high = float(measures[name].min()), float(measures[name].max())
        ends = {"refuse_below": (measure.below, low, low - high), "refuse_above": (measure.above, high, high - low)}
        limits[name] = {"low": low, "high": high} | {end: _beyond(*given) for end, given in ends.items()}
    return limits


def check_limits(measures: Mapping[str, float], limits: Mapping[str, Mapping]) -> list[str]:
    """Warnings for measures outside training's range at an end that has a limit; InputFault for the first beyond it."""
    warnings = []
    for name, value in measures.items():
        limit, measure = limits[name], MEASURES[name]
        seen = f"{measure.label}: {value:.3g}, in training {limit['low']:.3g} to {limit['high']:.3g}"
        below, above = (np.nan if limit[end] is None else limit[end] for end in ("refuse_below", "refuse_above"))
        if value < below or value > above or np.isnan(value):
            raise InputFault("CT", f"is not of the kind the model was trained on ({seen})", measure.mend)
        # An end without a limit is no fault; a spacing equal to training's must not warn for its last bit.
        low, high = limit["low"] * (1 - 1e-3), limit["high"] * (1 + 1e-3)
        if below <= value < low or above >= value > high:
            warnings.append(f"{seen}: estimates are less certain than their intervals say")
    return warnings


def edge_width_mm(hu: ndarray, bone: ndarray, spacing_mm: Sequence[float]) -> float:
    """In-plane sharpness: FWHM of the blur at outer bone surfaces; hu and bone (z, y, x), the latter bool. NaN: none.

    On profiles across the surface the steepest slope over the rise of HU; a Gaussian blur of FWHM w has rise / slope =
    w / 0.94 at a thick cortex and less at a thin one, so that the value compares CTs of the same bone, no more.
    """
    profiles = _profiles(hu, bone, np.asarray(spacing_mm))
    middle = len(PROFILE_MM) // 2
    rise = profiles[:, middle - 5 :].max(axis=1) - np.median(profiles[:, : middle - 20], axis=1)
    slope = np.gradient(profiles, PROFILE_MM[1] - PROFILE_MM[0], axis=1).max(axis=1)
    sharp = rise > CONTRAST_HU
    return float(np.median(FWHM_OF_SLOPE * rise[sharp] / slope[sharp])) if sharp.any() else np.nan


def noise_hu(hu: ndarray) -> float:
    """SD of noise from the median absolute difference of next slices in soft tissue; hu (z, y, x). NaN: none."""
    a, b = hu[:-1:2], hu[1::2][: len(hu[:-1:2])]
    soft = (a > SOFT_HU[0]) & (a < SOFT_HU[1]) & (b > SOFT_HU[0]) & (b < SOFT_HU[1])
    return float(np.median(np.abs(a[soft] - b[soft])) * 1.4826 / np.sqrt(2)) if soft.any() else np.nan


def _profiles(hu: ndarray, bone: ndarray, spacing: ndarray) -> ndarray:
    """HU along at most N_EDGES in-plane normals of the bone's surface, from outside to inside."""
    surface = np.argwhere(bone & ~ndimage.binary_erosion(bone, np.ones((1, 3, 3)), border_value=1))
    surface = surface[:: max(1, len(surface) // N_EDGES)]
    smooth = ndimage.gaussian_filter(bone.astype(np.float32), [0, *(1.0 / spacing[1:])])  # 1 mm
    steps = [np.eye(3, dtype=int)[axis] for axis in (1, 2)]
    values = [[_at(smooth, surface + sign * step) for sign in (1, -1)] for step in steps]
    normal = np.stack([(up - down) / mm for (up, down), mm in zip(values, spacing[1:], strict=True)], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    shift = normal[:, :, None] * PROFILE_MM / spacing[1:, None]
    points = np.concatenate([np.zeros_like(shift[:, :1]), shift], axis=1) + surface[:, :, None]
    return ndimage.map_coordinates(hu, points.transpose(1, 0, 2), order=1, mode="nearest", output=np.float32)


def _at(array: ndarray, index: ndarray) -> ndarray:
    return array[tuple(np.clip(index, 0, np.array(array.shape) - 1).T)]


def _sizes(labels: ndarray, spacing: ndarray) -> dict[str, float]:
    found = {}
    for bone, value in BONES.items():
        across = [np.flatnonzero((labels == value).any(axis=axes)) for axes in ((0, 1), (0, 2))]
        for name, places, mm in zip(("width", "depth"), across, spacing[:0:-1], strict=True):
            found[f"{bone}_{name}_mm"] = float((np.ptp(places) + 1) * mm)
    found["depth_ratio"] = found["femur_depth_mm"] / found["tibia_depth_mm"]
    tibia, femur = labels == BONES["tibia"], labels == BONES["femur"]
    top = len(labels) - tibia[::-1].argmax(axis=0)[tibia.any(axis=0) & femur.any(axis=0)]
    low, high = np.percentile(top, (10, 90)) if len(top) else (0, np.nan)
    return found | {"plateau_mm": float((high - low) * spacing[0])}


def _beyond(margin: tuple[str, float] | None, end: float, width: float) -> float | None:
    if margin is None:
        return None
    kind, value = margin
    return {"x": end * value, "+": end + width * value, "=": value}[kind]
