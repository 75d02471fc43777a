"""The protocol: every distribution of the simulated cohort, checked, drawn from and hashed."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ctsma.common import InputError
from ctsma.files import sha256_file

PROTOCOL = Path(__file__).with_name("protocol.yaml")
CALIBRATION = PROTOCOL.with_name("calibration.json")


class Quantity(BaseModel):
    """One entry of the protocol: a constant, a (clipped) normal or a uniform distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float | None = None
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    signed: bool = False
    unit: str
    source: str

    @model_validator(mode="after")
    def _check_possible(self):
        numbers = [self.value, self.mean, self.sd, self.low, self.high]
        numbers = [number for number in numbers if number is not None]
        is_constant = self.value is not None
        is_normal = self.mean is not None and self.sd is not None
        is_bounded = self.low is not None and self.high is not None
        if not (is_constant or is_normal or is_bounded):
            raise ValueError("give value, or mean and sd, or low and high")
        if not np.isfinite(numbers).all() or (self.sd or 0) < 0:
            raise ValueError("negative SD or not finite")
        if min(numbers) < 0 and not self.signed:
            raise ValueError("negative, and not marked as signed")
        if self.unit.startswith("fraction") and max(numbers) > 1:
            raise ValueError("a fraction above 1")
        if is_bounded and self.low > self.high:
            raise ValueError("low above high")
        return self

    def draw(self, rng: np.random.Generator) -> float:
        """One value: the constant itself, or a draw (a normal is clipped to low..high)."""
        if self.value is not None:
            return self.value
        if self.mean is None:
            return float(rng.uniform(self.low, self.high))
        return float(np.clip(rng.normal(self.mean, self.sd), self.low, self.high))


def load_protocol(path: str | Path | None = None) -> dict[str, dict[str, Quantity]]:
    """Read and check a protocol file (default: the frozen one): {group: {name: Quantity}}.

    Raises
    ------
    InputError : an entry without unit or source, an impossible value (negative thickness, a
        fraction above 1), or an entry missing that the default protocol has.
    """
    path = Path(path or PROTOCOL)
    groups = _read_groups(path)
    for group, entries in _read_groups(PROTOCOL).items():
        missing = sorted(entries.keys() - groups.get(group, {}).keys())
        if missing:
            problem = f"entries of {group} missing: {missing[:3]}"
            raise InputError(path, problem, "copy them from the default protocol")
    protocol = {}
    for group, entries in groups.items():
        protocol[group] = {name: _quantity(path, group, name, e) for name, e in entries.items()}
    return protocol


def protocol_sha256(path: str | Path | None = None) -> str:
    """SHA-256 of the protocol file's bytes; it stands in every results file."""
    return sha256_file(path or PROTOCOL)


def read_calibration() -> dict:
    """Difficulty of the frozen protocol on several hundred knees, by `benchmarks/calibration.py`.

    Raises InputError where it was measured under another protocol than the one in use.
    """
    calibration = json.loads(CALIBRATION.read_text("utf-8"))
    if calibration["protocol_sha256"] != protocol_sha256():
        remedy = "run benchmarks/calibration.py again"
        raise InputError(CALIBRATION, "was measured under another protocol", remedy)
    return calibration


def draw_subjects(protocol: dict, n_knees: int, seed: int) -> pd.DataFrame:
    """One knee per subject: manifest columns without paths, latent `severity`, and `height_cm`.

    severity ~ N(0, 1) = a z_age + b z_bmi + c female + residual; KL grade by cuts; oa = KL >= 2.
    Each knee has its own generator, so knee i is the same whatever the number of knees.
    """
    if n_knees < 1:
        raise InputError("n_knees", f"is {n_knees}", "ask for at least one knee")
    return pd.DataFrame([_draw_subject(protocol, seed, index) for index in range(n_knees)])


def _draw_subject(protocol: dict, seed: int, index: int) -> dict:
    rng = np.random.default_rng([seed, index])
    person, disease = protocol["subject"], protocol["disease"]
    p_female = person["female"].value
    sex = "F" if rng.random() < p_female else "M"
    age = person["age"].draw(rng)
    bmi = person["bmi"].draw(rng)
    height = person["height_female" if sex == "F" else "height_male"].draw(rng)
    per_age = disease["severity_per_age"].value
    per_bmi = disease["severity_per_bmi"].value
    per_female = disease["severity_female"].value
    # What is left of unit variance after age, BMI and sex.
    residual = np.sqrt(1 - per_age**2 - per_bmi**2 - per_female**2 * p_female * (1 - p_female))
    explained = per_age * z_score(person["age"], age) + per_bmi * z_score(person["bmi"], bmi)
    explained += per_female * ((sex == "F") - p_female)
    severity = explained + residual * rng.standard_normal()
    kl_grade = sum(severity > disease[f"kl_{grade}_cut"].value for grade in (1, 2, 3, 4))
    return {
        "knee_id": f"k{index:04d}",
        "subject_id": f"s{index:04d}",
        "side": "LR"[rng.integers(2)],
        "oa": int(kl_grade >= 2),
        "kl_grade": int(kl_grade),
        "age": round(age, 1),
        "sex": sex,
        "bmi": round(bmi, 1),
        "site": "simulated",
        "severity": float(severity),
        "height_cm": round(height, 1),
    }


def z_score(quantity: Quantity, value: float) -> float:
    """Standard score of a value under an entry's normal distribution."""
    return (value - quantity.mean) / quantity.sd


def _read_groups(path: Path) -> dict:
    try:
        content = _parse(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        problem = f"is not a readable YAML file ({error})"
        raise InputError(path, problem, "give a protocol file") from error
    if not isinstance(content, dict):
        raise InputError(path, "holds no groups", "start from the default protocol")
    return {name: entries for name, entries in content.items() if isinstance(entries, dict)}


@lru_cache(maxsize=2)
def _parse(text: str) -> object:
    """Content of a YAML text; every knee reads the same one."""
    return yaml.safe_load(text)


def _quantity(path: Path, group: str, name: str, entry: dict) -> Quantity:
    try:
        return Quantity.model_validate(entry)
    except ValidationError as error:
        reason = error.errors()[0]
        problem = f"{group}.{name} is impossible: {reason['msg']} {reason['loc'] or ''}"
        raise InputError(path, problem, "correct the entry") from error
