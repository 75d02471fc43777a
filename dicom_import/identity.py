"""Pseudonyms from a secret salt: one person always gets one name, and only the salt tells whose."""

import base64
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

from ctsma.common import InputError

from .headers import element_text

MAX_AGE = 90  # years; older people are few enough to be recognised (HIPAA, 45 CFR 164.514)
MAX_SHIFT_DAYS = 365  # design choice: the dates of a person move back by 1 to so many days
SALT_BYTES = 32


def read_salt(path: str | Path, cohort: str | Path) -> bytes:
    """Read the secret salt, or make it (mode 600) where the file does not exist.

    Raises InputError: inside the cohort's folder, readable by others, or shorter than 16 bytes.
    """
    path = Path(path)
    if path.resolve().is_relative_to(Path(cohort).resolve()):
        problem = "lies inside the cohort, which may be passed on"
        raise InputError(path, problem, "give --salt-file outside it")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(SALT_BYTES) + "\n")  # a secret: no seeded generator
    if path.stat().st_mode & 0o077:
        raise InputError(path, "can be read by others", f"run chmod 600 {path}")
    salt = path.read_bytes().strip()
    if len(salt) < SALT_BYTES // 2:
        remedy = "remove it to make a new salt, or restore the old one"
        raise InputError(path, f"holds {len(salt)} bytes, too few for a secret", remedy)
    return salt


def identity_text(header: Mapping) -> str:
    """What identifies a person: the patient ID, else name and birth date, else the study."""
    patient_id, name = element_text(header, "PatientID"), element_text(header, "PatientName")
    if patient_id:
        return patient_id
    if name:
        return f"{name}^{element_text(header, 'PatientBirthDate')}"
    return f"study {header.get('StudyInstanceUID', '')}"


def pseudonym(salt: bytes, identity: str) -> str:
    """P and ten letters and digits (50 bits) for a person."""
    return "P" + base64.b32encode(_digest(salt, "person", identity)).decode()[:10]


def new_uid(salt: bytes, uid: str) -> str:
    """A DICOM UID in the place of another: 2.25 and 128 bits (PS3.5 annex B.2)."""
    return f"2.25.{int.from_bytes(_digest(salt, 'uid', uid)[:16])}"


def salted_key(salt: bytes, text: str) -> str:
    """Ten hexadecimal digits for a series."""
    return _digest(salt, "series", text)[:5].hex()


def shifted_date(salt: bytes, identity: str, day: str) -> str:
    """A date "YYYYMMDD" moved back by the person's own number of days, as ISO text; "" if none."""
    shift = 1 + int.from_bytes(_digest(salt, "date", identity)[:4]) % MAX_SHIFT_DAYS
    try:
        true_date = date(int(day[:4]), int(day[4:6]), int(day[6:8]))
        return (true_date - timedelta(days=shift)).isoformat()
    except (ValueError, OverflowError):
        return ""


def salt_mark(salt: bytes) -> str:
    """Eight hexadecimal digits by which a later import recognises the salt of a cohort."""
    return _digest(salt, "mark", "")[:4].hex()


def age_years(header: Mapping) -> float | None:
    """Age in whole years at the examination, at most 90; None where the header does not give it."""
    age, born = str(header.get("PatientAge") or ""), str(header.get("PatientBirthDate") or "")
    day = str(header.get("StudyDate") or "")
    try:
        if age.endswith("Y"):
            years = int(age[:-1])
        else:
            years = int(day[:4]) - int(born[:4]) - (day[4:8] < born[4:8])
    except ValueError:
        return None
    return float(min(years, MAX_AGE)) if 0 < years < 130 else None


def _digest(salt: bytes, purpose: str, text: str) -> bytes:
    return hmac.new(salt, f"{purpose}\0{text}".encode(), hashlib.sha256).digest()
