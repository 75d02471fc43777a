"""The model directory: networks of every fold, what they were trained on and reached, verified before use."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray
from safetensors.numpy import load_file
from torch import nn

from ctsma import distillation
from ctsma.cohort import BIOMARKERS, BONES, InputFault, content_key, sha256_file
from ctsma.patches import Patches

from .limits import Familiar

SCHEMA_VERSION = 1
CARD, ABOUT = "MODEL_CARD.md", "model.json"
CHECK, FAMILIAR = "check.safetensors", "familiar.safetensors"
TOLERANCE = 1e-3  # relative; other processors round float32 otherwise, a wrong network is wrong by more (our choice)


@dataclass(frozen=True)
class Ensemble:
    """A model directory in memory: `about` is model.json, `members` the networks with their records."""

    about: dict
    members: list[tuple[nn.Module, dict]]
    familiar: Familiar


def estimate(members: Sequence[tuple[nn.Module, dict]], ct: ndarray, voi: ndarray, ruler_hu: ndarray) -> ndarray:
    """Biomarkers (n, 4) in their own units from CT patches and their trabecular region: the mean over the members.

    Parameters
    ----------
    members : networks with their records, as of `distillation.load_model`.
    ct : (n, 12, 24, 24) HU. voi : (n, 12, 48, 48) bool.
    ruler_hu : (n,) HU of the knee's own dense cortex, the mean of `patches.cortex_hu`.

    This is the one place where a network meets a patch outside training.
    """
    table = pd.DataFrame(np.zeros((len(ct), len(BIOMARKERS))), columns=list(BIOMARKERS))
    table = table.assign(**{f"cortex_{bone}_hu": ruler_hu for bone in BONES})
    no_mr = np.zeros(voi.shape, np.float16)
    examples = distillation.prepare(Patches(table, no_mr, ct, voi), detail=False)
    rows, found = np.arange(len(ct)), []
    for model, record in members:
        settings = distillation.Settings(**record["settings"])
        found.append(distillation.predict(model, record["role"], examples, rows, record["scale"], settings))
    return np.mean(found, axis=0)


def read_about(folder: str | Path) -> dict:
    """model.json of a model directory, whole and unchanged, with every file it names.

    Raises InputFault: no model there, damaged, changed since the export, of another version, a file that is missing
    or differs.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise InputFault(folder, f"holds no model ({ABOUT})", "give a folder that ctsma export-model wrote")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        same = content_key({name: value for name, value in about.items() if name != "content_sha256"})
    except (ValueError, AttributeError) as error:
        raise InputFault(path, "is damaged", "copy or export the model again") from error
    if about.get("schema_version") != SCHEMA_VERSION:
        seen = f"has schema version {about.get('schema_version')}, not {SCHEMA_VERSION}"
        raise InputFault(path, seen, "export the model again with this version of ctsma")
    if about.get("content_sha256") != same:
        raise InputFault(path, "was changed since the export", "copy or export the model again")
    for name, sha256 in about["files"].items():
        _check_file(Path(folder) / name, sha256)
    return about


def load_ensemble(folder: str | Path) -> Ensemble:
    """Read a model directory and see that it gives the estimates stored with it; faults as `read_about`.

    Raises InputFault too where the networks do not fit this version of ctsma, or estimate otherwise than stored.
    """
    folder, about = Path(folder), read_about(folder)
    try:
        members = [distillation.load_model(folder / name) for name in about["members"]]
    except (RuntimeError, TypeError, KeyError) as error:
        mend = f"use the version of ctsma that exported it (commit {about['git_commit'][:12]}), or export it again"
        raise InputFault(folder, "holds networks of another architecture than this version's", mend) from error
    check = load_file(folder / CHECK)
    found = estimate(members, check["ct"].astype(np.float32), check["voi"], check["ruler_hu"])
    if not np.allclose(found, check["estimate"], rtol=TOLERANCE, atol=0):
        worst = float(np.abs(found / check["estimate"] - 1).max())
        fault = f"gives estimates {100 * worst:.2g} % away from those stored with it"
        raise InputFault(folder, fault, "use the package versions that its model.json lists")
    return Ensemble(about, members, Familiar(**load_file(folder / FAMILIAR)))


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise InputFault(path, "is missing from the model", "copy or export the model again")
    if sha256_file(path) != sha256:
        raise InputFault(path, "differs from the checksum in model.json", "copy or export the model again")
