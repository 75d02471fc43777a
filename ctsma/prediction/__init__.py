"""A trained model leaves the study, and estimates the biomarkers of anybody's knee from its CT alone."""

from .ensemble import Ensemble, estimate, load_ensemble, read_about
from .export import export_model
from .folder import listed_cts, manifest_cts, predict_cts
from .knee import Knee, biomarker_maps, joint_view, predict_knee
