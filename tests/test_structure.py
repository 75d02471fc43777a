"""How the project is built: imports point backwards, functions are documented, files agree."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from ctsma.cache import imported_modules
from ctsma.cohort.manifest import SCHEMA
from ctsma_lab.profiles import profiles
from ctsma_lab.runner import STAGES, notebook_parameters

REPOSITORY = Path(__file__).parents[1]
# A module of ctsma imports only modules that stand before it.
ORDER = ["common", "files", "compiled", "parallel", "cache", "arms", "cohort", "registration"]
ORDER += ["biomarkers", "patches", "ridge", "models", "distillation"]
ORDER += ["agreement", "diagnosis", "cli"]
# Packages that ctsma does not import; each may import those before it.
BESIDE = ["kneesim", "dicom_import", "ctsma_predict", "ctsma_lab"]
PACKAGES = ["ctsma", *BESIDE]
SOURCES = [path for name in PACKAGES for path in sorted((REPOSITORY / name).rglob("*.py"))]
MAIN_LINE = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SUPPLEMENT = sorted((REPOSITORY / "notebooks" / "supplement").glob("S*.ipynb"))
MAX_CODE_LINES = 3500  # of ctsma, without blank lines, comments and docstrings
# Words that are not the field's. Each has a plain one in docs/glossary.md or in the code.
NOT_OUR_WORDS = re.compile(
    r"\b(r[u]ler\w*|l[e]sson\w*|w[e]ighed|the h[o]use|r[o]oms?|same d[o]or|m[e]nd(s|ed|ing)?|"
    r"known a[g]ain|its own k[i]nd|t[o]ld (by|its|the)|to d[o]ubt this|c[a]sework|b[a]rred|"
    r"how s[u]re)\b",
    re.IGNORECASE,
)


def tracked_files():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = [REPOSITORY / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def module_name(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def code_lines(path):
    """Lines that are neither blank, nor comment, nor docstring."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        holder = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if holder and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counted = enumerate(text.splitlines(), 1)
    return sum(bool(re.match(r"\s*[^\s#]", s)) for n, s in counted if n not in docstrings)


def test_the_method_is_thin_and_its_lines_are_short():
    sources = [path for path in SOURCES if module_name(path).split(".")[0] == "ctsma"]
    assert sum(code_lines(path) for path in sources) <= MAX_CODE_LINES
    long = [
        f"{p}: {line}" for p in SOURCES for line in p.read_text().splitlines() if len(line) > 100
    ]
    assert not long


def test_imports_point_backwards():
    for path in SOURCES:
        name = module_name(path)
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        top_level = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        imported = imported_modules(ast.Module(top_level, []), package)
        reached = {m.split(".")[1] for m in imported if m.startswith("ctsma.")}
        beside = {m.split(".")[0] for m in imported} & set(BESIDE)
        if name.startswith("ctsma."):
            own = name.split(".")[1]
            assert not beside, f"{name} imports {beside}"
            later = {m for m in reached - {own} if ORDER.index(m) > ORDER.index(own)}
            assert not later, f"{name} imports {later}, which stand after it"
        elif name != "ctsma":
            allowed = BESIDE[: BESIDE.index(name.split(".")[0]) + 1]
            assert beside <= set(allowed), f"{name} imports {beside}"


def test_notebooks_without_networks_do_not_wait_for_torch():
    imports = []
    for stage in ("01_cohort", "02_registration_qa", "04_icc_agreement"):
        cells = nbformat.read(REPOSITORY / "notebooks" / f"{stage}.ipynb", as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        imports += [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
    source = "\n".join([*map(ast.unparse, imports), "import sys", "print(sorted(sys.modules))"])
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert "'numpy'" in done.stdout
    assert "'torch'" not in done.stdout


def test_public_functions_are_documented_and_typed():
    problems = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                problems.append(f"{path.name}: {node.name} has no docstring")
            if public and isinstance(node, ast.FunctionDef) and node.returns is None:
                problems.append(f"{path.name}: {node.name} does not state what it returns")
    assert not problems


def test_packages_do_not_print_show_or_seed_globally():
    pattern = r"plt\.show|os\.getenv|except:|np\.random\.seed|manual_seed\(\d"
    for path in SOURCES:
        assert not re.findall(pattern, path.read_text()), path
        speaks = path.stem.endswith("command") or path.parent.name == "commands"
        if not speaks and path.stem not in ("cli", "run", "pipeline_figure", "terminal"):
            assert not re.search(r"\bprint\(", path.read_text()), path


def test_words_are_the_fields_own():
    found = []
    for path in tracked_files():
        if path.suffix in (".py", ".md", ".ipynb"):
            words = [match.group(0) for match in NOT_OUR_WORDS.finditer(path.read_text())]
            found += [f"{path.relative_to(REPOSITORY)}: {word}" for word in words]
    assert not found


def test_no_file_names_a_machine():
    for path in tracked_files():
        if path.suffix not in (".png", ".webp", ".safetensors", ".gz", ".npz"):
            text = path.read_text()
            assert not re.search(r"/home/\w+/|/(root|Users|work)/|/[t]mp/tmp", text), path


def test_environment_yml_agrees_with_pyproject():
    location = REPOSITORY / ".ci" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", location)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPOSITORY / "environment.yml").read_text() == module.environment()


def test_lock_pins_every_dependency_and_names_no_host():
    text = (REPOSITORY / "requirements.lock").read_text()
    lines = [line for line in text.splitlines() if "==" in line]
    pinned = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
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


def cells_of(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


@pytest.mark.parametrize("path", MAIN_LINE + SUPPLEMENT, ids=lambda path: path.stem)
def test_notebooks_are_pages_that_people_read(path):
    cells = cells_of(path)
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert cells[0].source.startswith("# ")
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert [c for c in code if "parameters" in c.metadata.get("tags", [])] == [code[0]]
    assert any(re.search(r"^#+ Limitations", text, re.MULTILINE) for text in prose)
    for cell in code:
        assert not re.search(r"^(def|class) |^!|^%", cell.source, re.MULTILINE)
        assert max(len(line) for line in cell.source.splitlines()) <= 100
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", f"no prose before: {cell.source}"
    if path in MAIN_LINE:
        assert len(code) <= 15
        assert sum(len(text.split()) for text in prose) <= 900
        assert "Run.open" in code[1].source
        assert "write_results" in code[-1].source
        assert any(re.search(r"^#+ Result", text, re.MULTILINE) for text in prose)


@pytest.mark.parametrize("path", MAIN_LINE + SUPPLEMENT, ids=lambda path: path.stem)
def test_parameter_cells_are_typed_literals_with_a_comment(path):
    tagged = [c for c in cells_of(path) if "parameters" in c.metadata.get("tags", [])]
    for line in tagged[0].source.splitlines():
        code, _, comment = line.partition("#")
        statement = ast.parse(code.strip()).body[0]
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        assert comment.strip(), line
        assert line.count("=") == 1, line


def test_profiles_name_parameters_and_stages_that_exist():
    known = {name for stage in STAGES for name in notebook_parameters(stage)}
    for name, profile in profiles().items():
        assert set(profile["parameters"]) <= known, name
        assert not profile["minutes"] or set(profile["minutes"]) == set(STAGES), name
    assert profiles()["full"]["parameters"] == {}
    assert len(MAIN_LINE) == len(STAGES) == 5
