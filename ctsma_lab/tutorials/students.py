"""The students' notebooks, made from the teachers': solutions are folded and do not run.

notebooks/tutorials/solutions holds the sources. Each exercise there is a cell with `...` for the
answer and a cell tagged `solution` with the whole answer. The students' notebooks lie one folder
higher, so their links lose one `../`.
"""

import copy
from pathlib import Path

import nbformat

from ctsma.files import SHARE, write_text

TUTORIALS = SHARE / "notebooks" / "tutorials"
FOLDED = "<details><summary>Solution</summary>\n\n```python\n{}\n```\n\n</details>"


def student_version(source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of a teachers' notebook in which every cell tagged `solution` is folded text."""
    notebook = copy.deepcopy(source)
    for number, cell in enumerate(notebook.cells):
        if "solution" in cell.metadata.get("tags", []):
            folded = nbformat.v4.new_markdown_cell(FOLDED.format(cell.source), id=cell.id)
            notebook.cells[number] = folded
        elif cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](")
    return notebook


def write_student_versions(folder: Path = TUTORIALS) -> list[Path]:
    """Write the students' notebook of every source in `folder`/solutions; returns their paths."""
    written = []
    for path in sorted((folder / "solutions").glob("T*.ipynb")):
        student = student_version(nbformat.read(path, as_version=4))
        written.append(write_text(folder / path.name, nbformat.writes(student) + "\n"))
    return written
