"""The protocol: every constant and distribution of the simulated cohort, checked, drawn from, hashed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ctsma.cohort import InputFault

PROTOCOL = Path(__file__).with_name("protocol.yaml")
CALIBRATION = PROTOCOL.with_name("calibration.json")


class Quantity(BaseModel):
    """One protocol entry: a constant, a (clipped) normal or a uniform distribution, with unit and source."""

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
    def _possible(self):
        given = [v for v in (self.value, self.mean, self.sd, self.low, self.high) if v is not None]
        constant, normal = self.value is not None, self.mean is not None and self.sd is not None
        if not (constant or normal or (self.low is not None and self.high is not None)):
            raise ValueError("give value, or mean and sd, or low and high")
        if not np.isfinite(given).all() or (min(given) < 0 and not self.signed) or (self.sd or 0) < 0:
            raise ValueError("negative or not finite")
        if self.unit.startswith("fraction") and max(given) > 1:
            raise ValueError("a fraction above 1")
        if self.low is not None and self.high is not None and self.low > self.high:
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
    """Read and check a protocol file: {group: {name: Quantity}}.

    Raises
    ------
    InputFault : an entry without unit or source, an impossible value (negative thickness, a fraction above 1),
        or a group or entry missing that the default protocol has.
    """
    path = Path(path or PROTOCOL)
    groups = {k: v for k, v in _read(path).items() if isinstance(v, dict)}
    wanted = {f"{g}.{n}" for g, v in _read(PROTOCOL).items() if isinstance(v, dict) for n in v}
    if missing := wanted - {f"{g}.{n}" for g, v in groups.items() for n in v}:
        raise InputFault(path, f"entries missing: {sorted(missing)[:3]}", "copy them from the default protocol")
    return {g: {n: _quantity(path, f"{g}.{n}", v) for n, v in entries.items()} for g, entries in groups.items()}


def protocol_sha256(path: str | Path | None = None) -> str:
    """SHA-256 of the protocol file's bytes: goes into every results file."""
    return hashlib.sha256(Path(path or PROTOCOL).read_bytes()).hexdigest()


def read_calibration() -> dict:
    """Difficulty of the frozen protocol on several hundred knees, as `benchmarks/calibration.py` wrote it.

    Holds `protocol_sha256`, which must be that of the protocol in use; InputFault where it is not.
    """
    found = json.loads(CALIBRATION.read_text())
    if found["protocol_sha256"] != protocol_sha256():
        raise InputFault(CALIBRATION, "measured under another protocol", "run benchmarks/calibration.py again")
    return found


def draw_subjects(protocol: dict, n_knees: int, seed: int) -> pd.DataFrame:
    """One knee per subject: manifest columns without paths, plus the latent `severity` and `height_cm`.

    severity ~ N(0, 1) = a z_age + b z_bmi + c female + rest; KL grade by cuts; oa = KL >= 2. Each knee has its
    own generator, so knee i is the same whatever the number of knees.
    """
    if n_knees < 1:
        raise InputFault("n_knees", f"{n_knees} knees asked", "ask for at least one")
    return pd.DataFrame([_subject(protocol, seed, index) for index in range(n_knees)])


def _subject(protocol: dict, seed: int, index: int) -> dict:
    rng, who, ill = np.random.default_rng([seed, index]), protocol["subject"], protocol["disease"]
    sex = "F" if rng.random() < who["female"].value else "M"
    age, bmi = who["age"].draw(rng), who["bmi"].draw(rng)
    height = who["height_female" if sex == "F" else "height_male"].draw(rng)
    female, share = who["female"].value, ill["severity_female"].value
    a, b = ill["severity_per_age"].value, ill["severity_per_bmi"].value
    rest = np.sqrt(1 - a**2 - b**2 - share**2 * female * (1 - female))
    known = a * z_score(who["age"], age) + b * z_score(who["bmi"], bmi) + share * ((sex == "F") - female)
    severity = known + rest * rng.standard_normal()
    kl = sum(severity > ill[f"kl_{g}_cut"].value for g in (1, 2, 3, 4))
    names = {"knee_id": f"k{index:04d}", "subject_id": f"s{index:04d}", "side": "LR"[rng.integers(2)]}
    person = {"age": round(age, 1), "sex": sex, "bmi": round(bmi, 1), "site": "simulated"}
    latent = {"severity": float(severity), "height_cm": round(height, 1)}
    return names | {"oa": int(kl >= 2), "kl_grade": int(kl)} | person | latent


def z_score(quantity: Quantity, value: float) -> float:
    """Standard score of a value under a protocol entry's normal distribution."""
    return (value - quantity.mean) / quantity.sd


def _read(path: Path) -> dict:
    try:
        groups = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputFault(path, f"not a readable YAML file ({error})", "give a protocol file") from error
    if not isinstance(groups, dict):
        raise InputFault(path, "no groups in it", "start from the default protocol")
    return groups


def _quantity(path: Path, name: str, entry: dict) -> Quantity:
    try:
        return Quantity.model_validate(entry)
    except ValidationError as error:
        reason = error.errors()[0]
        fault = f"{name} is impossible: {reason['msg']} {reason['loc'] or ''}"
        raise InputFault(path, fault, "mend the entry") from error
