"""Simulated knees with known truth: anatomy, trabecular microstructure, disease, a CT and a bSSFP MR scanner.

Everything drawn comes from `protocol.yaml`; other rooms see only images and manifest, quality assurance sees `Truth`.
"""

from .anatomy import Template, label_template, own_template, read_labels
from .knees import QUICK_FIELD_MM, simulate_knee, write_cohort
from .microstructure import level_half_width, make_tile
from .mr import bssfp_signal
from .protocol import Quantity, draw_subjects, load_protocol, protocol_sha256, read_calibration
from .subject import bone_cube
from .truth import Truth, has_truth, read_truth
