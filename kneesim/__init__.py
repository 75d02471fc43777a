"""Simulated knees with known ground truth: anatomy, trabeculae, disease, a CT and an MR scanner.

Every distribution is in `protocol.yaml`. The study reads a simulated cohort as it reads a clinical
one, from a manifest and images; only quality assurance reads the ground truth. The modules
`difficulty` and `command` are imported by name, so that a simulation does not wait for PyTorch.
"""

from .anatomy import Template, own_template
from .knees import QUICK_FIELD_MM, simulate_knee, write_cohort
from .label_map import label_template, read_labels
from .microstructure import level_half_width, make_tile
from .mr import bssfp_signal
from .patch_truth import (
    extract_true_patches,
    ground_truth_slice,
    load_ground_truth,
    measure_ground_truth,
)
from .protocol import Quantity, draw_subjects, load_protocol, protocol_sha256, read_calibration
from .subject import bone_cube
from .truth import Truth, has_truth, read_truth, stage_errors_mm
