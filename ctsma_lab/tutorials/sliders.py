"""Figures that follow sliders."""

from collections.abc import Callable

import ipywidgets
from IPython.display import display


def slider(label: str, low: float, high: float, step: float, value: float) -> ipywidgets.Widget:
    """A slider with its label and unit; the figure follows when it is released."""
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        description=label,
        continuous_update=False,
        style={"description_width": "13em"},
        layout={"width": "32em"},
    )


def explore(draw: Callable, **controls: ipywidgets.Widget) -> None:
    """Show the controls above the figure that `draw` makes from their values.

    `draw` takes one keyword argument for each control and leaves a matplotlib figure open.
    """
    display(ipywidgets.interactive(draw, **controls))
