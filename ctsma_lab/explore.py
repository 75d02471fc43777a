"""Look at a study knee by knee and patch by patch: the shipped simulated data, or a finished run.

Each `draw_` function returns a figure; the `explore_` functions add controls to it. Points are
(x, y, z) in LPS mm, and transforms map CT points to MR points.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import SimpleITK as sitk
from ipywidgets import Widget
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

import kneesim
from ctsma.agreement import bland_altman, bootstrap_icc
from ctsma.arms import ARMS, MAIN_ARM
from ctsma.cohort import read_knee_volume
from ctsma.common import BIOMARKERS, BONES, LABELS
from ctsma.diagnosis import auc_delong, compartment_means, cross_validate_tabular
from ctsma.diagnosis.statistics import roc_band
from ctsma.patches import CT_SPACING_MM, MR_SPACING_MM, load_table
from ctsma.registration import apply_rigid, read_stages, rigid_transform
from ctsma.registration.transforms import sample_points
from ctsma_predict.conformal import cross_conformal
from kneesim.patch_truth import ground_truth_slice

from . import bones, figures
from .run import Run
from .tutorials.data import PATCH, read_knee, read_knees, read_patch_images, read_patches
from .tutorials.make_data import knee_table, patch_table
from .tutorials.sliders import choice, explore, slider, steps

PIXEL_MM = 0.6  # of the planes; design choice
PLANES = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}  # normal, row, column
LEVEL, N_RESAMPLES = 0.90, 500  # of conformal intervals; of the bootstrap
HALVES = {  # of the knees, divided at the median
    "ct_fwhm_mm": ("sharp kernel", "soft kernel"),
    "ct_noise_hu": ("low noise", "high noise"),
}
TRUTH_MM = 0.1  # pixel of the true bone


@dataclass(frozen=True)
class KneeImages:
    """One knee: images, transforms by stage and bone, and, where it is simulated, the truth.

    `true` {bone: transform} and `targets` {bone: (n, 3)} are empty without ground truth.
    """

    ct: sitk.Image
    mr: sitk.Image
    labels: sitk.Image
    stages: dict
    true: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PatchImages:
    """Patches of one knee: patch_id (n,), and images; `bone` is empty without ground truth.

    ct (n, 12, 24, 24) HU, mr and voi (n, 12, 48, 48); bone: the true bone in the middle slice, on
    pixels of 0.1 mm.
    """

    patch_id: ndarray
    ct: ndarray
    mr: ndarray
    voi: ndarray
    bone: list


@dataclass(frozen=True)
class Study:
    """What can be looked at.

    Attributes
    ----------
    name : said in every figure. patches, knees : as of `read_patches` and `read_knees`.
    arms : whose estimates `patches` holds. with_images : knees whose CT and MR are there.
    with_patches : knees whose patches are there as images.
    run : where the images come from; None for the shipped data.
    """

    name: str
    patches: pd.DataFrame
    knees: pd.DataFrame
    arms: list
    with_images: list
    with_patches: list
    run: Run | None = None

    def knee(self, knee_id: str) -> KneeImages:
        """Images and transforms of one of `with_images`."""
        if self.run is None:
            ct, mr, labels, facts = read_knee()
            stages = {name: _rigid(bones) for name, bones in facts["stages"].items()}
            targets = {bone: np.array(points) for bone, points in facts["targets"].items()}
            return KneeImages(ct, mr, labels, stages, _rigid(facts["true"]), targets)
        row, root = self._row(knee_id)
        folder = self.run.path / "registration"
        labels = sitk.ReadImage(str(folder / f"{knee_id}_mask.nii.gz"))
        ct, mr = (read_knee_volume(row, column, root) for column in ("ct", "mr"))
        known = [ct, mr, labels, read_stages(folder, knee_id)]
        if not kneesim.has_truth(root):
            return KneeImages(*known)
        truth = kneesim.read_truth(root, knee_id)
        targets = {bone: truth.target_points_lps(bone) for bone in BONES}
        return KneeImages(*known, true=truth.transforms, targets=targets)

    def patch_images(self, knee_id: str) -> PatchImages:
        """The patches of one of `with_patches`."""
        if self.run is None:
            every = read_patch_images()
            rows = np.flatnonzero(every.table["knee_id"] == knee_id)
            patch_id = every.table["patch_id"].to_numpy()[rows]
            return PatchImages(patch_id, every.ct[rows], every.mr[rows], every.voi[rows], [])
        folder, bone = self.run.path / "patches", []
        table = load_table(folder)
        table = table[table["knee_id"] == knee_id]
        patch_id = table["patch_id"].to_numpy()
        with np.load(folder / f"{knee_id}.npz") as stored:
            images = [stored[name][patch_id] for name in ("ct", "mr", "voi")]
        row, root = self._row(knee_id)
        if kneesim.has_truth(root):
            truth = kneesim.read_truth(root, knee_id)
            for patch in table.to_dict("records"):
                bone.append(ground_truth_slice(truth, patch, row["side"], TRUTH_MM))
        return PatchImages(patch_id, *images, bone)

    def _row(self, knee_id: str) -> tuple[pd.Series, str]:
        manifest = self.run.manifest()
        return manifest.set_index("knee_id", drop=False).loc[knee_id], manifest.attrs["root"]


def open_study(run_dir: str | Path = "") -> Study:
    """The shipped data where `run_dir` is empty, else a finished run.

    Raises InputError where the run is not finished.
    """
    if not run_dir:
        patches, knees = read_patches(), read_knees()
        arms = [arm for arm in ARMS if f"bv_tv_{arm}" in patches]
        small = list(read_patch_images().table["knee_id"].unique())
        name = "shipped data, simulated knees"
        return Study(name, patches, knees, arms, [read_knee()[3]["knee_id"]], small)
    run = Run(Path(run_dir))
    patches, arms = patch_table(run)
    kind = "simulated" if run.results("cohort")["simulated"] else "cohort's"
    names = sorted(patches["knee_id"].unique())
    knees = knee_table(run, patches["knee_id"])
    return Study(f"run {run.path.name}, {kind} knees", patches, knees, arms, names, names, run)


def _rigid(transforms: Mapping) -> dict:
    return {bone: rigid_transform(**parameters) for bone, parameters in transforms.items()}


def draw_knee(
    study: Study, knee_id: str, plane: str, place: float, bone: str, stage: str
) -> Figure:
    """CT, MR by the transform of one bone at one stage, blend, checkerboard, and TRE by stage.

    `place` is the place of the plane along the CT's extent, 0 to 1 (to the left, the back or the
    head of the patient).
    """
    images = study.knee(knee_id)
    points = plane_points(images.ct, plane, place)
    flat, shape = points.reshape(-1, 3), points.shape[:2]
    hu = sample_points(images.ct, flat).reshape(shape)
    moved = apply_rigid(images.stages[stage][bone], flat)
    grey = sample_points(images.mr, moved).reshape(shape)
    outside = np.isnan(hu) | np.isnan(grey)
    hu = np.where(np.isnan(hu), np.nanmin(hu), hu)
    dark = np.where(outside, 0.0, grey)
    bright = np.where(outside, np.nanmax(dark), grey)  # black once inverted
    pixel_mm, edges = (PIXEL_MM, PIXEL_MM), {"orientation": figures.ORIENTATION[plane]}
    figure = plt.figure(figsize=(11.5, 6.7), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 0.8))
    places = (0, 0), (0, 1), (1, 0), (1, 1), (slice(None), 2)
    axes = [figure.add_subplot(grid[place]) for place in places]
    figures.image(axes[0], hu, pixel_mm, "CT (-200 to 1000 HU)", (-200, 1000), **edges)
    figures.image(axes[1], dark, pixel_mm, f"MR, {stage}, {bone}", **edges)
    figures.blend(axes[2], hu, -bright, pixel_mm, "CT orange, inverted MR blue", **edges)
    figures.checkerboard(axes[3], hu, dark, pixel_mm, "checkerboard of CT and MR", **edges)
    for name, label in BONES.items():
        mask = sitk.Cast(images.labels == label, sitk.sitkFloat32)
        outline = np.nan_to_num(sample_points(mask, flat)).reshape(shape) > 0.5
        for ax in axes[:3]:
            figures.contour(ax, outline, pixel_mm, figures.COLOURS[name], name)
    axes[0].legend(fontsize=8, facecolor="black", labelcolor="white", loc="lower right")
    _draw_tre(axes[4], images, stage)
    figure.suptitle(f"{study.name}: {knee_id}, {plane} plane; MR by the transform of the {bone}")
    return figure


def draw_bones(study: Study, knee_id: str, turn_deg: float, tilt_deg: float) -> Figure:
    """The bones of a knee as the study found them in the CT, as of `bones.draw_bones`."""
    title = f"{study.name}: {knee_id}, turn {turn_deg:g}, tilt {tilt_deg:g} degrees"
    return bones.draw_bones(study.knee(knee_id).labels, turn_deg, tilt_deg, title)


def plane_points(ct: sitk.Image, plane: str, place: float) -> ndarray:
    """Points (rows, columns, 3) of a plane through the whole CT, first row on top."""
    ends = [(0, n - 1) for n in ct.GetSize()]
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1).T.tolist()
    corners = np.array([ct.TransformIndexToPhysicalPoint(corner) for corner in corners])
    low, high = corners.min(axis=0), corners.max(axis=0)
    normal, row, column = PLANES[plane]
    down = np.arange(low[row], high[row], PIXEL_MM)
    down = down[::-1] if row == 2 else down  # the head is on top
    along = np.arange(low[column], high[column], PIXEL_MM)
    points = np.empty((len(down), len(along), 3))
    points[..., normal] = low[normal] + place * (high[normal] - low[normal])
    points[..., row], points[..., column] = np.meshgrid(down, along, indexing="ij")
    return points


def _draw_tre(ax: Axes, images: KneeImages, stage: str) -> None:
    """Mean target registration error of both bones by stage."""
    if not images.true:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no ground truth:\nthe TRE is unknown", ha="center", va="center")
        return
    errors = kneesim.stage_errors_mm(images.stages, images.true, images.targets)
    for bone in BONES:
        values = [errors[name][bone].mean() for name in errors]
        ax.plot(list(errors), values, "o-", color=figures.COLOURS[bone], label=bone)
    ax.axvline(stage, color="black", linewidth=0.9, linestyle="--", label="chosen stage")
    chosen = ", ".join(f"{bone} {errors[stage][bone].mean():.2f}" for bone in BONES)
    ax.set(yscale="log", ylabel="mean TRE (mm)", title=f"TRE: {chosen} mm")
    ax.set_xticks(range(len(errors)), [name.replace("_", " ") for name in errors], rotation=30)
    ax.legend(frameon=False, fontsize=8)


def draw_patch(study: Study, knee_id: str, number: int) -> Figure:
    """CT, MR, true bone where it is known, and the estimates of every arm with 90 % intervals.

    `number` counts the knee's patches from 1; beyond the last it shows the last.
    """
    images = study.patch_images(knee_id)
    at = min(int(number), len(images.patch_id)) - 1
    patch = study.patches.set_index(PATCH, drop=False).loc[(knee_id, images.patch_id[at])]
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    grid = figure.add_gridspec(2, 12, height_ratios=(1, 0.9))
    middle, edges = images.ct.shape[1] // 2, {"orientation": figures.ORIENTATION["sagittal"]}
    mr_mm, mr = MR_SPACING_MM[1:], images.mr[at][middle].astype(float)
    shown = [(images.ct[at][middle], CT_SPACING_MM[1:], "CT (-100 to 700 HU)", (-100, 700))]
    shown.append((mr, mr_mm, "MR", None))
    if images.bone:
        bone = images.bone[at].astype(float)
        shown.append((bone, (TRUTH_MM, TRUTH_MM), "simulated bone (ground truth)", (0, 1)))
    for column, (values, pixel_mm, title, limits) in enumerate(shown):
        ax = figure.add_subplot(grid[0, 4 * column : 4 * column + 4])
        figures.image(ax, values, pixel_mm, title, limits, **edges)
        figures.contour(ax, images.voi[at][middle], mr_mm, figures.PALETTE[4], "region measured")
    figure.axes[0].legend(frameon=True, fontsize=8, loc="lower right")
    axes = grid[1, :].subgridspec(1, 4).subplots(sharey=True)
    for ax, biomarker in zip(axes, BIOMARKERS, strict=True):
        rows = interval_rows(study, biomarker, knee_id, images.patch_id[at])
        figures.intervals(ax, rows, LABELS[biomarker])
        ax.axvline(patch[f"{biomarker}_reference"], color="black", label="MR reference")
        if f"{biomarker}_true" in patch:
            value = patch[f"{biomarker}_true"]
            ax.axvline(value, color="black", linestyle=":", label="ground truth")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    place = patch["compartment"].replace("_", ", ")
    figure.suptitle(
        f"{study.name}: {knee_id}, patch {at + 1} of {len(images.patch_id)}, {place}; "
        "points: estimates, lines: 90 % conformal intervals"
    )
    return figure


def interval_rows(study: Study, biomarker: str, knee_id: str, patch_id: int) -> pd.DataFrame:
    """Estimate of one patch by every arm with its conformal interval: label, value, low, high."""
    table, rows = study.patches, []
    at = ((table["knee_id"] == knee_id) & (table["patch_id"] == patch_id)).to_numpy()
    for arm in study.arms:
        reference, estimate = table[f"{biomarker}_reference"], table[f"{biomarker}_{arm}"]
        found = cross_conformal(reference, estimate, table["fold"], LEVEL)[at].iloc[0]
        ends = {"low": found["low"], "high": found["high"]}
        about = {"label": ARMS[arm].label, "colour": ARMS[arm].colour}
        rows.append(about | {"value": estimate[at].iloc[0]} | ends)
    return pd.DataFrame(rows)


def selected(
    study: Study,
    bone: str = "all",
    side: str = "all",
    oa: str = "all",
    ct_fwhm_mm: str = "all",
    ct_noise_hu: str = "all",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Patches and knees that pass the filters.

    Parameters
    ----------
    bone : "femur" or "tibia". side : "medial" or "lateral". oa : "OA" or "no OA".
    ct_fwhm_mm, ct_noise_hu : one of `HALVES`, below or above the median of all knees; for studies
        whose knees have these columns.
    """
    patches, knees = study.patches, study.knees
    places = patches["compartment"].str.split("_", expand=True)
    keep = (bone == "all") | (places[0] == bone)
    keep &= (side == "all") | (places[1] == side)
    passed = pd.Series(True, index=knees.index)
    if oa != "all":
        passed &= knees["oa"] == int(oa == "OA")
    for column, value in (("ct_fwhm_mm", ct_fwhm_mm), ("ct_noise_hu", ct_noise_hu)):
        if value != "all":
            above = knees[column] > knees[column].median()
            passed &= above == (value == HALVES[column][1])
    knees = knees[passed]
    if not passed.all():
        keep &= patches["knee_id"].isin(knees["knee_id"])
    return patches[keep], knees


def draw_agreement(study: Study, arm: str, biomarker: str, **filters: str) -> Figure:
    """ICC, Bland-Altman and ROC of one arm for the patches and knees that pass the filters.

    The ROC is of a logistic regression on the means of the four biomarkers in the chosen
    compartments. It is fitted to all knees, out-of-fold, and shown for the knees that pass.
    """
    patches, knees = selected(study, **filters)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    chosen = ", ".join(f"{value}" for value in filters.values() if value != "all") or "all"
    n_knees = patches["knee_id"].nunique()
    figure.suptitle(
        f"{study.name}: {ARMS[arm].label}\nfilters: {chosen}; {len(patches)} patches, "
        f"{n_knees} knees"
    )
    if patches["subject_id"].nunique() < 2:
        for ax in axes:
            _say(ax, "fewer than two subjects pass the filters")
        return figure
    reference = patches[f"{biomarker}_reference"].to_numpy()
    estimate = patches[f"{biomarker}_{arm}"].to_numpy()
    pairs, rng = (reference, estimate, patches["subject_id"]), np.random.default_rng(0)
    found, name = bootstrap_icc(*pairs, rng, N_RESAMPLES), LABELS[biomarker]
    interval = f"{found['icc']:.2f} ({found['ci_low']:.2f} to {found['ci_high']:.2f})"
    colour = ARMS[arm].colour
    figures.scatter(axes[0], reference, estimate, f"ICC(A,1) {interval}", colour)
    axes[0].set(xlabel=f"reference {name}", ylabel=f"estimate of {name}")
    limits = bland_altman(*pairs, rng, N_RESAMPLES)
    title = "solid: bias, dashed: 95 % limits of agreement"
    figures.bland_altman(axes[1], reference, estimate, limits, title, colour)
    axes[1].set(xlabel=f"mean of both, {name}", ylabel=f"estimate - reference, {name}")
    _draw_roc(axes[2], study, arm, filters, knees)
    return figure


def _draw_roc(ax: Axes, study: Study, arm: str, filters: Mapping, knees: pd.DataFrame) -> None:
    if knees["oa"].nunique() < 2:
        _say(ax, "ROC: needs knees with and without OA")
        return
    places = {name: value for name, value in filters.items() if name in ("bone", "side")}
    tokens = selected(study, **places)[0]
    tokens = tokens[tokens["knee_id"].isin(study.knees["knee_id"])]
    estimates = tokens[["knee_id", "subject_id", "compartment"]].copy()
    estimates[list(BIOMARKERS)] = tokens[[f"{name}_{arm}" for name in BIOMARKERS]].to_numpy()
    features = compartment_means(estimates).dropna(axis=1, how="all")
    splits = study.knees[["subject_id", "fold"]].drop_duplicates()
    labels = study.knees.set_index("knee_id")["oa"]
    scores = cross_validate_tabular(features, labels, splits)
    scores = scores[scores["knee_id"].isin(knees["knee_id"])]
    outcome = labels.loc[scores["knee_id"]].to_numpy()
    values = outcome, scores["score"].to_numpy()
    found = auc_delong(*values)
    band = roc_band(*values, scores["subject_id"], np.random.default_rng(0), N_RESAMPLES)
    label = f"AUC {found['auc']:.2f} ({found['ci_low']:.2f} to {found['ci_high']:.2f})"
    ends = band["low"], band["high"]
    figures.roc(ax, band["fpr"], band["tpr"], label, ARMS[arm].colour, ends)
    ax.set_title(f"OA: {int(outcome.sum())} with, {int((1 - outcome).sum())} without")
    ax.legend(frameon=False, loc="lower right")


def _say(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center")


def static_figures(study: Study, knee_id: str = "", number: int = 1) -> dict[str, Figure]:
    """The figures of one knee, one of its patches, and the agreement of the main arm, for a report.

    `knee_id` is one of `study.with_images` (default: the first). Keys: knee, patch, agreement.
    """
    knee_id = knee_id or study.with_images[0]
    stage = list(study.knee(knee_id).stages)[-1]
    return {
        "knee": draw_knee(study, knee_id, "sagittal", 0.3, "tibia", stage),
        "patch": draw_patch(study, knee_id, number),
        "agreement": draw_agreement(study, _main_arm(study), "bv_tv"),
    }


def static_tables(study: Study, knee_id: str = "", number: int = 1) -> dict[str, pd.DataFrame]:
    """The numbers behind `static_figures`, under the same keys; knee: mean TRE in mm, if known."""
    knee_id = knee_id or study.with_images[0]
    images, arm = study.knee(knee_id), _main_arm(study)
    errors = []
    if images.true:
        by_stage = kneesim.stage_errors_mm(images.stages, images.true, images.targets)
        for stage, bones in by_stage.items():
            for bone, values in bones.items():
                errors.append({"stage": stage, "bone": bone, "mean_tre_mm": values.mean()})
    patch_id = study.patch_images(knee_id).patch_id
    patch_id = patch_id[min(number, len(patch_id)) - 1]
    estimates = {
        name: interval_rows(study, name, knee_id, patch_id).drop(columns="colour")
        for name in BIOMARKERS
    }
    columns = [*PATCH, "subject_id", "bv_tv_reference", f"bv_tv_{arm}"]
    return {
        "knee": pd.DataFrame(errors, columns=["stage", "bone", "mean_tre_mm"]),
        "patch": pd.concat(estimates, names=["biomarker"]).reset_index("biomarker"),
        "agreement": study.patches[columns],
    }


def _main_arm(study: Study) -> str:
    return MAIN_ARM if MAIN_ARM in study.arms else study.arms[-1]


def explore_knee(study: Study) -> None:
    """`draw_knee` with controls."""
    first = study.with_images[0]
    stages = list(study.knee(first).stages)
    explore(
        partial(draw_knee, study),
        knee_id=choice("knee", study.with_images, first),
        plane=choice("plane", list(PLANES), "sagittal"),
        place=slider("place of the plane", 0, 1, 0.02, 0.3),
        bone=choice("transform of the", list(BONES), "tibia"),
        stage=steps("registration stage", stages, stages[-1]),
    )


def explore_bones(study: Study) -> None:
    """`draw_bones` with controls."""
    first = study.with_images[0]
    explore(
        partial(draw_bones, study),
        knee_id=choice("knee", study.with_images, first),
        turn_deg=slider("turn to the patient's left (degrees)", -180, 180, 15, 30),
        tilt_deg=slider("tilt, from above (degrees)", -90, 90, 15, 15),
    )


def viewer(study: Study, knee_id: str = "") -> Widget:
    """CT and bones of a knee (default: the first) in the 3D viewer, as of `bones.viewer`."""
    images = study.knee(knee_id or study.with_images[0])
    return bones.viewer(images.ct, images.labels)


def explore_patch(study: Study) -> None:
    """`draw_patch` with controls."""
    first = study.with_patches[0]
    known = study.patches[study.patches["knee_id"].isin(study.with_patches)]
    most = 4 if study.run is None else int(known.groupby("knee_id").size().max())
    explore(
        partial(draw_patch, study),
        knee_id=choice("knee", study.with_patches, first),
        number=slider("patch of the knee", 1, most, 1, 1),
    )


def explore_agreement(study: Study) -> None:
    """`draw_agreement` with controls; those of the scanner where it is known."""
    arms = [(ARMS[arm].label, arm) for arm in study.arms]
    labels = {"ct_fwhm_mm": "CT kernel (blur)", "ct_noise_hu": "CT noise"}
    scanner = {
        name: choice(labels[name], ["all", *HALVES[name]], "all")
        for name in HALVES
        if name in study.knees
    }
    explore(
        partial(draw_agreement, study),
        arm=choice("estimates", arms, _main_arm(study)),
        biomarker=choice("biomarker", [(LABELS[name], name) for name in BIOMARKERS], "bv_tv"),
        bone=choice("bone", ["all", *BONES], "all"),
        side=choice("compartment", ["all", "medial", "lateral"], "all"),
        oa=choice("OA", ["all", "OA", "no OA"], "all"),
        **scanner,
    )
