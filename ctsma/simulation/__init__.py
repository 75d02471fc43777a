"""Simulated knees with known truth: anatomy, trabecular microstructure, disease, a CT and a bSSFP MR scanner.

Everything drawn comes from `protocol.yaml`; other rooms see only images and manifest, quality assurance sees `Truth`.
"""

from .anatomy import Template, label_template, own_template, read_labels
from .knees import QUICK_FIELD_MM, simulate_knee, write_cohort
from .microstructure import level_half_width, make_tile
from .protocol import Quantity, draw_subjects, load_protocol, protocol_sha256
from .scanners import bssfp_signal
from .truth import Truth, has_truth, read_truth

__all__ = [
    "QUICK_FIELD_MM",
    "Quantity",
    "Template",
    "Truth",
    "bssfp_signal",
    "draw_subjects",
    "label_template",
    "has_truth",
    "level_half_width",
    "load_protocol",
    "own_template",
    "protocol_sha256",
    "make_tile",
    "read_labels",
    "read_truth",
    "simulate_knee",
    "write_cohort",
]
