"""The wheel: it holds what the commands read, and it runs where it is installed."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SHARED = SETUPTOOLS["package-dir"]  # package of the wheel -> folder of the repository
PACKAGES = [name for name in SETUPTOOLS["packages"] if name not in SHARED and "." not in name]


def tracked(*folders):
    """Files of the project below these folders, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--"]
    listed = subprocess.run([*command, *folders], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: its files cannot be told from others")
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    return [name for name in names if (REPOSITORY / name).is_file()]


def run(command, folder, **environment):
    """Run a command where nothing leads to the repository; returns its output."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": folder, "env": inherited | environment, "capture_output": True, "text": True}
    done = subprocess.run([str(part) for part in command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="a home folder that is a file, as HOME names it")
def test_compiled_functions_run_where_neither_source_nor_home_can_be_written(tmp_path):
    source = "from ctsma.compiled import compiled\n@compiled()\ndef double(x):\n    return 2 * x\n"
    (tmp_path / "twice.py").write_text(source + "print(double(2), double(1.5))\n")
    (tmp_path / "__pycache__").write_text("")  # a file: no folder can be made in its place
    (tmp_path / "temporary").mkdir()
    places = {"HOME": str(tmp_path / "twice.py"), "TMPDIR": str(tmp_path / "temporary")}
    places |= {"XDG_CACHE_HOME": places["HOME"], "PYTHONPATH": str(REPOSITORY)}
    assert run([sys.executable, tmp_path / "twice.py"], tmp_path, **places) == "4 3.0\n"
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the project in a folder of an unusual name."""
    # Importing setuptools fails where another module has imported distutils before.
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools 77 or later")
    folder = tmp_path_factory.mktemp("bui ld{x} é")
    for name in tracked(*PACKAGES, *SHARED.values(), "pyproject.toml", "README.md", "LICENSE"):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "--wheel-dir", folder, folder / "source"], folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_packages_and_of_the_shared_folders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {name.as_posix() for name in tracked(*PACKAGES)}
    for package, folder in SHARED.items():
        place = package.replace(".", "/")
        wanted |= {f"{place}/{n.relative_to(folder).as_posix()}" for n in tracked(folder)}
    assert not wanted - held
    assert not [name for name in held - wanted if ".dist-info/" not in name]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel; the other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("install") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    target = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run([*pip, "--no-index", wheel], folder)
    # Editable installs of this environment are not read there: .pth files count in site folders.
    others = [path for path in sys.path if path.endswith("-packages")]
    Path(target.strip(), "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    return scripts


@pytest.mark.slow  # its content is compared above
def test_an_installed_wheel_runs_and_finds_notebooks_and_model(installed, tmp_path):
    version = PROJECT["project"]["version"]
    assert run([installed / "ctsma", "--version"], tmp_path) == f"ctsma {version}\n"
    program = """
import json
import ctsma.files, ctsma_lab.runner, ctsma_predict.model
from ctsma_lab import cli
from ctsma_predict.predict_command import SHIPPED_MODEL
assert not (ctsma.files.ROOT / "pyproject.toml").exists(), ctsma.files.ROOT
assert cli.main(["run", "--profile", "tiny", "--dry-run"]) == 0
notebooks = ctsma_lab.runner.NOTEBOOKS
print(json.dumps([
    len(ctsma_predict.model.load_ensemble(SHIPPED_MODEL).members),
    len(list(notebooks.rglob("*.ipynb"))),
    len(list((notebooks / "../docs/results/full").glob("*.json"))),
    (ctsma.files.SHARE / "data_manifest" / "datapackage.json").exists(),
    ctsma.files.git_commit(),
]))
"""
    output = run([next(installed.glob("python*")), "-c", program], tmp_path)
    plan, found = output.rsplit("\n", 2)[:2]
    assert "05_roc_diagnosis" in plan
    notebooks = len([name for name in tracked("notebooks") if name.suffix == ".ipynb"])
    results = len([name for name in tracked("docs/results/full") if name.suffix == ".json"])
    assert json.loads(found) == [5, notebooks, results, True, "unknown"]
    assert not list(tmp_path.iterdir())
