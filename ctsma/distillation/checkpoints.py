"""A trained network on disk: weights as safetensors, everything else as JSON beside them, curves as CSV."""

import json
from pathlib import Path

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
    if not weights.exists() or sha256_file(weights) != record["weights_sha256"]:
        raise InputFault(weights, "is missing or damaged", "run the stage again, which trains it anew")
    settings = record["settings"]
    model = build(record["role"], settings["size"], torch.Generator(), tuple(settings["widths"]))
    model.load_state_dict(load_file(weights))
    return model.to(settings["device"], memory_format=torch.channels_last_3d).eval(), record
