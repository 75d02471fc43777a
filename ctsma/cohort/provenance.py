"""What a number came from: content hashes, package versions, and result files written whole or not at all."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]  # the folder that holds the package
SCHEMA_VERSION = 1
PACKAGES = [
    "numpy",
    "scipy",
    "pandas",
    "SimpleITK",
    "torch",
    "monai",
    "numba",
    "pingouin",
    "scikit-learn",
    "papermill",
]


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_key(*parts) -> str:
    """SHA-256 over JSON-able parts; equal content gives an equal key in any process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


@cache
def source_sha256(module: str) -> str:
    """SHA-256 over the source of a ctsma module and of every ctsma module it imports, followed to the end.

    A package's data files (YAML) count as source. Editing a room to the right leaves the value unchanged.
    """
    files = sorted(file for name in _followed(module, set()) for file in _files(name))
    return content_key([(str(file.relative_to(ROOT)), sha256_file(file)) for file in files])


def imports(source: str, package: str = "") -> set[str]:
    """The ctsma modules that a Python source imports, by full name; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("ctsma.") and _source(name).exists()}


def _source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _files(module: str) -> list[Path]:
    source = _source(module)
    return [source, *source.parent.glob("*.yaml")] if source.name == "__init__.py" else [source]


def _followed(module: str, seen: set[str]) -> set[str]:
    if module in seen:
        return seen
    seen.add(module)
    source = _source(module)
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    for name in imports(source.read_text(), package):
        _followed(name, seen)
    return seen


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all: temporary file in the same folder, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(handle)
    try:
        Path(temporary).write_text(text, encoding="utf-8")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def write_json(path: str | Path, mapping: Mapping) -> Path:
    """Write JSON whole or not at all; numpy numbers and paths become plain, NaN becomes null."""
    return write_text(path, json.dumps(_finite(mapping), indent=1, default=_plain) + "\n")


def write_results(path: str | Path, numbers: Mapping, header: Mapping) -> Path:
    """Write one stage's results file: `header` (profile, seed, hashes, seconds), versions, then `numbers`."""
    head = {"schema_version": SCHEMA_VERSION, **header, "git_commit": git_commit(), "packages": versions()}
    return write_json(path, head | dict(numbers))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str:
    """Commit of the source tree, with "+changes" where it is edited; "unknown" outside a git checkout."""
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value):
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_finite(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
