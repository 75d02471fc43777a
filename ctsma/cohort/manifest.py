"""The manifest: one row per knee; all problems of a manifest are reported at once."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pandera.pandas as pa
import SimpleITK as sitk

from ctsma.common import IMAGES, InputError
from ctsma.files import sha256_file

from .images import format_extent, read_volume

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


# No underscore in an identifier: file names join an identifier and a suffix with one.
IDENTIFIER = pa.Check.str_matches(
    r"^[A-Za-z0-9][A-Za-z0-9-]*$", error="holds more than letters, digits and hyphens"
)
SHA256 = pa.Check.str_matches(r"^[0-9a-f]{64}$", error="is not 64 hexadecimal digits")
SCHEMA = pa.DataFrameSchema(
    {
        "knee_id": pa.Column(str, IDENTIFIER, unique=True),
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
    path : CSV file, one row per knee.
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
    try:
        frame = pd.read_csv(path, dtype="str")  # SCHEMA makes numbers of what must be one
    except FileNotFoundError as error:
        raise InputError(path, "does not exist", "give the path of a manifest CSV") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, "is not a CSV table", "save it as UTF-8 CSV") from error
    try:
        frame = SCHEMA.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        problems = "; ".join(_sentences(errors.failure_cases))
        remedy = "correct the manifest (columns: data_manifest/datapackage.json)"
        raise InputError(path, problems, remedy) from errors
    frame.attrs = {"root": str(Path(root) if root else path.parent), "path": str(path)}
    _check_inside(path, frame)
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


def check_sha256(knee: dict | pd.Series, column: str, root: str | Path) -> None:
    """InputError where an image file differs from the checksum that the manifest gives."""
    expected, path = knee.get(f"{column}_sha256"), image_path(knee, column, root)
    if isinstance(expected, str) and path.is_file() and sha256_file(path) != expected:
        problem = f"differs from {column}_sha256 of the manifest"
        remedy = "restore the file, or correct the checksum if the change is meant"
        raise InputError(path, problem, remedy)


def check_images(manifest: pd.DataFrame, n_jobs: int = 1) -> pd.DataFrame:
    """Read every image of a manifest and go on after a problem.

    Returns
    -------
    DataFrame, one row per image: knee_id, column, problem ("" when good), size, spacing_mm.
    """
    root = manifest.attrs["root"]
    images = []
    for knee in manifest.to_dict("records"):
        images += [(knee, column) for column in IMAGES if image_path(knee, column, root)]
    tasks = (joblib.delayed(_check_image)(knee, column, root) for knee, column in images)
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        rows = joblib.Parallel()(tasks)
    return pd.DataFrame(rows, columns=["knee_id", "column", "problem", "size", "spacing_mm"])


def table_one(manifest: pd.DataFrame) -> pd.DataFrame:
    """Table 1: mean (SD), or share in %, by OA label; knees without a label are left out.

    Returns
    -------
    DataFrame, one row per characteristic; columns `no OA`, `OA`, and `SMD`, the standardised mean
    difference (pooled SD).
    """
    values = manifest[["age", "bmi", "kl_grade"]].astype(float)
    values["female_pct"] = 100.0 * (manifest["sex"] == "F")
    values["right_pct"] = 100.0 * (manifest["side"] == "R")
    without, with_oa = values[manifest["oa"] == 0], values[manifest["oa"] == 1]
    pooled_sd = np.sqrt((without.var() + with_oa.var()) / 2)
    smd = ((with_oa.mean() - without.mean()) / pooled_sd).round(2)
    rows = {"n": [len(without), len(with_oa), np.nan]}
    for name in values:
        rows[name] = [_mean_sd(without[name]), _mean_sd(with_oa[name]), smd[name]]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["no OA", "OA", "SMD"])


def _mean_sd(values: pd.Series) -> str:
    if values.name.endswith("_pct"):
        return f"{values.mean():.1f}"
    return f"{values.mean():.1f} ({values.std():.1f})"


def _check_image(knee: dict, column: str, root: str) -> dict:
    row = {
        "knee_id": knee["knee_id"],
        "column": column,
        "problem": "",
        "size": "",
        "spacing_mm": "",
    }
    try:
        check_sha256(knee, column, root)
        image = read_knee_volume(knee, column, root)
    except InputError as error:
        return row | {"problem": str(error)}
    spacing_mm = format_extent(image.GetSpacing())
    return row | {"size": format_extent(image.GetSize()), "spacing_mm": spacing_mm}


def _sentences(cases: pd.DataFrame) -> list[str]:
    """Pandera's failure cases in plain words, each once, in the order of the checks."""
    sentences = []
    for case in cases.sort_index().to_dict("records"):
        check, value, row = str(case["check"]), case["failure_case"], case["index"]
        if check in COLUMN_WORDS:
            sentences.append(f"column {value} {COLUMN_WORDS[check]}")
        elif not pd.isna(row):  # else a check that could not run for want of a column
            place = f"row {int(row) + 2}"  # counted from 1, below the header line
            if case["schema_context"] == "Column":
                place += f": {case['column']} = {value}"
            sentences.append(f"{place} {VALUE_WORDS.get(check, check)}")
    return list(dict.fromkeys(sentences))


def _check_inside(path: Path, frame: pd.DataFrame) -> None:
    """No image, and no link among the slices of a DICOM folder, may lead out of the root."""
    root = Path(frame.attrs["root"]).resolve()
    for knee in frame.to_dict("records"):
        for column in IMAGES:
            image = image_path(knee, column, root)
            if image is None:
                continue
            for file in [image, *(link for link in image.glob("*") if link.is_symlink())]:
                if not file.resolve().is_relative_to(root):
                    problem = f"knee {knee['knee_id']}: {file} leads out of the cohort's root"
                    remedy = "give a path below the root, without links or .."
                    raise InputError(path, problem, remedy)
