"""Browse samples with widgets, or look at one where nobody can move them."""

import ipywidgets
import numpy as np
from IPython import get_ipython
from matplotlib.figure import Figure

from lib.data import Samples
from lib.notebook import small_png
from lib.plots import WIDTH, blend_labels, class_patches, colour_depth, depth_shades, fade, plot_grid

LAYERS = ("labels", "depth", "RGB")


def browse_samples(samples: Samples, interactive: bool | None = None) -> ipywidgets.VBox | Figure:
    """Widgets to choose a sample, a layer, its opacity and a class; a picture of the first sample without them.

    Args:
        samples: labelled samples.
        interactive: None shows widgets only where a person runs the cell: papermill and nbval get the
            picture, so that a saved notebook holds no widget without a kernel.
    """
    if not (runs_in_editor() if interactive is None else interactive):
        return plot_sample(samples, 0)
    wide = {"width": "100%"}
    index = ipywidgets.SelectionSlider(
        options=choices(samples, "all"), description="index", continuous_update=False, layout=wide
    )
    layers = [layer for layer in LAYERS if layer != "depth" or samples.depth is not None]
    layer = ipywidgets.ToggleButtons(options=layers, description="layer", style={"button_width": "70px"})
    opacity = ipywidgets.FloatSlider(0.6, min=0, max=1, step=0.05, description="opacity", continuous_update=False)
    found = [name for name in samples.classes if choices(samples, name)]
    only = ipywidgets.Dropdown(options=["all", *found], description="only class")
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # not stretched

    def choose_class(change: dict) -> None:
        shown, options = index.value, choices(samples, change["new"])
        index.options = options
        if shown in dict(options).values():
            index.value = shown

    def draw(_: dict | None = None) -> None:
        picture.value = small_png(plot_sample(samples, index.value, layer.value, opacity.value, only.value))

    only.observe(choose_class, "value")
    for control in (index, layer, opacity, only):
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([index, layer, opacity, only, picture])


def choices(samples: Samples, only: str) -> list[tuple[str, int]]:
    """(name, position) of the samples in which a class occurs; of all for `all`."""
    positions = np.arange(len(samples))
    if only != "all":
        positions = np.flatnonzero((samples.labels_or_ignored == samples.classes.index(only)).any((1, 2)))
    return [(str(samples.names[position]), int(position)) for position in positions]


def plot_sample(samples: Samples, index: int, layer: str = "labels", opacity: float = 0.6, only: str = "all") -> Figure:
    """One sample large: its RGB, its depth, or its labels over RGB; all but the class `only` is faded."""
    image, label = samples.image[index], samples.labels_or_ignored[index]
    picture, legend, shades = image / 255, [], None
    if layer == "depth":
        shades = depth_shades([samples])
        picture = colour_depth(samples.depth[index], shades)
    elif layer == "labels":
        picture, legend = blend_labels(image, label, samples.classes, opacity), class_patches(samples.classes, [label])
    title, chosen = f"{samples.names[index]}: {layer}", np.ones(label.shape, bool)
    if only != "all":
        title, legend = f"{title}, only {only}", []
        chosen = label == samples.classes.index(only)
    picture = np.where(chosen[..., None], picture, fade(image))
    figure = plot_grid([{title: picture}], legend=legend, shades=shades, width=0.7 * WIDTH)
    if not chosen.all():
        figure.axes[0].contour(chosen, [0.5], colors="black", linewidths=1)
    return figure


def runs_in_editor() -> bool:
    """Whether JupyterLab or another editor runs this cell: they say which one it is, papermill and nbval don't."""
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
