"""T2: register one knee by hand and by the algorithm.

One simulated knee from notebooks/data: CT and MR around the joint, on voxels of 0.6 mm. Transforms
map CT points to MR points, (x, y, z) in LPS mm. A pose is a rotation vector in degrees and a shift
in mm that are added to the transform of the stage `centre`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.spatial.transform import Rotation

from ctsma.common import BONES
from ctsma.registration import apply_rigid, rigid_transform
from ctsma.registration.masks import isotropic
from ctsma.registration.quality import MIN_CORRELATION, target_registration_error_mm
from ctsma.registration.stages import (
    PER_BONE,
    align_trabeculae,
    bone_depths_mm,
    multiresolution_optimise,
)
from ctsma.registration.trabeculae import highpass, interior, registration_metrics
from ctsma.registration.transforms import (
    Rigid,
    recentred,
    rotation_matrix,
    sample_points,
    voxel_axes,
)
from ctsma_lab import figures

from .data import read_knee
from .exercises import Exercise, number_near
from .sliders import choice, explore, slider

N_BINS, N_POINTS, NEAR_MM = 32, 10_000, 6.0  # of the mutual information shown; design choice
FINE_MM = 0.5  # voxel of the high-pass filtered images
PIXEL_MM, PLANE_MM = 0.5, (52.0, 56.0)  # of the planes: height, width; design choice
ANGLE_DEG, ARM_MM = 2.0, 40.0  # of exercise T2.1
GOOD_MM = 2.0  # TRE that the hand should reach in T2.2
LARGEST, STEP = 20.0, 0.5  # of the six sliders, degrees and mm
FAR_MM = 1.0  # TRE above which a pose of T2.5 is wrong


@dataclass(frozen=True)
class Knee:
    """What all figures share; bones by name.

    Attributes
    ----------
    ct, mr, labels : images. stages : {stage: {bone: transform}}. true : {bone: transform}.
    targets : {bone: (n, 3)} CT points 1 to 10 mm below the joint surface.
    depths_mm : {bone: image of the depth below its surface}.
    ct_fine, mr_fine : high-pass filtered. inner : {bone: (points, CT values)} deep in the bone.
    near : {bone: (points, CT values)} in the bone and 6 mm around it.
    """

    ct: sitk.Image
    mr: sitk.Image
    labels: sitk.Image
    stages: dict
    true: dict
    targets: dict
    depths_mm: dict
    ct_fine: sitk.Image
    mr_fine: sitk.Image
    inner: dict
    near: dict


@cache
def knee() -> Knee:
    """The knee of notebooks/data, with what is computed from it once."""
    ct, mr, labels, facts = read_knee()
    stages = {
        stage: {bone: rigid_transform(**p) for bone, p in transforms.items()}
        for stage, transforms in facts["stages"].items()
    }
    true = {bone: rigid_transform(**p) for bone, p in facts["true"].items()}
    targets = {bone: np.array(points) for bone, points in facts["targets"].items()}
    depths_mm = bone_depths_mm(labels)
    ct_fine, mr_fine = (highpass(isotropic(image, FINE_MM)) for image in (ct, mr))
    inner = {bone: interior(ct_fine, depth, 0) for bone, depth in depths_mm.items()}
    near = {bone: _near(ct, depth) for bone, depth in depths_mm.items()}
    return Knee(ct, mr, labels, stages, true, targets, depths_mm, ct_fine, mr_fine, inner, near)


def _near(ct: sitk.Image, depth_mm: sitk.Image) -> tuple[ndarray, ndarray]:
    depth = sitk.Resample(depth_mm, ct, sitk.Transform(), sitk.sitkLinear, -1e6)
    index = np.argwhere(sitk.GetArrayViewFromImage(depth) > -NEAR_MM)
    index = index[np.random.default_rng(0).permutation(len(index))[:N_POINTS]]
    points = index[:, ::-1] @ voxel_axes(ct).T + ct.GetOrigin()
    return points, sitk.GetArrayViewFromImage(ct)[tuple(index.T)]


def pose(bone: str, rotation_deg: Sequence, shift_mm: Sequence) -> Rigid:
    """The transform of the stage `centre`, turned about the middle of the bone and shifted."""
    start, middle = knee().stages["centre"][bone], knee().targets[bone].mean(axis=0)
    start = recentred(start, middle)
    turn = np.reshape(rotation_matrix(rotation_deg), (3, 3))
    matrix = turn @ np.reshape(start.GetMatrix(), (3, 3))
    return rigid_transform(matrix, middle, np.add(start.GetTranslation(), shift_mm))


def pose_of(bone: str, transform: Rigid) -> ndarray:
    """The six numbers (degrees, then mm) whose `pose` is a transform of the bone."""
    middle = knee().targets[bone].mean(axis=0)
    start, wanted = (recentred(t, middle) for t in (knee().stages["centre"][bone], transform))
    matrices = [np.reshape(t.GetMatrix(), (3, 3)) for t in (wanted, start)]
    turn = Rotation.from_matrix(matrices[0] @ matrices[1].T).as_rotvec(degrees=True)
    return np.r_[turn, np.subtract(wanted.GetTranslation(), start.GetTranslation())]


def mutual_information(bone: str, transform: Rigid) -> float:
    """Mutual information of CT and MR near a bone, nats; from a joint histogram of 32 bins."""
    points, hu = knee().near[bone]
    grey = sample_points(knee().mr, apply_rigid(transform, points))
    seen = np.isfinite(grey)
    if seen.sum() < N_BINS:
        return 0.0
    joint = np.histogram2d(hu[seen], grey[seen], bins=N_BINS)[0] / seen.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    filled = joint > 0
    return float(np.sum(joint[filled] * np.log(joint[filled] / independent[filled])))


def measures(bone: str, transform: Rigid) -> dict[str, float]:
    """Mutual information (nats) and trabecular correlation; neither needs ground truth."""
    found = registration_metrics(*knee().inner[bone][:2], knee().mr_fine, transform)
    mi = mutual_information(bone, transform)
    return {"mutual information": mi, "trabecular correlation": found["correlation"]}


def tre_mm(bone: str, transform: Rigid) -> float:
    """Mean target registration error of a bone, mm; needs ground truth."""
    true, points = knee().true[bone], knee().targets[bone]
    return float(target_registration_error_mm(transform, true, points).mean())


def register(bone: str, start: Rigid) -> tuple[Rigid, pd.DataFrame]:
    """The last two stages of the study from any start.

    Returns the final transform and a table of stages with TRE and measures.
    """
    data = knee()
    spacings_mm = {level.spacing_mm for level in PER_BONE}
    pyramid = {mm: (isotropic(data.ct, mm), isotropic(data.mr, mm)) for mm in spacings_mm}
    depth_mm = data.depths_mm[bone]
    optima = multiresolution_optimise([start], pyramid, PER_BONE, depth_mm, 0)
    last = align_trabeculae(data.inner[bone], data.mr_fine, optima[-1].transform)[0]
    transforms = {"start": start, "per_bone": optima[-1].transform, "trabeculae": last.transform}
    return last.transform, table_of(bone, transforms)


def table_of(bone: str, transforms: dict[str, Rigid]) -> pd.DataFrame:
    """TRE and measures of several transforms of a bone, by name."""
    rows = {n: {"TRE (mm)": tre_mm(bone, t)} | measures(bone, t) for n, t in transforms.items()}
    return pd.DataFrame(rows).T.round(3)


def stage_errors() -> pd.DataFrame:
    """TRE (mm) by stage and bone, of the registration of the whole images in the run."""
    stages = knee().stages
    rows = {s: {bone: tre_mm(bone, t) for bone, t in bones.items()} for s, bones in stages.items()}
    return pd.DataFrame(rows).T.round(2)


def displaced(bone: str, direction: int, shifts_mm: Sequence) -> pd.DataFrame:
    """Measures of the true transform, shifted along x (0), y (1) or z (2) of the MR."""
    rows = []
    for shift in shifts_mm:
        moved = sitk.Euler3DTransform(knee().true[bone])
        offset = np.eye(3)[direction] * shift
        moved.SetTranslation(np.add(moved.GetTranslation(), offset).tolist())
        rows.append({"shift_mm": shift} | measures(bone, moved))
    return pd.DataFrame(rows)


def fit_rigid(points: ndarray, moved: ndarray) -> Rigid:
    """The rigid transform that maps points (n, 3) to moved (n, 3) with the least squared error.

    Source: Kabsch, Acta Cryst A 1976;32:922.
    """
    middle, moved_middle = points.mean(axis=0), moved.mean(axis=0)
    u, _, vt = np.linalg.svd((points - middle).T @ (moved - moved_middle))
    sign = np.sign(np.linalg.det(vt.T @ u.T))
    matrix = vt.T @ np.diag([1, 1, sign]) @ u.T
    return rigid_transform(matrix, middle, moved_middle - middle)


@cache
def unknown_poses() -> dict[str, Rigid]:
    """Four transforms of the tibia, some of them wrong by more than 1 mm (exercise T2.5)."""
    true, middle = knee().true["tibia"], knee().targets["tibia"].mean(axis=0)
    changes = {  # rotation vector (degrees) and shift (mm)
        "A": ((0.0, 0.0, 0.0), (0.0, 1.2, 0.0)),
        "B": ((0.2, 0.0, -0.2), (0.1, 0.0, 0.1)),
        "C": ((0.0, 5.0, 0.0), (0.0, 0.0, 0.0)),
        "D": ((0.0, 0.0, 0.0), (0.0, -0.1, 0.2)),
    }
    found = {}
    for name, (rotation_deg, shift_mm) in changes.items():
        centred = recentred(true, middle)
        turn = np.reshape(rotation_matrix(rotation_deg), (3, 3))
        matrix = turn @ np.reshape(centred.GetMatrix(), (3, 3))
        shift = np.add(centred.GetTranslation(), shift_mm)
        found[name] = rigid_transform(matrix, middle, shift)
    return found


def _plane(bone: str, plane: str) -> ndarray:
    """Points (rows, columns, 3) of a sagittal or coronal plane through the middle of a bone."""
    x, y, z = knee().targets[bone].mean(axis=0)
    if plane == "sagittal":  # through one compartment, where the joint surface is wide
        x += 18.0
    n_rows, n_columns = (round(mm / PIXEL_MM) for mm in PLANE_MM)
    down = (np.arange(n_rows) - n_rows / 2 + 0.5) * PIXEL_MM
    along = (np.arange(n_columns) - n_columns / 2 + 0.5) * PIXEL_MM
    rows, columns = np.meshgrid(down, along, indexing="ij")
    if plane == "sagittal":
        return np.stack([np.full(rows.shape, x), y + columns, z - rows], axis=-1)
    return np.stack([x + columns, np.full(rows.shape, y), z - rows], axis=-1)


def _draw_plane(ax: Axes, bone: str, plane: str, transform: Rigid) -> None:
    points = _plane(bone, plane)
    flat, shape = points.reshape(-1, 3), points.shape[:2]
    hu = sample_points(knee().ct, flat).reshape(shape)
    grey = sample_points(knee().mr, apply_rigid(transform, flat)).reshape(shape)
    outside = np.isnan(hu) | np.isnan(grey)
    hu[outside], grey[outside] = np.nanmin(hu), np.nanmax(grey)  # both black once MR is inverted
    pixel_mm = (PIXEL_MM, PIXEL_MM)
    edges = figures.ORIENTATION[plane]
    figures.blend(ax, hu, -grey, pixel_mm, f"{plane}, {bone}", orientation=edges)
    is_bone = sitk.Cast(knee().labels == BONES[bone], sitk.sitkFloat32)
    outline = np.nan_to_num(sample_points(is_bone, flat)).reshape(shape) > 0.5
    figures.contour(ax, outline, pixel_mm, "#009E73")


def draw_transform(bone: str, transform: Rigid) -> Figure:
    """CT (orange) and inverted MR (blue) in two planes, and the measures as bars."""
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4.4), width_ratios=(1, 1, 0.8), layout="constrained"
    )
    for ax, plane in zip(axes, ("sagittal", "coronal"), strict=False):
        _draw_plane(ax, bone, plane, transform)
    found, best = measures(bone, transform), measures(bone, knee().true[bone])
    error = tre_mm(bone, transform)
    rows = [f"{name}: {value:.2f}" for name, value in found.items()]
    shares = [found[name] / best[name] for name in found]
    axes[2].barh(rows, shares, color=figures.PALETTE[0], height=0.5)
    axes[2].axvline(1, color="black", linestyle="--", linewidth=0.9)
    axes[2].invert_yaxis()
    axes[2].set(xlim=(-0.1, 1.25), xlabel="value / value at the true position")
    axes[2].set_title(f"TRE {error:.2f} mm", fontsize=14)
    figure.suptitle(
        "simulated knee: CT orange, inverted MR blue, grey where they agree, green: bone"
    )
    return figure


def draw_by_hand(rx: float, ry: float, rz: float, tx: float, ty: float, tz: float) -> Figure:
    """`draw_transform` of a pose of the femur."""
    return draw_transform("femur", pose("femur", (rx, ry, rz), (tx, ty, tz)))


def draw_stage(stage: str, bone: str) -> Figure:
    """`draw_transform` of a stage of the run."""
    return draw_transform(bone, knee().stages[stage][bone])


def draw_displaced(table: pd.DataFrame) -> Figure:
    """Both measures of `displaced`, each over its value at shift 0."""
    figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
    at_zero = table.loc[table["shift_mm"].abs().idxmin()]
    for colour, name in zip(figures.PALETTE, table.columns[1:], strict=False):
        ax.plot(table["shift_mm"], table[name] / at_zero[name], color=colour, label=name)
    ax.axhline(0.5, color="#888888", linewidth=0.9, linestyle=":", label="half")
    ax.set(xlabel="shift from the true position (mm)", ylabel="value / value at shift 0")
    ax.set_title("tibia of one simulated knee")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def explore_by_hand() -> None:
    """`draw_by_hand` with six sliders."""
    names = {"rx": "turn about x, flexion", "ry": "turn about y", "rz": "turn about z"}
    ends = -LARGEST, LARGEST, STEP
    controls = {n: slider(f"{text} (degrees)", *ends, 0) for n, text in names.items()}
    names = {"tx": "shift to the left, x", "ty": "shift to the back, y", "tz": "shift up, z"}
    controls |= {n: slider(f"{text} (mm)", *ends, 0) for n, text in names.items()}
    explore(draw_by_hand, **controls)


def explore_stages() -> None:
    """`draw_stage` with two lists."""
    stages = list(knee().stages)
    explore(
        draw_stage,
        stage=choice("stage", stages, stages[0]),
        bone=choice("bone", list(BONES), "femur"),
    )


def _judge_hand(answer: object) -> str:
    values = [float(value) for value in answer]
    if len(values) != 6:
        return "Give six numbers: three angles in degrees, then three shifts in mm."
    error = tre_mm("femur", pose("femur", values[:3], values[3:]))
    if error <= GOOD_MM:
        return ""
    start = tre_mm("femur", pose("femur", (0, 0, 0), (0, 0, 0)))
    if error >= start:
        return f"The TRE is {error:.1f} mm, and {start:.1f} mm before you began. Begin with the \
shifts: align the outline of the bone in the sagittal plane."
    return f"The TRE is {error:.1f} mm; {GOOD_MM:.0f} mm are enough. Alternate: flexion (x), then \
the shifts y and z, then the other plane. Mutual information tells whether a step was good."


@cache
def half_width_mm() -> float:
    """Shift of the tibia along y at which the trabecular correlation has halved."""
    shifts = np.arange(0, 3.01, 0.05)
    table = displaced("tibia", 1, shifts)
    values = table["trabecular correlation"]
    return float(shifts[(values < values[0] / 2).idxmax()])


@cache
def mi_half_width_mm() -> float:
    """The same for the mutual information."""
    shifts = np.arange(0, 15.01, 0.1)
    values = displaced("tibia", 1, shifts)["mutual information"]
    return float(shifts[(values < values[0] / 2).idxmax()])


@cache
def best_single_mm() -> float:
    """TRE of the best rigid transform of both bones, mean over all targets."""
    true, targets = knee().true, knee().targets
    points = np.vstack([targets[bone] for bone in BONES])
    moved = np.vstack([apply_rigid(true[bone], targets[bone]) for bone in BONES])
    fitted = apply_rigid(fit_rigid(points, moved), points)
    return float(np.linalg.norm(fitted - moved, axis=1).mean())


@cache
def femur_on_tibia_mm() -> float:
    """TRE of the tibia under the true transform of the femur."""
    return tre_mm("tibia", knee().true["femur"])


def _judge_wrong_poses(answer: object) -> str:
    poses = unknown_poses()
    given = set(answer)
    wrong = {name for name, transform in poses.items() if tre_mm("tibia", transform) > FAR_MM}
    if given == wrong:
        return ""
    if not given <= set(poses):
        return f"Give a set of names out of {', '.join(poses)}."
    if given == set(poses) - wrong:
        return "These are the good ones."
    return f"{len(given & wrong)} of your poses are wrong by more than {FAR_MM:.0f} mm, and \
{len(wrong - given)} wrong ones are missing. A bone whose trabecular correlation is below \
{MIN_CORRELATION} is flagged by the study."


EXERCISES = {
    "T2.1": Exercise(
        number_near(
            lambda: 2 * ARM_MM * np.sin(np.deg2rad(ANGLE_DEG) / 2),
            0.02,
            "A point at distance a from the axis moves on an arc: angle in radians times a.",
            {
                "This is the angle times the distance in degrees. Use radians.": lambda: (
                    ANGLE_DEG * ARM_MM
                ),
                "An error of rotation moves points far from the axis.": lambda: 0.0,
            },
        ),
        "Two degrees are more than one trabecular spacing at the rim of the bone. A small angle "
        "is not a small error.",
    ),
    "T2.2": Exercise(
        _judge_hand,
        "This is near enough for the algorithm, which starts from your position in section 3.",
    ),
    "T2.3": Exercise(
        number_near(
            half_width_mm,
            0.12,
            "Read where the curve of the trabecular correlation crosses one half, on one side.",
            {
                "This is the width from side to side. The half width is asked.": lambda: (
                    2 * half_width_mm()
                ),
                "This is the half width of the mutual information.": mi_half_width_mm,
            },
        ),
        "The correlation is sharp: it says exactly where the bone is, but only from near by. "
        "Mutual information is wide: it leads there from far away. This is why the stages come in "
        "this order, and why the last one begins with a search within 2 mm.",
    ),
    "T2.4": Exercise(
        number_near(
            best_single_mm,
            0.05,
            "Fit one transform to the targets of both bones together (fit_rigid), apply it, and "
            "take the mean distance to where the targets truly are.",
            {
                "This applies the femur's transform to the tibia. The best single transform "
                "is a compromise between the bones.": femur_on_tibia_mm,
                "This is the error after the stage whole_knee. Is there a better single "
                "transform?": lambda: whole_knee_mm(),
            },
        ),
        "No optimiser can do better with one transform: the knee was flexed differently in the two "
        "scanners. Each bone is rigid, the knee is not.",
    ),
    "T2.5": Exercise(
        _judge_wrong_poses,
        "The mutual information of the wrong poses is only a little lower. The trabecular "
        "correlation separates them without ground truth, so the study can flag a failed knee of "
        "a patient.",
    ),
}


@cache
def whole_knee_mm() -> float:
    """TRE after the stage whole_knee, mean over the targets of both bones."""
    errors = []
    for bone, transform in knee().stages["whole_knee"].items():
        true, points = knee().true[bone], knee().targets[bone]
        errors.append(target_registration_error_mm(transform, true, points))
    return float(np.concatenate(errors).mean())
