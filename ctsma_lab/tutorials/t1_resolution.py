"""T1: what voxel size, blur and threshold do to trabeculae. Lengths in mm; arrays are (z, y, x)."""

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.ndimage import gaussian_filter
from scipy.special import erf, erfinv

from ctsma.biomarkers import local_thickness, morphometry
from ctsma.common import BIOMARKERS, LABELS
from ctsma_lab import figures
from kneesim.microstructure import FINE_VOXELS, is_bone, level_half_width, make_tile

from .exercises import Exercise, number_near, one_of
from .sliders import explore, slider

FINE_MM, N_VOXELS = 0.05, 96  # a specimen of 4.8 mm; design choice
# As in kneesim/protocol.yaml
WAVELENGTH_MM, COARSE_RATIO, BANDWIDTH, RODNESS = 0.98, 1.5, 0.2, 0.35
MIXING = 0.3  # share of the coarse wavelength, an angle; design choice
FWHM_PER_SD = 2 * np.sqrt(2 * np.log(2))
BLURS_MM = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PLATE_MM, PLATE_FWHM_MM = 0.2, 0.6  # of exercise T1.2
BLUR_MM, VOXEL_MM = 0.4, 0.1  # of exercises T1.3 to T1.5
HU_MARROW, HU_BONE = -50.0, 1450.0  # of exercise T1.4


@cache
def specimen(bv_tv: float = 0.25, seed: int = 0) -> ndarray:
    """Simulated trabecular bone (bool) in voxels of 0.05 mm, a cube of 4.8 mm."""
    tile = make_tile(np.random.default_rng(seed), COARSE_RATIO, BANDWIDTH)
    along = (np.arange(N_VOXELS) + 0.5) * FINE_MM / WAVELENGTH_MM * FINE_VOXELS
    z, y, x = np.meshgrid(along, along, along, indexing="ij")
    points = np.column_stack([x.ravel(), y.ravel(), z.ravel()])
    half_width = float(level_half_width(np.array(bv_tv), np.array(RODNESS)))
    constants = (np.full(len(points), value) for value in (RODNESS, half_width, MIXING))
    return is_bone(tile, points, *constants).reshape((N_VOXELS,) * 3)


def scan(bone: ndarray, voxel_mm: float, blur_mm: float) -> ndarray:
    """Image of a specimen: share of bone, 0 to 1, in voxels of `voxel_mm`.

    `blur_mm` is the full width at half maximum of a Gaussian; then each voxel is the mean of the
    fine voxels inside it. `voxel_mm` is 0.05, 0.1, 0.15, 0.2, 0.3 or 0.4, whole numbers of fine
    voxels that divide the specimen. The image is free of noise.
    """
    n = round(voxel_mm / FINE_MM)
    blurred = gaussian_filter(bone.astype(np.float32), blur_mm / FWHM_PER_SD / FINE_MM)
    z, y, x = (size // n for size in bone.shape)
    return blurred.reshape(z, n, y, n, x, n).mean(axis=(1, 3, 5))


def measure(mask: ndarray, voxel_mm: float) -> dict[str, float]:
    """The four biomarkers of a mask; NaN where it holds one phase only."""
    found = morphometry(mask, voxel_mm, further=False)
    return {name: found[name] for name in BIOMARKERS}


@cache
def true_biomarkers(bv_tv: float = 0.25, seed: int = 0) -> dict[str, float]:
    """The four biomarkers of a specimen itself."""
    return measure(specimen(bv_tv, seed), FINE_MM)


@cache
def thickness_map(bv_tv: float = 0.25, seed: int = 0) -> ndarray:
    """Local thickness of the bone of a specimen, mm; 0 in marrow."""
    return local_thickness(specimen(bv_tv, seed), FINE_MM)


def threshold_of_equal_volume(image: ndarray, bv_tv: float) -> float:
    """The threshold above which the share `bv_tv` of the voxels lies."""
    return float(np.quantile(image, 1 - bv_tv))


def plate_maximum(thickness_mm: float, blur_mm: float) -> float:
    """Largest share of bone in the blurred image of a plate; blur as FWHM of a Gaussian."""
    return float(erf(thickness_mm / 2 / (np.sqrt(2) * blur_mm / FWHM_PER_SD)))


def biomarkers_by_blur() -> pd.DataFrame:
    """Biomarkers over true ones against blur, threshold of equal volume, voxels of 0.1 mm."""
    bone, true = specimen(), true_biomarkers()
    rows = []
    for blur_mm in BLURS_MM:
        image = scan(bone, VOXEL_MM, blur_mm)
        found = measure(image > threshold_of_equal_volume(image, bone.mean()), VOXEL_MM)
        for name in BIOMARKERS:
            row = {"blur_mm": blur_mm, "biomarker": LABELS[name].partition(" (")[0]}
            rows.append(row | {"ratio": found[name] / true[name]})
    return pd.DataFrame(rows)


@cache
def several_specimens() -> pd.DataFrame:
    """True and apparent Tb.Th of eight specimens; apparent: blur 0.4 mm, equal volume."""
    rows = []
    for seed, bv_tv in enumerate(np.linspace(0.15, 0.36, 8).round(2), 1):
        bone = specimen(bv_tv, seed)[: N_VOXELS // 2]
        image = scan(bone, VOXEL_MM, BLUR_MM)
        mask = image > threshold_of_equal_volume(image, bone.mean())
        true = local_thickness(bone, FINE_MM)[bone].mean()
        apparent = local_thickness(mask, VOXEL_MM)[mask].mean()
        rows.append({"bv_tv": bone.mean(), "true": true, "apparent": apparent})
    return pd.DataFrame(rows)


def draw_specimen() -> Figure:
    """One slice of the specimen, and its local thickness."""
    bone, thickness = specimen(), thickness_map()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    middle, pixel_mm = N_VOXELS // 2, (FINE_MM, FINE_MM)
    figures.image(left, bone[middle], pixel_mm, "simulated bone (white), voxels 0.05 mm", (0, 1))
    shown = np.where(bone[middle], thickness[middle], np.nan)
    figures.image(right, bone[middle], pixel_mm, "local thickness", limits=(0, 3))
    colours = right.imshow(shown, "viridis", extent=(0, 4.8, 4.8, 0), interpolation="nearest")
    figure.colorbar(colours, ax=right, label="local thickness (mm)")
    return figure


def draw_plate(thickness_mm: float, blur_mm: float, voxel_mm: float, threshold: float) -> Figure:
    """Share of bone across one plate: true, blurred, sampled, and above the threshold."""
    x = np.arange(-1.2, 1.2, 0.005)
    sd = blur_mm / FWHM_PER_SD
    edges = [(x + side * thickness_mm / 2) / (np.sqrt(2) * sd) for side in (1, -1)]
    blurred = (erf(edges[0]) - erf(edges[1])) / 2
    n = int(np.ceil(1.2 / voxel_mm))
    centres = (np.arange(2 * n) - n + 0.5) * voxel_mm
    voxels = [np.mean(blurred[np.abs(x - centre) <= voxel_mm / 2]) for centre in centres[1:-1]]
    apparent_mm = voxel_mm * np.sum(np.array(voxels) > threshold)
    figure, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    inside = np.abs(x) <= thickness_mm / 2
    ax.fill_between(x, inside.astype(float), color="#CCCCCC", step="mid", label="plate")
    ax.plot(x, blurred, color=figures.PALETTE[0], label="after blur")
    steps = {"where": "mid", "color": figures.PALETTE[1]}
    ax.step(centres[1:-1], voxels, label="voxel values", **steps)
    ax.axhline(threshold, color="black", linestyle="--", linewidth=0.9, label="threshold")
    title = f"plate {thickness_mm:.2f} mm thick, apparent thickness {apparent_mm:.2f} mm"
    ax.set(xlabel="position across the plate (mm)", ylabel="share of bone", title=title)
    ax.set(ylim=(0, 1.05), xlim=(-1.2, 1.2))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_resolution(voxel_mm: float, blur_mm: float, threshold: float) -> Figure:
    """Bone, image and mask in one slice, and the biomarkers of the mask over the true ones."""
    bone, true = specimen(), true_biomarkers()
    image = scan(bone, voxel_mm, blur_mm)
    mask = image > threshold
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    middle, pixel_mm = len(image) // 2, (voxel_mm, voxel_mm)
    figures.image(axes[0], bone[N_VOXELS // 2], (FINE_MM, FINE_MM), "simulated bone", (0, 1))
    figures.image(axes[1], image[middle], pixel_mm, "image (share of bone, 0 to 1)", limits=(0, 1))
    figures.image(axes[2], mask[middle], pixel_mm, f"mask, threshold {threshold:.2f}", (0, 1))
    if mask.any() and not mask.all():
        found = measure(mask, voxel_mm)
        ratios = [found[name] / true[name] for name in BIOMARKERS]
        axes[3].barh(range(4), ratios, color=figures.PALETTE[0])
        for row, (name, ratio) in enumerate(zip(BIOMARKERS, ratios, strict=True)):
            axes[3].text(ratio, row, f" {found[name]:.2f}", va="center")
        axes[3].set_xlim(0, max(2, 1.2 * max(ratios)))
    else:
        axes[3].text(0.5, 0.5, "one phase only", transform=axes[3].transAxes, ha="center")
    axes[3].axvline(1, color="black", linewidth=0.9, linestyle="--")
    axes[3].set_yticks(range(4), [LABELS[name] for name in BIOMARKERS])
    axes[3].invert_yaxis()
    axes[3].set(xlabel="measured / true (dashed: 1)", title="biomarkers of the mask")
    return figure


def draw_by_blur(table: pd.DataFrame) -> Figure:
    """`biomarkers_by_blur` as lines."""
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    figures.lines(ax, table, "blur_mm", "ratio", "biomarker")
    ax.axhline(1, color="black", linewidth=0.9, linestyle="--")
    title = "one simulated specimen, voxels 0.1 mm, threshold of equal volume"
    ax.set(xlabel="blur, FWHM (mm)", ylabel="measured / true", title=title)
    return figure


def draw_specimens(table: pd.DataFrame) -> Figure:
    """Apparent against true Tb.Th of `several_specimens`."""
    figure, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    top = 1.1 * table[["true", "apparent"]].to_numpy().max()
    ax.plot([0, top], [0, top], color="black", linestyle="--", linewidth=0.9, label="identity")
    ax.scatter(table["true"], table["apparent"], color=figures.PALETTE[0], label="specimen")
    r = np.corrcoef(table["true"], table["apparent"])[0, 1]
    ax.set(xlabel="true Tb.Th (mm)", ylabel="apparent Tb.Th (mm)", xlim=(0, top), ylim=(0, top))
    ax.set(title=f"n = {len(table)} simulated specimens, r = {r:.2f}")
    ax.legend(frameon=False, loc="lower right")
    return figure


def explore_plate() -> None:
    """`draw_plate` with sliders."""
    explore(
        draw_plate,
        thickness_mm=slider("thickness (mm)", 0.05, 0.6, 0.05, 0.2),
        blur_mm=slider("blur, FWHM (mm)", 0.05, 1.0, 0.05, 0.3),
        voxel_mm=slider("voxel (mm)", 0.02, 0.4, 0.02, 0.1),
        threshold=slider("threshold", 0.05, 0.95, 0.05, 0.5),
    )


def explore_resolution() -> None:
    """`draw_resolution` with sliders."""
    explore(
        draw_resolution,
        voxel_mm=slider("voxel (mm)", 0.1, 0.4, 0.1, 0.1),
        blur_mm=slider("blur, FWHM (mm)", 0.05, 0.8, 0.05, 0.1),
        threshold=slider("threshold", 0.05, 0.95, 0.05, 0.5),
    )


def _exercise_image() -> ndarray:
    return scan(specimen(), VOXEL_MM, BLUR_MM)


def _thickness_ratio(threshold: float) -> float:
    mask = _exercise_image() > threshold
    return measure(mask, VOXEL_MM)["tb_th_mm"] / true_biomarkers()["tb_th_mm"]


def _equal_volume() -> float:
    return threshold_of_equal_volume(_exercise_image(), specimen().mean())


def _judge_grey_bv_tv(function: object) -> str:
    """Judge bv_tv(hu, hu_marrow, hu_bone) on coarse and fine images of two specimens."""
    for bv_tv, seed, voxel_mm in ((0.25, 0, 0.1), (0.25, 0, 0.4), (0.15, 1, 0.2)):
        image = scan(specimen(bv_tv, seed), voxel_mm, 0.5)
        hu = HU_MARROW + (HU_BONE - HU_MARROW) * image
        found = float(function(hu, HU_MARROW, HU_BONE))
        true = specimen(bv_tv, seed).mean()
        if abs(found - (image > 0.5).mean()) < 1e-3:
            return "This counts voxels above a threshold. What does the mean HU tell?"
        if not abs(found - true) <= 0.01:  # also NaN
            place = f"true BV/TV {true:.3f}, voxels {voxel_mm} mm"
            return f"Your function gives {found:.3f} ({place}). A voxel half full of bone has \
the HU halfway between marrow and bone: which share of bone has a voxel of any HU?"
    return ""


EXERCISES = {
    "T1.1": Exercise(
        number_near(
            lambda: (0.2**2 + 0.4**2) / 0.6,
            0.004,
            "Tb.Th is the mean over *bone voxels*. How many voxels has each kind of plate?",
            {
                "This is the mean over plates. Tb.Th is the mean over bone voxels, and the thick "
                "plates have twice as many of them.": lambda: 0.3
            },
        ),
        "Local thickness is weighted by volume, so thick trabeculae count more.",
    ),
    "T1.2": Exercise(
        number_near(
            lambda: plate_maximum(PLATE_MM, PLATE_FWHM_MM),
            0.02,
            "The plate is lost when its *largest* voxel value falls below the threshold. Set the "
            "sliders to 0.2 mm, 0.6 mm and a small voxel, and read the top of the blue curve. Or "
            "use plate_maximum.",
            {
                "Half of the maximum gives the right *width* of a thick plate only. Here the whole "
                "curve lies below 0.5.": lambda: 0.5,
                "This is thickness over FWHM. It is close to a sharp box, but the blur is a "
                "Gaussian.": lambda: PLATE_MM / PLATE_FWHM_MM,
            },
        ),
        "With the usual threshold of half the bone value this plate would be lost. It would "
        f"survive only above {PLATE_FWHM_MM / FWHM_PER_SD * 2 * np.sqrt(2) * erfinv(0.5):.2f} mm "
        "thickness.",
    ),
    "T1.3": Exercise(
        number_near(
            lambda: _thickness_ratio(_equal_volume()),
            0.06,
            "Find the threshold first: the share of voxels above it must be the true BV/TV (a "
            "quantile). Then measure Tb.Th of that mask, and divide by the true Tb.Th.",
            {
                "This is the ratio at the threshold 0.5, whose mask has too little bone. Choose "
                "the threshold whose mask has the true BV/TV.": lambda: _thickness_ratio(0.5),
                "This is the ratio upside down: measured over true.": lambda: (
                    1 / _thickness_ratio(_equal_volume())
                ),
            },
        ),
        "The amount of bone is right and its thickness is not: few thick trabeculae replace many "
        "thin ones. One threshold cannot make both right.",
    ),
    "T1.4": Exercise(
        _judge_grey_bv_tv,
        "Blur moves bone between voxels and keeps its sum, so the mean needs no threshold and no "
        "resolution. It needs the HU of pure bone and of pure marrow instead, which differ between "
        "patients and scanners. This is why the study calibrates to the cortex of the same knee.",
    ),
    "T1.5": Exercise(
        one_of(
            "order",
            {
                "values": "Compare the points with the dashed line of identity.",
                "both": "Compare the points with the dashed line of identity.",
                "neither": "Is the specimen with the thickest trabeculae found?",
            },
        ),
        "Apparent biomarkers rank specimens and are on another scale than the true ones. A "
        "reference from MR has this property too.",
    ),
}
