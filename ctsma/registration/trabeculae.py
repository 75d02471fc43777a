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

from .transforms import Rigid, apply_rigid, recentred, sample_points, voxel_axes, voxel_index

HIGHPASS_SD_MM = 1.0  # trabeculae are 0.4 to 1 mm apart (design choice)
# Below the surface: 3 SD from the subchondral plate of 1 mm, whose edge is alike in all knees.
INTERIOR_DEPTH_MM = 4.0
SEARCH_MM = 2.0  # in steps of a voxel; correlation vanishes within 0.75 to 1 mm (design choice)
N_SEARCH, N_METRIC = 5000, 50_000  # voxels for the search, and for the rest (design choice)
CLIP_PERCENT = 1.0  # of the grey values at each end, against metal (design choice)
# Gauss-Newton, in mean motion of the voxels: the longest step is half a trabecular spacing, and
# the shortest a hundredth of it; 5 to 15 iterations are used (design choice).
MAX_STEP_MM, MIN_STEP_MM, MAX_ITERATIONS = 0.5, 0.005, 30
MAX_MOTION_MM = 3.0  # from the search; beyond, other trabeculae agree by chance (design choice)
MIN_VOXELS = 1000  # of 0.5 mm; with fewer, a bone is not in the field of view (design choice)


def highpass(image: sitk.Image) -> sitk.Image:
    """Grey values minus their Gaussian mean (SD 1 mm), clipped at both ends; float32, same grid."""
    grey = sitk.Cast(image, sitk.sitkFloat32)
    fine = grey - sitk.SmoothingRecursiveGaussian(grey, HIGHPASS_SD_MM)
    some = sitk.GetArrayViewFromImage(fine)[::2, ::2, ::2]  # enough voxels for two percentiles
    limits = np.percentile(some, (CLIP_PERCENT, 100 - CLIP_PERCENT))
    return sitk.Clamp(fine, sitk.sitkFloat32, *limits.tolist())


def interior(ct: sitk.Image, depth_mm: sitk.Image, seed: int) -> tuple[np.ndarray, ...]:
    """Draw at most 50,000 CT voxels deep inside a bone.

    Parameters
    ----------
    ct : high-pass filtered. depth_mm : signed distance to the bone's surface, positive inside.

    Returns
    -------
    points (n, 3) in LPS mm, grey values (n,) and their gradient (n, 3) per mm, which is 0 at the
    border of the image; in seeded order.
    """
    depth = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e6)
    voxels = np.flatnonzero(sitk.GetArrayViewFromImage(depth) > INTERIOR_DEPTH_MM)
    voxels = voxels[np.random.default_rng(seed).permutation(len(voxels))[:N_METRIC]]
    index = np.transpose(np.unravel_index(voxels, ct.GetSize(), order="F"))
    points = index @ voxel_axes(ct).T + ct.GetOrigin()
    slopes = [sample_points(ct, points + h) - sample_points(ct, points - h) for h in np.eye(3) / 2]
    grey = sitk.GetArrayViewFromImage(ct).ravel()[voxels]
    return points, grey, np.nan_to_num(np.transpose(slopes))


def trabecular_correlation(hu: np.ndarray, grey: np.ndarray) -> float:
    """Minus the correlation of paired CT and MR values (n,) after high-pass filtering.

    0 where fewer than 1000 MR values are finite, or where they are constant.
    """
    seen = np.isfinite(grey)
    if seen.sum() < MIN_VOXELS or np.ptp(grey[seen]) == 0:
        return 0.0
    return -float(np.corrcoef(hu[seen], grey[seen])[0, 1])


def registration_metrics(points, grey, mr, transform: Rigid) -> dict[str, float]:
    """Metrics of one bone under a transform, from its `interior` and the high-pass filtered MR.

    ``correlation`` see `trabecular_correlation`; ``overlap`` share of the interior inside the MR.
    """
    mr_grey = sample_points(mr, apply_rigid(transform, points))
    overlap = float(np.isfinite(mr_grey).mean())
    return {"correlation": trabecular_correlation(grey, mr_grey), "overlap": overlap}


def best_shift(points: np.ndarray, grey: np.ndarray, mr: sitk.Image, start: Rigid) -> Rigid:
    """`start`, shifted by up to 2 mm along each MR axis to the largest trabecular correlation.

    The shifts are whole MR voxels. The MR is not interpolated: `refine` corrects the rounding.
    """
    n = round(SEARCH_MM / mr.GetSpacing()[0])
    index = np.rint(voxel_index(mr, apply_rigid(start, points[:N_SEARCH]))).astype(int)
    inside = ((index >= n) & (index < np.array(mr.GetSize()) - n)).all(axis=1)
    if inside.sum() < MIN_VOXELS:
        return start
    hu, steps = grey[:N_SEARCH][inside], np.cumprod([1, *mr.GetSize()[:2]])
    shifts = np.array(sorted(product(range(-n, n + 1), repeat=3), key=np.linalg.norm))
    voxels = (index[inside] @ steps)[:, None] + shifts @ steps
    values = sitk.GetArrayViewFromImage(mr).ravel()[voxels].astype(float)
    values -= values.mean(axis=0)
    scores = (hu.mean(dtype=float) - hu) @ values / np.linalg.norm(values, axis=0).clip(1e-9)
    shifted = sitk.Euler3DTransform(start)
    best_mm = voxel_axes(mr) @ shifts[scores.argmax()]  # the nearest of equals
    shifted.SetTranslation((start.GetTranslation() + best_mm).tolist())
    return shifted


def refine(points, grey, gradient, mr, start) -> tuple[Rigid, int, str]:
    """Gauss-Newton iterations from `best_shift` to the largest trabecular correlation.

    The MR is fitted by the CT and its derivatives with respect to rotation and translation. Their
    coefficients, divided by that of the CT, are the motion that remains. The derivatives are the
    CT's because those of the MR hold more noise, which would shorten the steps. A step that does
    not raise the correlation, or ends more than 3 mm from the search, is halved.

    Parameters
    ----------
    points, grey, gradient : `interior` of a bone. mr : high-pass filtered.
    start : within about 2 mm.

    Returns
    -------
    The transform of the highest correlation, the number of iterations, and where they stopped.
    """
    shifted, centre = best_shift(points, grey, mr, start), points.mean(axis=0)
    arms = points - centre
    columns = np.column_stack([np.cross(arms, gradient), gradient, grey, np.ones(len(grey))])
    transform, best, highest, step_mm = shifted, shifted, 0.0, 0.0
    first, iterations = apply_rigid(shifted, points), 0
    while True:
        iterations += 1
        moved = apply_rigid(transform, points)
        mr_grey = sample_points(mr, moved)
        correlation = trabecular_correlation(grey, mr_grey)
        is_near = np.linalg.norm(moved - first, axis=1).mean() < MAX_MOTION_MM
        if is_near and correlation > highest:
            best, highest, seen = transform, correlation, np.isfinite(mr_grey)
            known = columns[seen]
            fit = np.linalg.lstsq(known.T @ known, known.T @ mr_grey[seen])[0]
            rotation, shift = -fit[:3] / fit[6], -fit[3:6] / fit[6]
            motion_mm = np.linalg.norm(np.cross(rotation, arms) + shift, axis=1).mean()
            step_mm = min(motion_mm, MAX_STEP_MM)
        else:  # too long a step: shorten it
            step_mm /= 2
        if step_mm < MIN_STEP_MM or iterations == MAX_ITERATIONS:
            return best, iterations, f"correlation {highest:.3f}, next step {step_mm:.4f} mm"
        share = step_mm / motion_mm
        transform = recentred(best, centre, np.rad2deg(share * rotation), share * shift)
