"""Files written whole or not at all, their hashes, and the versions behind a result."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]  # the folder that holds the packages
_INSTALLED = Path(__file__).with_name("share")  # only in a wheel, see pyproject.toml
SHARE = _INSTALLED if _INSTALLED.is_dir() else ROOT  # notebooks/, models/, docs/, data_manifest/
PACKAGES = ("numpy", "scipy", "pandas", "SimpleITK", "nibabel", "torch", "monai", "numba")
PACKAGES += ("pingouin", "statsmodels", "scikit-learn", "papermill")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its suffixes, that replaces it when the block ends.

    The folder is made where it does not exist. After an error nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file whole or not at all; returns the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, mapping: Mapping) -> Path:
    """Write JSON whole or not at all; numpy values and paths become plain, NaN becomes null."""
    return write_text(path, json.dumps(_finite(mapping), indent=1, default=plain) + "\n")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


def git_commit() -> str:
    """Commit of the source tree, with "+changes" where it is edited; "unknown" outside git.

    A repository that only surrounds the tree, as around an installed package, does not count.
    """
    options = ["--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(ROOT), "--git-dir=.git", "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def plain(value: object) -> object:
    """A numpy value or a path as what JSON can hold; TypeError for anything else."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: object) -> object:
    """The same value with text keys, and None in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_finite(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
