"""Pseudonyms from a secret salt: the same person gets the same name, and nobody without the salt can tell who."""

import base64
import hashlib
import hmac
import os
import secrets
from datetime import date, timedelta
from pathlib import Path

from ctsma.cohort import InputFault

MAX_AGE = 90  # years; older people are few enough to be known by their age (HIPAA safe harbour, 45 CFR 164.514)
MAX_SHIFT_DAYS = 365  # dates of a person move back by 1 to so many days, all alike (our choice)
SALT_BYTES = 32


def read_salt(path: str | Path, cohort: str | Path) -> bytes:
    """Read the secret salt, or make it (mode 600) where the file does not exist.

    Raises InputFault: inside the cohort's folder, readable by others, or shorter than 16 bytes.
    """
    path = Path(path)
    if path.resolve().is_relative_to(Path(cohort).resolve()):
        raise InputFault(path, "lies inside the cohort, which may be passed on", "give --salt-file outside it")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(SALT_BYTES) + "\n")  # a secret, so not of a seeded generator
    if path.stat().st_mode & 0o077:
        raise InputFault(path, "can be read by others", f"run chmod 600 {path}")
    salt = path.read_bytes().strip()
    if len(salt) < SALT_BYTES // 2:
        raise InputFault(path, f"holds {len(salt)} bytes", "remove it to make a new salt, or restore the old one")
    return salt


def pseudonym(salt: bytes, identity: str) -> str:
    """Ten letters and digits (50 bits) for a person, beginning with P."""
    return "P" + base64.b32encode(_digest(salt, "person", identity)).decode()[:10]


def new_uid(salt: bytes, uid: str) -> str:
    """A DICOM UID in the place of another: 2.25 and 128 bits (PS3.5 annex B.2)."""
    return f"2.25.{int.from_bytes(_digest(salt, 'uid', uid)[:16])}"


def salted_key(salt: bytes, text: str) -> str:
    """Ten hexadecimal digits for a series."""
    return _digest(salt, "series", text)[:5].hex()


def shifted_date(salt: bytes, identity: str, day: str) -> str:
    """A date "YYYYMMDD" moved back by the person's own number of days, as ISO text; "" where it is no date."""
    shift = 1 + int.from_bytes(_digest(salt, "date", identity)[:4]) % MAX_SHIFT_DAYS
    try:
        return (date(int(day[:4]), int(day[4:6]), int(day[6:8])) - timedelta(days=shift)).isoformat()
    except (ValueError, OverflowError):
        return ""


def salt_mark(salt: bytes) -> str:
    """Eight hexadecimal digits by which a later import recognises its salt without knowing it."""
    return _digest(salt, "mark", "")[:4].hex()


def age_years(header: dict) -> float | None:
    """Age in whole years at the examination, 90 for all who are older; None where the header does not tell."""
    text, born, day = (str(header.get(n) or "") for n in ("PatientAge", "PatientBirthDate", "StudyDate"))
    try:
        age = int(text[:-1]) if text.endswith("Y") else int(day[:4]) - int(born[:4]) - (day[4:8] < born[4:8])
    except ValueError:
        return None
    return float(min(age, MAX_AGE)) if 0 < age < 130 else None


def _digest(salt: bytes, purpose: str, text: str) -> bytes:
    return hmac.new(salt, f"{purpose}\0{text}".encode(), hashlib.sha256).digest()
