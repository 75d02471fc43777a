"""Checked exercises: is an answer right, and what to think about where it is not.

Each tutorial has a module with its EXERCISES, by number ("T1.2"). A test inserts every solution and
a wrong answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np

MODULES = {
    "T1": "t1_resolution",
    "T2": "t2_registration",
    "T3": "t3_training",
    "T4": "t4_agreement",
    "T5": "t5_diagnosis",
}


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes
    ----------
    judge : answer -> hint, or "" where the answer is right.
    comment : what a right answer shows.
    """

    judge: Callable[[object], str]
    comment: str


@dataclass(frozen=True)
class Verdict:
    """What a notebook shows below an answer."""

    number: str
    right: bool
    text: str

    def __repr__(self) -> str:
        return f"{self.number}: {'right' if self.right else 'not yet'}. {self.text}"

    def _repr_markdown_(self) -> str:
        mark = "✔ **right.**" if self.right else "✘ **not yet.**"
        return f"{mark} {self.text} ({self.number})"


def check(number: str, answer: object) -> Verdict:
    """Judge the answer to an exercise.

    Parameters
    ----------
    number : of the exercise, for example "T1.2".
    answer : a number, a text, a set or a function, as the exercise says; `...` is no answer yet.

    Raises
    ------
    KeyError : there is no such exercise.
    """
    exercise = exercises(number.partition(".")[0])[number]
    if answer is ...:
        return Verdict(number, False, "Replace `...` by your answer.")
    try:
        hint = exercise.judge(answer)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        hint = f"The answer cannot be judged: {error}."
    return Verdict(number, not hint, hint or exercise.comment)


def exercises(tutorial: str) -> dict[str, Exercise]:
    """The exercises of one tutorial ("T1") by number."""
    return import_module(f".{MODULES[tutorial]}", __package__).EXERCISES


def number_near(
    expected: Callable[[], float],
    tolerance: float,
    hint: str,
    mistakes: Mapping[str, Callable[[], float]] | None = None,
) -> Callable[[object], str]:
    """A judge of numbers.

    Parameters
    ----------
    expected : gives the right number. tolerance : largest absolute difference from it.
    hint : for any other number. mistakes : hint -> gives the number of a common mistake.
    """

    def judge(answer: object) -> str:
        value = float(answer)
        if abs(value - expected()) <= tolerance:
            return ""
        for text, mistaken in (mistakes or {}).items():
            if abs(value - mistaken()) <= tolerance:
                return text
        return hint if np.isfinite(value) else "The answer is not a finite number."

    return judge


def one_of(right: str, hints: Mapping[str, str]) -> Callable[[object], str]:
    """A judge of texts: the right one, and a hint for each of the others."""

    def judge(answer: object) -> str:
        if answer == right:
            return ""
        names = ", ".join(sorted([right, *hints]))
        return hints.get(answer, f"Answer with one of {names}.")

    return judge
