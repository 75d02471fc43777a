"""Drawing only: each function draws numbers on an `ax` and returns it, and computes nothing.

The first argument is always `ax` (matplotlib Axes), then come the data (slices, masks: 2D arrays;
tables: DataFrames), then labels. Arms take their label and colour from `ctsma.distillation.ARMS`.
All colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ctsma.arms import ARMS
from ctsma.common import LABELS  # noqa: F401 (notebooks take it from here)

ARM_LABELS = {name: arm.label for name, arm in ARMS.items()}
COLOURS = {name: arm.colour for name, arm in ARMS.items()}
COLOURS |= {"femur": "#0072B2", "tibia": "#D55E00"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Left, right, top and bottom edge of a slice whose image is in LPS order
ORIENTATION = {"sagittal": "APSI", "coronal": "RLSI", "axial": "RLAP"}
LABEL_WIDTH = 40  # characters from which a label is broken at its first comma (design choice)
_EDGES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))


def colour_of(name: str) -> str:
    """Colour of an arm, of a model on an arm's estimates ("ct_sma, logistic"), or of a bone."""
    return COLOURS.get(name.partition(",")[0].partition(" +")[0], "#D55E00")


def label_of(name: str) -> str:
    """Label of an arm or of a model on an arm's estimates; any other name as it is."""
    arm = name.partition(",")[0].partition(" +")[0]
    return ARM_LABELS.get(arm, arm) + name.removeprefix(arm)


def wrapped(label: str) -> str:
    """A label in which long lines are broken at their first comma."""
    lines = []
    for line in label.split("\n"):
        lines.append(line.replace(", ", ",\n", 1) if len(line) > LABEL_WIDTH else line)
    return "\n".join(lines)


def image(
    ax: Axes,
    array: np.ndarray,
    spacing_mm: Sequence[float],
    title: str = "",
    limits=None,
    cmap="gray",
    orientation=None,
) -> Axes:
    """Draw a 2D slice (rows, columns), first row on top, axes in mm.

    `spacing_mm` is (row, column). `limits` are the values shown black and white (default: 1st and
    99th percentile). `orientation` names the left, right, top and bottom edge, for example
    `ORIENTATION["sagittal"]`.
    """
    low, high = np.percentile(array, (1, 99)) if limits is None else limits
    pixels = {"extent": _extent(array, spacing_mm), "interpolation": "nearest"}
    ax.imshow(array, cmap, vmin=low, vmax=high, **pixels)
    ax.set(title=title, xlabel="mm", ylabel="mm")
    for text, (x, y) in zip(orientation or (), _EDGES, strict=False):
        if not text:
            continue
        style = {"color": "white", "backgroundcolor": "#00000080", "fontsize": 8}
        ax.text(x, y, text, transform=ax.transAxes, ha="center", va="center", **style)
    return ax


def contour(
    ax: Axes, mask: np.ndarray, spacing_mm: Sequence[float], colour: str, label=None
) -> Axes:
    """Outline a 2D mask over a slice drawn by `image`; `spacing_mm` is (row, column)."""
    rows = (np.arange(mask.shape[0]) + 0.5) * spacing_mm[0]
    columns = (np.arange(mask.shape[1]) + 0.5) * spacing_mm[1]
    if mask.any() and not mask.all():
        outline = mask.astype(float)
        ax.contour(columns, rows, outline, levels=[0.5], colors=[colour], linewidths=1.2)
    ax.plot([], [], color=colour, label=label)
    return ax


def overlay(ax: Axes, values: np.ndarray, spacing_mm: Sequence[float], limits) -> Axes:
    """Lay a colour map over a slice drawn by `image`, on the same pixels; NaN is transparent."""
    pixels = {"extent": _extent(values, spacing_mm), "interpolation": "nearest"}
    ax.imshow(values, "viridis", vmin=limits[0], vmax=limits[1], alpha=0.6, **pixels)
    return ax


def checkerboard(
    ax: Axes,
    first: np.ndarray,
    second: np.ndarray,
    spacing_mm: Sequence[float],
    title: str,
    orientation=None,
    tiles=8,
) -> Axes:
    """Two slices of one grid in alternating tiles, each scaled to its 1st to 99th percentile."""
    rows, columns = np.indices(first.shape)
    edge = max(1, max(first.shape) // tiles)
    use_first = (rows // edge + columns // edge) % 2 == 0
    board = np.where(use_first, _to_unit_range(first), _to_unit_range(second))
    return image(ax, board, spacing_mm, title, limits=(0, 1), orientation=orientation)


def blend(
    ax: Axes,
    first: np.ndarray,
    second: np.ndarray,
    spacing_mm: Sequence[float],
    title: str,
    orientation=None,
) -> Axes:
    """Two slices of one grid as one image: first orange, second blue, grey where they agree."""
    red, blue = _to_unit_range(first), _to_unit_range(second)
    colours = np.stack([red, (red + blue) / 2, blue], axis=-1)
    return image(ax, colours, spacing_mm, title, limits=(0, 1), orientation=orientation)


def points_by_group(ax: Axes, table: pd.DataFrame, x: str, y: str, hue=None, ylabel="") -> Axes:
    """Box and every point of column `y` by the groups of column `x` (and `hue`: bones or arms)."""
    import seaborn as sns  # a second to import, for this figure alone

    palette = {name: colour_of(name) for name in table[hue].unique()} if hue else None
    shared = {"data": table, "x": x, "y": y, "hue": hue, "palette": palette, "ax": ax}
    sns.boxplot(**shared, legend=False, showfliers=False, fill=False, linewidth=1)
    sns.stripplot(**shared, legend=bool(hue), dodge=bool(hue), size=3, alpha=0.6)
    if hue:
        ax.legend(title=None, frameon=False)
    groups = [text.get_text().replace("_", " ") for text in ax.get_xticklabels()]
    ax.set_xticks(ax.get_xticks(), groups)
    ax.set(xlabel="", ylabel=ylabel or y)
    return ax


def histogram(ax: Axes, groups: Mapping, xlabel: str, published=None) -> Axes:
    """Histograms of several groups over each other; `published` (low, high) is shaded behind."""
    if published is not None:
        ax.axvspan(*published, color="#DDDDDD", zorder=0, label="published range")
    style = {"bins": 20, "histtype": "step", "linewidth": 1.6, "density": True}
    for (name, values), colour in zip(groups.items(), PALETTE, strict=False):
        ax.hist(values, color=colour, label=name, **style)
    ax.set(xlabel=xlabel, ylabel="density")
    ax.legend(frameon=False, fontsize=8)
    return ax


def intervals(ax: Axes, table: pd.DataFrame, xlabel: str, offset=0.0) -> Axes:
    """Values with intervals, one row each, first row on top.

    `table` has label, value, low and high. Optional columns: colour; published (a diamond);
    range_low, range_high (a grey bar behind the value, for example published ranges or percentiles
    of other knees); range_middle (their median). A second call with `offset` (share of a row,
    positive: down) adds a second value to the same rows.
    """
    heights = np.arange(len(table))[::-1]
    for height, row in zip(heights, table.to_dict("records"), strict=True):
        colour, at = row.get("colour", PALETTE[0]), height - offset
        if "range_low" in row:
            ends = [row["range_low"], row["range_high"]]
            ax.plot(ends, [height] * 2, color="#CCCCCC", linewidth=11, solid_capstyle="butt")
        if "range_middle" in row:
            ax.vlines(row["range_middle"], height - 0.2, height + 0.2, color="#888888", linewidth=1)
        ax.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=1.8)
        ax.plot(row["value"], at, "o", color=colour, markersize=4.5)
        if "published" in row:
            ax.plot(row["published"], at, "D", markerfacecolor="none", color="black", markersize=6)
    ax.set_yticks(heights, [wrapped(label) for label in table["label"]], fontsize=9)
    ax.set(xlabel=xlabel, ylim=(-0.6, len(table) - 0.4))
    ax.grid(axis="x", alpha=0.3)
    return ax


def lines(ax: Axes, table: pd.DataFrame, x: str, y: str, group: str, band=None) -> Axes:
    """Column `y` against column `x`, one line per value of column `group`.

    `band` names two columns, the lower and upper end of a shaded interval.
    """
    for colour, (name, rows) in zip(PALETTE, table.groupby(group, sort=False), strict=False):
        ax.plot(rows[x], rows[y], "o-", color=colour, markersize=4, label=name)
        if band is not None:
            low, high = band
            ax.fill_between(rows[x], rows[low], rows[high], color=colour, alpha=0.2, linewidth=0)
    ax.legend(frameon=False, fontsize=8)
    return ax


def curves(ax: Axes, table: pd.DataFrame, y: str, title: str) -> Axes:
    """Loss (column `y`) against epoch, one thin line per fold and seed, coloured by arm.

    `table` has arm, fold, epoch and `y`; rows where `y` is NaN are left out.
    """
    keys = ["fold", "seed"] if "seed" in table else ["fold"]
    for arm, rows in table.dropna(subset=[y]).groupby("arm", sort=False):
        style = {"color": colour_of(arm), "linewidth": 1, "alpha": 0.7}
        for _, line in rows.groupby(keys):
            ax.plot(line["epoch"], line[y], **style)
        ax.plot([], [], label=label_of(arm), **style)
    ax.set(
        xlabel="epoch", ylabel=y.replace("_", " ").replace("mse", "MSE"), title=title, yscale="log"
    )
    ax.legend(frameon=False, fontsize=8)
    return ax


def scatter(ax: Axes, reference: np.ndarray, estimate: np.ndarray, title: str, colour: str) -> Axes:
    """Estimate against reference, with the line of identity."""
    low, high = np.min([reference, estimate]), np.max([reference, estimate])
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle="--")
    ax.scatter(reference, estimate, s=6, alpha=0.5, color=colour, edgecolors="none")
    ax.set(xlabel="reference", ylabel="estimate", title=title, aspect="equal")
    return ax


def bland_altman(
    ax: Axes, reference: np.ndarray, estimate: np.ndarray, limits, title: str, colour: str
) -> Axes:
    """Difference against mean, with bias and limits; `limits` holds bias, loa_low and loa_high."""
    middle, difference = (reference + estimate) / 2, estimate - reference
    ax.scatter(middle, difference, s=6, alpha=0.5, color=colour, edgecolors="none")
    for name, style in (("bias", "-"), ("loa_low", "--"), ("loa_high", "--")):
        ax.axhline(limits[name], color="black", linewidth=0.9, linestyle=style)
        place = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(0.99, limits[name], f"{limits[name]:.3f}", fontsize=9, **place)
    ax.set(xlabel="mean of both", ylabel="estimate - reference", title=title)
    return ax


def roc(
    ax: Axes, false_positive: np.ndarray, true_positive: np.ndarray, label, colour: str, band=None
) -> Axes:
    """ROC curve; `band` (low, high) are true-positive rates on the same false-positive grid."""
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.step(false_positive, true_positive, where="post", color=colour, linewidth=1.6, label=label)
    if band is not None:
        low, high = band
        ax.fill_between(false_positive, low, high, color=colour, alpha=0.15, lw=0, step="post")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", ylim=(0, 1.01))
    return ax


def calibration(ax: Axes, table: pd.DataFrame, title: str, colour: str) -> Axes:
    """Observed share of OA against predicted probability; `table` as of `calibration_curve`."""
    errors = [table["observed"] - table["ci_low"], table["ci_high"] - table["observed"]]
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.errorbar(table["predicted"], table["observed"], errors, color=colour, marker="o", capsize=3)
    ax.set(xlabel="predicted probability of OA", ylabel="observed share of OA", aspect="equal")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), title=title)
    return ax


def decision(ax: Axes, tables: Mapping) -> Axes:
    """Decision curves by model (`net_benefit` tables) beside treating all knees and none."""
    first = next(iter(tables.values()))
    ax.plot(first["threshold"], first["treat_all"], ":", color="#666666", label="treat all")
    ax.axhline(0, color="#666666", linewidth=0.8, label="treat none")
    for name, table in tables.items():
        style = {"color": colour_of(name), "linestyle": "--" if "," in name else "-"}
        ax.plot(table["threshold"], table["model"], label=label_of(name), **style)
    ax.set(xlabel="threshold probability", ylabel="net benefit (true positives per knee)")
    ax.set_ylim(bottom=-0.15)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _extent(array, spacing_mm):
    return 0, array.shape[1] * spacing_mm[1], array.shape[0] * spacing_mm[0], 0


def _to_unit_range(array):
    low, high = np.percentile(array, (1, 99))
    return np.clip((array - low) / max(high - low, 1e-9), 0, 1)
