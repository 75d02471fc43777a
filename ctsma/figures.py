"""Drawing only: each function takes numbers and an `ax`, draws, and returns the `ax`.

Nothing is computed or shown here. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

LABELS = {"bv_tv": "BV/TV", "tb_th_mm": "Tb.Th (mm)", "tb_sp_mm": "Tb.Sp (mm)", "tb_n_per_mm": "Tb.N (1/mm)"}
COLOURS = {
    "hu_regression": "#999999",
    "ct_only": "#E69F00",
    "ruler_regression": "#555555",
    "ct_residual": "#F0E442",
    "ct_sma": "#0072B2",
    "ct_sma_plus": "#009E73",
    "ct_oracle": "#CC79A7",
    "mr_teacher": "#56B4E9",
    "mr_reference": "#000000",
    "femur": "#0072B2",
    "tibia": "#D55E00",
}


def image(ax: Axes, array: np.ndarray, spacing_mm: Sequence[float], title: str, limits=None, cmap="gray") -> Axes:
    """Draw a 2D slice (rows, columns), first row on top, axes in mm; `spacing_mm` is (row, column)."""
    extent = (0, array.shape[1] * spacing_mm[1], array.shape[0] * spacing_mm[0], 0)
    low, high = limits if limits is not None else np.percentile(array, (1, 99))
    ax.imshow(array, cmap=cmap, extent=extent, vmin=low, vmax=high, interpolation="nearest")
    ax.set(title=title, xlabel="mm", ylabel="mm")
    return ax


def contour(ax: Axes, mask: np.ndarray, spacing_mm: Sequence[float], colour: str, label: str | None = None) -> Axes:
    """Outline a 2D mask over a slice drawn by `image`; `spacing_mm` is (row, column)."""
    rows = (np.arange(mask.shape[0]) + 0.5) * spacing_mm[0]
    columns = (np.arange(mask.shape[1]) + 0.5) * spacing_mm[1]
    if mask.any() and not mask.all():
        ax.contour(columns, rows, mask.astype(float), levels=[0.5], colors=[colour], linewidths=1.2)
    ax.plot([], [], color=colour, label=label)
    return ax


def checkerboard(ax: Axes, first: np.ndarray, second: np.ndarray, spacing_mm, title: str, tiles: int = 8) -> Axes:
    """Draw two slices of one grid in alternating tiles, each scaled to its own 1st to 99th percentile."""
    scaled = [_unit(array) for array in (first, second)]
    rows, columns = np.indices(first.shape)
    edge = max(1, max(first.shape) // tiles)
    board = np.where((rows // edge + columns // edge) % 2 == 0, *scaled)
    return image(ax, board, spacing_mm, title, limits=(0, 1))


def blend(ax: Axes, first: np.ndarray, second: np.ndarray, spacing_mm, title: str) -> Axes:
    """Draw two slices of one grid as one colour image: first in orange, second in blue, grey where they agree."""
    one, two = (_unit(array) for array in (first, second))
    colours = np.stack([one, (one + two) / 2, two], axis=-1)
    extent = (0, first.shape[1] * spacing_mm[1], first.shape[0] * spacing_mm[0], 0)
    ax.imshow(colours, extent=extent, interpolation="nearest")
    ax.set(title=title, xlabel="mm", ylabel="mm")
    return ax


def points_by_group(ax: Axes, table: pd.DataFrame, x: str, y: str, hue: str | None = None, ylabel: str = "") -> Axes:
    """Box and every point of `y` by the groups of `x` (and `hue`: femur and tibia, or arms)."""
    palette = {name: COLOURS.get(name, "#0072B2") for name in table[hue].unique()} if hue else None
    shared = {"data": table, "x": x, "y": y, "hue": hue, "palette": palette, "ax": ax, "legend": False}
    sns.boxplot(**shared, showfliers=False, fill=False, linewidth=1)
    sns.stripplot(**(shared | {"legend": bool(hue)}), dodge=bool(hue), size=3, alpha=0.6)
    if hue:
        ax.legend(title=None, frameon=False)
    ax.set(xlabel="", ylabel=ylabel or y)
    return ax


def ratios(ax: Axes, table: pd.DataFrame, xlabel: str, ylabel: str, title: str) -> Axes:
    """One line a biomarker: ratios to a reference (columns of `table`) against its index, on a logarithmic axis."""
    ax.axhline(1, color="black", linewidth=0.8)
    styles = zip(table.items(), ("#000000", "#D55E00", "#0072B2", "#009E73"), "osD^", strict=False)
    for (name, values), colour, marker in styles:
        ax.plot(table.index, values, marker=marker, color=colour, label=LABELS[name].partition(" ")[0])
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log", ylim=(0.015, 20))
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax


def histogram(
    ax: Axes, groups: Mapping[str, np.ndarray], xlabel: str, published: Sequence[float] | None = None
) -> Axes:
    """Histograms of several groups over each other; `published` (low, high) is shaded behind them."""
    if published is not None:
        ax.axvspan(*published, color="#DDDDDD", zorder=0, label="published range")
    for (name, values), colour in zip(groups.items(), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        ax.hist(values, bins=20, histtype="step", linewidth=1.6, density=True, color=colour, label=name)
    ax.set(xlabel=xlabel, ylabel="density")
    ax.legend(frameon=False, fontsize=8)
    return ax


def agreement(ax: Axes, reference: np.ndarray, estimate: np.ndarray, title: str, colour: str) -> Axes:
    """Scatter of estimate against reference with the line of identity."""
    low, high = np.min([reference, estimate]), np.max([reference, estimate])
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle="--")
    ax.scatter(reference, estimate, s=6, alpha=0.5, color=colour, edgecolors="none")
    ax.set(xlabel="reference", ylabel="estimate", title=title, aspect="equal")
    return ax


def bland_altman(
    ax: Axes, reference: np.ndarray, estimate: np.ndarray, limits: Mapping, title: str, colour: str
) -> Axes:
    """Difference against mean with bias and 95 % limits; `limits` holds bias, loa_low, loa_high."""
    ax.scatter((reference + estimate) / 2, estimate - reference, s=6, alpha=0.5, color=colour, edgecolors="none")
    for name, style in (("bias", "-"), ("loa_low", "--"), ("loa_high", "--")):
        ax.axhline(limits[name], color="black", linewidth=0.9, linestyle=style)
        at, above = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}, (-3, 2)
        ax.annotate(f"{limits[name]:.3f}", (1, limits[name]), above, **at, fontsize=7, ha="right")
    ax.set(xlabel="mean of both", ylabel="estimate - reference", title=title)
    return ax


def forest(ax: Axes, table: pd.DataFrame, xlabel: str, published: Mapping[str, float] | None = None) -> Axes:
    """Values with intervals, one line each; `table` has label, value, low, high and colour; published: diamonds."""
    rows = np.arange(len(table))[::-1]
    for row, entry in zip(rows, table.to_dict("records"), strict=True):
        ax.plot([entry["low"], entry["high"]], [row, row], color=entry["colour"], linewidth=2)
        ax.plot(entry["value"], row, "o", color=entry["colour"], markersize=5)
        if published and entry["label"] in published:
            ax.plot(published[entry["label"]], row, "D", mfc="none", color="black", markersize=6)
    ax.set_yticks(rows, table["label"])
    ax.set_xlabel(xlabel)
    ax.grid(axis="x", alpha=0.3)
    return ax


def gains(axes: Sequence[Axes], table: pd.DataFrame, by: str, x: str, xlabel: str, alone: pd.DataFrame) -> None:
    """Left the mean ICC, right the gain with its interval, against column `x`, one line for each value of column `by`.

    `table` has icc, difference, ci_low and ci_high; `alone` the column icc_alone of the student without a teacher.
    """
    for colour, (name, line) in zip(sns.color_palette("colorblind"), table.groupby(by, sort=False), strict=False):
        axes[0].plot(line[x], line["icc"], "o-", color=colour, label=name.partition(" - ")[0])
        axes[1].plot(line[x], line["difference"], "o-", color=colour, label=name)
        axes[1].fill_between(line[x], line["ci_low"], line["ci_high"], color=colour, alpha=0.2)
    axes[0].plot(alone[x], alone["icc_alone"], "s--", color="black", label="student alone")
    axes[1].axhline(0, color="#666666", linewidth=0.8, linestyle=":")
    for ax, label in zip(axes, ("mean ICC(A,1)", "gain in mean ICC"), strict=True):
        ax.set(xlabel=xlabel, ylabel=label)
        ax.legend(frameon=False)


def ranges(ax: Axes, found: pd.DataFrame, other: pd.DataFrame, title: str) -> Axes:
    """Values with intervals over published ranges; rows as of `difficulty`, `other` the same rows of another draw."""
    for row, (name, entry) in enumerate(found[::-1].iterrows()):
        ax.plot([entry["low"], entry["high"]], [row, row], color="#CCCCCC", linewidth=11, solid_capstyle="butt")
        for part, colour, shift in ((entry, "#E69F00", -0.15), (other.loc[name], "#0072B2", 0.15)):
            ax.plot([part["ci_low"], part["ci_high"]], [row + shift] * 2, color=colour, linewidth=1.6)
            ax.plot(part["value"], row + shift, "o", color=colour, markersize=4)
    names = [name.split(".")[-1].removeprefix("auc_") for name in found.index[::-1]]
    ax.set_yticks(range(len(found)), [LABELS.get(name, name.replace("_", " ")) for name in names])
    ax.set(title=title, ylim=(-0.6, len(found) - 0.4))
    return ax


def curves(ax: Axes, table: pd.DataFrame, y: str, title: str) -> Axes:
    """Loss against epoch: one thin line a fold, coloured by arm; `table` has arm, fold, epoch, `y` (NaN: not seen)."""
    for arm, lines in table.dropna(subset=[y]).groupby("arm", sort=False):
        for number, (_, line) in enumerate(lines.groupby("fold")):
            label = arm if number == 0 else None
            ax.plot(line["epoch"], line[y], color=COLOURS.get(arm, "#0072B2"), linewidth=1, alpha=0.7, label=label)
    ax.set(xlabel="epoch", ylabel=y.replace("_", " "), title=title, yscale="log")
    ax.legend(frameon=False, fontsize=8)
    return ax


def roc(ax: Axes, false_positive: np.ndarray, true_positive: np.ndarray, label: str, colour: str, band=None) -> Axes:
    """ROC curve; `band` (low, high) are true-positive rates on the same false-positive grid."""
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.step(false_positive, true_positive, where="post", color=colour, linewidth=1.6, label=label)
    if band is not None:
        ax.fill_between(false_positive, *band, color=colour, alpha=0.12, linewidth=0, step="post")
    ax.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", xlim=(0, 1), ylim=(0, 1.01))
    return ax


def calibration(ax: Axes, table: pd.DataFrame, label: str, colour: str) -> Axes:
    """Observed share of OA against predicted probability with intervals; `table` as of `calibration_curve`."""
    errors = [table["observed"] - table["ci_low"], table["ci_high"] - table["observed"]]
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=0)
    ax.errorbar(table["predicted"], table["observed"], errors, color=colour, marker="o", capsize=3, label=label)
    ax.set(xlabel="predicted probability of OA", ylabel="observed share of OA", aspect="equal")
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), title=label)
    return ax


def decision(ax: Axes, tables: Mapping[str, pd.DataFrame]) -> Axes:
    """Decision curves by arm (`net_benefit` tables) beside treating all and treating none."""
    first = next(iter(tables.values()))
    ax.plot(first["threshold"], first["treat_all"], color="#666666", linestyle=":", label="treat all")
    ax.axhline(0, color="#666666", linewidth=0.8, label="treat none")
    for arm, table in tables.items():
        ax.plot(table["threshold"], table["model"], color=COLOURS.get(arm, "#D55E00"), linewidth=1.6, label=arm)
    ax.set(xlabel="threshold probability", ylabel="net benefit (true positives a knee)")
    ax.set_ylim(-0.15, 1.08 * max(table["model"].max() for table in tables.values()))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def places(ax: Axes, points_mm: np.ndarray, values: np.ndarray, names: Sequence, limit: float, label: str) -> Axes:
    """Named dots at (column, row) mm over a slice drawn by `image`, blue below 0 and red above, with a scale."""
    drawn = ax.scatter(*points_mm.T, c=values, cmap="RdBu_r", vmin=-limit, vmax=limit, s=170, edgecolors="black")
    for (x, y), name, value in zip(points_mm, names, values, strict=True):
        ax.text(x, y, name, ha="center", va="center", fontsize=7, color="white" if abs(value) > limit / 2 else "black")
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8, label=label)
    return ax


def overlay(ax: Axes, values: np.ndarray, spacing_mm: Sequence[float], limits: Sequence[float]) -> Axes:
    """Lay a map in colour over a slice drawn by `image`, on the same pixels; NaN leaves the slice free."""
    extent = (0, values.shape[1] * spacing_mm[1], values.shape[0] * spacing_mm[0], 0)
    ax.imshow(values, cmap="viridis", extent=extent, vmin=limits[0], vmax=limits[1], interpolation="nearest", alpha=0.6)
    return ax


def standing(ax: Axes, table: pd.DataFrame, known: np.ndarray, xlabel: str) -> Axes:
    """Values with intervals over others' range: `table` has value, low, high; `known` (rows, 3) low, middle, high."""
    for row, (entry, (low, middle, high)) in enumerate(zip(table[::-1].to_dict("records"), known[::-1], strict=True)):
        ax.plot([low, high], [row, row], color="#CCCCCC", linewidth=11, solid_capstyle="butt")
        ax.plot([middle, middle], [row - 0.2, row + 0.2], color="#888888", linewidth=1)
        ax.plot([entry["low"], entry["high"]], [row, row], color="#0072B2", linewidth=1.6)
        ax.plot(entry["value"], row, "o", color="#0072B2", markersize=5)
    ax.set_yticks(range(len(table)), [str(name).replace("_", ", ") for name in table.index[::-1]])
    ax.set(xlabel=xlabel, ylim=(-0.6, len(table) - 0.4))
    return ax


def _unit(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, (1, 99))
    return np.clip((array - low) / max(high - low, 1e-9), 0, 1)
