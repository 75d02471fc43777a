"""Which series are imported: a rule, a table of its choice, and a file that overrides it."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ctsma.cohort.dicom import MIN_SLICES
from ctsma.common import InputError
from ctsma.files import write_text

from .headers import element_number, element_text
from .identity import identity_text, pseudonym

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # start of the SOP classes of screen copies (PS3.4)
THIN_MM = 1.0  # design choice: thinner slices than this are good enough, then the kernel decides
KNEE = re.compile(
    r"KNEE|KNIE|GENOU|GINOCCHI|RODILLA|JOELHO|LOW(ER)?[ _]?EXT|\bLEG\b|EXTREMIT", re.IGNORECASE
)
RIGHT_WORDS = r"RIGHT|RECHTS|DROIT\w*|DERECH\w*|DESTR\w*|RE|RT|R"
LEFT_WORDS = r"LEFT|LINKS|GAUCHE|IZQUIERD\w*|SINISTR\w*|LI|LT|L"
SIDES = {  # whole words, so that neither "L3" nor "AXIAL" is a side
    "R": re.compile(rf"(?<![A-Z0-9])({RIGHT_WORDS})(?![A-Z0-9])|RKNEE", re.IGNORECASE),
    "L": re.compile(rf"(?<![A-Z0-9])({LEFT_WORDS})(?![A-Z0-9])|LKNEE", re.IGNORECASE),
}
BOTH = re.compile(r"(?<![A-Z])(BOTH|BILAT\w*|BEIDE\w*|BDS)(?![A-Z])", re.IGNORECASE)
BSSFP = re.compile(r"B[-_ ]?FFE|BAL(ANCED|_| )|TRU(E)?[-_ ]?FI|FIESTA|SSFP|CISS", re.IGNORECASE)
# Design choice, by vendor: Siemens from number 50, GE names, Canon from FC30, Philips letters
SHARP = re.compile(
    r"^(BONE|EDGE|LUNG|ULTRA|HD)|^[A-Z]{1,2}R?([5-9]\d)|^FC(3\d|[5-8]\d)|^(D|E|YD|YE|YC)$",
    re.IGNORECASE,
)
SOFT = re.compile(
    r"^(SOFT|SMOOTH|STANDARD_SOFT)|^[A-Z]{1,2}R?[1-3]\d|^FC(0\d|1[0-9]?|2\d)$|^(A|YA)$",
    re.IGNORECASE,
)
COLUMNS = ["take", "stack", "subject", "side", "modality", "note", "n_images", "thickness_mm"]
COLUMNS += ["spacing_mm", "kernel", "echo", "echo_time_ms", "series_number", "body_part"]
COLUMNS += ["description", "folder"]  # of the choice file; `take` is `selected` in the tables here
TEXTS = ("SeriesDescription", "ProtocolName", "StudyDescription")


def list_stacks(
    images: pd.DataFrame, salt: bytes, side: str | None = None, echo: int | None = None
) -> pd.DataFrame:
    """One row per stack of `scan`'s images, in a stable order, and whether it is selected.

    Of one person, modality and side one stack is selected: thin slices before thick, CT with a bone
    kernel before others, bSSFP before other MR, then thinner slices, then more.

    Parameters
    ----------
    images : of `scan`.
    salt : of `read_salt`.
    side : "L" or "R" for the stacks that do not name it.
    echo : of multi-echo MR; the shortest where None.

    Returns
    -------
    DataFrame of COLUMNS (`selected` for `take`), `refused` (a knee's image that must not be
    imported) and `excluded` (nor may a choice select it). `note` is the reason why a stack is left
    out, or of how many it is the best.
    """
    table = pd.DataFrame([_describe(group, salt) for _, group in images.groupby("stack")])
    if side:
        table.loc[(table["side"] == "") & (table["note"] == ""), "side"] = side
    _leave_out_other_echoes(table, echo)
    table["selected"] = False
    usable = table[table["note"] == ""].sort_values("rank", kind="stable")
    for _, group in usable.groupby(["subject", "modality"]):
        with_side = group[group["side"] != ""]
        candidates = with_side if len(with_side) else group
        for _, same_knee in candidates.groupby("side"):
            best = same_knee.index[0]
            table.loc[best, ["selected", "note"]] = True, f"best of {len(same_knee)}"
    left_out = (table["note"] == "") & ~table["selected"]
    table.loc[left_out, "note"] = "another series of this knee is better, or names its side"
    columns = ["selected", *COLUMNS[1:], "refused", "excluded"]
    order = ["subject", "modality", "series_number", "stack"]
    return table[columns].sort_values(order, ignore_index=True)


def write_choice(table: pd.DataFrame, path: str | Path) -> Path:
    """Write the choice as CSV, to be edited in columns take (1 or 0) and side.

    The file names folders, which may identify: keep it inside the hospital.
    """
    columns = table.assign(take=table["selected"].astype(int))[COLUMNS]
    return write_text(path, columns.to_csv(index=False))


def apply_choice(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The table with `selected` and `side` as the file gives them; other stacks are left out.

    Raises InputError: not a choice file, a stack that is not in the tree or is excluded, a take
    that is not 0 or 1, a side that is not L or R.
    """
    try:
        chosen = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("stack")
        take, side = chosen["take"].map({"0": False, "1": True}), chosen["side"]
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        remedy = "remove it, and the import writes it again"
        raise InputError(path, "is not a choice file", remedy) from error
    unknown = sorted(set(chosen.index) - set(table["stack"]))
    if unknown:
        problem = f"names stack {', '.join(unknown[:3])}, which is not in the tree"
        raise InputError(path, problem, "remove its row")
    if not chosen.index.is_unique or take.isna().any() or not side.isin(["", "L", "R"]).all():
        problem = "names a stack twice, or a take that is not 0 or 1, or a side that is not L or R"
        raise InputError(path, problem, "correct it")
    table, name = table.copy(), Path(path).name
    for index, row in table.iterrows():
        if row["stack"] not in chosen.index:
            table.loc[index, "selected"] = False
            table.loc[index, "note"] = f"not in {name}: add its row, or remove the file"
            continue
        selected = bool(take[row["stack"]])
        if selected and row["excluded"]:
            raise InputError(
                path, f"takes stack {row['stack']}: {row['note']}", "set its take to 0"
            )
        if selected != row["selected"]:
            table.loc[index, "note"] = f"chosen in {name}"
        table.loc[index, "selected"] = selected
        table.loc[index, "side"] = side[row["stack"]] or row["side"]
    return table


def sharpness(kernel: str) -> str:
    """ "bone", "soft" or "" (between, or unknown) of a CT kernel, by the vendors' names."""
    if SHARP.search(kernel):
        return "bone"
    return "soft" if SOFT.search(kernel) else ""


def _describe(images: pd.DataFrame, salt: bytes) -> dict:
    """One row of the table, and `series` and `rank`, by which the best stack is found."""
    header = images.iloc[0].dropna().to_dict()
    spacing = element_text(header, "PixelSpacing").split("\\")[0]
    screen_copy = element_text(header, "SOPClassUID").startswith(SECONDARY_CAPTURE)
    modality = element_text(header, "Modality")
    burned_in = element_text(header, "BurnedInAnnotation").upper() == "YES"
    row = {
        "stack": header["stack"],
        "subject": pseudonym(salt, identity_text(header)),
        "side": _side_in_words(header),
        "modality": modality,
        "note": _reason_to_leave_out(header, len(images)),
        "n_images": len(images),
        "thickness_mm": element_number(header, "SliceThickness"),
        "spacing_mm": element_number({"row": spacing}, "row"),
        "kernel": element_text(header, "ConvolutionKernel"),
        "echo": element_number(header, "EchoNumbers"),
        "echo_time_ms": element_number(header, "EchoTime"),
        "series_number": element_number(header, "SeriesNumber"),
        "body_part": element_text(header, "BodyPartExamined"),
        "description": element_text(header, "SeriesDescription"),
        "folder": str(Path(header["file"]).parent),
        "refused": burned_in,
        "excluded": burned_in or screen_copy or modality not in ("CT", "MR"),
        "series": str(header["SeriesInstanceUID"]),
    }
    return row | {"rank": _rank(row, header)}


def _reason_to_leave_out(header: Mapping, n_images: int) -> str:
    """Why a stack cannot be a knee's CT or MR, or ""."""
    modality, part = element_text(header, "Modality"), element_text(header, "BodyPartExamined")
    if element_text(header, "SOPClassUID").startswith(SECONDARY_CAPTURE):
        return "a secondary capture (a screen copy), not an image with geometry"
    if modality not in ("CT", "MR"):
        return f"modality {modality or 'not stated'}"
    if "LOCALIZER" in element_text(header, "ImageType").upper() or n_images < MIN_SLICES:
        return f"a localiser or fragment: {n_images} images (a volume has {MIN_SLICES} or more)"
    if "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header:
        return "no slice position: export the original slices"
    words = [element_text(header, name) for name in (*TEXTS, "ReceiveCoilName")]
    if part and not KNEE.search(" ".join([part, *words])):
        return f"body part {part}, not a knee"
    if element_text(header, "BurnedInAnnotation").upper() == "YES":
        return "burned-in annotation is declared: blacken it and set BurnedInAnnotation to NO first"
    return ""


def _side_in_words(header: Mapping) -> str:
    """ "L" or "R" as the header gives it, "" where it gives none or both."""
    for name in ("Laterality", "ImageLaterality", "FrameLaterality"):
        value = element_text(header, name).upper()
        if value in SIDES:
            return value
    for name in ("BodyPartExamined", *TEXTS):
        words = element_text(header, name)
        found = [side for side, pattern in SIDES.items() if pattern.search(words.replace("_", " "))]
        if len(found) == 1 and not BOTH.search(words):
            return found[0]
    return ""


def _rank(row: Mapping, header: Mapping) -> tuple:
    """Sorts the stacks of one knee, the best first."""
    thickness = row["thickness_mm"] if np.isfinite(row["thickness_mm"]) else 99.0
    derived = "DERIVED" in element_text(header, "ImageType").upper()
    if row["modality"] == "CT":
        kernel = ["bone", "", "soft"].index(sharpness(row["kernel"]))
        return (thickness > THIN_MM, derived, kernel, thickness, -row["n_images"])
    names = (*TEXTS, "SequenceName", "PulseSequenceName")
    is_bssfp = BSSFP.search(" ".join(element_text(header, name) for name in names))
    voxel_mm3 = thickness * row["spacing_mm"] ** 2
    return (not is_bssfp, derived, voxel_mm3, -row["n_images"], 0)


def _leave_out_other_echoes(table: pd.DataFrame, echo: int | None) -> None:
    """Note, in place, of the echoes of an MR series that they are not the wanted one."""
    usable = table[(table["modality"] == "MR") & (table["note"] == "")]
    for _, series in usable.groupby("series"):
        if series["echo_time_ms"].nunique() < 2:
            continue
        series = series.sort_values("echo_time_ms")
        counted = pd.Series(range(1, len(series) + 1), index=series.index)
        numbers = series["echo"].fillna(counted).astype(int)
        if not numbers.is_unique:
            numbers = counted
        wanted = numbers.iloc[0] if echo is None else echo
        for index, number in numbers.items():
            if number != wanted:
                time = f"TE {series.loc[index, 'echo_time_ms']:g} ms"
                note = f"echo {number} of {len(series)} ({time}); --echo {number} takes it"
                table.loc[index, "note"] = note
