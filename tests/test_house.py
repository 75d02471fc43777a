"""The laws of the house: rooms import leftwards, public functions are documented and typed, files agree."""

import ast
import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from ctsma import report
from ctsma.cohort import BIOMARKERS
from ctsma.cohort.manifest import SCHEMA
from ctsma.cohort.provenance import imports

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ctsma"
ROOMS = ["cohort", "simulation", "registration", "biomarkers", "patches", "networks", "distillation"]
ROOMS += ["agreement", "diagnosis", "difficulty", "figures", "intake", "prediction", "study", "report", "cli"]
SOURCES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def module_name(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.stem in ROOMS], ids=module_name)
def test_a_room_imports_only_rooms_to_its_left(path):
    room = module_name(path).split(".")[1]
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    reached = {name.split(".")[1] for name in imports(path.read_text(), package)} - {room}
    assert all(ROOMS.index(other) < ROOMS.index(room) for other in reached), f"{room} reaches right to {reached}"
    assert room != "figures" or not reached


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_functions_are_documented_and_typed(path):
    for node in functions(path):
        if node.name.startswith("_"):
            continue
        assert node.returns is not None, f"{node.name} does not say what it returns"
    public = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert not [n.name for n in public if not n.name.startswith("_") and not ast.get_docstring(n)]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem != "cli"], ids=module_name)
def test_rooms_do_not_print_show_or_read_the_environment(path):
    found = re.findall(
        r"\bprint\(|plt\.show|os\.getenv|os\.environ\[|except:|np\.random\.seed|manual_seed\(\d", path.read_text()
    )
    assert not found


def test_functions_are_short_and_the_package_is_thin():
    lengths = sorted(len(ast.unparse(_without_docstring(node)).splitlines()) for p in SOURCES for node in functions(p))
    assert lengths[len(lengths) // 2] <= 10
    assert max(lengths) <= 60  # the one long function is the compiled kernel of both scanners
    assert sum(_code_lines(path) for path in SOURCES) < 6500


def _without_docstring(node):
    if ast.get_docstring(node):
        node.body = node.body[1:] or [ast.Pass()]
    return node


def _code_lines(path):
    """Lines that are neither blank, nor comment, nor docstring."""
    text, tree = path.read_text().splitlines(), ast.parse(path.read_text())
    holders = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)]
    docstrings = [node.body[0] for node in holders if ast.get_docstring(node)]
    prose = {number for node in docstrings for number in range(node.lineno, node.end_lineno + 1)}
    return sum(bool(re.match(r"\s*[^\s#]", line)) for number, line in enumerate(text, 1) if number not in prose)


def test_environment_yml_agrees_with_pyproject():
    spec = importlib.util.spec_from_file_location("environment", REPOSITORY / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPOSITORY / "environment.yml").read_text() == module.environment()


def test_lock_pins_every_dependency_and_names_no_host():
    text = (REPOSITORY / "requirements.lock").read_text()
    pinned = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted} <= pinned
    assert "torch==2.13.0" in text
    assert "://" not in text


def test_data_dictionary_agrees_with_the_schema():
    package = json.loads((REPOSITORY / "data_manifest" / "datapackage.json").read_text())
    fields = [field["name"] for field in package["resources"][0]["schema"]["fields"]]
    assert fields == list(SCHEMA.columns)
    required = [name for name, column in SCHEMA.columns.items() if column.required]
    header = (REPOSITORY / "data_manifest" / "example.csv").read_text().splitlines()[0]
    assert header.split(",") == required


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_pages(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].source.startswith("# ")
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert [c for c in code if "parameters" in c.metadata.get("tags", [])] == [code[0]]
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and cell is not code[0]:
            assert before.cell_type == "markdown", f"no prose before: {cell.source}"
    for cell in code[1:]:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 14, f"{len(lines)} lines: {cell.source}"
        assert not re.search(r"^(def|class) |^!|^%", cell.source, re.MULTILINE)
    assert "write_results" in code[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameter_cells_are_typed_literals_with_a_comment(path):
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    for line in cell.source.splitlines():
        code, _, comment = line.partition("#")
        statement = ast.parse(code.strip()).body[0]
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        assert comment.strip(), line
        assert line.count("=") == 1, line


def test_the_readme_table_comes_from_the_published_results(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((REPOSITORY / "README.md").read_text())
    report.update_readme(readme, REPOSITORY / "docs" / "results" / "quick")
    assert readme.read_text() == (REPOSITORY / "README.md").read_text()


def test_the_oracle_estimated_the_published_cohort_patch_by_patch():
    results = REPOSITORY / "docs" / "results"
    rows = pd.read_csv(results / "distillation_oracle.csv", dtype={"knee_id": "str"})
    evidence = json.loads((results / "distillation_evidence.json").read_text())
    found = json.loads((results / "quick" / "agreement.json").read_text())
    known = [*BIOMARKERS, *(f"{b}_reference" for b in BIOMARKERS)]
    assert evidence["oracle"]["n_knees"] == 743
    assert len(rows) == found["bland_altman"]["ct_sma_plus"]["bv_tv"]["n"]
    assert not rows.duplicated(["knee_id", "patch_id"]).any() and np.isfinite(rows[known]).all(axis=None)
    assert "ct_oracle" in found["icc"] and "ct_oracle_vs_ct_sma_plus" in found["gain"]


def test_no_file_names_a_machine():
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.split():
        path = REPOSITORY / name
        if path.is_file() and path.suffix not in (".png", ".safetensors"):
            assert not re.search(r"/home/\w+/|/(root|Users|work)/", path.read_text()), name


CHECKLISTS = sorted((REPOSITORY / "docs" / "checklists").glob("*.yaml"))


def headings(file):
    """The headings of a Markdown file or a notebook."""
    if file.suffix == ".ipynb":
        cells = nbformat.read(file, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)", text, re.MULTILINE)


@pytest.mark.parametrize("path", CHECKLISTS, ids=lambda p: p.stem)
def test_checklists_are_whole_and_their_anchors_exist(path):
    items = yaml.safe_load(path.read_text())["items"]
    numbers = [int(re.match(r"\d+", str(item["item"]))[0]) for item in items]
    assert sorted(set(numbers)) == list(range(1, {"claim_2024": 44, "tripod_ai": 27}[path.stem] + 1))
    for item in items:
        assert item["status"] in ("reported", "partly", "missing", "not applicable"), item
        assert item["status"] == "reported" or item["note"], item
        for anchor in item["where"]:
            file, _, part = anchor.partition("#")
            found = [heading for heading in headings(REPOSITORY / file) if part in heading]
            assert len(found) == 1, f"{item['item']}: {anchor} names {found}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_links_of_the_documents_exist(path):
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
