"""Draw the README's pipeline figure, docs/figures/pipeline.png, with images of a knee.

Command: `python -m ctsma_lab.pipeline_figure --run runs/full`
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from ctsma.cohort import read_knee_volume, read_manifest
from ctsma.files import atomic
from ctsma_lab.views import anatomical_plane

MR, CT, NEUTRAL = "#D55E00", "#0072B2", "#444444"  # Okabe and Ito
WIDTH, HEIGHT = 100.0, 51.5  # units of the drawing, a tenth of an inch each


def main(arguments: list[str] | None = None) -> None:
    """Draw the figure from one knee of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/full"), help="folder of a run")
    parser.add_argument("--knee", default="k0000", help="knee_id")
    parser.add_argument("--patch", type=int, default=2, help="row of the knee's patches")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/pipeline.png"))
    chosen = parser.parse_args(arguments)
    figure = draw(read_pictures(chosen.run, chosen.knee, chosen.patch))
    with atomic(chosen.out) as temporary:
        figure.savefig(temporary, dpi=160)


def read_pictures(run: Path, knee_id: str, patch: int) -> dict[str, tuple[np.ndarray, float]]:
    """Slices of a knee and of one patch, each with its ratio of row to column spacing."""
    manifest = read_manifest(run / "cohort" / "simulated.csv")
    knee = manifest[manifest["knee_id"] == knee_id].iloc[0]
    pictures = {}
    for column in ("mr", "ct"):
        image = read_knee_volume(knee, column, manifest.attrs["root"])
        array, (row_mm, column_mm) = anatomical_plane(image, "sagittal", share=0.3)
        pictures[column] = array, row_mm / column_mm
    with np.load(run / "patches" / f"{knee_id}.npz") as arrays:
        for column in ("mr", "ct"):
            array = arrays[column][patch].astype(float)
            pictures[f"{column}_patch"] = array[len(array) // 2], 1.0
    return pictures


def draw(pictures: dict[str, tuple[np.ndarray, float]]) -> plt.Figure:
    """The method from left to right: the MR path above, the CT path below."""
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")

    ax.add_patch(plt.Rectangle((0.8, 25), 80.2, 25.6, color=MR, alpha=0.06, linewidth=0))
    ax.add_patch(plt.Rectangle((0.8, 0.8), 80.2, 23.0, color=CT, alpha=0.06, linewidth=0))
    ax.text(1.8, 48.6, "Training only: MR", color=MR, weight="bold", fontsize=12, va="center")
    ax.text(1.8, 2.9, "Training and use: CT", color=CT, weight="bold", fontsize=12, va="center")

    picture(figure, pictures["mr"], (2, 28.5, 15, 15), MR)
    picture(figure, pictures["ct"], (2, 6, 15, 15), CT)
    ax.text(9.5, 45, "MR, balanced FFE", ha="center", fontsize=10)
    ax.text(9.5, 21.9, "CT", ha="center", fontsize=10)

    box(ax, (20.5, 17.5, 15, 14), "Registration\nwhole knee\nfemur and tibia\ntrabeculae", NEUTRAL)
    arrow(ax, (17.3, 33.5), (20.3, 28.5))
    arrow(ax, (17.3, 15.5), (20.3, 20.5))
    arrow(ax, (35.7, 28.5), (39.2, 33.5))
    arrow(ax, (35.7, 20.5), (39.2, 15.5))

    picture(figure, pictures["mr_patch"], (39.5, 29, 14, 14), MR)
    picture(figure, pictures["ct_patch"], (39.5, 6, 14, 14), CT)
    ax.text(46.5, 44.4, "MR patch", ha="center", fontsize=10)
    ax.text(46.5, 21.3, "CT patch, same bone", ha="center", fontsize=10)
    arrow(ax, (53.8, 39), (57.2, 43.5))
    arrow(ax, (53.8, 33), (57.2, 31.5))
    arrow(ax, (53.8, 13), (57.2, 13))

    box(ax, (57.5, 40.5, 22, 8), "Reference biomarkers\nmeasured on MR", MR)
    box(ax, (57.5, 27.5, 22, 8), "Teacher\n3D network on MR", MR)
    box(ax, (57.5, 8, 22, 10), "Student\n3D network on CT\nestimates the biomarkers", CT)
    arrow(ax, (68.5, 27.2), (68.5, 18.3), MR)
    ax.text(67.5, 21.8, "distillation", ha="right", fontsize=10, style="italic", color=MR)

    box(ax, (83.5, 27, 15, 9), "Agreement\nICC", NEUTRAL)
    box(ax, (83.5, 3.5, 15, 13.5), "Diagnosis\nTransformer\nover patches\nROC, AUC", NEUTRAL)
    arrow(ax, (79.8, 44.5), (91, 36.3))
    arrow(ax, (79.8, 16), (88.5, 26.7))
    arrow(ax, (79.8, 10.5), (83.2, 10.5))
    return figure


def picture(figure: plt.Figure, shown: tuple[np.ndarray, float], place: tuple, colour: str) -> None:
    """An image at (x, y, width, height) in units of the drawing, with a coloured frame."""
    array, aspect = shown
    x, y, width, height = place
    ax = figure.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
    low, high = np.percentile(array, (1, 99.5))
    ax.imshow(array, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(color=colour, linewidth=1.5)


def box(ax: Axes, place: tuple, text: str, colour: str) -> None:
    """A rounded box at (x, y, width, height); the first line of its text is bold."""
    x, y, width, height = place
    style = {"facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
    ax.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1", **style))
    first, _, rest = text.partition("\n")
    lines = 1 + text.count("\n")
    middle = x + width / 2
    top = y + height / 2 + 0.95 * (lines - 1)
    ax.text(middle, top, first, ha="center", va="center", weight="bold", fontsize=11)
    ax.text(middle, top - 1.3, rest, ha="center", va="top", fontsize=10, linespacing=1.25)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = NEUTRAL) -> None:
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "mutation_scale": 14}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    main()
