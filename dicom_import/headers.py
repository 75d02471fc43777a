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
from ctsma.cohort.dicom import MIN_SLICES, SLICE_ELEMENTS, read_headers
from ctsma.common import InputError

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz", ".iso")
WHITELIST = yaml.safe_load(Path(__file__).with_name("whitelist.yaml").read_text("utf-8"))
TECHNICAL = [*SLICE_ELEMENTS, *WHITELIST["technical"]]
READ = [*TECHNICAL, *WHITELIST["identifying"]]


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
        for image in _read_images(file, skipped):
            # Some exporters write one SOPInstanceUID into all slices, so the position counts too.
            uid = str(image["SOPInstanceUID"] or file)
            position = (uid, image["frame"], str(image["ImagePositionPatient"]), _stack_key(image))
            if position in seen:
                skipped["the same image twice in the tree"] += 1
                continue
            seen.add(position)
            rows.append(image | {"file": str(file), "stack": _stack_key(image)})
    _separate_spacings(rows)
    if not rows:
        counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it is empty"
        remedy = "give the folder of a DICOM export, unpacked"
        raise InputError(folder, f"holds no DICOM image ({counts})", remedy)
    return pd.DataFrame(rows, dtype=object), skipped


def removed_elements(file: str | Path) -> list[str]:
    """Names (never values) of a file's elements that are left out, private ones as "private"."""
    names = set()
    for element in pydicom.dcmread(file, stop_before_pixels=True, force=True):
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


def _read_images(file: Path, skipped: Counter) -> list[dict]:
    """Headers of a file's images; files without image are counted by reason."""
    try:
        images = read_headers(file, READ)
    except InputError:
        skipped["damaged or unreadable"] += 1
        return []
    if images and images[0]["SeriesInstanceUID"]:
        return images
    is_index = images or "DICOMDIR" in file.name.upper()
    skipped["DICOM without an image series (DICOMDIR)" if is_index else "not DICOM"] += 1
    return []


def _stack_key(image: dict) -> str:
    """What one volume is made of shares series, echo, orientation and matrix."""
    series = str(image["SeriesInstanceUID"])
    echo = [str(image.get(name) or "") for name in ("EchoNumbers", "EchoTime")]
    try:
        axes = [round(float(v), 3) + 0.0 for v in image.get("ImageOrientationPatient") or []]
    except (TypeError, ValueError):
        axes = str(image["ImageOrientationPatient"])
    return content_hash(series, echo, axes, image.get("Rows"), image.get("Columns"))[:10]


def _separate_spacings(rows: list[dict]) -> None:
    """Make stacks, in place, of the pixel spacings of one; not of a few odd slices, an error."""
    spacings: dict[str, Counter] = {}
    for row in rows:
        spacings.setdefault(row["stack"], Counter())[str(row["PixelSpacing"])] += 1
    for row in rows:
        counts = spacings[row["stack"]]
        if len(counts) > 1 and min(counts.values()) >= MIN_SLICES:
            row["stack"] = content_hash(row["stack"], str(row["PixelSpacing"]))[:10]
