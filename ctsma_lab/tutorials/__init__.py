"""Tutorials for teaching: checked exercises, figures with sliders, and their small data."""

from .exercises import check
from .sliders import choice, explore, slider
