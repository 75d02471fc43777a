"""The manifest: one row a knee, checked whole, every fault reported at once."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pandera.pandas as pa
import SimpleITK as sitk

from .images import read_volume
from .names import IMAGES, InputFault
from .provenance import sha256_file

IDENTIFIER = r"^[A-Za-z0-9][A-Za-z0-9-]*$"  # no underscore: file names join a knee and a suffix with one
SHA256 = r"^[0-9a-f]{64}$"


def _text(pattern: str | None = None, **keywords) -> pa.Column:
    checks = [pa.Check.str_matches(pattern)] if pattern else []
    return pa.Column(str, checks, **({"nullable": True, "coerce": True} | keywords))


def _number(low: float, high: float, **keywords) -> pa.Column:
    return pa.Column(float, pa.Check.in_range(low, high), **({"nullable": True, "coerce": True} | keywords))


SCHEMA = pa.DataFrameSchema(
    {
        "knee_id": _text(IDENTIFIER, nullable=False, unique=True),
        "subject_id": _text(IDENTIFIER, nullable=False),
        "side": pa.Column(str, pa.Check.isin(["L", "R"])),
        "ct": _text(),
        "mr": _text(),
        "oa": pa.Column(float, pa.Check.isin([0.0, 1.0]), nullable=True, coerce=True),
        "kl_grade": pa.Column(float, pa.Check.isin([0.0, 1.0, 2.0, 3.0, 4.0]), nullable=True, coerce=True),
        "age": _number(0, 120),
        "sex": pa.Column(str, pa.Check.isin(["F", "M"]), nullable=True),
        "bmi": _number(8, 100),
        "site": _text(),
        "ct_sha256": _text(SHA256),
        "mr_sha256": _text(SHA256),
        "mr_echo": _number(1, 99, required=False),
        "mr_rescan": _text(required=False),
    },
    strict=True,
    checks=[
        pa.Check(lambda f: ~f.duplicated(["subject_id", "side"]), name="one_row_per_subject_and_side"),
        pa.Check(lambda f: f["ct"].notna() | f["mr"].notna(), name="ct_or_mr_is_given"),
    ],
)


def read_manifest(path: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """Read and check a manifest (columns: data_manifest/datapackage.json).

    Parameters
    ----------
    path : CSV file, one row a knee.
    root : folder that the image paths are relative to; the manifest's own folder where None.

    Returns
    -------
    DataFrame with `attrs["root"]` (Path) and `attrs["path"]`; ids and paths are text, missing text is NA.

    Raises
    ------
    InputFault : not a CSV, or any column or value outside the schema; all faults are listed together.
    """
    path = Path(path)
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(("knee_id", "subject_id", "side", "sex"), "str"))
    except FileNotFoundError as error:
        raise InputFault(path, "does not exist", "give the path of a manifest CSV") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputFault(path, "is not a CSV table", "save it as comma-separated UTF-8 text") from error
    frame = _validated(path, frame)
    frame.attrs = {"root": str(Path(root) if root else path.parent), "path": str(path)}
    _check_inside(path, frame)
    return frame


def image_path(knee: dict | pd.Series, column: str, root: str | Path) -> Path | None:
    """Absolute path of a knee's image in `column`, None where the cell is empty."""
    value = knee.get(column)
    return None if pd.isna(value) else Path(root) / value


def read_knee_volume(knee: dict | pd.Series, column: str, root: str | Path) -> sitk.Image:
    """Read the image that a manifest row names in column ct, mr or mr_rescan (see `read_volume`)."""
    echo = knee.get("mr_echo") if column.startswith("mr") else None
    path = image_path(knee, column, root)
    if path is None:
        raise InputFault(f"knee {knee['knee_id']}", f"has no image in column {column}", "add its path to the manifest")
    return read_volume(path, "CT" if column == "ct" else "MR", None if echo is None or pd.isna(echo) else int(echo))


def check_data(manifest: pd.DataFrame, n_jobs: int = 1) -> pd.DataFrame:
    """Read every image; one row each: knee_id, column, fault ("" when good), size, spacing_mm."""
    knees = manifest.to_dict("records")
    columns = [name for name in IMAGES if name in manifest]
    named = [(knee, column) for knee in knees for column in columns if not pd.isna(knee[column])]
    tasks = (joblib.delayed(_check_image)(knee, column, manifest.attrs["root"]) for knee, column in named)
    with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
        return pd.DataFrame(joblib.Parallel()(tasks), columns=["knee_id", "column", "fault", "size", "spacing_mm"])


def table_one(manifest: pd.DataFrame) -> pd.DataFrame:
    """Table 1: mean and SD, or share in %, by OA label, with the standardised mean difference (pooled SD).

    One row a characteristic; columns `no OA`, `OA`, `SMD`. Knees without a label are left out.
    """
    numbers = (
        manifest[["age", "bmi", "kl_grade"]]
        .astype(float)
        .assign(female_pct=100.0 * (manifest["sex"] == "F"), right_pct=100.0 * (manifest["side"] == "R"))
    )
    without, with_oa = (numbers[manifest["oa"] == label] for label in (0, 1))
    smd = (with_oa.mean() - without.mean()) / np.sqrt((with_oa.var() + without.var()) / 2)
    shown = {
        name: [_mean_sd(group[column]) for column in numbers] for name, group in (("no OA", without), ("OA", with_oa))
    }
    counts = pd.DataFrame({"no OA": [len(without)], "OA": [len(with_oa)], "SMD": [np.nan]}, index=["n"])
    return pd.concat([counts, pd.DataFrame(shown, index=numbers.columns).assign(SMD=smd.round(2))])


def _mean_sd(values: pd.Series) -> str:
    return f"{values.mean():.1f}" if values.name.endswith("_pct") else f"{values.mean():.1f} ({values.std():.1f})"


def _check_image(knee: dict, column: str, root: str) -> dict:
    row = {"knee_id": knee["knee_id"], "column": column, "fault": "", "size": "", "spacing_mm": ""}
    try:
        _check_sha256(knee, column, root)
        image = read_knee_volume(knee, column, root)
    except InputFault as fault:
        return row | {"fault": str(fault)}
    shown = " x ".join(f"{value:.4g}" for value in image.GetSpacing())
    return row | {"size": " x ".join(map(str, image.GetSize())), "spacing_mm": shown}


def _check_sha256(knee: dict, column: str, root: str) -> None:
    wanted, path = knee.get(f"{column}_sha256"), image_path(knee, column, root)
    if wanted is not None and not pd.isna(wanted) and path.is_file() and sha256_file(path) != wanted:
        raise InputFault(path, f"differs from {column}_sha256 of the manifest", "restore the file or correct the sum")


def _validated(path: Path, frame: pd.DataFrame) -> pd.DataFrame:
    for name in ("ct", "mr", "site", "ct_sha256", "mr_sha256", "mr_rescan"):
        if name in frame:
            frame[name] = frame[name].astype("str").where(frame[name].notna())
    try:
        return SCHEMA.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        faults = "; ".join(_sentence(row) for row in _distinct(errors.failure_cases))
        raise InputFault(path, faults, "correct the manifest (columns: data_manifest/datapackage.json)") from errors


def _distinct(cases: pd.DataFrame) -> list[dict]:
    return cases.drop_duplicates(["column", "check", "failure_case", "index"]).to_dict("records")


def _sentence(case: dict) -> str:
    check = str(case["check"])
    if check == "column_in_dataframe":
        return f"column {case['failure_case']} is missing"
    if check == "column_in_schema":
        return f"column {case['failure_case']} is unknown"
    row = "" if pd.isna(case["index"]) else f"row {int(case['index']) + 2}: "  # 1-based, below the header line
    if case["schema_context"] == "DataFrameSchema":
        return f"{row}breaks the rule {check}"
    return f"{row}{case['column']} = {case['failure_case']!s} breaks {check}"


def _check_inside(path: Path, frame: pd.DataFrame) -> None:
    root = Path(frame.attrs["root"]).resolve()
    for knee in frame.to_dict("records"):
        for column in IMAGES:
            target = image_path(knee, column, root)
            if target is not None and not target.resolve().is_relative_to(root):
                fault = f"knee {knee['knee_id']}: {column} = {knee[column]} leads out of the cohort's root"
                raise InputFault(path, fault, "give a path below the root, without links or ..")
