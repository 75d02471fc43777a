"""What every test shares: one thread, no screen, one kernel for notebooks, the real data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import matplotlib
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from papermill.engines import Engine, NBClientEngine, papermill_engines
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

matplotlib.use("Agg")
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]
# Files of the longest time first, so that two processes end at about the same moment.
LONGEST = ("notebooks", "tutorials", "prediction", "cluster", "registration", "packed")
LONGEST += ("distillation", "checks", "simulation")


def pytest_collection_modifyitems(items):
    """Order the files; the tests of a file keep their order."""
    names = [f"test_{name}" for name in LONGEST]
    rank = {name: number for number, name in enumerate(names)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(names)))


@pytest.fixture(scope="session")
def run_notebook():
    """Run notebooks one after another in one kernel, so that libraries are imported once.

    `run_notebook(path, **parameters)` runs one in its folder, without variables of an earlier one,
    and returns it with its outputs.
    """
    patience = {"timeout": 600, "startup_timeout": 300, "iopub_timeout": 60}  # a busy machine
    client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3", **patience)

    def run(path, **parameters):
        notebook = load_notebook_node(str(path))
        if parameters:
            notebook = parameterize_notebook(notebook, parameters)
        source = f"%reset -f\nimport os\nos.chdir({str(path.parent)!r})"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(source))
        client.nb = notebook
        client.execute(cleanup_kc=False)
        del notebook.cells[0]
        return notebook

    with client.setup_kernel():
        yield run


class InProcess(Engine):
    """Runs the cells of a notebook in this process, so that no kernel has to start."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_):
        variables = {}
        for index, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, index)
            if cell.cell_type == "code":
                exec(cell.source, variables)
            nb_man.cell_complete(cell, index)


@pytest.fixture
def in_process():
    """Lets papermill run notebooks in this process, where what they display does not matter."""
    papermill_engines.register(None, InProcess)
    yield
    papermill_engines.register(None, NBClientEngine)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the optional real data (environment variable CTSMA_REAL_DATA)."""
    folder = Path(os.environ.get("CTSMA_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the optional real data folder is absent; set CTSMA_REAL_DATA to its path")
    return folder
