"""Browse images with widgets, samples or results; or look at one where nobody can move them."""

import base64
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
from IPython import get_ipython
from matplotlib.figure import Figure

from lib.data import Samples, Split
from lib.metrics import image_accuracy
from lib.notebooks import plots
from lib.notebooks.plots import small_png

PAIRS = 12  # of classes confused with one another, most frequent first
PAIR = " confused with "
Masks = Callable[[Samples], Sequence[np.ndarray]]


class _Browser(ipywidgets.VBox):
    """Widgets, of which a saved notebook keeps the picture."""

    def _repr_mimebundle_(self, **options: object) -> dict[str, str]:
        picture = base64.b64encode(self.children[-1].value).decode()
        return {**super()._repr_mimebundle_(**options), "image/png": picture}


def browse_samples(samples: Samples, interactive: bool | None = None) -> ipywidgets.VBox | Figure:
    """Widgets to go through labelled samples, or through those with a class; or the first one, without widgets.

    With `interactive` None, widgets show only where a person runs the cell: papermill and nbval get the picture, so
    that a saved notebook holds no widget without a kernel.
    """
    label, groups = samples.labels_or_ignored, {"all": np.arange(len(samples))}
    groups |= {
        name: np.flatnonzero((label == index).any((1, 2))) for index, name in enumerate(samples.classes)
    }
    return _browse(
        samples.names.tolist(),
        groups,
        lambda index, only: plot_sample(samples[[index]], {}, only),
        interactive,
    )


def browse_results(
    pieces: Split, counts: np.ndarray, masks: dict[str, Masks], interactive: bool | None = None
) -> ipywidgets.VBox | Figure:
    """Widgets to go through images from the worst to the best, or those with a class or a confusion; or the worst.

    Args:
        pieces: the images.
        counts: `(N, C, C)` of them; of several runs those of the first, by which images are sorted.
        masks: by run, what gives the predictions `(H, W)` of samples.
        interactive: as for `browse_samples`.
    """
    accuracy, classes = image_accuracy(counts), pieces.classes
    order = np.argsort(accuracy)[: np.isfinite(accuracy).sum()]
    groups = {"all": order}
    groups |= {name: order[counts[order, index].any(1)] for index, name in enumerate(classes)}
    wrong = counts.sum(0) * ~np.eye(len(classes), dtype=bool)
    for truth, named in zip(
        *np.unravel_index(np.argsort(-wrong, axis=None)[:PAIRS], wrong.shape), strict=True
    ):
        found = counts[:, truth, named]
        groups[classes[truth] + PAIR + classes[named]] = np.argsort(-found, kind="stable")[
            : (found > 0).sum()
        ]

    def draw(index: int, only: str) -> Figure:
        sample = pieces[np.array([index])][0]
        return plot_sample(sample, {name: of(sample)[0] for name, of in masks.items()}, only)

    names = [f"{name}: {score:.2f}" for name, score in zip(pieces.names, accuracy, strict=True)]
    return _browse(names, groups, draw, interactive)


def _browse(
    names: list[str],
    groups: dict[str, np.ndarray],
    draw: Callable[[int, str], Figure],
    interactive: bool | None,
) -> ipywidgets.VBox | Figure:
    """Widgets that go through the positions of a group of images, `all` at first, and draw what is chosen."""
    if not (runs_in_editor() if interactive is None else interactive):
        return draw(groups["all"][0], "all")
    options = {group: [(names[at], int(at)) for at in positions] for group, positions in groups.items()}
    options = {group: images for group, images in options.items() if images}
    slider = ipywidgets.SelectionSlider(
        options=options["all"], continuous_update=False, layout={"width": "100%"}
    )
    short = {"style": {"description_width": "initial"}, "layout": {"width": "auto"}}
    name = ipywidgets.Combobox(description="name", continuous_update=False, **short)
    group = ipywidgets.Dropdown(options=list(options), description="only", **short)
    steps = [ipywidgets.Button(description=words, layout={"width": "90px"}) for words in ("Previous", "Next")]
    count = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # not stretched

    def choose(_: dict | None = None) -> None:
        shown, images = slider.value, options[group.value]
        slider.options, name.options = images, [label for label, _ in images]
        if shown in dict(images).values():
            slider.value = shown
        with_it = "" if group.value == "all" else f" with {group.value}"
        count.value = f"{len(images)} of {len(options['all'])} images{with_it}"

    def step(button: ipywidgets.Button) -> None:
        slider.index = min(max(slider.index + (1 if button is steps[1] else -1), 0), len(slider.options) - 1)

    def jump(change: dict) -> None:
        found = [label for label, _ in slider.options if label.startswith(change["new"])]
        slider.label = found[0] if found else slider.label
        name.value = slider.label

    def redraw(_: dict | None = None) -> None:
        name.value = slider.label
        picture.value = small_png(draw(slider.value, group.value))

    choose()
    group.observe(choose, "value")
    name.observe(jump, "value")
    for control in (slider, group):
        control.observe(redraw, "value")
    for button in steps:
        button.on_click(step)
    redraw()
    return _Browser(
        [slider, ipywidgets.HBox([*steps, name, group, count], layout={"flex_flow": "row wrap"}), picture]
    )


def plot_sample(sample: Samples, predicted: dict[str, np.ndarray], only: str = "all") -> Figure:
    """One image: RGB, depth, truth, of each run its prediction and errors; all but a class or confusion is faded.

    `predicted` holds `(H, W)` by run; `only` is `all`, a class, or two with `PAIR` between them, which is outlined, in
    the RGB image too.
    """
    image, label, classes = sample.image[0], sample.labels_or_ignored[0], sample.classes
    shades, truth, chosen = plots.depth_shades([sample]), "ground truth" if predicted else "labels", {}
    pictures = {"RGB": image / 255, plots.DEPTH: plots.colour_depth(sample.depth_or_missing[0], shades)}
    pictures[truth] = plots.colour_labels(label, classes)
    index = [] if only == "all" else [classes.index(name) for name in only.split(PAIR)]
    if len(index) == 1:
        chosen = dict.fromkeys(pictures, label == index[0])
    for name, mask in predicted.items():
        pictures[name] = plots.colour_labels(mask, classes)
        pictures[f"errors, {name}"] = plots.colour_errors(image, label, mask, classes)
        if len(index) == 1:
            chosen |= {name: mask == index[0], f"errors, {name}": (label == index[0]) | (mask == index[0])}
        elif index:
            chosen = dict.fromkeys(pictures, (label == index[0]) & (mask == index[1])) | chosen
    row = {title: picture for title, picture in pictures.items() if picture is not None}
    for title in row.keys() & chosen.keys() - {"RGB"}:
        row[title] = np.where(chosen[title][..., None], row[title], plots.fade(image))
    legend = plots.class_patches(classes, [label, *predicted.values()])
    width = (1.4 if predicted else 1) * plots.WIDTH
    figure = plots.plot_grid([row], sample.names.tolist(), legend, shades, width)
    for axes, title in zip(figure.axes, row, strict=False):
        if title in chosen and 0 < chosen[title].mean() < 1:
            axes.contour(chosen[title], [0.5], colors="black", linewidths=1).set_path_effects(plots.HALO)
    return figure


def runs_in_editor() -> bool:
    """Whether JupyterLab or another editor runs this cell: they say which one it is, papermill and nbval don't."""
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
