"""A tree of mixed DICOM files, read without pixels: one row an image, grouped into stacks of one series and echo."""

import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pydicom
import yaml

from ctsma.cohort import InputFault, content_key

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz", ".iso")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # SOP classes that begin so are screen copies (PS3.4 annex B.5)
WHITELIST = yaml.safe_load(Path(__file__).with_name("whitelist.yaml").read_text())
READ = [*WHITELIST["technical"], *WHITELIST["identifying"]]


def scan(folder: str | Path) -> tuple[pd.DataFrame, Counter]:
    """Read the headers of every DICOM file below a folder, whatever its name.

    Returns
    -------
    images : one row an image (a frame of a multi-frame file): `file`, `frame` (None or its number), `stack` (key of
        series, echo, orientation and matrix) and the elements of the whitelist.
    skipped : how many files were left out, by reason.

    Raises
    ------
    InputFault : the folder does not exist, is an archive, or holds no DICOM file.
    """
    folder = Path(folder)
    if folder.is_file():
        mend = "unpack it first and give the folder" if _is_archive(folder) else "give the folder of a DICOM export"
        raise InputFault(folder, "is a file, not a folder", mend)
    if not folder.is_dir():
        raise InputFault(folder, "does not exist", "give the folder of a DICOM export")
    skipped, rows, seen = Counter(), [], set()
    for file in _files(folder, skipped):
        header = _read(file, skipped)
        if header is None:
            continue
        if str(header.get("SOPInstanceUID", file)) in seen:
            skipped["the same image twice in the tree"] += 1
            continue
        seen.add(str(header.get("SOPInstanceUID", file)))
        rows += _images(file, header)
    if not rows:
        found = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it is empty"
        raise InputFault(folder, f"holds no DICOM image ({found})", "give the folder of a DICOM export, unpacked")
    return pd.DataFrame(rows, dtype=object), skipped


def removed_elements(file: str | Path) -> list[str]:
    """Names (never values) of the header elements of a file that are not carried over, private ones as "private"."""
    data = pydicom.dcmread(file, stop_before_pixels=True)
    kept = set(WHITELIST["technical"])
    return sorted({"private" if e.tag.is_private else e.keyword or str(e.tag) for e in data} - kept)


def _is_archive(file: Path) -> bool:
    return file.name.lower().endswith(ARCHIVES)


def _files(folder: Path, skipped: Counter) -> list[Path]:
    """Files in the order of their names; links are never followed out of the tree, archives never opened."""
    root, found = folder.resolve(), []
    for base, folders, names in os.walk(folder, followlinks=False):
        skipped["link to a folder, not followed"] += sum((Path(base) / name).is_symlink() for name in folders)
        for file in (Path(base) / name for name in names):
            if not file.resolve().is_relative_to(root):
                skipped["link that leads out of the tree"] += 1
            elif not file.is_file():
                skipped["broken link"] += 1
            elif _is_archive(file):
                skipped["archive, not opened: unpack it first"] += 1
            else:
                found.append(file)
    skipped += Counter()  # drops zeros
    return sorted(found)


def _read(file: Path, skipped: Counter) -> dict | None:
    try:
        data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=READ)
        header = {name: data[name].value for name in READ if name in data}
    except pydicom.errors.InvalidDicomError:
        skipped["not DICOM"] += 1
        return None
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, AttributeError, TypeError):
        skipped["damaged or unreadable"] += 1
        return None
    if "DICOMDIR" in file.name.upper() or "SeriesInstanceUID" not in header:
        skipped["DICOM without an image series (DICOMDIR)"] += 1
        return None
    return header


def _images(file: Path, header: dict) -> list[dict]:
    plain = {k: v for k, v in header.items() if not k.endswith("GroupsSequence")}
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        return [_named(plain | {"file": str(file), "frame": None})]
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    parts = (_flat(shared[0]) | _flat(frame) for frame in frames)
    return [_named(plain | part | {"file": str(file), "frame": number}) for number, part in enumerate(parts)]


def _flat(groups: pydicom.Dataset) -> dict:
    """The elements of a frame's functional groups (PS3.3 C.7.6.16) under the names that single slices use."""
    inner = (item for group in groups if group.VR == "SQ" and group.value for item in group.value[:1])
    found = {element.keyword: element.value for item in inner for element in item if element.VR != "SQ"}
    renamed = {"EffectiveEchoTime": "EchoTime", "FrameLaterality": "ImageLaterality", "FrameType": "ImageType"}
    found |= {new: found[old] for old, new in renamed.items() if found.get(old) is not None}
    return {name: value for name, value in found.items() if name in {*READ, *WHITELIST["frame"]}}


def _named(image: dict) -> dict:
    """Add the stack's key: what one volume is made of shares series, echo, orientation and matrix."""
    axes = [round(float(v), 3) + 0.0 for v in image.get("ImageOrientationPatient") or []]
    echo = [str(image.get(name) or "") for name in ("EchoNumbers", "EchoTime")]
    parts = str(image["SeriesInstanceUID"]), echo, axes, image.get("Rows"), image.get("Columns")
    return image | {"stack": content_key(*parts)[:10]}
