"""Alignment by trabeculae: the last stage, and the metric that needs no ground truth.

Mutual information follows the cortex. Where a scan shows the cortex of one side only, its maximum
lies up to 1.5 mm from the true position, because dark cartilage explains bright cortex as well as
dark cortex does. Trabeculae do not have this ambiguity: after high-pass filtering, CT and MR are
anticorrelated where they are aligned (bone is bright in CT and dark in MR) and uncorrelated half a
trabecular spacing away (design choice).
"""

from itertools import product

import numpy as np
import SimpleITK as sitk

from .transforms import Rigid, apply_rigid, sample_points, voxel_axes

HIGHPASS_SD_MM = 1.0  # trabeculae are 0.4 to 1 mm apart (design choice)
# Below the surface: 3 SD from the subchondral plate of 1 mm, whose edge is alike in all knees.
INTERIOR_DEPTH_MM = 4.0
SEARCH_MM, SEARCH_STEP_MM = 2.0, 0.5  # correlation vanishes within 0.75 to 1 mm (design choice)
N_SEARCH, N_METRIC = 5000, 50_000  # voxels for the search, and for the metric (design choice)
CLIP_PERCENT = 1.0  # of the grey values at each end, against metal (design choice)
MIN_VOXELS = 1000  # of 0.5 mm; with fewer, a bone is not in the field of view (design choice)


def highpass(image: sitk.Image) -> sitk.Image:
    """Grey values minus their Gaussian mean (SD 1 mm), clipped at both ends; float32, same grid."""
    grey = sitk.Cast(image, sitk.sitkFloat32)
    fine = grey - sitk.SmoothingRecursiveGaussian(grey, HIGHPASS_SD_MM)
    limits = np.percentile(sitk.GetArrayViewFromImage(fine), (CLIP_PERCENT, 100 - CLIP_PERCENT))
    return sitk.Clamp(fine, sitk.sitkFloat32, *limits.tolist())


def interior(ct: sitk.Image, depth_mm: sitk.Image, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw at most 50,000 CT voxels deep inside a bone.

    Parameters
    ----------
    ct : high-pass filtered. depth_mm : signed distance to the bone's surface, positive inside.

    Returns
    -------
    points (n, 3) in LPS mm and grey values (n,), in seeded order.
    """
    depth = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e6)
    index = np.argwhere(sitk.GetArrayViewFromImage(depth) > INTERIOR_DEPTH_MM)
    index = index[np.random.default_rng(seed).permutation(len(index))[:N_METRIC]]
    points = index[:, ::-1] @ voxel_axes(ct).T + ct.GetOrigin()
    return points, sitk.GetArrayViewFromImage(ct)[tuple(index.T)]


def trabecular_correlation(hu: np.ndarray, grey: np.ndarray) -> float:
    """Minus the correlation of paired CT and MR values (n,) after high-pass filtering.

    0 where fewer than 1000 MR values are finite, or where they are constant.
    """
    seen = np.isfinite(grey)
    if seen.sum() < MIN_VOXELS or np.ptp(grey[seen]) == 0:
        return 0.0
    return -float(np.corrcoef(hu[seen], grey[seen])[0, 1])


def registration_metrics(
    points: np.ndarray, grey: np.ndarray, mr: sitk.Image, transform: Rigid
) -> dict[str, float]:
    """Metrics of one bone under a transform, from its `interior` and the high-pass filtered MR.

    ``correlation`` see `trabecular_correlation`; ``overlap`` share of the interior inside the MR.
    """
    mr_grey = sample_points(mr, apply_rigid(transform, points))
    overlap = float(np.isfinite(mr_grey).mean())
    return {"correlation": trabecular_correlation(grey, mr_grey), "overlap": overlap}


def best_shift(points: np.ndarray, grey: np.ndarray, mr: sitk.Image, start: Rigid) -> Rigid:
    """`start`, shifted by up to 2 mm along each axis to the largest trabecular correlation."""
    moved = apply_rigid(start, points)
    seen = np.flatnonzero(np.isfinite(sample_points(mr, moved)))[:N_SEARCH]
    steps = np.arange(-SEARCH_MM, SEARCH_MM + SEARCH_STEP_MM / 2, SEARCH_STEP_MM)
    shifts = sorted(product(steps, repeat=3), key=np.linalg.norm)  # the nearest of equal ones
    scores = [
        trabecular_correlation(grey[seen], sample_points(mr, moved[seen] + shift))
        for shift in shifts
    ]
    shifted = sitk.Euler3DTransform(start)
    best = shifts[int(np.argmax(scores))]
    shifted.SetTranslation(np.add(start.GetTranslation(), best).tolist())
    return shifted
