"""One page about one knee with its pictures inside: what was found, where, how certain, and compared with whom."""

import base64
import html
import io

import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib.figure import Figure

from ctsma import figures
from ctsma.cohort import BIOMARKERS, BONES, COMPARTMENTS

from .knee import HALF_MM, Knee

WINDOW_HU = (-200.0, 1000.0)  # marrow to cortex (our choice)
PLACES = ("medial", "lateral")
CROP_MM = 34.0  # half the height of the pictures, around the joint (our choice)
STYLE = """
body{max-width:62rem;margin:1.5rem auto;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;color:#222}
img{max-width:100%} table{border-collapse:collapse;margin:.6rem 0} .note{color:#666;font-size:13px}
td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem;text-align:left} li,.warn{color:#a33}
"""


def knee_page(numbers: dict, knee: Knee, maps: dict[str, sitk.Image], about: dict) -> str:
    """HTML of one knee, pictures embedded, nothing loaded from elsewhere.

    numbers : what prediction.json holds. maps : of `biomarker_maps`. about : model.json.
    """
    title = f"Knee {html.escape(numbers['knee_id'])}, {'right' if numbers['side'] == 'R' else 'left'}"
    parts = [f"<h1>{title}</h1>", _warnings(knee.warnings), _table(knee.compartments, about), _oa(numbers["oa"], about)]
    parts += [_picture(_slices(knee, maps), "Slices of the CT with bone outlines, patches, and the map of BV/TV")]
    parts += [_picture(_standing(knee.compartments, about), "The knee among the knees of training"), _origin(numbers)]
    head = f"<meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _warnings(warnings: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in warnings)
    return f"<p class='warn'>This CT lies at the edge of what the model knows:</p><ul>{items}</ul>" if items else ""


def _table(compartments: pd.DataFrame, about: dict) -> str:
    level = f"{100 * about['intervals']['level']:.0f} %"
    head = "".join(f"<th>{figures.LABELS[name]}</th>" for name in BIOMARKERS)
    rows = [f"<tr><th>compartment</th><th>patches</th>{head}</tr>"]
    for place, row in compartments.iterrows():
        cells = "".join(f"<td>{_cell(row, name)}</td>" for name in BIOMARKERS)
        rows.append(f"<tr><td>{place.replace('_', ', ')}</td><td>{row['n_patches']:.0f}</td>{cells}</tr>")
    note = f"Mean over a compartment's patches ({level} interval of the MR reference) and percentile among the "
    note += f"{about['training']['n_knees']} knees of training. No interval: too few knees to calibrate one."
    return f"<table>{''.join(rows)}</table><p class='note'>{note}</p>"


def _cell(row: pd.Series, name: str) -> str:
    if np.isnan(row[name]):
        return "no patch"
    interval = "" if np.isnan(row[f"{name}_low"]) else f" ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
    return f"{row[name]:.3f}{interval}<br><span class='note'>percentile {row[f'{name}_percentile']:.0f}</span>"


def _oa(oa: dict, about: dict) -> str:
    if oa["probability"] is None:
        return "<p>No probability of osteoarthritis: the model knew too few labelled knees.</p>"
    found = about["oa"]
    said = f"Probability of osteoarthritis: <b>{oa['probability']:.2f}</b> (share in training "
    said += f"{found['n_oa'] / found['n_knees']:.2f}, {found['n_knees']} knees)."
    if oa["auc"]:
        said += (
            f" AUC {oa['auc']['auc']:.2f} ({oa['auc']['ci_low']:.2f} to {oa['auc']['ci_high']:.2f}), cross-validated"
        )
        said += " by subject." if not about["metrics"]["oa_calibration"] else _calibrated(about)
    return f"<p>{said}</p>"


def _calibrated(about: dict) -> str:
    slope = about["metrics"]["oa_calibration"]["slope"]
    if slope is None:
        return " by subject."
    hint = "too far from the share in training" if slope < 1 else "too near to the share in training"
    return f" by subject; calibration slope {slope:.2f} (ideal 1: such probabilities lie {hint})."


def _slices(knee: Knee, maps: dict[str, sitk.Image]) -> Figure:
    """A coronal slice and a sagittal one through each side: bone outlines, patch centres nearby, map of BV/TV."""
    usable = knee.patches[knee.patches["flag"] == ""]
    figure = Figure(figsize=(13, 3.8))
    axes = figure.subplots(1, 3, gridspec_kw={"left": 0.05, "right": 0.98, "bottom": 0.14, "wspace": 0.25})
    planes = [("coronal", usable)] + [(f"sagittal, {p}", usable[usable["compartment"].str.endswith(p)]) for p in PLACES]
    for ax, (name, rows) in zip(axes, planes, strict=True):
        if len(rows):
            _slice(ax, knee, maps["bv_tv"], rows, name)
        else:
            ax.set_title(f"{name}: no patch")
    figure.colorbar(axes[0].images[-1], ax=axes, shrink=0.8, label=figures.LABELS["bv_tv"])
    return figure


def _slice(ax, knee: Knee, shown: sitk.Image, rows: pd.DataFrame, name: str) -> None:
    across = 1 if name == "coronal" else 0  # index of y and x in LPS points
    place = rows[["x", "y", "z"]].median().to_numpy()
    index = knee.view.TransformPhysicalPointToIndex(place.tolist())
    spacing, origin = np.array(knee.view.GetSpacing()), np.array(knee.view.GetOrigin())
    planes = [np.take(sitk.GetArrayViewFromImage(i), index[across], 2 - across) for i in (knee.view, knee.masks, shown)]
    span = int(CROP_MM / spacing[2])
    low, high = max(0, index[2] - span), index[2] + span
    hu, labels, values = (plane[low:high][::-1] for plane in planes)
    pixel = (spacing[2], spacing[1 - across])
    figures.image(ax, hu, pixel, name, WINDOW_HU)
    figures.overlay(ax, np.where(values > 0, values, np.nan), pixel, _range(shown))
    for bone, value in BONES.items():
        figures.contour(ax, labels == value, pixel, figures.COLOURS[bone])
    near = rows[np.abs(rows["xyz"[across]] - place[across]) < HALF_MM[across]]
    top = origin[2] + (min(high, knee.view.GetSize()[2]) - 0.5) * spacing[2]
    columns = near["xyz"[1 - across]] - origin[1 - across] + spacing[1 - across] / 2
    ax.plot(columns, top - near["z"], "+", color="white", markersize=6)


def _range(image: sitk.Image) -> tuple[float, float]:
    values = sitk.GetArrayViewFromImage(image)
    return tuple(np.percentile(values[values > 0], (2, 98)))


def _standing(compartments: pd.DataFrame, about: dict) -> Figure:
    figure = Figure(figsize=(13, 2.6))
    room = {"left": 0.1, "right": 0.98, "bottom": 0.2, "top": 0.96, "wspace": 0.1}
    for ax, name in zip(figure.subplots(1, len(BIOMARKERS), sharey=True, gridspec_kw=room), BIOMARKERS, strict=True):
        rows = compartments.rename(columns={name: "value", f"{name}_low": "low", f"{name}_high": "high"})
        known = np.array([about["compartments"][place][name] or [np.nan] * 21 for place in COMPARTMENTS])
        figures.standing(ax, rows[["value", "low", "high"]], known[:, [1, 10, 19]], figures.LABELS[name])
    return figure


def _picture(figure: Figure, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return f"<img alt='{words}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _origin(numbers: dict) -> str:
    model = numbers["model"]
    kind = "simulated knees: its numbers say nothing yet about patients" if model["simulated"] else "knees of a cohort"
    said = f"Model {model['arm']}, trained on {kind} (profile {model['profile']}, commit {model['commit'][:12]}, "
    said += f"sha256 {model['sha256'][:12]}). CT sha256 {numbers['ct_sha256'][:12]}. Maps hold 0 where nothing is "
    said += "estimated. Not a medical device; not for clinical decisions."
    return f"<p class='note'>{said}</p>"
