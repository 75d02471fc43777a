"""The table of answers for teachers in docs/teaching.md, with the numbers of the shipped data."""

from pathlib import Path

import jinja2
import numpy as np

from ctsma.files import SHARE
from ctsma_lab.pages import TEMPLATES
from ctsma_lab.tables import renew

from . import t2_registration as t2
from . import t3_training as t3
from . import t4_agreement as t4


def answers_table() -> str:
    """A Markdown table: exercise, answer, common mistake, what is worth discussing."""
    by_hand = t2.pose_of("femur", t2.knee().true["femur"])
    improved = sorted(t3.improved(t3.ARM, "hu_regression_calibrated"))
    numbers = {
        "by_hand": tuple(np.round(by_hand / t2.STEP) * t2.STEP + 0.0),  # no -0
        "half_width_mm": t2.half_width_mm(),
        "best_single_mm": t2.best_single_mm(),
        "femur_on_tibia_mm": t2.femur_on_tibia_mm(),
        "share_common": t3.share_common(t3.errors()),
        "change_within": t3.change_of("r_within"),
        "change_between": t3.change_of("r_between"),
        "improved": ", ".join(f'`"{name}"`' for name in improved) or "none: `set()`",
        "width_in_sd": t4.limits_width_in_sd(),
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES))
    return environment.get_template("answers.md.jinja").render(numbers)


def write_answers(page: Path = SHARE / "docs" / "teaching.md") -> int:
    """Renew the table in the page; returns how many it has."""
    return renew(page, {"answers": answers_table()})
