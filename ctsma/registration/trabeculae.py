"""What the last stage aligns: the trabeculae deep in one bone, seen in CT and MR.

Mutual information follows the cortex, and where a scan shows the cortex of one face only, its maximum lies up to
1.5 mm beside the truth: to bright cortex, dark cartilage is as good a partner as dark cortex. The trabeculae know
better. Freed of everything coarser than they are, CT and MR are anticorrelated where aligned (bone is bright in one and
dark in the other), and not at all half a trabecular spacing away (our idea).
"""

from itertools import product

import numpy as np
import SimpleITK as sitk

from .quality import axes_of, carried, sampled

COARSER_MM = 1.0  # SD of the Gaussian that is taken away; trabeculae are 0.4 to 1 mm apart (our choice)
DEEP_MM = 4.0  # below the surface: 3 SD from a plate of 1 mm, whose edge would else match that of any knee
REACH_MM, STEP_MM = 2.0, 0.5  # shifts tried; the correlation falls to nothing within 0.75 to 1 mm (our choice)
TRIED, COUNTED = 5000, 50_000  # voxels that judge a shift, and a transform (our choice)
CLIPPED = 1.0  # per cent of the grey values at each end: metal (our choice)
FEWEST = 1000  # voxels of 0.5 mm; with fewer, a bone is not in view (our choice)


def trabeculae(image: sitk.Image) -> sitk.Image:
    """Grey values less their Gaussian mean (SD 1 mm), the outermost per cent clipped; float32, same grid."""
    fine = sitk.Cast(image, sitk.sitkFloat32)
    fine = fine - sitk.SmoothingRecursiveGaussian(fine, COARSER_MM)
    low, high = np.percentile(sitk.GetArrayViewFromImage(fine), (CLIPPED, 100 - CLIPPED)).tolist()
    return sitk.Clamp(fine, sitk.sitkFloat32, low, high)


def interior(ct: sitk.Image, depth_mm: sitk.Image, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3) in LPS mm and grey values (n,) of at most 50,000 CT voxels deep in a bone, in seeded order.

    `ct` of `trabeculae`; `depth_mm` signed distance to the bone's surface, inside positive.
    """
    depth = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e6)
    index = np.argwhere(sitk.GetArrayViewFromImage(depth) > DEEP_MM)
    index = index[np.random.default_rng(seed).permutation(len(index))[:COUNTED]]
    return index[:, ::-1] @ axes_of(ct).T + ct.GetOrigin(), sitk.GetArrayViewFromImage(ct)[tuple(index.T)]


def best_shift(
    points: np.ndarray, grey: np.ndarray, mr: sitk.Image, start: sitk.Euler3DTransform
) -> sitk.Euler3DTransform:
    """`start` shifted, by up to 2 mm in each direction, to where a bone's `interior` and the MR's trabeculae match."""
    carried_points = carried(start, points)
    seen = np.flatnonzero(np.isfinite(sampled(mr, carried_points)))[:TRIED]
    steps = np.arange(-REACH_MM, REACH_MM + STEP_MM / 2, STEP_MM)
    shifts = sorted(product(steps, repeat=3), key=np.linalg.norm)  # of equal ones the nearest
    scores = [matched(grey[seen], sampled(mr, carried_points[seen] + shift)) for shift in shifts]
    found = sitk.Euler3DTransform(start)
    found.SetTranslation(np.add(start.GetTranslation(), shifts[int(np.argmax(scores))]).tolist())
    return found


def checked(points: np.ndarray, grey: np.ndarray, mr: sitk.Image, transform: sitk.Euler3DTransform) -> dict[str, float]:
    """Match of a bone's `interior` with the MR's trabeculae under a transform, and the share of it inside the MR."""
    seen = sampled(mr, carried(transform, points))
    return {"match": matched(grey, seen), "overlap": float(np.isfinite(seen).mean())}


def matched(hu: np.ndarray, grey: np.ndarray) -> float:
    """Match of paired CT and MR trabeculae (n,): minus their correlation; 0 where too few MR values are seen."""
    seen = np.isfinite(grey)
    if seen.sum() < FEWEST or not np.ptp(grey[seen]):
        return 0.0
    return -float(np.corrcoef(hu[seen], grey[seen])[0, 1])
