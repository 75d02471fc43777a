"""The arms of the study, every way of estimating the biomarkers, from distillation/arms.yaml.

Reading it needs no torch, so that figures and reports load fast.
"""

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from ctsma.common import InputError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Arm:
    """One way of estimating the biomarkers; arms.yaml explains the fields."""

    id: str
    label: str
    colour: str
    kind: Literal["ridge", "student", "teacher", "reference", "external"]
    input: Literal["ct", "ct+cortex", "mr"]
    baseline: str | None = None
    without_teacher: str | None = None
    loss_weights: list[dict[str, float]] = field(default_factory=lambda: [{}])
    published: dict = field(default_factory=dict)

    @property
    def distilled(self) -> bool:
        """Whether a loss term of non-zero weight compares the student with the teacher."""
        return any(weight for weights in self.loss_weights for weight in weights.values())


def read_arms(descriptions: Mapping[str, Mapping]) -> dict[str, Arm]:
    """Arms by id from their descriptions, as in the `arms` entry of arms.yaml.

    Raises InputError where a field is missing, unknown or has a value that is not allowed.
    """
    return {
        arm_id: validated(Arm, f"arms.{arm_id}", {"id": arm_id, **description})
        for arm_id, description in descriptions.items()
    }


def validated(model: Callable[..., object], source: str, values: Mapping) -> object:
    """A pydantic model from a mapping of its fields. Raises InputError, which names the field."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join([source, *map(str, first["loc"])])
        raise InputError(field_name, first["msg"].lower(), "correct or remove it") from error


_FILE = Path(__file__).parent / "distillation" / "arms.yaml"
_STUDY = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
ARMS = read_arms(_STUDY["arms"])
COMPARISONS = [(arm, other) for arm, other in _STUDY["comparisons"]]
MAIN_ARM = _STUDY["main"]
TRAINED = [name for name, arm in ARMS.items() if arm.kind in ("ridge", "student", "teacher")]
