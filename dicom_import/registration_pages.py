"""Quality control of registration: one page per knee and one of all knees, readable without script.

On a page of a knee two images of the same planes alternate while the pointer is over them: the MR
before and after registration, and CT and MR.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import SimpleITK as sitk
from PIL import Image, ImageDraw
from scipy import ndimage

from ctsma.cohort import read_knee_volume
from ctsma.common import BONES, InputError
from ctsma.files import atomic, write_text
from ctsma.patches import patch_centres
from ctsma.registration import Registration, read_stages
from ctsma.registration.quality import MAX_FLEXION_DEG, MIN_CORRELATION, MIN_OVERLAP
from ctsma.registration.transforms import Rigid, image_centre, rigid_transform

TEMPLATES = Path(__file__).parent / "templates"
# Directions (LPS) of columns, rows and normal of a plane, and the letters of its left, right, top
# and bottom edge.
PLANES = {
    "sagittal": (((0, 1, 0), (0, 0, -1), (1, 0, 0)), "APSI"),
    "coronal": (((1, 0, 0), (0, 0, -1), (0, 1, 0)), "RLSI"),
    "axial": (((1, 0, 0), (0, 1, 0), (0, 0, 1)), "RLAP"),
}
FILES = ("ct.webp", "mr.webp", "before.webp", "outlines.png")  # of a knee, after its name
PIXELS, PIXEL_MM = 300, 0.3  # of one view: 90 mm hold the joint (design choice)
CT_HU = (-200.0, 1000.0)  # black and white
PATCH_MM = 10.5  # edge of a patch
PATCHES_PER_COMPARTMENT = 4  # drawn where no patches were cut yet
MAX_BYTES = 6_600  # of one image: a page has less than 40 kB, that of 80 knees less than 3 MB
QUALITIES = range(80, 0, -5)  # of WebP, the highest that fits is taken
# Palette of the outlines: none, femur, tibia, patches (Okabe and Ito), letters and their rim.
PALETTE = (0, 0, 0, 86, 180, 233, 230, 159, 0, 0, 158, 115, 255, 255, 255, 0, 0, 0)
FEMUR_INK, TIBIA_INK, PATCH_INK, LETTER_INK, RIM_INK = 1, 2, 3, 4, 5


def draw_knee(
    knee: Mapping,
    folder: Path,
    *,
    root: str,
    registration_folder: str,
    patches_folder: str,
    image_folder: str,
) -> dict:
    """Draw the images of one registered knee of a run (for `map_knees`).

    Parameters
    ----------
    registration_folder, patches_folder : of the run. image_folder : where the images are written;
        they are the files of the record.
    """
    knee_id = knee["knee_id"]
    ct, mr = (read_knee_volume(knee, column, root) for column in ("ct", "mr"))
    masks = sitk.ReadImage(str(Path(registration_folder) / f"{knee_id}_mask.nii.gz"))
    stages = read_stages(registration_folder, knee_id)
    table = Path(patches_folder) / f"{knee_id}_table.csv"
    centres = pd.read_csv(table) if table.exists() else None
    draw_images(knee, ct, mr, masks, list(stages.values())[-1], image_folder, centres)
    written = [Path(image_folder) / f"{knee_id}_{name}" for name in FILES]
    return {"files": [os.path.relpath(file, folder) for file in written]}


def draw_images(
    knee: Mapping,
    ct: sitk.Image,
    mr: sitk.Image,
    masks: sitk.Image,
    transforms: Mapping[str, Rigid],
    folder: str | Path,
    centres: pd.DataFrame | None = None,
) -> None:
    """Write <knee>_ct, _mr and _before (WebP) and <knee>_outlines (PNG): three planes of each bone.

    Parameters
    ----------
    masks : bone labels on the grid of the CT. transforms : {bone: from CT to MR points}.
    centres : compartment, x, y, z of the patches; None draws places as the study does.
    """
    if centres is None:
        centres = _places(masks, knee["side"])
    shift = image_centre(mr) - image_centre(ct)
    unregistered = rigid_transform(np.eye(3), image_centre(ct), shift)
    shown = {"ct": [], "mr": [], "before": [], "outlines": []}
    for bone in BONES:
        for plane in PLANES:
            grid = _plane_grid(plane, bone, masks, centres)
            shown["ct"].append(sample_plane(ct, grid))
            shown["mr"].append(sample_plane(mr, grid, transforms[bone]))
            shown["before"].append(sample_plane(mr, grid, unregistered))
            shown["outlines"].append(_outlines(plane, grid, masks, centres))
    limits = np.nanpercentile(shown["mr"], (1, 99.5)) if np.isfinite(shown["mr"]).any() else (0, 1)
    stem = f"{knee['knee_id']}_"
    for name in ("ct", "mr", "before"):
        low, high = CT_HU if name == "ct" else limits
        grey = np.nan_to_num(255 * (_montage(shown[name]) - low) / max(high - low, 1e-9))
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).reduce(2)
        _write_small(image, Path(folder) / f"{stem}{name}.webp")
    outlines = Image.fromarray(_montage(shown["outlines"]))
    outlines.putpalette(PALETTE)
    with atomic(Path(folder) / f"{stem}outlines.png") as temporary:
        outlines.save(temporary, bits=4, transparency=0, optimize=True)


def sample_plane(
    image: sitk.Image, grid: sitk.Image, transform: sitk.Transform | None = None
) -> np.ndarray:
    """An image (rows, columns) on a grid of one slice, linear, NaN outside the image.

    `transform` maps points of the grid to points of the image (None: they are the same).
    """
    outside, transform = float("nan"), transform or sitk.Transform()
    sampled = sitk.Resample(image, grid, transform, sitk.sitkLinear, outside, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(sampled)[0]


def metrics_row(result: Registration) -> dict:
    """Flag, flexion and metrics of a registration, named as `register_pair` names them."""
    row = {"flagged": result.flagged, "flexion_deg": result.flexion_deg}
    for bone, metrics in result.metrics.items():
        row |= {f"{name}_{bone}": value for name, value in metrics.items()}
    return row


def write_pages(
    folder: str | Path, rows: Sequence[Mapping], warnings: Sequence[str] = (), home: str = ""
) -> Path:
    """Write index.html and one page per knee beside the images of `draw_images` in `folder`/images.

    Parameters
    ----------
    rows : one per knee: knee_id, side, error, the items of `metrics_row` where it was registered,
        and where known tre_<bone> (mm), n_patches, n_flagged and findings (sentences).
    warnings : what stands on top of every page. home : link to the report that holds the pages.
    """
    folder, rows = Path(folder), sorted(rows, key=_badness)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    limits = {"correlation": MIN_CORRELATION, "overlap": MIN_OVERLAP, "flexion": MAX_FLEXION_DEG}
    shared = {"limits": limits, "warnings": warnings, "home": home, "bones": list(BONES)}
    page = environment.get_template("registration_knee.html.jinja")
    for n, row in enumerate(rows):
        has_images = (folder / "images" / f"{row['knee_id']}_outlines.png").exists()
        beside = {"worse": rows[n - 1] if n else None, "better": (rows[n + 1 :] or [None])[0]}
        html = page.render(knee=row, has_images=has_images, **beside, **shared)
        write_text(folder / f"{row['knee_id']}.html", html)
    known = {name: any(name in row for row in rows) for name in ("tre_femur", "n_patches")}
    group = environment.get_template("registration_group.html.jinja")
    return write_text(folder / "index.html", group.render(knees=rows, known=known, **shared))


def _badness(row: Mapping) -> tuple:
    """Order of the knees: those with an error, flagged ones, then by their lower correlation."""
    lowest = min((row.get(f"correlation_{bone}") or 0.0 for bone in BONES), default=0.0)
    return (not row.get("error"), not row.get("flagged"), lowest, row["knee_id"])


def _places(masks: sitk.Image, side: str) -> pd.DataFrame:
    """Places of patches; the middle of each bone where the joint surface is not found."""
    try:
        found = patch_centres(masks, side, PATCHES_PER_COMPARTMENT, np.random.default_rng(0))
        if len(found):
            return found
    except InputError:
        pass
    return pd.DataFrame(columns=["compartment", "x", "y", "z"])


def _plane_grid(plane: str, bone: str, masks: sitk.Image, centres: pd.DataFrame) -> sitk.Image:
    """Grid of a plane through the first patch of a bone, else through the bone's middle."""
    own = centres[centres["compartment"].str.startswith(bone)][["x", "y", "z"]].to_numpy(float)
    through = own[0] if len(own) else _centroid(masks, bone)
    every = centres[["x", "y", "z"]].to_numpy(float)
    middle = every.mean(axis=0) if len(every) else through
    axes = np.array(PLANES[plane][0], float)
    centre = middle + axes[2] * ((through - middle) @ axes[2])
    grid = sitk.Image([PIXELS, PIXELS, 1], sitk.sitkUInt8)
    grid.SetSpacing([PIXEL_MM] * 3)
    grid.SetDirection(axes.T.ravel().tolist())
    half = (PIXELS - 1) / 2 * PIXEL_MM
    grid.SetOrigin((centre - half * (axes[0] + axes[1])).tolist())
    return grid


def _centroid(masks: sitk.Image, bone: str) -> np.ndarray:
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(masks)
    return np.array(shape.GetCentroid(BONES[bone]))


def _outlines(plane: str, grid: sitk.Image, masks: sitk.Image, centres: pd.DataFrame) -> np.ndarray:
    """Palette indices: bone contours, squares of patches that the plane cuts, and letters."""
    labels = sitk.Resample(masks, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    labels, ink = sitk.GetArrayFromImage(labels)[0], np.zeros((PIXELS, PIXELS), np.uint8)
    for bone, colour in (("femur", FEMUR_INK), ("tibia", TIBIA_INK)):
        mask = labels == BONES[bone]
        ink[mask & ~ndimage.binary_erosion(mask, iterations=2, border_value=1)] = colour
    image = Image.fromarray(ink)
    draw = ImageDraw.Draw(image)
    draw.fontmode = "1"  # no grey: every value is an index
    half = PATCH_MM / 2 / PIXEL_MM
    for point in centres[["x", "y", "z"]].to_numpy(float).tolist():
        x, y, off_plane = grid.TransformPhysicalPointToContinuousIndex(point)
        if abs(off_plane) < half:
            draw.rectangle((x - half, y - half, x + half, y + half), outline=PATCH_INK, width=2)
    end, middle = PIXELS - 14, PIXELS // 2
    edges = ((14, middle), (end, middle), (middle, 14), (middle, end))
    for letter, (x, y) in zip(PLANES[plane][1], edges, strict=True):
        for dx, dy in ((-2, 0), (2, 0), (0, -2), (0, 2)):
            draw.text((x + dx, y + dy), letter, fill=RIM_INK, anchor="mm", font_size=20)
        draw.text((x, y), letter, fill=LETTER_INK, anchor="mm", font_size=20)
    return np.array(image)


def _montage(views: Sequence[np.ndarray]) -> np.ndarray:
    """Views of all planes side by side, one row per bone."""
    columns = len(PLANES)
    return np.vstack([np.hstack(views[n : n + columns]) for n in range(0, len(views), columns)])


def _write_small(image: Image.Image, file: Path) -> None:
    """Write a WebP of at most MAX_BYTES, or of the lowest quality where none is so small."""

    def encoded(quality: int) -> bytes:
        stream = BytesIO()
        image.save(stream, "WebP", quality=quality)
        return stream.getvalue()

    # Bisection: the size falls with the quality.
    first = bisect_left(QUALITIES, True, key=lambda quality: len(encoded(quality)) <= MAX_BYTES)
    with atomic(file) as temporary:
        temporary.write_bytes(encoded(QUALITIES[min(first, len(QUALITIES) - 1)]))
