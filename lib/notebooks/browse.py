"""Browse images by class or confusion, with widgets in JupyterLab and as a static figure elsewhere."""

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anywidget
import cv2
import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from IPython import get_ipython
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from lib.classes import IGNORE_INDEX
from lib.data import Samples, Split
from lib.data.samples import choose_evenly
from lib.metrics import mean_iou
from lib.notebooks import plots
from lib.options import check_choice

if TYPE_CHECKING:  # imports torch, which takes seconds and is not needed by explore.ipynb
    from lib.evaluation import Predicted

ALL = "all images"
CONFUSED = " confused with "
JPEG_PANELS = ("RGB", plots.DEPTH)  # no class colours here; JPEG would alter them
DIFFERENCE_PANELS = {
    1: (plots.ERRORS_TITLE, plots.colour_errors),
    2: (plots.CHANGES_TITLE, plots.colour_changes),
}  # number of runs: (panel title, colouring function)
DRAWER = ThreadPoolExecutor(1)  # shared, because each execution of a cell makes a browser
Predictor = Callable[[Samples], "Predicted"]
Order = Callable[[str], np.ndarray]


class View(NamedTuple):
    """The panels and pixel values of one image.

    Attributes:
        panels: `(H, W, 3)` uint8 RGB panels by title.
        values: `(H, W)` arrays by name for the pixel readout: uint8 class indices, float32 confidence, or
            uint16 depth in millimetres.
        classes: names of the classes.
        shown: titles of the initially visible panels.
        depth_scale: colour scale of the depth panel; None without one.
    """

    panels: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    classes: tuple[str, ...]
    shown: tuple[str, ...]
    depth_scale: ScalarMappable | None

    def encode(self) -> dict[str, object]:
        """Encode the view for browse.js: RGB and depth as JPEG, other panels as PNG, values as raw bytes."""
        suffixes = {title: ".jpg" if title in JPEG_PANELS else ".png" for title in self.panels}
        encoded = {
            title: cv2.imencode(suffixes[title], cv2.cvtColor(panel, cv2.COLOR_RGB2BGR))[1]
            for title, panel in self.panels.items()
        }
        values = self.values.items()
        return {
            "panels": [{"title": title, "bytes": picture.tobytes()} for title, picture in encoded.items()],
            "values": [
                {"name": name, "kind": value.dtype.name, "bytes": value.tobytes()} for name, value in values
            ],
            "size": self.panels["RGB"].shape[1::-1],
            "classes": self.classes,
            "colours": [plots.class_colours(self.classes)[name] for name in self.classes],
            "shown": self.shown,
        }


class Panels(anywidget.AnyWidget):
    """A widget that shows the panels of one image, implemented in browse.js."""

    _esm = Path(__file__).with_name("browse.js")
    image = traitlets.Dict().tag(sync=True)


class Browser(ipywidgets.VBox):
    """Widgets for browsing images.

    Args:
        names: `(N,)` image names.
        choices: `(N,)` bool masks of the images to show, by menu entry.
        orders: sort orders by menu entry; each function maps a choice to `(N,)` keys, smallest first.
        draw: function that returns the `View` of an image, given its position and the choice.
    """

    def __init__(
        self,
        names: Sequence[str],
        choices: dict[str, np.ndarray],
        orders: dict[str, Order],
        draw: Callable[[int, str], View],
    ) -> None:
        self.names = list(names)
        self.choices = choices
        self.orders = orders
        self.draw = draw
        self.pending: dict[tuple[int, str], Future] = {}
        self.panels = Panels(layout={"width": "100%"})
        self.picture = ipywidgets.Image(layout={"align_self": "flex-start", "max_width": "100%"})
        widths = {"style": {"description_width": "initial"}, "layout": {"width": "auto", "max_width": "100%"}}
        self.only = ipywidgets.Dropdown(options=list(choices), description="show", **widths)
        self.order = ipywidgets.Dropdown(options=list(orders), description="sorted by", **widths)
        self.name = ipywidgets.Combobox(placeholder="name of an image", continuous_update=False)
        self.slider = ipywidgets.IntSlider(min=1, continuous_update=False, readout=False)
        self.message = ipywidgets.Label()
        previous_button, next_button = (ipywidgets.Button(description=text) for text in ("Previous", "Next"))
        wrapped = {"flex_flow": "row wrap"}
        above = ipywidgets.HBox([self.only, self.order, self.name], layout=wrapped)
        below = ipywidgets.HBox([previous_button, next_button, self.slider, self.message], layout=wrapped)
        super().__init__([above, below, self.panels, self.picture])
        self.add_class("browse")
        previous_button.on_click(lambda _: self.step(-1))
        next_button.on_click(lambda _: self.step(1))
        self.panels.on_msg(self._on_message)
        self.slider.observe(self._show, "value")
        self.name.observe(self._search, "value")
        self.only.observe(self._update_images, "value")
        self.order.observe(self._update_images, "value")
        self._update_images()

    def choose(self, only: str) -> "Browser":
        """Show the images of one choice, such as `tv` or `tv confused with wall`, and return the browser."""
        check_choice("only", only, self.choices)
        self.only.value = only
        return self

    def step(self, by: int) -> None:
        """Move forward by this number of images, or back if it is negative."""
        self.slider.value += by

    def _update_images(self, _: object = None) -> None:
        """Filter and sort the images, then show the first one."""
        ranked = np.argsort(self.orders[self.order.value](self.only.value), kind="stable")
        self.images = ranked[self.choices[self.only.value][ranked]].tolist()
        with self.hold_sync(), self.slider.hold_trait_notifications():
            self.slider.max = len(self.images)
            self.slider.value = 1
        self.name.options = [self.names[image] for image in self.images]
        self._show()

    def _show(self, _: object = None) -> None:
        """Show the current image and draw the next one in the background."""
        position = self.slider.value
        keys = [(image, self.only.value) for image in self.images[position - 1 : position + 1]]
        self.pending = {key: self.pending.get(key) or DRAWER.submit(self._draw, *key) for key in keys}
        name = self.names[self.images[position - 1]]
        caption = f"{name} · {position} of {len(self.images)} · {self.only.value}, by {self.order.value}"
        self.message.value = caption
        view, self.panels.image = self.pending[keys[0]].result()
        if self.picture.layout.display != "none":
            self.picture.value = plots.small_png(plot_views([view], [caption]))

    def _draw(self, image: int, only: str) -> tuple[View, dict[str, object]]:
        view = self.draw(image, only)
        return view, view.encode()

    def _search(self, change: dict) -> None:
        """Go to the image with the entered name, or else to the first whose name starts with it."""
        names = [self.names[image] for image in self.images]
        matches = [name for name in names if name.startswith(change["new"])]
        if matches and change["new"]:
            found = change["new"] if change["new"] in matches else matches[0]
            self.slider.value = names.index(found) + 1
            self.name.value = ""
        elif change["new"]:
            self.message.value = f"no image is called {change['new']} here"

    def _on_message(self, _: object, content: dict, __: list) -> None:
        """Handle messages from browse.js: `ready` hides the static image, `step` moves to another image."""
        if content.get("ready"):
            self.picture.layout.display = "none"
        self.step(content.get("step", 0))

    def _repr_mimebundle_(self, **options: object) -> dict[str, str]:
        picture = base64.b64encode(self.picture.value).decode()
        return {**super()._repr_mimebundle_(**options), "image/png": picture}


def browse(
    names: Sequence[str],
    choices: dict[str, np.ndarray],
    orders: dict[str, Order],
    draw: Callable[[int, str], View],
    interactive: bool | None,
) -> Browser | Figure:
    """Return a `Browser`, or a figure of the first image if `interactive` is False.

    If `interactive` is None, widgets are shown only if an editor runs the cell, so that papermill and nbval
    save no widgets. For the other arguments see `Browser`.
    """
    if runs_in_editor() if interactive is None else interactive:
        return Browser(names, {entry: mask for entry, mask in choices.items() if mask.any()}, orders, draw)
    order, keys = next(iter(orders.items()))
    first = np.argsort(np.where(choices[ALL], keys(ALL), np.inf))[0]
    return plot_views([draw(first, ALL)], [f"{names[first]} · 1 of {choices[ALL].sum()} · {ALL}, by {order}"])


def browse_samples(
    samples: Samples, depth_scale: ScalarMappable | None = None, interactive: bool | None = None
) -> Browser | Figure:
    """Browse labelled samples, with a depth panel if `depth_scale` is given."""
    pixels = np.array(
        [np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1) for label in samples.labels_or_ignored]
    )
    choices = {ALL: np.ones(len(samples), bool)}
    choices |= {name: pixels[:, index] > 0 for index, name in enumerate(samples.classes)}
    orders = {
        "file name": lambda _: np.arange(len(samples)),
        "pixels of the class": lambda only: (
            np.arange(len(samples)) if only == ALL else -pixels[:, samples.classes.index(only)]
        ),
    }
    return browse(
        samples.names,
        choices,
        orders,
        lambda index, only: view_sample(samples[[index]], {}, depth_scale, only),
        interactive,
    )


def browse_results(
    split: Split,
    counts: dict[str, np.ndarray],
    predictors: dict[str, Predictor],
    keys: dict[str, np.ndarray] | None = None,
    interactive: bool | None = None,
) -> Browser | Figure:
    """Browse the results of one run or of two runs, A and B.

    Initially, the images of one run are sorted by wrong pixels, and those of two runs by the gain of B over
    A, in descending order.

    Args:
        split: the N images.
        counts: `(N, C, C)` confusion matrices of the images, by run name.
        predictors: functions that predict `Samples`, by run name; the confidence may be None.
        keys: additional `(N,)` sort keys by menu entry, smallest first.
        interactive: see `browse`.
    """
    cells = _choose_cells(sum(counts.values()), split.classes)
    choices = {entry: (sum(counts.values()) * cell).any((1, 2)) for entry, cell in cells.items()}
    depth_scale = plots.choose_depth_scale(split[choose_evenly(len(split), 8)])
    correct = np.eye(len(split.classes), dtype=bool)

    def score(matrices: np.ndarray, only: str) -> np.ndarray:
        """Return `(N,)` scores: pixel accuracy for `ALL`, IoU for a class, minus a confusion's pixels."""
        cell = cells[only]
        if CONFUSED in only:
            return -(matrices * cell).sum((1, 2))
        return (matrices * (cell & correct)).sum((1, 2)) / np.maximum((matrices * cell).sum((1, 2)), 1)

    def draw(index: int, only: str) -> View:
        (sample,) = split[np.array([index])]
        return view_sample(
            sample, {name: look(sample) for name, look in predictors.items()}, depth_scale, only
        )

    a, *others = counts.values()
    orders = {"wrong pixels": lambda only: -(a * (cells[only] & ~correct)).sum((1, 2))}
    orders |= {"IoU": lambda only: image_scores(a) if only == ALL else score(a, only)}
    if others:
        (b,) = others
        orders = {"gain of B": lambda only: score(a, only) - score(b, only)}
        orders |= {"loss of B": lambda only: score(b, only) - score(a, only)}
    orders |= {entry: lambda _, key=key: key for entry, key in (keys or {}).items()}
    return browse(split.names, choices, orders, draw, interactive)


def image_scores(counts: np.ndarray) -> np.ndarray:
    """Return the `(N,)` mIoU of each image from counts `(N, C, C)`; NaN without a labelled pixel.

    The mIoU averages the classes in the ground truth of the image.
    """
    return np.array([mean_iou(image) if image.any() else np.nan for image in counts])


def _choose_cells(counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the `(C, C)` bool cells of a confusion matrix that each choice selects.

    `ALL` selects all cells, a class its row and column, and a confusion a single cell.
    """
    cells = {ALL: np.ones((len(classes), len(classes)), bool)}
    for choice in (*classes, *rank_confusions(counts, classes).index[:20]):  # the 20 most costly
        truth, predicted = (classes.index(name) for name in (choice.split(CONFUSED) * 2)[:2])
        cells[choice] = np.zeros_like(cells[ALL])
        cells[choice][truth, predicted] = True
        if truth == predicted:
            cells[choice][truth] = cells[choice][:, truth] = True
    return cells


def rank_confusions(counts: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """Rank confusions by their cost: the gain in mIoU if these pixels were predicted correctly.

    Args:
        counts: `(N, C, C)` confusion matrices, which are pooled over images.
        classes: names of the C classes.

    Returns:
        A table of the confusions that occur, indexed by `A confused with B`, most costly first: `cost` in
        mIoU over the classes in the ground truth, number of `pixels`, their `share` of all wrong pixels, and
        number of `images` with the confusion.
    """
    pooled = counts.sum(0)
    intersection = np.diagonal(pooled)
    union = np.maximum(pooled.sum(0) + pooled.sum(1) - intersection, 1)
    present = pooled.any(1)
    iou = np.where(present, intersection / union, 0)
    errors = pooled * ~np.eye(len(pooled), dtype=bool)
    reduced_union = np.maximum(union - errors, 1)  # union of the predicted class without these pixels
    gain = errors / union[:, None] + np.where(present, intersection / reduced_union - iou, 0)
    truth, predicted = np.nonzero(errors)
    table = pd.DataFrame(
        {
            "cost": gain[truth, predicted] / max(present.sum(), 1),
            "pixels": errors[truth, predicted],
            "share": errors[truth, predicted] / max(errors.sum(), 1),
            "images": (counts[:, truth, predicted] > 0).sum(0),
        },
        [classes[t] + CONFUSED + classes[p] for t, p in zip(truth, predicted, strict=True)],
    )
    return table.sort_values("cost", ascending=False, kind="stable")


def view_sample(
    sample: Samples, predicted: dict[str, "Predicted"], depth_scale: ScalarMappable | None, only: str = ALL
) -> View:
    """Return the view of one image with the predictions of up to two runs.

    `only` is `ALL`, a class, or a confusion such as `tv confused with wall`. The pixels of a class or
    confusion are outlined, and class colours are shown only there, on a faded image.
    """
    image, classes = sample.image[0], sample.classes
    titles = (
        ["prediction"]
        if len(predicted) == 1
        else [f"{letter}: {name}" for letter, name in zip("AB", predicted, strict=False)]
    )
    runs = dict(zip(titles, predicted.values(), strict=True))
    truth = {} if sample.label is None else {"ground truth" if runs else "labels": sample.label[0]}
    masks = truth | {title: run.labels[0] for title, run in runs.items()}
    panels = {title: plots.colour_labels(mask, classes) for title, mask in masks.items()}
    if only != ALL:
        selected = _choose_pixels([*masks.values()], [classes.index(name) for name in only.split(CONFUSED)])
        faded = plots.fade(image)
        panels = {title: np.where(selected[..., None], panel, faded) for title, panel in panels.items()}
    if runs and truth:
        title, colour_difference = DIFFERENCE_PANELS[len(runs)]
        panels[title] = colour_difference(image, *masks.values())
    shown = tuple(panels)[-3:]
    panels["RGB"] = image
    if depth_scale is not None:
        panels[plots.DEPTH] = plots.colour_depth(sample.depth_or_missing[0], depth_scale)
    if only != ALL:
        panels = {title: plots.outline(panel, selected) for title, panel in panels.items()}
    confidence = {
        f"confidence, {title}": run.confidence[0] for title, run in runs.items() if run.confidence is not None
    }
    depth = {} if sample.depth is None else {"depth": sample.depth[0]}
    return View(
        panels,
        masks | confidence | depth,
        classes,
        shown if runs else tuple(panels),
        depth_scale,
    )


def _choose_pixels(masks: list[np.ndarray], indices: list[int]) -> np.ndarray:
    """Return `(H, W)` bool: one class in any mask, or the first class predicted as the second."""
    if len(indices) == 1:
        return np.any([mask == indices[0] for mask in masks], axis=0)
    return (masks[0] == indices[0]) & np.any([mask == indices[1] for mask in masks[1:]], axis=0)


def plot_views(views: Sequence[View], captions: Sequence[str] = ()) -> Figure:
    """Draw one row per view: RGB and the initially visible panels."""
    rows = [{title: view.panels[title] for title in dict.fromkeys(("RGB", *view.shown))} for view in views]
    labels = [value for view in views for value in view.values.values() if value.dtype == np.uint8]
    legend = plots.class_patches(views[0].classes, labels)
    return plots.plot_grid(
        rows, captions, legend, views[0].depth_scale if plots.DEPTH in views[0].shown else None
    )


def plot_samples(samples: Samples, depth_scale: ScalarMappable | None) -> Figure:
    """Draw one row per sample: RGB, labels and, if `depth_scale` is given, depth."""
    views = [view_sample(samples[[index]], {}, depth_scale) for index in range(len(samples))]
    return plot_views(views, samples.names.tolist())


def plot_predictions(
    samples: Samples | Sequence[Samples], predicted: Sequence[np.ndarray], captions: Sequence[str] = ()
) -> Figure:
    """Draw one row per image: RGB, ground truth, prediction and wrong pixels.

    Without labels, only RGB and the prediction are drawn.

    Args:
        samples: `Samples`, or a sequence of `Samples` that may differ in size.
        predicted: `(H, W)` class indices of each image.
        captions: text below each row.
    """
    from lib.evaluation import Predicted  # imported here because it imports torch

    batches = [samples] if isinstance(samples, Samples) else samples
    images = [batch[[index]] for batch in batches for index in range(len(batch))]
    predictions = [{"": Predicted(image, mask[None])} for image, mask in zip(images, predicted, strict=True)]
    return plot_views([view_sample(*pair, None) for pair in zip(images, predictions, strict=True)], captions)


def runs_in_editor() -> bool:
    """Return whether JupyterLab or another editor runs the cell.

    Editors send the ID of the cell that they run; papermill and nbval don't.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
