"""Browse samples with widgets, or look at one where nobody can move them."""

import ipywidgets
import numpy as np
from IPython import get_ipython
from matplotlib.figure import Figure

from lib.classes import CLASS_NAMES
from lib.data.samples import Samples
from lib.notebook import small_png
from lib.plots import LAYERS, plot_sample


def browse_samples(samples: Samples, interactive: bool | None = None) -> ipywidgets.VBox | Figure:
    """Widgets to choose a sample, a layer, its opacity and a class; a picture of the first sample without them.

    Args:
        samples: labelled samples.
        interactive: None shows widgets only where a person runs the cell: papermill and nbval get the
            picture, so that a saved notebook holds no widget without a kernel.
    """
    if interactive is None:
        interactive = runs_in_editor()
    if not interactive:
        return plot_sample(samples, 0)
    index = ipywidgets.SelectionSlider(options=choices(samples, "all"), description="index", continuous_update=False)
    layer = ipywidgets.ToggleButtons(options=LAYERS, description="layer", style={"button_width": "70px"})
    opacity = ipywidgets.FloatSlider(0.6, min=0, max=1, step=0.05, description="opacity", continuous_update=False)
    found = [name for name in CLASS_NAMES if choices(samples, name)]
    only = ipywidgets.Dropdown(options=["all", *found], description="only class")
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # not stretched

    def choose_class(change: dict) -> None:
        index.options = choices(samples, change["new"])

    def draw(_: dict | None = None) -> None:
        picture.value = small_png(plot_sample(samples, index.value, layer.value, opacity.value, only.value))

    only.observe(choose_class, "value")
    for control in (index, layer, opacity, only):
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([index, layer, opacity, only, picture])


def choices(samples: Samples, only: str) -> list[tuple[str, int]]:
    """(name, position) of the samples in which a class occurs; of all for `all`."""
    holds = np.ones(len(samples), bool) if only == "all" else (samples.label == CLASS_NAMES.index(only)).any((1, 2))
    return [(str(samples.names[position]), int(position)) for position in np.flatnonzero(holds)]


def runs_in_editor() -> bool:
    """Whether JupyterLab or another editor runs this cell: they say which one it is, papermill and nbval don't."""
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
