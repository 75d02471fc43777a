"""Headers of a tree of mixed DICOM files: one row per image, grouped into stacks."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import yaml

from ctsma.cache import content_hash
from ctsma.cohort.dicom import SLICE_ELEMENTS
from ctsma.common import InputError

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz", ".iso")
WHITELIST = yaml.safe_load(Path(__file__).with_name("whitelist.yaml").read_text())
TECHNICAL = [*SLICE_ELEMENTS, *WHITELIST["technical"]]
READ = [*TECHNICAL, *WHITELIST["identifying"]]
FRAME_NAMES = {  # element of a frame (PS3.3 C.7.6.16) -> the name that single slices use
    "EffectiveEchoTime": "EchoTime",
    "FrameLaterality": "ImageLaterality",
    "FrameType": "ImageType",
}


def scan(folder: str | Path) -> tuple[pd.DataFrame, Counter]:
    """Read the headers of every DICOM file below a folder, whatever its name.

    Returns
    -------
    images : one row per image (a frame of a multi-frame file): `file`, `frame` (None or its
        number), `stack` (key of series, echo, orientation and matrix) and the elements read.
    skipped : how many files were left out, by reason.

    Raises
    ------
    InputError : the folder does not exist, is an archive, or holds no DICOM file.
    """
    folder = Path(folder)
    if folder.is_file():
        is_archive = folder.name.lower().endswith(ARCHIVES)
        remedy = "unpack it first and give the folder" if is_archive else "give a folder of DICOM"
        raise InputError(folder, "is a file, not a folder", remedy)
    if not folder.is_dir():
        raise InputError(folder, "does not exist", "give the folder of a DICOM export")
    skipped, rows, seen = Counter(), [], set()
    for file in _find_files(folder, skipped):
        header = _read_header(file, skipped)
        if header is None:
            continue
        uid = str(header.get("SOPInstanceUID", file))
        if uid in seen:
            skipped["the same image twice in the tree"] += 1
            continue
        seen.add(uid)
        for image in _split_frames(header):
            rows.append(image | {"file": str(file), "stack": _stack_key(image)})
    if not rows:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it is empty"
        remedy = "give the folder of a DICOM export, unpacked"
        raise InputError(folder, f"holds no DICOM image ({counts})", remedy)
    return pd.DataFrame(rows, dtype=object), skipped


def removed_elements(file: str | Path) -> list[str]:
    """Names (never values) of a file's elements that are left out, private ones as "private"."""
    names = set()
    for element in pydicom.dcmread(file, stop_before_pixels=True):
        names.add("private" if element.tag.is_private else element.keyword or str(element.tag))
    return sorted(names - set(TECHNICAL))


def element_text(header: Mapping, name: str) -> str:
    """An element as text, several values joined by a backslash; "" where it is absent."""
    value = header.get(name)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return str(value)
    return "\\".join(map(str, value))


def element_number(header: Mapping, name: str) -> float:
    """An element as a number; NaN where it is absent or no single number."""
    try:
        return float(header.get(name))
    except (TypeError, ValueError):
        return float("nan")


def _find_files(folder: Path, skipped: Counter) -> list[Path]:
    """Files by name; links out of the tree are not followed and archives are not opened."""
    root, found = folder.resolve(), []
    for base, folders, names in os.walk(folder, followlinks=False):
        for name in folders:
            if (Path(base) / name).is_symlink():
                skipped["link to a folder, not followed"] += 1
        for name in names:
            file = Path(base) / name
            if not file.resolve().is_relative_to(root):
                skipped["link that leads out of the tree"] += 1
            elif not file.is_file():
                skipped["broken link"] += 1
            elif name.lower().endswith(ARCHIVES):
                skipped["archive, not opened: unpack it first"] += 1
            else:
                found.append(file)
    return sorted(found)


def _read_header(file: Path, skipped: Counter) -> dict | None:
    try:
        data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=READ)
        header = {name: data[name].value for name in READ if name in data}
    except pydicom.errors.InvalidDicomError:
        skipped["not DICOM"] += 1
        return None
    except (OSError, EOFError, ValueError, LookupError, RuntimeError, AttributeError, TypeError):
        skipped["damaged or unreadable"] += 1
        return None
    if "DICOMDIR" in file.name.upper() or "SeriesInstanceUID" not in header:
        skipped["DICOM without an image series (DICOMDIR)"] += 1
        return None
    return header


def _split_frames(header: dict) -> list[dict]:
    """One header per frame of a multi-frame file, with the names that single slices use."""
    shared = header.pop("SharedFunctionalGroupsSequence", None) or [pydicom.Dataset()]
    frames = header.pop("PerFrameFunctionalGroupsSequence", None)
    if not frames:
        return [header | {"frame": None}]
    common = header | _flatten(shared[0])
    return [common | _flatten(frame) | {"frame": n} for n, frame in enumerate(frames)]


def _flatten(groups: pydicom.Dataset) -> dict:
    """The elements of functional groups that are read, without the groups (PS3.3 C.7.6.16)."""
    found = {}
    for group in groups:
        if group.VR != "SQ" or not group.value:
            continue
        for element in group.value[0]:
            name = FRAME_NAMES.get(element.keyword, element.keyword)
            if name in READ and element.VR != "SQ" and element.value is not None:
                found[name] = element.value
    return found


def _stack_key(image: dict) -> str:
    """What one volume is made of shares series, echo, orientation and matrix."""
    series = str(image["SeriesInstanceUID"])
    echo = [str(image.get(name) or "") for name in ("EchoNumbers", "EchoTime")]
    axes = [round(float(v), 3) + 0.0 for v in image.get("ImageOrientationPatient") or []]
    return content_hash(series, echo, axes, image.get("Rows"), image.get("Columns"))[:10]
