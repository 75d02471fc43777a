"""Trabecular biomarkers: BV/TV, Tb.Th, Tb.Sp, Tb.N and more, from binary masks, MR patches and thresholded CT."""

from .binary import morphometry, resolution_series
from .grey import (
    DEFINITIONS,
    bone_volume_fraction,
    correct_bias,
    ct_threshold_biomarkers,
    marrow_intensity,
    mr_biomarkers,
)
from .thickness import local_thickness
