"""Rigid registration of one knee in stages: centre, whole knee, each bone, trabeculae.

The CT is fixed and the MR is moving, so every transform maps CT points to MR points (LPS mm). The
metric is mutual information, and in the last stage the correlation of the trabeculae. ITK runs on
one thread with an integer seed, so that every run gives the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import SimpleITK as sitk
from scipy import fft

from ctsma.common import BONES, InputError

from .masks import isotropic
from .quality import MIN_CORRELATION, failure_reason, flexion_deg
from .trabeculae import highpass, interior, refine, registration_metrics
from .transforms import Rigid, image_centre, recentred, rigid_transform, rotation_matrix

# Exhaustive start: CT voxels (4 mm on a 60 mm box, 6 mm on a knee; design choice), edge of the
# Fourier grid (shifts of up to half of it are tried) and value that marks the outside of an image.
START_VOXELS, START_GRID, OUTSIDE = 5000, 32, -1e6
# Step: the next level corrects about 15 degrees to each side. Range: the stress set turns by 30
# degrees (design choice).
START_STEP_DEG, START_MAX_DEG = 18.0, 36.0
N_STARTS = 3  # best starts that are refined (design choice)
CT_CLASS_HU = (-300.0, -20.0, 120.0, 300.0, 600.0)  # air, fat, soft, marrow, trabeculae, cortex
N_MR_CLASSES = 6  # of equal size (design choice)
FLEXIONS_DEG = (-12.0, 0.0, 12.0)  # tried for each bone about the joint (design choice)
N_BINS = 48  # of the joint histogram; 32 differed by at most 0.04 mm on five phantoms
ROTATION_ARM_MM = 30.0  # a rotation counts as the motion at this radius (design choice)
MAX_ITERATIONS = 60  # 10 to 15 are used (design choice)


@dataclass(frozen=True)
class Level:
    """One resolution of a stage.

    Attributes
    ----------
    spacing_mm : of the isotropic grid. step_mm : first step of the optimiser.
    margin_mm : of the mask around the bone; 0 to 12 mm were alike on a 0.8 mm grid.
    n_samples : voxels drawn for the metric from the box of the mask, 0 for all.
    """

    spacing_mm: float
    step_mm: float
    margin_mm: float = 3.0
    n_samples: int = 0


# With all voxels the last stage starts nearer to the truth (on twelve knees by 0.05 mm at the tibia
# and 0.34 mm at the femur, medians) and ends alike (design choice).
WHOLE_KNEE = (Level(4.0, 3.0), Level(2.0, 1.5, n_samples=20_000))
# At 4 mm a bone of a simulated knee ended in a false maximum.
PER_BONE = (Level(2.0, 1.5, margin_mm=6.0, n_samples=20_000), Level(1.0, 0.6, n_samples=40_000))
TRABECULAE_SPACING_MM = 0.5  # of the isotropic grids of the last stage (design choice)


@dataclass
class Optimum:
    """Result of one level: the transform and the metric there (nats, or correlation)."""

    transform: Rigid
    spacing_mm: float
    metric: float
    iterations: int
    stop: str

    def log_row(self, stage: str, bone: str = "") -> dict:
        """All but the transform, with the names of stage and bone."""
        row = {name: value for name, value in vars(self).items() if name != "transform"}
        return {"stage": stage, "bone": bone} | row


@dataclass
class Registration:
    """Registration of one knee; all transforms map CT points to MR points in LPS mm.

    Attributes
    ----------
    stages : {stage: {bone: transform}}, in order.
    log : one row for each stage, bone and level (see `Optimum`).
    metrics : {bone: {"correlation", "overlap"}}, see `registration_metrics`.
    flexion_deg : change of flexion from CT to MR.
    flagged : why the knee must not be used, or "".
    """

    stages: dict[str, dict[str, Rigid]]
    log: list[dict]
    metrics: dict[str, dict[str, float]]
    flexion_deg: float
    flagged: str

    @property
    def transforms(self) -> dict[str, Rigid]:
        """{bone: transform} of the last stage."""
        return self.stages["trabeculae"]


def register_knee(ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, *, seed: int) -> Registration:
    """`register_scans` of one MR."""
    return next(register_scans(ct, [mr], masks, seed=seed))


def register_scans(ct, scans, masks, *, seed) -> Iterator[Registration]:
    """Align MRs with one CT of the same knee, femur and tibia separately; yield each result.

    Parameters
    ----------
    ct : CT in HU. scans : iterable of MRs, of any orientation and slice thickness.
    masks : uint8 labels (values of `BONES`) on the grid of the CT.
    seed : of the metric's voxel sampling; equal seeds give equal bits.

    Raises
    ------
    InputError : a bone has no voxel in `masks`.

    Notes
    -----
    The stages are the paper's (whole knee, then each bone in its own mask), on the MR itself
    instead of a synthetic CT. Levels, start, flexed starts and last stage are design choices.
    SimpleITK is left on one thread.
    """
    # The metric ignores the method's own number of threads; on two the last digits vary.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for bone, value in BONES.items():
        if not (sitk.GetArrayViewFromImage(masks) == value).any():
            raise InputError("masks", f"hold no {bone}", "give labels of both bones on the CT grid")
    cts = {level.spacing_mm: isotropic(ct, level.spacing_mm) for level in WHOLE_KNEE + PER_BONE}
    box = _mask_shape(masks > 0).GetBoundingBox(1)  # the last stage sees nothing else of the CT
    fine = highpass(isotropic(sitk.RegionOfInterest(ct, box[3:], box[:3]), TRABECULAE_SPACING_MM))
    depths_mm = bone_depths_mm(masks)
    interiors = {bone: interior(fine, depth_mm, seed) for bone, depth_mm in depths_mm.items()}
    joint = np.mean([_mask_shape(depth > 0).GetCentroid(1) for depth in depths_mm.values()], axis=0)

    for mr in scans:
        pyramid = {spacing: (image, isotropic(mr, spacing)) for spacing, image in cts.items()}
        mr_fine = highpass(isotropic(mr, TRABECULAE_SPACING_MM))
        starts = starting_transforms(ct, mr)
        score, centre = starts[0]
        log = [Optimum(centre, 0.0, score, len(starts), "exhaustive").log_row("centre")]

        best_starts = [transform for _, transform in starts[:N_STARTS]]
        levels = multiresolution_optimise(best_starts, pyramid, WHOLE_KNEE, None, seed)
        log += [level.log_row("whole_knee") for level in levels]
        whole = levels[-1].transform

        flexed = [recentred(whole, joint, (angle, 0, 0)) for angle in FLEXIONS_DEG]
        per_bone, final, metrics = {}, {}, {}
        for bone, depth_mm in depths_mm.items():
            fine_pair = interiors[bone], mr_fine
            levels, end, metrics[bone] = align_bone(flexed, pyramid, fine_pair, depth_mm, seed)
            log += [level.log_row("per_bone", bone) for level in levels]
            log.append(end.log_row("trabeculae", bone))
            per_bone[bone], final[bone] = levels[-1].transform, end.transform

        stages = {"centre": dict.fromkeys(BONES, centre), "whole_knee": dict.fromkeys(BONES, whole)}
        stages |= {"per_bone": per_bone, "trabeculae": final}
        flexion = flexion_deg(final["femur"], final["tibia"])
        flagged = failure_reason(metrics, flexion, max(mr.GetSpacing()))
        yield Registration(stages, log, metrics, flexion, flagged)


def starting_transforms(ct: sitk.Image, mr: sitk.Image) -> list[tuple[float, Rigid]]:
    """Exhaustive search of rigid starts: (likelihood ratio in nats, transform), best first.

    The rotation vectors lie on a lattice of 18 degrees. For each of them, mutual information of
    grey-value classes is known at all voxel shifts at once, because the joint counts are
    cross-correlations of class indicators (Fourier transform). The score is overlapping voxels x
    mutual information, which does not reward a small overlap (design choice).
    """
    n = START_GRID
    volume_mm3 = np.prod(ct.GetSize()) * np.prod(ct.GetSpacing())
    spacing_mm = float((volume_mm3 / START_VOXELS) ** (1 / 3))
    fixed, moving = isotropic(ct, spacing_mm), isotropic(mr, spacing_mm)
    direction = np.reshape(ct.GetDirection(), (3, 3))

    filled = tuple(slice(0, min(size, n)) for size in fixed.GetSize()[::-1])
    ct_classes = np.full((n, n, n), -1)
    ct_classes[filled] = np.digitize(sitk.GetArrayViewFromImage(fixed), CT_CLASS_HU)[filled]
    ct_spectrum = np.conj(_class_spectrum(ct_classes, len(CT_CLASS_HU) + 1))
    quantiles = np.arange(1, N_MR_CLASSES) / N_MR_CLASSES
    mr_edges = np.quantile(sitk.GetArrayViewFromImage(moving), quantiles)

    grid = sitk.Image([n] * 3, sitk.sitkUInt8)
    grid.SetSpacing([spacing_mm] * 3)
    grid.SetDirection(ct.GetDirection())
    middle, mr_centre = image_centre(grid), image_centre(moving)
    first_shift = (n - np.array(ct_classes[filled].shape)) // 2 - n // 2

    steps_deg = np.arange(-START_MAX_DEG, START_MAX_DEG + 1, START_STEP_DEG)
    starts = []
    for vector_deg in product(steps_deg, repeat=3):
        if np.linalg.norm(vector_deg) > START_MAX_DEG + 1:
            continue
        matrix = rotation_matrix(vector_deg)
        rotation = rigid_transform(matrix, middle, mr_centre - middle)
        rotated = sitk.Resample(moving, grid, rotation, sitk.sitkLinear, OUTSIDE)
        grey = sitk.GetArrayFromImage(rotated)
        mr_classes = np.where(grey < OUTSIDE / 2, -1, np.digitize(grey, mr_edges))
        mr_spectrum = _class_spectrum(mr_classes, N_MR_CLASSES)
        joint = fft.ifftn(mr_spectrum * ct_spectrum[:, None], axes=(2, 3), overwrite_x=True)
        joint = fft.irfft(joint, n, overwrite_x=True)
        score = _likelihood_ratio(np.maximum(joint, 0.0, out=joint))
        shift = np.array(np.unravel_index(score.argmax(), score.shape))
        shift = (shift - first_shift) % n + first_shift
        centre = middle + fixed.GetOrigin() - direction @ shift[::-1] * spacing_mm
        start = rigid_transform(matrix, centre, mr_centre - centre)
        starts.append((float(score.max()), start))
    return sorted(starts, key=lambda start: -start[0])


def _class_spectrum(classes: np.ndarray, n: int) -> np.ndarray:
    indicators = np.stack([classes == k for k in range(n)]).astype(np.float32)
    return fft.rfftn(indicators, axes=(1, 2, 3))


def _likelihood_ratio(joint: np.ndarray) -> np.ndarray:
    """Counts x mutual information (nats) at every shift, from joint counts (a, b, z, y, x)."""

    def sum_n_log_n(counts: np.ndarray) -> np.ndarray:
        terms = counts * np.log(np.maximum(counts, 1e-6))
        return terms.reshape(-1, *joint.shape[2:]).sum(0)

    ct_counts, mr_counts, total = joint.sum(1), joint.sum(0), joint.sum((0, 1))[None]
    return sum_n_log_n(joint) - sum_n_log_n(ct_counts) - sum_n_log_n(mr_counts) + sum_n_log_n(total)


def multiresolution_optimise(starts, pyramid, levels, depth_mm, seed) -> list[Optimum]:
    """Coarse to fine: all starts at the first level, the best result of it at the others.

    Parameters
    ----------
    starts : list of transforms. pyramid : {spacing in mm: (CT, MR)}. levels : of `Level`.
    depth_mm : signed distance to the bone's surface, positive inside; None for the whole knee.

    Returns
    -------
    The best optimum of each level.
    """
    optima = []
    for level in levels:
        fixed, moving = pyramid[level.spacing_mm]
        mask = None
        if depth_mm is not None:
            fixed, mask = _near_bone(fixed, depth_mm, level.margin_mm)
        results = [optimise(fixed, moving, mask, start, level, seed) for start in starts]
        optima.append(max(results, key=lambda result: result.metric))
        starts = [optima[-1].transform]
    return optima


def align_bone(starts, pyramid, fine_pair, depth_mm, seed) -> tuple:
    """Levels of `PER_BONE`, then `align_trabeculae`: the levels, the optimum, its metrics.

    The first level chooses the start. Where the trabeculae do not agree at the end, as in a field
    of view that cuts the bone, each start is followed to its own end. Chance agrees best in one of
    several ends, so these must exceed 1.5 x `MIN_CORRELATION` (design choice). `fine_pair` is what
    `align_trabeculae` takes; for the others see `multiresolution_optimise`.
    """
    for n, some in enumerate((starts, *([start] for start in starts))):
        levels = multiresolution_optimise(some, pyramid, PER_BONE, depth_mm, seed)
        trial = (levels, *align_trabeculae(*fine_pair, levels[-1].transform))
        if n == 0 or trial[2]["correlation"] >= 1.5 * MIN_CORRELATION:
            best = trial
        if best[2]["correlation"] >= MIN_CORRELATION:
            break
    return best


def align_trabeculae(inside, mr, start) -> tuple[Optimum, dict[str, float]]:
    """Align the trabeculae of one bone from a start within about 2 mm.

    Parameters
    ----------
    inside : `interior` of a CT on a 0.5 mm grid. mr : high-pass filtered on such a grid.
    start : transform.

    Returns
    -------
    The optimum, and the `registration_metrics` of its transform.
    """
    end, iterations, stop = refine(*inside, mr, start)
    metrics = registration_metrics(*inside[:2], mr, end)
    return Optimum(end, mr.GetSpacing()[0], metrics["correlation"], iterations, stop), metrics


def optimise(fixed, moving, mask, start, level, seed) -> Optimum:
    """One gradient descent from a start at one `Level`; `mask` on the grid of `fixed`, or None.

    Where CT and MR hardly overlap the metric is 0, and `stop` says why.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(N_BINS)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    if level.n_samples:
        share = min(1.0, level.n_samples / fixed.GetNumberOfPixels())
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(share, seed + 1)  # 0 is the wall clock: not repeatable
    # ITK's smoothed gradient image cost about 0.1 mm on phantoms; use differences of the image.
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=level.step_mm,
        minStep=level.step_mm / 40,
        numberOfIterations=MAX_ITERATIONS,
        gradientMagnitudeTolerance=1e-9,
    )
    method.SetOptimizerScales([ROTATION_ARM_MM**2] * 3 + [1.0] * 3)
    method.SetInitialTransform(recentred(start, image_centre(fixed)), inPlace=True)
    try:
        end = sitk.Euler3DTransform(method.Execute(fixed, moving))
    except RuntimeError as error:
        return Optimum(start, level.spacing_mm, 0.0, 0, str(error).strip().rpartition("\n")[2])
    iterations, stop = method.GetOptimizerIteration(), method.GetOptimizerStopConditionDescription()
    return Optimum(end, level.spacing_mm, -method.GetMetricValue(), iterations, stop)


def bone_depths_mm(masks: sitk.Image) -> dict[str, sitk.Image]:
    """{bone: signed distance to its surface in mm, positive inside, on a 1 mm grid}."""
    depths_mm = {}
    for bone, value in BONES.items():
        share = isotropic(sitk.Cast(masks == value, sitk.sitkFloat32), 1.0)
        depths_mm[bone] = sitk.SignedMaurerDistanceMap(share > 0.5, True, False, True)
    return depths_mm


def _near_bone(image, depth_mm, margin_mm) -> tuple[sitk.Image, sitk.Image]:
    """Image and mask of a bone with a margin, both cropped to the mask."""
    depth = sitk.Resample(depth_mm, image, sitk.Transform(), sitk.sitkLinear, OUTSIDE)
    mask = depth > -margin_mm
    box = _mask_shape(mask).GetBoundingBox(1)
    return tuple(sitk.RegionOfInterest(whole, box[3:], box[:3]) for whole in (image, mask))


def _mask_shape(mask: sitk.Image) -> sitk.LabelShapeStatisticsImageFilter:
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.ComputePerimeterOff()
    shape.Execute(mask)
    return shape
