"""A trained network on disk: weights as safetensors, everything else as JSON beside them, curves as CSV."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctsma.cohort import InputFault, sha256_file, write_json, write_text
from ctsma.networks import build


def save_model(stem: Path, model: nn.Module, curves: pd.DataFrame, record: dict) -> None:
    """Write `<stem>.safetensors`, `<stem>.csv` (curves) and, last, `<stem>.json` (record): no JSON, no model."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = {suffix: stem.with_name(stem.name + suffix) for suffix in (".json", ".safetensors", ".csv")}
    files[".json"].unlink(missing_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, files[".safetensors"])
    write_text(files[".csv"], curves.to_csv(index=False))
    write_json(files[".json"], record | {"weights_sha256": sha256_file(files[".safetensors"])})


def load_model(stem: str | Path, expected: dict | None = None) -> tuple[nn.Module, dict]:
    """Read a model and its record (role, settings, scale, subjects, hashes, versions), ready to predict.

    Raises InputFault where there is none, or where a value of `expected` (a hash of protocol or split, the key)
    differs from the record: a model answers only for what it was trained on; or where its weights are damaged.
    """
    stem = Path(stem)
    try:
        record = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputFault(stem, "holds no trained model", "train it first") from error
    for name, value in (expected or {}).items():
        if record.get(name) != value:
            raise InputFault(stem, f"was trained with another {name}", "train again, or use the run it belongs to")
    weights = stem.with_name(stem.name + ".safetensors")
    if not weights.exists() or sha256_file(weights) != record.get("weights_sha256"):
        raise InputFault(weights, "is missing or damaged", "run the stage again, which trains it anew")
    settings = record["settings"]
    ruled, widths = "ridge" in record["scale"], tuple(settings["widths"])
    model = build(record["role"], settings["size"], torch.Generator(), widths, ruled)
    model.load_state_dict(load_file(weights))
    return model.to(settings["device"], memory_format=torch.channels_last_3d).eval(), record


class Progress:
    """A training on disk until its model is, so that one that was stopped goes on where it was, to the same bits.

    `<stem>.unfinished` holds tensors (torch.save, read back with weights_only) and is removed by `done`.
    """

    def __init__(self, stem: Path, key: str, seconds: float):
        self.path, self.key, self.seconds = stem.with_name(stem.name + ".unfinished"), key, seconds
        self.saved = time.monotonic()

    def resume(self, parts: dict, rng: np.random.Generator) -> list:
        """Put the kept state into `parts` and `rng`; returns the curves so far, [] where nothing fits."""
        try:
            kept = torch.load(self.path, weights_only=True)
        except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError):
            return []  # never begun, or cut off while it was written
        if kept["key"] != self.key:
            return []
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        rng.bit_generator.state = json.loads(kept["rng"])
        return kept["curves"]

    def keep(self, parts: dict, rng: np.random.Generator, curves: list, finished: bool) -> None:
        """Save after an epoch, at most once in `seconds` and when finished; whole or not at all."""
        if not finished and time.monotonic() - self.saved < self.seconds:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"key": self.key, "rng": json.dumps(rng.bit_generator.state), "curves": curves}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".partial-{self.path.name}")
        torch.save(state, partial)
        partial.replace(self.path)
        self.saved = time.monotonic()

    def done(self) -> None:
        """Remove what is no longer needed."""
        self.path.unlink(missing_ok=True)
