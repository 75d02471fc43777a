"""Prediction from one CT by a model directory, the networks that a finished run has exported."""

from .folder import listed_cts, manifest_cts, predict_cts
from .knee import Knee, biomarker_maps, joint_view, predict_knee
from .model import Ensemble, estimate, export_model, load_ensemble, read_about
