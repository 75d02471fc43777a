"""Notebooks as pages of a site: figures become files with captions, links and paths stay inside."""

import base64
import html
import io
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from nbformat.v4 import new_output
from PIL import Image

from ctsma.files import atomic, write_text

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_DPI = 100  # pixels of a page for an inch of a figure (design choice)
COLOURS = 128  # of the palette of a figure with images; a third of the size (design choice)
CHART_COLOURS = 256  # of the palette of a chart, whose own colours are no more than MANY
MANY = 4096  # colours; a chart has hundreds, by its smooth edges, and an image many thousands
WIDE = 900  # pixels from which a figure scrolls on a narrow screen (design choice)
CAPTION = re.compile(r"\*+(Key figure|Figure)\.\*+ *")
# A folder and a name after it, as in /data/me/knees.csv; no link, closing tag or fraction.
ABSOLUTE = re.compile(r"(?<![\w/.<])(?:/[\w.+-]+)+/([\w.+-]+)|\b[A-Z]:(?:\\+[\w.+-]+)+")


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


def notebook_body(
    name: str, notebook: NotebookNode, run_path: Path, report: Path, pages: Mapping[str, str]
) -> str:
    """HTML of an executed notebook; its figures and their tables go to `report`/figures.

    Parameters
    ----------
    name : of the notebook's page. pages : {name: title} of all pages of the site.
    """
    _take_out_figures(name, notebook, run_path, report)
    body, _ = _exporter().from_notebook_node(notebook)
    return tidy(body, pages)


@cache
def _exporter() -> HTMLExporter:
    """One for all notebooks, as it reads and compiles its templates when it is first used."""
    return HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def _take_out_figures(name: str, notebook: NotebookNode, run_path: Path, report: Path) -> None:
    """Put each figure of a notebook into a file, with the caption that stood before its code."""
    number, before = 0, None
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        for n, output in enumerate(outputs):
            data = output.get("data", {}).get("image/png")
            if data is None:
                continue
            number += 1
            caption = _take_caption(before) if before is not None else ""
            before = None  # a second figure of the same cell has no text of its own
            saved = re.search(r'save_figure\(\s*\w+, "(\w+)"', cell.source)
            figure = saved[1] if saved else f"{name}_{number}"
            file, kept = f"figures/{figure}.png", run_path / "figures" / f"{figure}.png"
            png = kept if kept.exists() else io.BytesIO(base64.b64decode(data))
            size = write_figure(png, report / file)
            table = copy_table(saved[1], run_path, report) if saved else None
            label = f"Figure {int(name[:2])}.{number}."
            shown = figure_html(label, file, size, markdown2html(caption), table)
            outputs[n] = new_output("display_data", {"text/html": shown})
        if cell.cell_type == "markdown":
            before = cell


def _take_caption(cell: NotebookNode) -> str:
    """Take a figure's caption from the prose before it: the paragraph so named, or the last one."""
    paragraphs = re.split(r"\n{2,}", cell.source.strip())
    named = [n for n, text in enumerate(paragraphs) if CAPTION.match(text)]
    index = named[0] if named else len(paragraphs) - 1
    if paragraphs[index].startswith("#"):
        return ""
    caption = paragraphs.pop(index)
    cell.source = "\n\n".join(paragraphs)
    return CAPTION.sub("", caption)


def write_figure(png: Path | io.BytesIO, file: Path) -> tuple[int, int]:
    """Write a PNG on white, at SHOWN_DPI and with a palette.

    The palette covers all colours of the figure, however few pixels have them, so that thin lines
    over grey images keep theirs. Returns (width, height) in pixels.
    """
    image = Image.open(png)
    shrink = round(image.info.get("dpi", (SHOWN_DPI,))[0] / SHOWN_DPI)
    image = image.convert("RGBA").reduce(max(shrink, 1))
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    n_colours = CHART_COLOURS if flat.getcolors(MANY) else COLOURS
    palette = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    with atomic(file) as temporary:
        flat.quantize(n_colours, **palette).save(temporary, optimize=True)
    return image.size


def copy_table(figure: str, run_path: Path, report: Path) -> str | None:
    """Write the CSV behind a figure of the run into the report, with five significant digits.

    Returns its link from the folder of the report; None where the figure has no table.
    """
    source, link = run_path / "figures" / f"{figure}.csv", f"figures/{figure}.csv"
    if not source.exists():
        return None
    table = pd.read_csv(source, dtype={"knee_id": "str", "subject_id": "str"})
    write_text(report / link, table.to_csv(index=False, float_format="%.5g"))
    return link


def figure_html(
    label: str, file: str, size: tuple[int, int], caption: str, table: str | None
) -> str:
    """A figure in a scroll box with its caption (HTML) and a link to the table behind it."""
    width, height = size
    alternative = html.escape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", caption)).strip())
    kind = ' class="wide"' if width > WIDE else ""
    image = f'<img src="{file}" width="{width}" height="{height}" alt="{alternative or label}">'
    data = f' <a href="{table}">Data of this figure (CSV).</a>' if table else ""
    inside = re.sub(r"^\s*<p>|</p>\s*$", "", caption)
    text = f"<figcaption><b>{label}</b> {inside}{data}</figcaption>"
    return f'<figure{kind}><div class="scroll">{image}</div>{text}</figure>'


def tidy(body: str, pages: Mapping[str, str]) -> str:
    """Keep what a reader elsewhere can use: a dead link becomes its text, a path its last name."""
    places = set(re.findall(r'id="([^"]*)"', body))

    def link(match: re.Match) -> str:
        target, text = match[1], match[2]
        if target.startswith("#"):
            return match[0] if target[1:] in places else text
        if target.startswith(("figures/", "https://", "http://")):
            return match[0]
        file, mark, anchor = target.partition("#")
        page = Path(file).stem
        return f'<a href="{page}.html{mark}{anchor}">{text}</a>' if page in pages else text

    body = re.sub(r'<a href="([^"]*)"[^>]*>(.*?)</a>', link, body, flags=re.DOTALL)
    return ABSOLUTE.sub(lambda match: match[1] or re.split(r"\\+", match[0])[-1], body)
