"""Rigid registration of one knee, stage by stage: centre and orientation, whole knee, each bone, its trabeculae.

Fixed is the CT, moving the MR, so every transform maps CT points to MR points (LPS mm). The metric is mutual
information, at last the correlation of the trabeculae; ITK optimises on one thread with an integer seed: the same
numbers every run.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from ctsma.cohort import BONES, InputFault

from .masks import isotropic
from .quality import flexion_deg, reason_to_flag
from .trabeculae import DEEP_MM, best_shift, checked, interior, trabeculae

START_VOXELS = 5000  # CT voxels of the exhaustive start: 4 mm on a 60 mm box, 6 mm on a knee (our choice)
START_GRID = 32  # edge of its Fourier grid: any shift up to half of it is tried
START_STEP_DEG = 18.0  # below the ~15 degrees to each side that the next level still captures (our choice)
START_MAX_DEG = 36.0  # the stress set turns by 30 degrees (our choice)
START_KEPT = 3  # best starts that are refined (our choice)
CT_CLASS_HU = (-300.0, -20.0, 120.0, 300.0, 600.0)  # air, fat, soft, marrow, trabeculae, cortex (our choice)
MR_CLASSES = 6  # classes of equal size (our choice)
HINGE_DEG = (-12.0, 0.0, 12.0)  # flexions tried for each bone about the joint (our choice)
BINS = 48  # of the joint histogram; 32 differed by at most 0.04 mm on five phantoms (our choice)
ARM_MM = 30.0  # a radian of rotation weighs as much as moving by this radius of a condyle (our choice)
OUTSIDE = -1e6  # marks what lies outside an image
ITERATIONS = 60  # 10 to 15 are used (our choice)


class Level(NamedTuple):
    """One resolution: grid spacing, optimiser's first step, metric samples (0 = every voxel), mask margin."""

    spacing_mm: float
    step_mm: float
    samples: int = 0
    margin_mm: float = 3.0  # 0 to 12 mm were alike on a 0.8 mm grid


WHOLE_KNEE = (Level(4.0, 3.0), Level(2.0, 1.5))
PER_BONE = (Level(2.0, 1.5, 0, 6.0), Level(1.0, 0.6))  # a bone at 4 mm ended in a false maximum on a simulated knee
TRABECULAE = Level(0.5, 0.2, 60_000, -DEEP_MM)


@dataclass
class Registration:
    """What registration of one knee found; all transforms map CT points to MR points in LPS mm.

    `transforms` {bone: Euler3DTransform}; `stages` one row per stage, bone and level (metric, iterations, stop reason,
    CPU seconds); `stage_transforms` {stage: {bone: transform}}; `checks` {bone: {check: value}}; `flagged` "" or the
    reason why the knee must not be used.
    """

    transforms: dict[str, sitk.Euler3DTransform]
    stages: list[dict]
    stage_transforms: dict[str, dict[str, sitk.Euler3DTransform]]
    checks: dict[str, dict[str, float]]
    flexion_deg: float
    flagged: str


@contextmanager
def _one_thread() -> Iterator[None]:
    # the metric's own threader ignores the method's SetNumberOfThreads; with two the last digits differ every run
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


@_one_thread()
def register_knee(ct: sitk.Image, mr: sitk.Image, masks: sitk.Image, *, seed: int) -> Registration:
    """Align one MR with one CT of the same knee, femur and tibia apart.

    Parameters
    ----------
    ct : CT in HU; mr : MR, any orientation and slice thickness; masks : uint8 labels `BONES` on the CT grid.
    seed : integer seed of the metric's voxel sampling; one thread, so equal seeds give equal bits.

    Raises
    ------
    InputFault : a bone has no voxel in `masks`.

    Notes
    -----
    Multi-stage scheme of the paper (whole knee, then each bone with its own mask), on the MR itself in place of
    its synthetic CT; levels, start and hinge are our choice.
    """
    for bone in [b for b, value in BONES.items() if not (sitk.GetArrayViewFromImage(masks) == value).any()]:
        raise InputFault("masks", f"hold no {bone}", "give labels of both bones on the CT grid")
    pyramid = {s: (isotropic(ct, s), isotropic(mr, s)) for s in {v.spacing_mm for v in WHOLE_KNEE + PER_BONE}}
    fine = tuple(trabeculae(isotropic(image, TRABECULAE.spacing_mm)) for image in (ct, mr))
    depths, tic = bone_depths_mm(masks), time.process_time()
    starts = starting_transforms(ct, mr)
    rows = [_row("centre", "", 0.0, starts[0][0], len(starts), "exhaustive", time.process_time() - tic)]
    whole = descend([t for _, t in starts[:START_KEPT]], pyramid, WHOLE_KNEE, None, seed, rows, "whole_knee")
    hinged = [_hinged(whole, np.mean([_middle(d) for d in depths.values()], 0), angle) for angle in HINGE_DEG]
    apart = {b: descend(hinged, pyramid, PER_BONE, d, seed, rows, "per_bone", b) for b, d in depths.items()}
    found, checks = {}, {}
    for bone, depth in depths.items():
        found[bone], checks[bone] = align_trabeculae(*fine, depth, apart[bone], seed, rows, bone)
    stages = {
        "centre": dict.fromkeys(BONES, starts[0][1]),
        "whole_knee": dict.fromkeys(BONES, whole),
        "per_bone": apart,
        "trabeculae": found,
    }
    bent_deg = flexion_deg(*found.values())
    return Registration(found, rows, stages, checks, bent_deg, reason_to_flag(checks, bent_deg, max(mr.GetSpacing())))


def align_trabeculae(
    fixed: sitk.Image,
    moving: sitk.Image,
    depth_mm: sitk.Image,
    start: sitk.Euler3DTransform,
    seed: int,
    rows: list[dict],
    bone: str,
) -> tuple[sitk.Euler3DTransform, dict[str, float]]:
    """Transform of one bone from a start within some 2 mm, and its checks there (see `reason_to_flag`).

    `fixed`, `moving` of `trabeculae`; `depth_mm` signed distance to the bone's surface; `rows` gets a log line.
    """
    tic, (points, grey) = time.process_time(), interior(fixed, depth_mm, seed)
    nearer = best_shift(points, grey, moving, start)
    region, mask = _masked(fixed, depth_mm, TRABECULAE.margin_mm)
    end, *log, _ = _optimised(region, moving, mask, nearer, TRABECULAE, seed, trabecular=True)
    rows.append(_row("trabeculae", bone, TRABECULAE.spacing_mm, *log, time.process_time() - tic))
    return end, checked(points, grey, moving, end)


def starting_transforms(ct: sitk.Image, mr: sitk.Image) -> list[tuple[float, sitk.Euler3DTransform]]:
    """Rigid starts, best first, one for each of the rotations tried: (likelihood ratio in nats, transform).

    For every rotation vector on an 18 degree lattice, mutual information of grey-value classes is known at all
    voxel shifts at once: the joint counts are cross-correlations of class indicators (Fourier transform). Score
    = overlapping voxels x mutual information, which does not reward small overlaps (our choice).
    """
    spacing_mm = float((np.prod(ct.GetSize()) * np.prod(ct.GetSpacing()) / START_VOXELS) ** (1 / 3))
    fixed, moving, n = isotropic(ct, spacing_mm), isotropic(mr, spacing_mm), START_GRID
    classes = np.full((n, n, n), -1)
    inner = tuple(slice(0, min(s, n)) for s in fixed.GetSize()[::-1])
    classes[inner] = np.digitize(sitk.GetArrayViewFromImage(fixed), CT_CLASS_HU)[inner]
    spectrum = np.conj(_spectrum(classes, len(CT_CLASS_HU) + 1))
    edges = np.quantile(sitk.GetArrayViewFromImage(moving), np.arange(1, MR_CLASSES) / MR_CLASSES)
    grid = _grid(n, spacing_mm, ct.GetDirection())
    middle, centre_mr = centre_of(grid), centre_of(moving)
    first_shift = (n - np.array(classes[inner].shape)) // 2 - n // 2
    found = []
    for matrix in _rotations():
        turn = rigid(matrix, middle, centre_mr - middle)
        grey = sitk.GetArrayFromImage(sitk.Resample(moving, grid, turn, sitk.sitkLinear, OUTSIDE))
        joint = (
            _spectrum(np.where(grey < OUTSIDE / 2, -1, np.digitize(grey, edges)), MR_CLASSES)[None] * spectrum[:, None]
        )
        score = _likelihood(np.maximum(np.fft.irfftn(joint, s=(n, n, n), axes=(2, 3, 4)), 0.0))
        shift = (np.array(np.unravel_index(score.argmax(), score.shape)) - first_shift) % n + first_shift
        centre = middle + fixed.GetOrigin() - np.reshape(ct.GetDirection(), (3, 3)) @ shift[::-1] * spacing_mm
        found.append((float(score.max()), rigid(matrix, centre, centre_mr - centre)))
    return sorted(found, key=lambda pair: -pair[0])


def _grid(n: int, spacing_mm: float, direction: tuple) -> sitk.Image:
    grid = sitk.Image([n] * 3, sitk.sitkUInt8)
    grid.SetSpacing([spacing_mm] * 3)
    grid.SetDirection(direction)
    return grid


def _rotations() -> list[tuple]:
    steps = np.arange(-START_MAX_DEG, START_MAX_DEG + 1, START_STEP_DEG)
    return [_matrix(v) for v in product(steps, repeat=3) if np.linalg.norm(v) <= START_MAX_DEG + 1]


def _spectrum(classes: np.ndarray, n: int) -> np.ndarray:
    return np.fft.rfftn(np.stack([classes == k for k in range(n)]).astype(np.float32), axes=(1, 2, 3))


def _likelihood(joint: np.ndarray) -> np.ndarray:
    """Counts x mutual information (nats) for joint counts (a, b, z, y, x), at every shift."""

    def plogp(counts: np.ndarray) -> np.ndarray:
        return (counts * np.log(np.maximum(counts, 1e-6))).reshape(-1, *joint.shape[2:]).sum(0)

    total = joint.sum((0, 1))[None]
    return plogp(joint) - plogp(joint.sum(1)) - plogp(joint.sum(0)) + plogp(total)


def descend(
    starts: list[sitk.Euler3DTransform],
    pyramid: dict[float, tuple[sitk.Image, sitk.Image]],
    levels: Sequence[Level],
    depth_mm: sitk.Image | None,
    seed: int,
    rows: list[dict],
    stage: str,
    bone: str = "",
) -> sitk.Euler3DTransform:
    """Coarse to fine: every start at the first level, the best of them further; `rows` gets one log line a level.

    `pyramid` {spacing in mm: (CT, MR)}; `depth_mm` signed distance to the bone's surface, None for the whole knee.
    """
    for level in levels:
        fixed, moving = pyramid[level.spacing_mm]
        fixed, mask = (fixed, None) if depth_mm is None else _masked(fixed, depth_mm, level.margin_mm)
        results = [_optimised(fixed, moving, mask, t, level, seed) for t in starts]
        end, *log, _ = max(results, key=lambda r: r[1])
        rows.append(_row(stage, bone, level.spacing_mm, *log, sum(r[-1] for r in results)))
        starts = [end]
    return end


def _optimised(fixed, moving, mask, start, level, seed, trabecular=False) -> tuple:
    """(transform, metric, iterations, stop reason, CPU seconds); metric in nats, of trabeculae the squared match."""
    tic, method = time.process_time(), sitk.ImageRegistrationMethod()
    if trabecular:
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(BINS)
    if level.samples and mask is not None:
        method.SetMetricSamplingStrategy(method.RANDOM)
        share = min(1.0, level.samples / sitk.GetArrayViewFromImage(mask).sum())
        method.SetMetricSamplingPercentage(share, seed + 1)  # 0 is sitkWallClock: another sample every run
    if mask is not None:
        method.SetMetricFixedMask(mask)
    # ITK smooths its own gradient image, which cost about 0.1 mm on phantoms: take differences of the image
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(level.step_mm, level.step_mm / 40, ITERATIONS, 0.5, 1e-9)
    method.SetOptimizerScales([ARM_MM**2] * 3 + [1.0] * 3)
    method.SetInitialTransform(recentred(start, centre_of(fixed)), inPlace=True)
    try:
        end = method.Execute(fixed, moving)
    except RuntimeError as error:  # hardly any overlap: this start is out of the race, and the log says why
        return start, 0.0, 0, str(error).strip().rpartition("\n")[2], time.process_time() - tic
    log = -method.GetMetricValue(), method.GetOptimizerIteration(), method.GetOptimizerStopConditionDescription()
    return sitk.Euler3DTransform(end), *log, time.process_time() - tic


def _row(stage, bone, spacing_mm, metric, iterations, stop, seconds) -> dict:
    row = {"stage": stage, "bone": bone, "spacing_mm": spacing_mm, "metric": metric}
    return row | {"iterations": iterations, "stop": stop, "seconds": seconds}


def bone_depths_mm(masks: sitk.Image) -> dict[str, sitk.Image]:
    """{bone: signed distance to its surface in mm, inside positive, on a 1 mm grid} of a label image (`BONES`)."""
    coarse = {b: isotropic(sitk.Cast(masks == value, sitk.sitkFloat32), 1.0) for b, value in BONES.items()}
    return {bone: sitk.SignedMaurerDistanceMap(share > 0.5, True, False, True) for bone, share in coarse.items()}


def _masked(fixed: sitk.Image, depth_mm: sitk.Image, margin_mm: float) -> tuple[sitk.Image, sitk.Image]:
    near = sitk.Resample(depth_mm, fixed, sitk.Transform(), sitk.sitkLinear, OUTSIDE) > -margin_mm
    box = _shape(near).GetBoundingBox(1)
    return sitk.RegionOfInterest(fixed, box[3:], box[:3]), sitk.RegionOfInterest(near, box[3:], box[:3])


def _middle(depth_mm: sitk.Image) -> np.ndarray:
    return np.array(_shape(depth_mm > 0).GetCentroid(1))


def _shape(mask: sitk.Image) -> sitk.LabelShapeStatisticsImageFilter:
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(mask)
    return shape


def centre_of(image: sitk.Image) -> np.ndarray:
    """Middle of an image's box, (x, y, z) in LPS mm."""
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))


def rigid(matrix: Sequence, centre: Sequence, translation: Sequence) -> sitk.Euler3DTransform:
    """p -> matrix (p - centre) + centre + translation; lengths in mm, matrix (3, 3) or flat."""
    transform = sitk.Euler3DTransform()
    transform.SetCenter([float(v) for v in centre])
    transform.SetMatrix([float(v) for v in np.ravel(matrix)], 1e-6)
    transform.SetTranslation([float(v) for v in translation])
    return transform


def recentred(transform: sitk.Euler3DTransform, centre: Sequence) -> sitk.Euler3DTransform:
    """The same motion, its rotation written about another centre (LPS mm)."""
    image = transform.TransformPoint([float(v) for v in centre])
    return rigid(transform.GetMatrix(), centre, np.subtract(image, centre))


def _matrix(vector_deg: Sequence) -> tuple:
    angle = float(np.linalg.norm(vector_deg))
    axis = (np.asarray(vector_deg) / angle).tolist() if angle else [0.0, 0.0, 1.0]
    return sitk.VersorTransform(axis, np.deg2rad(angle)).GetMatrix()


def _hinged(transform: sitk.Euler3DTransform, joint: np.ndarray, angle_deg: float) -> sitk.Euler3DTransform:
    """Flexion by an angle about the left-right axis (x) through the joint in CT space, then the transform."""
    at_joint = recentred(transform, joint)
    turned = np.reshape(transform.GetMatrix(), (3, 3)) @ np.reshape(_matrix([angle_deg, 0.0, 0.0]), (3, 3))
    return rigid(turned, joint, at_joint.GetTranslation())
