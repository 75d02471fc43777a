"""Report pages of a run, and the generated parts of the README. No page needs the network."""

import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from ctsma.common import InputError
from ctsma.files import atomic, write_text

from .tables import (
    STAGES,
    detailed_tables,
    draw_icc,
    origin,
    profiles_table,
    read_results,
    results_table,
    summary,
)

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_path: str | Path) -> Path:
    """Write one HTML page per executed notebook and an overview; returns report/index.html.

    Raises InputError where the run has no executed notebook.
    """
    run_path = Path(run_path)
    files = sorted(run_path.glob("notebooks/[0-9][0-9]_*.ipynb"))
    files = [file for file in files if "." not in file.stem]  # neither *.partial nor *.failed
    if not files:
        raise InputError(run_path, "holds no executed notebook", "run the study first: ctsma run")
    notebooks = {file.stem: nbformat.read(file, as_version=4) for file in files}
    titles = {"index": "Overview"}
    for name, notebook in notebooks.items():
        titles[name] = title_of(notebook)
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    for name, notebook in notebooks.items():
        body, _ = exporter.from_notebook_node(notebook)
        _write_page(run_path, titles, name, body)
    return _write_page(run_path, titles, "index", _overview(run_path, titles, notebooks))


def title_of(notebook: NotebookNode) -> str:
    """The first heading of the notebook."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.*)", text, re.MULTILINE)
    return heading[1] if heading else "Notebook without a title"


def result_of(notebook: NotebookNode) -> str:
    """The Markdown that the code under the heading "Result" shows; "" where there is none."""
    shown, inside = [], False
    for cell in notebook.cells:
        headings = re.findall(r"^#+ (.*)", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and headings:
            inside = "Result" in headings[-1]
        elif cell.cell_type == "code" and inside:
            for output in cell.outputs:
                shown.append(output.get("data", {}).get("text/markdown", ""))
    return "\n\n".join(shown).strip()


def _overview(
    run_path: Path, titles: Mapping[str, str], notebooks: Mapping[str, NotebookNode]
) -> str:
    """Body of the overview: the result of every notebook, then the tables of a complete run."""
    results = run_path / "results"
    complete = all((results / f"{stage}.json").exists() for stage in STAGES)
    parts = [f"# Study report: {run_path.name}"]
    if complete:
        draw_icc(results, run_path / "report" / "icc.svg")
        figure = "![Agreement of every arm with the MR reference](icc.svg)"
        parts += [origin(results), "## Result", summary(results), results_table(results), figure]
    parts.append("## Notebooks")
    for name, notebook in notebooks.items():
        parts += [f"### [{titles[name]}]({name}.html)", result_of(notebook)]
    if complete:
        for title, table in detailed_tables(results).items():
            parts += [f"## {title}", table]
    return markdown2html("\n\n".join(parts))


def _write_page(run_path: Path, titles: Mapping[str, str], name: str, body: str) -> Path:
    pages = list(titles)
    before, after = pages[: pages.index(name)], pages[pages.index(name) + 1 :]
    headings = re.findall(r'<h2[^>]*id="([^"]*)"[^>]*>(.*?)(?:<a class|</h2>)', body, re.DOTALL)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES))
    html = environment.get_template("page.html.jinja").render(
        run_name=run_path.name,
        titles=titles,
        page=name,
        contents=headings,
        previous=before[-1] if before else None,
        following=after[0] if after else None,
        warnings=_warnings(run_path / "results"),
        code_style=HtmlFormatter().get_style_defs(".highlight"),
        body=body,
    )
    html = html.replace(str(run_path.resolve()), f"runs/{run_path.name}")  # no path of this machine
    return write_text(run_path / "report" / f"{name}.html", html)


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


def update_readme(readme: str | Path, results: str | Path) -> None:
    """Renew what a README, and docs/results.md beside it, take from results files.

    A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; NAME is summary,
    profiles, results or tables. The figure docs/figures/icc.svg beside the README is drawn again.
    Raises InputError where the README has no generated part.
    """
    readme = Path(readme)
    tables = [f"## {title}\n\n{table}\n" for title, table in detailed_tables(results).items()]
    parts = {
        "summary": summary(results, readme.parent / "docs" / "results"),
        "profiles": profiles_table(),
        "results": f"{results_table(results)}\n\n{origin(results)}",
        "tables": "\n".join([*tables, origin(results)]),
    }
    details = readme.parent / "docs" / "results.md"
    if not _renew(readme, parts):
        marks = "<!-- results:begin --> and <!-- results:end -->"
        raise InputError(readme, "has no generated part", f"add the lines {marks}")
    if details.exists():
        _renew(details, parts)
    with atomic(readme.parent / "docs" / "figures" / "icc.svg") as temporary:
        draw_icc(results, temporary)


def _renew(file: Path, parts: Mapping[str, str]) -> int:
    """Replace the generated parts of a file; returns how many it has."""
    text, count = file.read_text(encoding="utf-8"), 0
    for name, content in parts.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin in text and end in text:
            head, _, rest = text.partition(begin)
            text = head + begin + content + "\n" + end + rest.partition(end)[2]
            count += 1
    write_text(file, text)
    return count
