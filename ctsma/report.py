"""One HTML page a notebook with its figures inside, an index, and the results table; no network is needed to read."""

import html
import json
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from .cohort import BIOMARKERS, InputFault, write_text

PAPER = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())
ARMS = {
    "hu_regression": "HU ridge regression",
    "ruler_regression": "HU ridge regression with ruler",
    "ct_only": "CT network alone",
    "ct_sma": "CT network, distilled (CT-SMA)",
    "ct_residual": "ridge with ruler + CT network",
    "ct_sma_plus": "ridge with ruler + CT network, distilled (ours)",
    "ct_oracle": "ridge with ruler + CT network, ten times the knees",
    "mr_teacher": "MR network (upper bound)",
    "mr_reference": "MR reference itself",
}
GAINS = [("ct_only", "hu_regression"), ("ct_sma", "ct_only"), ("ruler_regression", "hu_regression")]
GAINS += [("ct_residual", "ruler_regression"), ("ct_sma_plus", "ct_residual"), ("ct_sma_plus", "ct_only")]
GAINS += [("ct_sma_plus", "hu_regression"), ("ct_sma_plus", "ruler_regression"), ("ct_oracle", "ct_sma_plus")]
MEASURES = *BIOMARKERS, "mean"
LABELS = {"bv_tv": "BV/TV", "tb_th_mm": "Tb.Th", "tb_sp_mm": "Tb.Sp", "tb_n_per_mm": "Tb.N"}
STYLE = """
body{max-width:62rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;color:#222}
img{max-width:100%;height:auto} pre{overflow-x:auto;background:#f6f7f8;padding:.6rem .8rem;font-size:13px}
table{border-collapse:collapse;margin:1rem 0} td,th{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:left}
.dataframe td{text-align:right} nav a{margin-right:1rem} a{color:#0b5a9c} .note{color:#666}
div.jp-InputPrompt,div.jp-OutputPrompt,.anchor-link,div.prompt{display:none}
"""


def write_report(path: str | Path) -> Path:
    """Render every executed notebook of a run and an index page; returns report/index.html.

    Raises InputFault where the run has no executed notebook.
    """
    path = Path(path)
    notebooks = sorted(path.glob("notebooks/[0-9][0-9]_*[!l].ipynb"))
    notebooks = [notebook for notebook in notebooks if not notebook.stem.endswith(".partial")]
    if not notebooks:
        raise InputFault(path, "holds no executed notebook", "run the study first: ctsma run")
    names = [notebook.stem for notebook in notebooks]
    for notebook in notebooks:
        write_text(path / "report" / f"{notebook.stem}.html", _page(notebook.stem, names, _body(notebook)))
    return write_text(path / "report" / "index.html", _page("Study report", names, _index(path)))


def results_table(results: str | Path) -> str:
    """Markdown tables from the results files of a run's folder, with 95 % intervals, published values first.

    Agreement and diagnosis by arm; gains of one arm over another; registration error by bone.
    """
    agreement, diagnosis = (_read(results, stage) for stage in ("agreement", "diagnosis"))
    columns = [*(f"ICC {LABELS[name]}" for name in BIOMARKERS), "ICC mean", "AUC for OA"]
    lines = _rows([["", *columns], ["---"] * (len(columns) + 1)])
    for arm in [arm for arm in ARMS if arm in PAPER["icc"] or arm in PAPER["auc"]]:
        known = PAPER["icc"].get(arm, {})
        lines += _rows([[f"*paper: {ARMS[arm]}*", *(known.get(n, "") for n in MEASURES), PAPER["auc"].get(arm, "")]])
    for arm in [arm for arm in ARMS if arm in agreement["icc"] or arm in diagnosis["auc"]]:
        known, auc = agreement["icc"].get(arm, {}), diagnosis["auc"].get(arm)
        cells = [_interval(known[name], "icc") if name in known else "" for name in MEASURES]
        lines += _rows([[ARMS[arm], *cells, _interval(auc, "auc") if auc else ""]])
    gains = [pair for pair in GAINS if "_vs_".join(pair) in agreement["gain"]]
    lines += ["", "| gain in mean ICC | ours |", "| --- | --- |"]
    for arm, other in gains:
        gain = _interval(agreement["gain"][f"{arm}_vs_{other}"], "difference")
        lines += _rows([[f"{ARMS[arm]}, over {ARMS[other]}", gain]])
    return "\n".join(lines + _registration(_read(results, "registration"))) + "\n"


def _registration(found: dict) -> list[str]:
    if not found["tre_mm"]:
        return []
    heads = ["registration error (mm)", "median", "95th percentile", "largest"]
    rows = [[bone, *(f"{e[name]:.3f}" for name in ("median", "p95", "max"))] for bone, e in found["tre_mm"].items()]
    return ["", *_rows([heads, ["---"] * 4, *rows])]


def _rows(rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def difficulty_table(results: str | Path) -> str:
    """Markdown table of how hard a simulated cohort is: published, this cohort, the draw it was frozen on."""
    calibration = _read(results, "cohort")["calibration"]
    lines = ["| difficulty (simulated) | published | this cohort | large draw |", "| --- | --- | --- | --- |"]
    for name, row in calibration["figures"].items():
        published = "" if row["low"] is None else f"{row['low']:g} to {row['high']:g}: {row['source']}"
        shown = [_interval(part, "value") for part in (row, calibration["frozen"][name])]
        lines.append(f"| {name} | {published} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines) + "\n"


def update_readme(readme: str | Path, results: str | Path) -> None:
    """Replace the text between the README's results marks by the table and the origin of its numbers."""
    text, (begin, end) = Path(readme).read_text(), ("<!-- results:begin -->\n", "<!-- results:end -->")
    if begin not in text or end not in text:
        raise InputFault(readme, "has no results marks", f"add the lines {begin.strip()} and {end}")
    head, _, tail = text.partition(begin)
    write_text(
        readme, head + begin + results_table(results) + "\n" + origin(results) + "\n" + end + tail.partition(end)[2]
    )


def origin(results: str | Path) -> str:
    """One line that says what run the numbers come from."""
    cohort, settings = _read(results, "cohort"), _read(results, "distillation")["settings"]
    keys = f"protocol {cohort['protocol_sha256'][:12]}, seed {cohort['seed']}, commit {cohort['git_commit'][:12]}"
    keys += f", networks in {settings['computed_in']}" if "computed_in" in settings else ""  # earlier runs do not say
    return f"Profile {cohort['profile']}, {cohort['n_knees']} knees, {keys}."


def _interval(value: dict, name: str) -> str:
    if value[name] is None:
        return "not defined"
    if value["ci_low"] is None:
        return f"{value[name]:.3f} (no interval)"
    return f"{value[name]:.3f} ({value['ci_low']:.3f} to {value['ci_high']:.3f})"


def _read(results: str | Path, stage: str) -> dict:
    file = Path(results) / f"{stage}.json"
    if not file.exists():
        raise InputFault(file, "does not exist", "run the study to its end first")
    return json.loads(file.read_text())


def _body(notebook: Path) -> str:
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    return exporter.from_notebook_node(nbformat.read(notebook, as_version=4))[0]


def _index(path: Path) -> str:
    complete = all((path / "results" / f"{stage}.json").exists() for stage in ("cohort", "agreement", "diagnosis"))
    parts = [f"<h1>Study report: {html.escape(path.name)}</h1>"]
    if complete:
        tables = (results_table, difficulty_table)
        parts.append(f"<p class='note'>{html.escape(origin(path / 'results'))}</p>")
        parts += [_html_table(table(path / "results")) for table in tables]
    for png in sorted(path.glob("figures/*.png")):
        parts.append(f"<h2>{png.stem}</h2><img src='../figures/{png.name}' alt='{png.stem}'>")
    return "\n".join(parts)


def _html_table(markdown: str) -> str:
    """Tables in Markdown, parted by empty lines, as HTML."""
    return "".join(_one_table(part.splitlines()) for part in markdown.strip().split("\n\n"))


def _one_table(lines: list[str]) -> str:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if "---" not in line]
    cells = ["".join(f"<td>{html.escape(cell.strip('*'))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _page(title: str, names: list[str], body: str) -> str:
    links = "".join(f"<a href='{name}.html'>{name}</a>" for name in names)
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    head = f"<meta charset='utf-8'><title>{title}</title><style>{style}</style>"
    top = f"<nav><a href='index.html'>index</a>{links}</nav>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{top}{body}</body></html>"
