"""Trained networks on disk, and the checkpoint of a training that is not finished.

A network is two files: weights as safetensors, and the record of its training as JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ctsma.cache import write_record
from ctsma.common import InputError
from ctsma.files import atomic, sha256_file
from ctsma.models import Network, build


def save_model(stem: Path, network: Network, key: str, record: dict) -> None:
    """Write `<stem>.safetensors` and, last, the record `<stem>.json`."""
    weights = Path(f"{stem}.safetensors")
    with atomic(weights) as temporary:
        state = {name: values.cpu().contiguous() for name, values in network.state_dict().items()}
        save_file(state, temporary)
    record = record | {"weights_sha256": sha256_file(weights)}
    write_record(Path(f"{stem}.json"), key, record, [weights.name])


def load_model(stem: str | Path) -> tuple[Network, dict]:
    """Read a network, ready to predict, and its record.

    Raises InputError where there is none or its weights are damaged.
    """
    try:
        record = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(stem, "holds no trained model", "train it first") from error
    weights = Path(f"{stem}.safetensors")
    if not weights.exists() or sha256_file(weights) != record["weights_sha256"]:
        raise InputError(weights, "is missing or damaged", "run the stage again, which trains it")
    settings, widths = record["settings"], tuple(record["settings"]["widths"])
    network = build(record["scale"]["input"], settings["size"], torch.Generator(), widths)
    network.load_state_dict(load_file(weights))
    device = settings["device"]
    return network.to(device, memory_format=torch.channels_last_3d).eval(), record


def save_checkpoint(path: Path, parts: Mapping, rng: np.random.Generator, curves: list) -> None:
    """Write the state of a training after an epoch: of its parts, its generator and its curves."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"rng": json.dumps(rng.bit_generator.state), "curves": curves}
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, parts: Mapping, rng: np.random.Generator) -> list:
    """Put a saved state into `parts` and `rng`; returns the curves so far."""
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    rng.bit_generator.state = json.loads(state["rng"])
    return state["curves"]
