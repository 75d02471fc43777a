"""The report of a run, a site that needs no network, and the generated parts of the README."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import yaml
from nbconvert.filters import markdown2html
from PIL import Image
from pygments.formatters import HtmlFormatter

from ctsma.arms import ARMS
from ctsma.cache import map_knees
from ctsma.cohort import read_manifest
from ctsma.common import BONES, InputError
from ctsma.files import atomic, write_text
from dicom_import.registration_pages import draw_knee, write_pages

from . import explore
from .methods import write_methods
from .pages import (
    SHOWN_DPI,
    TEMPLATES,
    copy_table,
    figure_html,
    notebook_body,
    result_of,
    tidy,
    title_of,
    write_figure,
)
from .tables import (
    STAGES,
    cost_table,
    detailed_tables,
    draw_icc,
    origin,
    profiles_table,
    published_networks,
    read_results,
    renew,
    results_table,
    summary,
)

EXPLORE = "One knee, one patch, one arm"  # title of the page with the explorer's figures
KEY_FIGURES = yaml.safe_load(Path(__file__).with_name("key_figures.yaml").read_text("utf-8"))
README_FIGURES = ("04_agreement", "02_tre", "05_roc")  # of the key figures
FEW_KNEES = 16  # their images are drawn before other processes have loaded their libraries
EXPLORED = {  # captions of the explorer's figures
    "knee": (
        "The worst registered knee. CT, MR by the transform of the tibia after the last stage, "
        "their blend and checkerboard in one sagittal plane, and the target registration error "
        "(TRE) by stage where the truth is known. n: 1 knee. Outlines: bone masks of femur and "
        "tibia. A coloured rim at the tibia would show misalignment. A: anterior, P: posterior, "
        "S: superior, I: inferior."
    ),
    "patch": (
        "One patch of this knee and its estimates. Above: CT, MR and, where known, the true bone "
        "in the middle slice; the outline is the region measured. Below: estimates by arm. n: 1 "
        "patch. Points: estimates. Lines: 90 % conformal intervals. Solid vertical line: MR "
        "reference. Dotted: ground truth."
    ),
    "agreement": (
        "BV/TV of all patches by the main arm. Left: estimate against reference. Middle: "
        "Bland-Altman plot. Right: ROC for osteoarthritis (OA) of a logistic regression on the "
        "four biomarkers, fitted out of fold. n: in the title. Intervals and shade: 95 % "
        "(bootstrap over subjects; AUC: DeLong). Dashed lines: identity, and 95 % limits of "
        "agreement around the bias."
    ),
}
BESIDE = {  # pages and files of the site that are no notebook, in the order of its navigation
    "knees/index.html": "Registration, knee by knee",
    "methods.md": "Methods text for a paper",
    "methods.bib": "Its references (BibTeX)",
}


def write_report(
    run_path: str | Path, progress: Callable[..., None] | None = None, n_jobs: int = 1
) -> Path:
    """Write the site of a run, report/: a first page, one page per executed notebook and per knee.

    Figures and the tables behind them go to report/figures, so that the folder can be moved or
    published as it is. A complete run also gets the methods section of a paper. `progress` and
    `n_jobs` are those of `map_knees`, which draws the knees. Returns report/index.html. Raises
    InputError where the run has no executed notebook.
    """
    run_path = Path(run_path)
    files = sorted(run_path.glob("notebooks/[0-9][0-9]_*.ipynb"))
    files = [file for file in files if "." not in file.stem]  # neither *.partial nor *.failed
    if not files:
        raise InputError(run_path, "holds no executed notebook", "run the study first: ctsma run")
    report = run_path / "report"
    notebooks = {file.stem: nbformat.read(file, as_version=4) for file in files}
    titles = {"index": "Overview"} | {name: title_of(one) for name, one in notebooks.items()}
    write_knees(run_path, progress, n_jobs)
    if is_complete(run_path):
        write_methods(run_path)
    results = {name: result_of(notebook) for name, notebook in notebooks.items()}
    if is_complete(run_path) and (run_path / "models" / "predictions.csv").exists():
        titles["explore"] = EXPLORE
        _write_page(run_path, titles, "explore", tidy(_explored(run_path), titles))
    for name, notebook in notebooks.items():
        body = notebook_body(name, notebook, run_path, report, titles)
        _write_page(run_path, titles, name, body)
    overview = _overview(run_path, titles, results)
    return _write_page(run_path, titles, "index", tidy(overview, titles))


def is_complete(run_path: Path) -> bool:
    """Whether every stage of a run has its results file."""
    return all((run_path / "results" / f"{stage}.json").exists() for stage in STAGES)


def write_knees(
    run_path: Path, progress: Callable[..., None] | None = None, n_jobs: int = 1
) -> None:
    """Write report/knees, the quality control of registration; nothing without registered knees.

    Images are drawn again only where the registration of the knee has changed.
    """
    results, registration = run_path / "results", run_path / "registration"
    records = [json.loads(file.read_text("utf-8")) for file in sorted(registration.glob("*.json"))]
    records = {record["knee_id"]: record for record in records if "knee_id" in record}
    if not records or not (results / "cohort.json").exists():
        return
    cohort, folder = read_results(results, "cohort"), run_path / "report" / "knees"
    manifest_file = run_path / cohort["manifest"]
    if not manifest_file.exists():
        return
    manifest = read_manifest(manifest_file, run_path / cohort["root"])
    knees = manifest[manifest["knee_id"].isin(list(records))]
    registered = knees[[not records[knee_id]["error"] for knee_id in knees["knee_id"]]]
    parameters = {
        "root": str(manifest.attrs["root"]),
        "registration_folder": str(registration.resolve()),
        "patches_folder": str((run_path / "patches").resolve()),
        "image_folder": str((folder / "images").resolve()),
    }
    earlier = [registration, run_path / "patches"]
    work = {"n_jobs": n_jobs if len(registered) > FEW_KNEES else 1, "report": progress}
    map_knees(draw_knee, registered, run_path / "knees", parameters, after=earlier, **work)
    errors = _registration_errors(run_path)
    rows = []
    for knee in knees[["knee_id", "side"]].to_dict("records"):
        record = records[knee["knee_id"]]
        row = knee | {name: record[name] for name in record if name not in ("files", "key")}
        patches = run_path / "patches" / f"{knee['knee_id']}.json"
        if patches.exists():
            cut = json.loads(patches.read_text("utf-8"))
            row |= {name: cut[name] for name in ("n_patches", "n_flagged") if name in cut}
        rows.append(row | errors.get(knee["knee_id"], {}))
    write_pages(folder, rows, _warnings(results), home="../index.html")


def _registration_errors(run_path: Path) -> dict[str, dict[str, float]]:
    """{knee_id: {"tre_<bone>": mm}} after the last stage; empty without ground truth."""
    file = run_path / "figures" / "02_tre.csv"
    if not file.exists():
        return {}
    table = pd.read_csv(file, dtype={"knee_id": "str"})
    found: dict[str, dict[str, float]] = {}
    for row in table[table["stage"] == "trabeculae"].to_dict("records"):
        found.setdefault(row["knee_id"], {})[f"tre_{row['bone']}"] = row["tre_mm"]
    return found


def _overview(run_path: Path, titles: Mapping[str, str], shown: Mapping[str, str]) -> str:
    """Body of the first page: of a complete run a summary, key figures and tables.

    `shown` is the result of every notebook, as Markdown.
    """
    results = run_path / "results"
    parts = [f"# Study report: {run_path.name}"]
    links = [f"### [{titles[name]}]({name}.html)\n\n{text}" for name, text in shown.items()]
    if is_complete(run_path):
        parts += ["## What was done", _what_was_done(results), origin(results)]
        parts += ["## Result", summary(results), results_table(results)]
        parts += ["## Key figures", *_key_figures(run_path)]
        tables = detailed_tables(results).items()
        parts += ["## Tables", *(f"### {title}\n\n{table}" for title, table in tables)]
    parts += ["## Result of each notebook", *links]
    return markdown2html("\n\n".join(parts))


def _what_was_done(results: Path) -> str:
    """Three sentences on cohort, arms and evaluation, from the results files."""
    cohort, numbers = read_results(results, "cohort"), _numbers(results)
    kind = "simulated knees" if cohort["simulated"] else "knees"
    compared = read_results(results, "agreement")["icc"]
    arms = [arm for name, arm in ARMS.items() if name in compared]
    names = "; ".join(arm.label for arm in arms)
    return (
        f"MR and CT of {numbers['n_registered']} {kind} were registered. Trabecular biomarkers "
        f"were measured on MR in {numbers['n_patches']} patches below the joint surface. "
        f"{len(arms)} arms were compared out of fold, with folds by subject: {names}. Their "
        "estimates were compared with the MR reference. A Transformer classified osteoarthritis "
        f"in {numbers['n_diagnosed']} knees."
    )


def _numbers(results: Path) -> dict:
    """What the captions of the key figures state."""
    distillation, diagnosis = (read_results(results, s) for s in ("distillation", "diagnosis"))
    arm = ARMS.get(diagnosis["arm"])
    return {
        "n_knees": read_results(results, "cohort")["n_knees"],
        "n_registered": read_results(results, "registration")["n_knees"],
        "n_patches": distillation["n_patches"],
        "n_knees_read": distillation["n_knees"],
        "n_diagnosed": diagnosis["n_knees"],
        "main_arm": arm.label if arm else diagnosis["arm"],
    }


def _key_figures(run_path: Path) -> list[str]:
    """HTML of the key figures that the run has, with caption, n, legend and the CSV behind each."""
    results, report, shown = run_path / "results", run_path / "report", []
    numbers = _numbers(results)
    kind = "simulated" if read_results(results, "cohort")["simulated"] else "own"
    for name, about in KEY_FIGURES.items():
        file = run_path / "figures" / f"{name}.png"
        if about["cohort"] not in (kind, "any") or not file.exists():
            continue
        picture = report / f"figures/{name}.png"  # written with the page of its notebook
        size = Image.open(picture).size if picture.exists() else write_figure(file, picture)
        caption = _caption(name, numbers)
        table = copy_table(name, run_path, report)
        label = f"Figure {len(shown) + 1}."
        shown.append(figure_html(label, f"figures/{name}.png", size, caption, table))
    return shown


def _explored(run_path: Path) -> str:
    """Body of the page with figures of the explorer for the knee with the lowest correlation."""
    study, report = explore.open_study(run_path), run_path / "report"
    knee_id = _worst_knee(run_path, study.with_images)
    tables, shown = explore.static_tables(study, knee_id), []
    for name, figure in explore.static_figures(study, knee_id).items():
        stream, stem = io.BytesIO(), f"figures/explore_{name}"
        figure.savefig(stream, format="png", dpi=SHOWN_DPI)
        plt.close(figure)
        size = write_figure(stream, report / f"{stem}.png")
        table = None
        if len(tables[name]):
            table = f"{stem}.csv"
            text = tables[name].to_csv(index=False, float_format="%.5g")
            write_text(report / table, text)
        label = f"Figure {len(shown) + 1}."
        shown.append(figure_html(label, f"{stem}.png", size, EXPLORED[name], table))
    text = (
        f"# {EXPLORE}\n\nKnee {knee_id} has the lowest trabecular correlation of all knees with "
        "estimates. The notebook `notebooks/tutorials/explore.ipynb` shows any other knee, "
        f"patch and arm: set `run_dir` to the folder of this run, {run_path.name}."
    )
    return markdown2html("\n\n".join([text, *shown]))


def _worst_knee(run_path: Path, knee_ids: Sequence[str]) -> str:
    """Of these knees the one whose lower correlation of both bones is lowest."""
    lowest = {}
    for knee_id in knee_ids:
        record = json.loads((run_path / "registration" / f"{knee_id}.json").read_text("utf-8"))
        lowest[knee_id] = min(record[f"correlation_{bone}"] for bone in BONES)
    return min(lowest, key=lowest.get)


def _write_page(run_path: Path, titles: Mapping[str, str], name: str, body: str) -> Path:
    pages, report = list(titles), run_path / "report"
    before, after = pages[: pages.index(name)], pages[pages.index(name) + 1 :]
    headings = re.findall(r'<h2[^>]*id="([^"]*)"[^>]*>(.*?)(?:<a class|</h2>)', body, re.DOTALL)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES))
    html = environment.get_template("page.html.jinja").render(
        run_name=run_path.name,
        titles=titles,
        beside={file: text for file, text in BESIDE.items() if (report / file).exists()},
        page=name,
        contents=headings,
        previous=before[-1] if before else None,
        following=after[0] if after else None,
        warnings=_warnings(run_path / "results"),
        code_style=HtmlFormatter().get_style_defs(".highlight"),
        body=body,
    )
    html = html.replace(str(run_path.resolve()), f"runs/{run_path.name}")  # it may hold spaces
    return write_text(report / f"{name}.html", html)


def _warnings(results: Path) -> list[str]:
    """What a reader must know before any number of the run."""
    if not (results / "cohort.json").exists():
        return []
    cohort = read_results(results, "cohort")
    warnings = []
    if cohort["profile"] == "tiny":
        warnings.append("Profile tiny tests the software: its numbers mean nothing.")
    if cohort["simulated"]:
        warnings.append("The knees are simulated: the results say nothing about patients.")
    return warnings


def readme_figures(results: str | Path) -> str:
    """A few key figures of the published report as Markdown, with the captions that it has.

    Their files are those of docs/report, so that the README shows what was published last.
    """
    numbers, parts = _numbers(Path(results)), []
    kind = "simulated" if read_results(results, "cohort")["simulated"] else "own"
    for name in README_FIGURES:
        if KEY_FIGURES[name]["cohort"] in (kind, "any"):
            caption = _caption(name, numbers) + (" Simulated knees." if kind == "simulated" else "")
            image = f"![{KEY_FIGURES[name]['caption']}](docs/report/figures/{name}.png)"
            parts.append(f"{image}\n\n*{caption}*")
    return "\n\n".join(parts)


def _caption(name: str, numbers: Mapping) -> str:
    """Title, caption, n and legend of a key figure, filled with `_numbers`."""
    about = KEY_FIGURES[name]
    texts = [about["title"], about["caption"], "n: " + about["n"], about["legend"]]
    return " ".join(text.rstrip(".") + "." for text in texts).format(**numbers)


def update_readme(readme: str | Path, results: str | Path) -> None:
    """Renew what a README, docs/results.md and docs/cluster.md take from results files.

    A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; NAME is summary,
    figures, profiles, results, networks, cost or tables. docs/results beside the README holds the
    results of the benchmarks. The figure docs/figures/icc.svg beside the README is drawn again.
    Raises InputError where the README has no generated part.
    """
    readme = Path(readme)
    evidence = readme.parent / "docs" / "results"
    tables = [f"## {title}\n\n{table}\n" for title, table in detailed_tables(results).items()]
    parts = {
        "summary": summary(results, evidence),
        "figures": readme_figures(results),
        "profiles": profiles_table(),
        "results": f"{results_table(results)}\n\n{origin(results)}",
        "networks": published_networks(evidence),
        "cost": cost_table(evidence),
        "tables": "\n".join([*tables, origin(results)]),
    }
    if not renew(readme, parts):
        marks = "<!-- results:begin --> and <!-- results:end -->"
        raise InputError(readme, "has no generated part", f"add the lines {marks}")
    for name in ("results.md", "cluster.md"):
        details = readme.parent / "docs" / name
        if details.exists():
            renew(details, parts)
    with atomic(readme.parent / "docs" / "figures" / "icc.svg") as temporary:
        draw_icc(results, temporary)
