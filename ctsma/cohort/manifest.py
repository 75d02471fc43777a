"""The manifest: one row per knee; all problems of a manifest are reported at once."""

import re
from io import StringIO
from pathlib import Path

import pandas as pd
import pandera.pandas as pa
import SimpleITK as sitk

from ctsma.common import VOLUMES, InputError

from .images import read_volume

COLUMN_WORDS = {"column_in_dataframe": "is missing", "column_in_schema": "is unknown"}
VALUE_WORDS = {  # of the checks that pandera names itself
    "not_nullable": "is empty",
    "field_uniqueness": "occurs twice",
    "coerce_dtype('float64')": "is not a number",
    "dtype('float64')": "is not a number",
}


def _text(check: pa.Check | None = None, required: bool = True) -> pa.Column:
    return pa.Column(str, check, nullable=True, required=required)


def _number(check: pa.Check, required: bool = True) -> pa.Column:
    return pa.Column(float, check, nullable=True, coerce=True, required=required)


def _between(low: float, high: float) -> pa.Check:
    return pa.Check.in_range(low, high, error=f"is not between {low} and {high}")


def _own_files(knee_ids: pd.Series) -> pd.Series:
    """False where the files of two knees would have one name, also where case is ignored."""
    names = knee_ids.str.lower()
    owners = names.str.replace(r"(_rescan|_stages)+$", "", regex=True)
    twice = names.duplicated() & ~knee_ids.duplicated()
    return ~(twice | ((owners != names) & owners.isin(names)))


IDENTIFIER = pa.Check.str_matches(
    r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
    error="holds more than letters, digits, hyphens, underscores and dots (not first or last)",
)
OWN_FILES = pa.Check(
    _own_files, error="would share its files with another knee (case, _rescan or _stages alone)"
)
SHA256 = pa.Check.str_matches(r"^[0-9a-f]{64}$", error="is not 64 hexadecimal digits")
SCHEMA = pa.DataFrameSchema(
    {
        "knee_id": pa.Column(str, [IDENTIFIER, OWN_FILES], unique=True),
        "subject_id": pa.Column(str, IDENTIFIER),
        "side": pa.Column(str, pa.Check.isin(["L", "R"], error="is not L or R")),
        "ct": _text(),
        "mr": _text(),
        "oa": _number(pa.Check.isin([0, 1], error="is not 0 or 1")),
        "kl_grade": _number(pa.Check.isin(range(5), error="is not 0, 1, 2, 3 or 4")),
        "age": _number(_between(0, 120)),
        "sex": _text(pa.Check.isin(["F", "M"], error="is not F or M")),
        "bmi": _number(_between(8, 100)),
        "site": _text(),
        "ct_sha256": _text(SHA256),
        "mr_sha256": _text(SHA256),
        "mr_echo": _number(_between(1, 99), required=False),
        "mr_rescan": _text(required=False),
        "ct_labels": _text(required=False),
        "has_reference": _number(pa.Check.isin([0, 1], error="is not 0 or 1"), required=False),
    },
    strict=True,
    checks=[
        pa.Check(lambda f: ~f.duplicated(["subject_id", "side"]), error="repeats a subject's side"),
        pa.Check(lambda f: f["ct"].notna() | f["mr"].notna(), error="names neither a CT nor an MR"),
    ],
)


def read_manifest(path: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """Read and check a manifest (columns: data_manifest/datapackage.json).

    Parameters
    ----------
    path : CSV file, one row per knee (see `read_text_table`; a decimal comma is read as a point).
    root : folder that the image paths are relative to; the manifest's own folder where None.

    Returns
    -------
    DataFrame with `attrs["root"]` and `attrs["path"]`, both text; identifiers and paths are text,
    missing text is NA.

    Raises
    ------
    InputError : not a CSV, a column or value outside the schema (all are listed together), or an
        image path or link that leads out of the root.
    """
    path = Path(path)
    frame = read_text_table(path)
    for name, column in SCHEMA.columns.items():
        if name in frame and str(column.dtype) == "float64":
            frame[name] = frame[name].str.replace(",", ".")
    try:
        frame = SCHEMA.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        problems = "; ".join(_sentences(errors.failure_cases))
        remedy = "correct the manifest (columns: data_manifest/datapackage.json)"
        raise InputError(path, problems, remedy) from errors
    frame = frame.reset_index(drop=True)
    for column in frame.columns.intersection(VOLUMES):
        frame[column] = frame[column].str.replace("\\", "/")  # paths as Windows writes them
    frame.attrs = {"root": str(Path(root) if root else path.parent), "path": str(path)}
    _check_inside(path, frame)
    return frame


def read_text_table(path: str | Path) -> pd.DataFrame:
    """A CSV as text, as spreadsheets save it: comma, semicolon or tab between columns.

    A byte-order mark, spaces around cells, empty lines and empty last columns do not count. Returns
    a DataFrame whose index is the row number in the file, from 1; empty cells are NA. Raises
    InputError where there is no such table.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        used = [not re.fullmatch(r"[\s,;]*|sep=.", line) for line in lines]
        if not any(used):
            raise InputError(path, "is empty", "give a table with a header line")
        first = used.index(True)  # a spreadsheet may name the delimiter before: sep=;
        options = {"sep": max(",;\t", key=lines[first].count), "skiprows": first}
        options |= {"header": None, "skip_blank_lines": False, "dtype": "str"}
        frame = pd.read_csv(StringIO(text), **options)
    except FileNotFoundError as error:
        raise InputError(path, "does not exist", "give the path of a CSV table") from error
    except UnicodeDecodeError as error:
        raise InputError(path, "is not UTF-8 text", "save it as CSV UTF-8") from error
    except (OSError, pd.errors.ParserError) as error:
        problem = f"is not a CSV table ({str(error).strip()})"
        raise InputError(
            path, problem, "save it as CSV UTF-8, and quote cells with commas"
        ) from error
    frame = frame.apply(lambda column: column.str.strip()).replace("", pd.NA)
    frame.index += 1 + first
    frame = frame.dropna(how="all").dropna(axis="columns", how="all")
    frame, frame.columns = frame[1:], list(frame.iloc[0])
    names = frame.columns[frame.columns.duplicated()]
    if len(names) or len(frame.columns) < 2:
        problem = f"names {names[0]} twice" if len(names) else f"has one column, {frame.columns[0]}"
        raise InputError(path, problem, "separate columns by comma, semicolon or tab, each once")
    return frame


def image_path(knee: dict | pd.Series, column: str, root: str | Path) -> Path | None:
    """Path of a knee's image in `column`, None where the cell is empty."""
    value = knee.get(column)
    return None if pd.isna(value) else Path(root) / value


def read_knee_volume(knee: dict | pd.Series, column: str, root: str | Path) -> sitk.Image:
    """Read the image that a manifest row names in column ct, mr or mr_rescan (`read_volume`)."""
    path = image_path(knee, column, root)
    if path is None:
        problem = f"has no image in column {column}"
        raise InputError(f"knee {knee['knee_id']}", problem, "add its path to the manifest")
    if column == "ct":
        return read_volume(path, "CT")
    echo = knee.get("mr_echo")
    return read_volume(path, "MR", None if pd.isna(echo) else int(echo))


def _sentences(cases: pd.DataFrame) -> list[str]:
    """Pandera's failure cases in plain words, each once, in the order of the checks."""
    sentences = []
    for case in cases.sort_index().to_dict("records"):
        check, value, row = str(case["check"]), case["failure_case"], case["index"]
        if check in COLUMN_WORDS:
            sentences.append(f"column {value} {COLUMN_WORDS[check]}")
        elif not pd.isna(row):  # else a check that could not run for want of a column
            place = f"row {int(row)}"
            if case["schema_context"] == "Column":
                place += f": {case['column']} = {value}"
            sentences.append(f"{place} {VALUE_WORDS.get(check, check)}")
    return list(dict.fromkeys(sentences))


def _check_inside(path: Path, frame: pd.DataFrame) -> None:
    """No image, and no link among the slices of a DICOM folder, may lead out of the root."""
    root = Path(frame.attrs["root"]).resolve()
    for knee in frame.to_dict("records"):
        for column in VOLUMES:
            image = image_path(knee, column, root)
            if image is None:
                continue
            for file in [image, *(link for link in image.glob("*") if link.is_symlink())]:
                if not file.resolve().is_relative_to(root):
                    problem = f"knee {knee['knee_id']}: {file} leads out of the cohort's root"
                    remedy = "give a path below the root, without links or .."
                    raise InputError(path, problem, remedy)
