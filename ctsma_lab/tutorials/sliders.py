"""Figures that follow sliders."""

import base64
import html
import io
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

DPI = 90  # of the pictures on screen
LOOK = {  # of every control: wide enough for the longest label
    "style": {"description_width": "16em"},
    "layout": {"width": "36em", "max_width": "100%"},
}


def slider(label: str, low: float, high: float, step: float, value: float) -> ipywidgets.Widget:
    """A slider with its label and unit; the figure follows when it is released."""
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        description=label,
        continuous_update=False,
        **LOOK,
    )


def choice(label: str, options: list, value: object) -> ipywidgets.Widget:
    """A list of options, of which one is chosen."""
    return ipywidgets.Dropdown(options=options, value=value, description=label, **LOOK)


def steps(label: str, options: list, value: object) -> ipywidgets.Widget:
    """A slider through named options in their order."""
    return ipywidgets.SelectionSlider(
        options=options, value=value, description=label, continuous_update=False, **LOOK
    )


def explore(draw: Callable, button: str = "", **controls: ipywidgets.Widget) -> None:
    """Show the controls above the figure that `draw` makes from their values.

    `draw` takes one keyword argument for each control and returns a matplotlib figure. The figure
    follows the controls; with the name of a `button` it waits until this is pressed, from the
    beginning. It is shown in an HTML widget: an output widget can stall a notebook that runs
    without a browser, and an image widget has no text for a screen reader.
    """
    picture = ipywidgets.HTML()

    def update(_change: object = None) -> None:
        figure = draw(**{name: control.value for name, control in controls.items()})
        picture.value = picture_html(figure)
        plt.close(figure)

    shown = list(controls.values())
    if button:
        shown.append(ipywidgets.Button(description=button, button_style="primary"))
        shown[-1].on_click(lambda pressed: _while_disabled(pressed, update))
    else:
        for control in controls.values():
            control.observe(update, "value")
        update()
    display(ipywidgets.VBox([*shown, picture]))


def picture_html(figure: Figure) -> str:
    """A figure as an HTML image; its titles, and the numbers in them, are the alternative text."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    source = base64.b64encode(stream.getvalue()).decode()
    titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    text = "; ".join(" ".join(title.split()) for title in titles if title)
    style = "max-width: 100%; height: auto"
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(text)}" style="{style}">'


def _while_disabled(button: ipywidgets.Button, work: Callable[[], None]) -> None:
    """Do some work while the button cannot be pressed and says so."""
    name, button.description, button.disabled = button.description, "working ...", True
    try:
        work()
    finally:
        button.description, button.disabled = name, False
