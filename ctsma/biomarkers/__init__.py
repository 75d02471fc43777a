"""Trabecular biomarkers BV/TV, Tb.Th, Tb.Sp and Tb.N of binary masks, MR patches and CT patches."""

from .binary import morphometry
from .grey import DEFINITIONS, bone_volume_fraction, ct_threshold_biomarkers, mr_biomarkers
from .thickness import local_thickness
