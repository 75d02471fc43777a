"""What every test shares: drawing without a screen, one thread, the optional real data."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the optional real data (environment variable CTSMA_REAL_DATA)."""
    folder = Path(os.environ.get("CTSMA_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the optional real data folder is absent; set CTSMA_REAL_DATA to its path")
    return folder
