"""Which series of each person and side come in: a rule, a table that shows it, and a file that overrides it."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.cohort import InputFault, write_text
from ctsma.cohort.images import MIN_SLICES

from .headers import SECONDARY_CAPTURE
from .identity import pseudonym

THIN_MM = 1.0  # thinner slices than this are all good enough: then the kernel decides (our choice)
KNEE = re.compile(r"KNEE|KNIE|GENOU|GINOCCHI|RODILLA|JOELHO|LOW(ER)?[ _]?EXT|\bLEG\b|EXTREMIT", re.IGNORECASE)
SIDES = {  # whole words, so that neither "L3" nor "AXIAL" is a side
    "R": re.compile(
        r"(?<![A-Z0-9])(RIGHT|RECHTS|DROIT\w*|DERECH\w*|DESTR\w*|RE|RT|R)(?![A-Z0-9])|RKNEE", re.IGNORECASE
    ),
    "L": re.compile(
        r"(?<![A-Z0-9])(LEFT|LINKS|GAUCHE|IZQUIERD\w*|SINISTR\w*|LI|LT|L)(?![A-Z0-9])|LKNEE", re.IGNORECASE
    ),
}
BOTH = re.compile(r"(?<![A-Z])(BOTH|BILAT\w*|BEIDE\w*|BDS)(?![A-Z])", re.IGNORECASE)
BSSFP = re.compile(r"B[-_ ]?FFE|BAL(ANCED|_| )|TRU(E)?[-_ ]?FI|FIESTA|SSFP|CISS", re.IGNORECASE)
# Kernels by vendor: Siemens number 50 and more, GE names, Canon FC30 and more, Philips letters (our choice)
SHARP = re.compile(
    r"^(BONE|EDGE|LUNG|ULTRA|HD)|^[A-Z]{1,2}R?([5-9]\d)|^FC(3\d|[5-8]\d)|^(D|E|YD|YE|YC)$", re.IGNORECASE
)
SOFT = re.compile(r"^(SOFT|SMOOTH|STANDARD_SOFT)|^[A-Z]{1,2}R?[1-3]\d|^FC(0\d|1[0-9]?|2\d)$|^(A|YA)$", re.IGNORECASE)
COLUMNS = ["take", "stack", "subject", "side", "modality", "note", "n_images", "thickness_mm", "spacing_mm", "kernel"]
COLUMNS += ["echo", "echo_time_ms", "series_number", "body_part", "description", "folder"]


def stacks(images: pd.DataFrame, salt: bytes, side: str | None = None, echo: int | None = None) -> pd.DataFrame:
    """One row a stack of `scan`'s images, in a stable order: what it is, and in `take` (bool) whether it comes in.

    Parameters
    ----------
    images : of `scan`. salt : of `read_salt`.
    side : "L" or "R" for the stacks that do not say it. echo : of multi-echo MR; the first where None.

    Returns
    -------
    DataFrame of COLUMNS, `refused` (a knee's image that must not come in) and `barred` (nor may a choice take it).
    `note` says why a stack is left out, or how many others it was preferred to. Of one person, modality and side one
    stack is taken: thin slices before thick, CT with a bone kernel before others, bSSFP before other MR, then thinner,
    more slices.
    """
    table = pd.DataFrame([_described(group, salt) for _, group in images.groupby("stack", sort=True)])
    table["side"] = [s or (side or "" if n == "" else "") for s, n in zip(table["side"], table["note"], strict=True)]
    _keep_echo(table, echo)
    table["take"] = False
    usable = table[table["note"] == ""].sort_values("rank", kind="stable")
    for _, group in usable.groupby(["subject", "modality"]):
        sided = group[group["side"] != ""]
        for _, same in (sided if len(sided) else group).groupby("side"):
            table.loc[same.index[0], ["take", "note"]] = True, f"best of {len(same)}"
    left = (table["note"] == "") & ~table["take"]
    table.loc[left, "note"] = "another series of this knee is better, or says which side it shows"
    return table[[*COLUMNS, "refused", "barred"]].sort_values(
        ["subject", "modality", "series_number", "stack"], ignore_index=True
    )


def write_choice(table: pd.DataFrame, path: str | Path) -> Path:
    """Write the choice as CSV, to be edited in columns take (1 or 0) and side. It names folders: keep it inside."""
    return write_text(path, table[COLUMNS].assign(take=table["take"].astype(int)).to_csv(index=False))


def apply_choice(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The table with `take` and `side` as the file says; stacks that it does not name are left out and say so.

    Raises InputFault: not such a file, a stack that is not in the tree or is barred, a take that is not 0 or 1, a side
    that is not L or R.
    """
    try:
        given = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("stack")
        take, side = given["take"].map({"0": False, "1": True}), given["side"]
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise InputFault(path, "is not a choice file", "remove it, and the import writes it again") from error
    if unknown := sorted(set(given.index) - set(table["stack"])):
        raise InputFault(path, f"names stack {', '.join(unknown[:3])}, which is not in the tree", "remove its row")
    if not given.index.is_unique or take.isna().any() or not side.isin(["", "L", "R"]).all():
        raise InputFault(
            path, "names a stack twice, or has a take that is not 0 or 1, or a side that is not L or R", "correct it"
        )
    table, named = table.copy(), table["stack"].isin(given.index)
    for row in table[table["barred"] & table["stack"].map(take).eq(True)].to_dict("records"):
        raise InputFault(path, f"takes stack {row['stack']}: {row['note']}", "set its take to 0")
    changed = named & (table["take"] != table["stack"].map(take).fillna(False).astype(bool))
    table["take"] = table["stack"].map(take).fillna(False).astype(bool)
    table["side"] = table["stack"].map(side.replace("", None)).fillna(table["side"])
    table.loc[changed, "note"] = f"chosen in {Path(path).name}"
    table.loc[~named, "note"] = f"not in {Path(path).name}: add its row, or remove the file to choose anew"
    return table


def sharpness(kernel: str) -> str:
    """ "bone", "soft" or "" (between, or unknown) of a CT convolution kernel, by the vendors' names."""
    return "bone" if SHARP.search(kernel) else "soft" if SOFT.search(kernel) else ""


def _described(images: pd.DataFrame, salt: bytes) -> dict:
    header = images.iloc[0].to_dict()
    header = {k: v for k, v in header.items() if v is not None and not (isinstance(v, float) and np.isnan(v))}
    text = {n: _text(header.get(n)) for n in ("SeriesDescription", "ProtocolName", "StudyDescription")}
    identity, spacing = person(header), header.get("PixelSpacing") or [np.nan]
    row = {"stack": header["stack"], "subject": pseudonym(salt, identity), "modality": _text(header.get("Modality"))}
    row |= {"n_images": len(images), "thickness_mm": _number(header.get("SliceThickness"))}
    row |= {"spacing_mm": float(spacing[0]), "kernel": _text(header.get("ConvolutionKernel"))}
    row |= {"echo": _number(header.get("EchoNumbers")), "echo_time_ms": _number(header.get("EchoTime"))}
    row |= {"series_number": _number(header.get("SeriesNumber")), "body_part": _text(header.get("BodyPartExamined"))}
    row |= {"description": text["SeriesDescription"], "folder": str(Path(header["file"]).parent)}
    row |= {"series": str(header["SeriesInstanceUID"]), "side": _side(header, text)}
    row["refused"] = _text(header.get("BurnedInAnnotation")).upper() == "YES"
    copied = str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    row["barred"] = row["refused"] or copied or row["modality"] not in ("CT", "MR")
    return row | {"note": _reason(header, text, len(images), row["refused"]), "rank": _rank(row, header, text)}


def person(header: Mapping) -> str:
    """What tells persons apart: the patient's ID; name and birth date without one; the study as last resort."""
    named = "^".join(_text(header.get(n)) for n in ("PatientName", "PatientBirthDate"))
    return _text(header.get("PatientID")) or (named if _text(header.get("PatientName")) else "") or _study(header)


def _study(header: Mapping) -> str:
    return f"study {header.get('StudyInstanceUID', '')}"


def _reason(header: dict, text: dict, n_images: int, burned_in: bool) -> str:
    """Why a stack cannot be a knee's CT or MR, or ""."""
    kind, part = _text(header.get("Modality")), _text(header.get("BodyPartExamined"))
    if str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE):
        return "a secondary capture (a screen copy), not an image with geometry"
    if kind not in ("CT", "MR"):
        return f"modality {kind or 'not stated'}"
    if "LOCALIZER" in _text(header.get("ImageType")).upper() or n_images < MIN_SLICES:
        return f"a localiser or fragment: {n_images} images"
    if "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header:
        return "no slice position: export the original slices"
    said = " ".join([part, *text.values(), _text(header.get("ReceiveCoilName"))])
    if part and not KNEE.search(said):
        return f"body part {part}, not a knee"
    return "burned-in annotation is declared: blacken it and set BurnedInAnnotation to NO first" if burned_in else ""


def _side(header: dict, text: dict) -> str:
    """ "L" or "R" as the header says, "" where it does not, or says both."""
    for name in ("Laterality", "ImageLaterality"):
        if (value := _text(header.get(name)).upper()) in SIDES:
            return value
    for said in (_text(header.get("BodyPartExamined")), *text.values()):
        found = [side for side, words in SIDES.items() if words.search(said.replace("_", " "))]
        if len(found) == 1 and not BOTH.search(said):
            return found[0]
    return ""


def _rank(row: dict, header: dict, text: dict) -> tuple:
    thickness = row["thickness_mm"] if np.isfinite(row["thickness_mm"]) else 99.0
    derived = "DERIVED" in _text(header.get("ImageType")).upper()
    if row["modality"] == "CT":
        kind = ["bone", "", "soft"].index(sharpness(row["kernel"]))
        return (thickness > THIN_MM, derived, kind, thickness, -row["n_images"])
    names = " ".join([*text.values(), *(_text(header.get(n)) for n in ("SequenceName", "PulseSequenceName"))])
    voxel = thickness * row["spacing_mm"] ** 2
    return (not BSSFP.search(names), derived, voxel, -row["n_images"], 0)


def _keep_echo(table: pd.DataFrame, echo: int | None) -> None:
    """Leave out all echoes of a series but the wanted one."""
    for _, group in table[(table["modality"] == "MR") & (table["note"] == "")].groupby("series"):
        if group["echo_time_ms"].nunique() < 2:
            continue
        order = group.sort_values("echo_time_ms")
        numbers = [int(e) if np.isfinite(e) else k for k, e in enumerate(order["echo"], 1)]
        wanted = echo if echo is not None else numbers[0]
        for index, number in zip(order.index, numbers, strict=True):
            if number != wanted:
                table.loc[index, "note"] = f"echo {number} of {len(group)}; --echo {number} takes it"


def _text(value) -> str:
    if value is None or isinstance(value, float) and np.isnan(value):
        return ""
    return str(value) if isinstance(value, str) or not hasattr(value, "__iter__") else "\\".join(map(str, value))


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
