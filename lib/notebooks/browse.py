"""Browse images: by class, by confusion, the most harmful first; in JupyterLab with widgets, else the first one."""

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
from lib.notebooks import plots

if TYPE_CHECKING:  # it needs torch, which takes seconds to import; explore browses without
    from lib.evaluation import Predicted

ALL = "all images"
CONFUSED = " confused with "
CONFUSIONS = 20  # that can be chosen, the most costly first
PREDICTION = "prediction"
PHOTOGRAPHS = ("RGB", plots.DEPTH)
Look = Callable[[Samples], "Predicted"]
Order = Callable[[str], np.ndarray]


class View(NamedTuple):
    """One image.

    Attributes:
        panels: `(H, W, 3)` uint8 by title.
        values: `(H, W)` by name, to read out: uint8 class indices, float confidence, or uint16 millimetres.
        classes: names of the classes.
        shown: titles of the panels that are shown at first.
        shades: of depth.
    """

    panels: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    classes: tuple[str, ...]
    shown: tuple[str, ...]
    shades: ScalarMappable | None

    def plot(self, caption: str) -> Figure:
        """The panels that are shown at first."""
        labels = [value for value in self.values.values() if value.dtype == np.uint8]
        row = {title: self.panels[title] for title in self.shown if title in self.panels}
        legend = plots.class_patches(self.classes, labels)
        return plots.plot_grid([row], [caption], legend, self.shades if plots.DEPTH in row else None)

    def encode(self) -> dict[str, object]:
        """What browse.js takes: photographs as JPEG, other panels as PNG, values as bytes."""
        panels = []
        for title, panel in self.panels.items():
            kind = ".jpg" if title in PHOTOGRAPHS else ".png"
            panels.append({"title": title, "bytes": cv2.imencode(kind, panel[..., ::-1])[1].tobytes()})
        values = [
            {"name": name, "kind": value.dtype.name, "bytes": value.tobytes()}
            for name, value in self.values.items()
        ]
        colours = plots.class_colours(self.classes)
        return {
            "panels": panels,
            "values": values,
            "size": panel.shape[1::-1],
            "classes": self.classes,
            "colours": [colours[name] for name in self.classes],
            "shown": self.shown,
        }


class Panels(anywidget.AnyWidget):
    """The panels of one image in the page; see browse.js."""

    _esm = Path(__file__).with_name("browse.js")
    image = traitlets.Dict().tag(sync=True)


class Browser(ipywidgets.VBox):
    """Widgets that go through images.

    Args:
        names: `(N,)` of the images.
        choices: `(N,)` bool by words, which images can be chosen together.
        orders: by words, of a choice the `(N,)` keys by which its images are sorted.
        draw: of an image's position and a choice.
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
        self.coming: dict[tuple[int, str], Future] = {}
        self.thread = ThreadPoolExecutor(1)
        self.drawn = None
        self.panels = Panels(layout={"width": "100%"})
        self.picture = ipywidgets.Image(layout={"align_self": "flex-start", "max_width": "100%"})
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "auto", "max_width": "100%"}}
        self.only = ipywidgets.Dropdown(options=list(choices), description="show", **wide)
        self.order = ipywidgets.Dropdown(options=list(orders), description="sorted by", **wide)
        self.name = ipywidgets.Combobox(placeholder="name of an image", continuous_update=False)
        self.slider = ipywidgets.IntSlider(min=1, continuous_update=False, readout=False)
        self.message = ipywidgets.Label()
        back, on = (ipywidgets.Button(description=words) for words in ("Previous", "Next"))
        wrapped = {"flex_flow": "row wrap"}
        above = ipywidgets.HBox([self.only, self.order, self.name], layout=wrapped)
        below = ipywidgets.HBox([back, on, self.slider, self.message], layout=wrapped)
        super().__init__([above, below, self.panels, self.picture])
        self.add_class("browse")
        back.on_click(lambda _: self.step(-1))
        on.on_click(lambda _: self.step(1))
        self.panels.on_msg(self._hear)
        self.slider.observe(self._show, "value")
        self.name.observe(self._find, "value")
        for control in (self.only, self.order):
            control.observe(self._list, "value")
        self._list()

    def choose(self, only: str) -> "Browser":
        """Show the images of one of the choices, such as `tv` or `tv confused with wall`."""
        if only not in self.choices:
            raise ValueError(f"only: found {only!r}, expected one of: {', '.join(self.choices)}")
        self.only.value = only
        return self

    def step(self, by: int) -> None:
        """That many images on."""
        self.slider.value += by

    def _list(self, _: object = None) -> None:
        """From the first image of what is chosen."""
        ranked = np.argsort(self.orders[self.order.value](self.only.value), kind="stable")
        self.images = ranked[self.choices[self.only.value][ranked]].tolist()
        with self.hold_sync(), self.slider.hold_trait_notifications():
            self.slider.max = len(self.images)
            self.slider.value = 1
        self.name.options = [self.names[image] for image in self.images]
        self._show()

    def _show(self, _: object = None) -> None:
        """Draw the current image, unless that is what is shown; the one after it is drawn in the meantime."""
        place = self.slider.value
        this, *after = [(image, self.only.value) for image in self.images[place - 1 : place + 1]]
        caption = f"{self.names[this[0]]} · {place} of {len(self.images)} · {this[1]}, by {self.order.value}"
        self.message.value = caption
        if this == self.drawn:
            return
        self.drawn = this
        self.coming = {
            key: self.coming.get(key) or self.thread.submit(self._draw, *key) for key in (this, *after)
        }
        view, encoded = self.coming[this].result()
        self.panels.image = encoded
        if self.picture.layout.display != "none":
            self.picture.value = plots.small_png(view.plot(caption))

    def _draw(self, image: int, only: str) -> tuple[View, dict[str, object]]:
        view = self.draw(image, only)
        return view, view.encode()

    def _find(self, change: dict) -> None:
        """Go to the first image whose name begins like this."""
        found = [at for at, image in enumerate(self.images) if self.names[image].startswith(change["new"])]
        if found and change["new"]:
            self.slider.value = found[0] + 1
            self.name.value = ""
        elif change["new"]:
            self.message.value = f"no image is called {change['new']} here"

    def _hear(self, _: object, content: dict, __: list) -> None:
        """The page has the panels, so that the plain picture can go; or an arrow key was pressed."""
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
    """A `Browser`; the first image alone where papermill or nbval runs the cell, so that no widget is saved.

    With `interactive` None, widgets show where an editor runs the cell.
    """
    if runs_in_editor() if interactive is None else interactive:
        return Browser(
            names, {words: images for words, images in choices.items() if images.any()}, orders, draw
        )
    order, keys = next(iter(orders.items()))
    first = np.argsort(np.where(choices[ALL], keys(ALL), np.inf))[0]
    return draw(first, ALL).plot(f"{names[first]} · 1 of {choices[ALL].sum()} · {ALL}, by {order}")


def browse_samples(
    samples: Samples, shades: ScalarMappable | None = None, interactive: bool | None = None
) -> Browser | Figure:
    """Goes through labelled samples; `shades` of depth."""
    bins = {"minlength": IGNORE_INDEX + 1}
    pixels = np.array([np.bincount(label.ravel(), **bins) for label in samples.labels_or_ignored])
    choices = {ALL: np.ones(len(samples), bool)}
    choices |= {name: pixels[:, index] > 0 for index, name in enumerate(samples.classes)}
    by_name = np.arange(len(samples))
    orders = {
        "file name": lambda _: by_name,
        "pixels of the class": lambda only: (
            -pixels[:, samples.classes.index(only)] if only != ALL else by_name
        ),
    }
    return browse(
        samples.names,
        choices,
        orders,
        lambda index, only: view_sample(samples[[index]], {}, shades, only),
        interactive,
    )


def browse_results(
    split: Split,
    counts: dict[str, np.ndarray],
    looks: dict[str, Look],
    keys: dict[str, np.ndarray] | None = None,
    interactive: bool | None = None,
) -> Browser | Figure:
    """Goes through the results of one run from the worst image to the best; of two, from where B gains most.

    Args:
        split: the images.
        counts: by run, `(N, C, C)` confusion matrices of them.
        looks: by run, what predicts `Samples`; confidence may be None.
        keys: by words, `(N,)` by which images can be sorted too, the smallest first.
        interactive: as for `browse`.
    """
    cells = _choose_cells(sum(counts.values()), split.classes)
    choices = {words: (sum(counts.values()) * cell).any((1, 2)) for words, cell in cells.items()}
    shades = plots.depth_shades(split[choose_evenly(len(split), 8)])
    correct = np.eye(len(split.classes), dtype=bool)

    def score(run: np.ndarray, only: str) -> np.ndarray:
        """The IoU of a class, of all images the pixel accuracy."""
        cell = cells[only]
        return (run * (cell & correct)).sum((1, 2)) / np.maximum((run * cell).sum((1, 2)), 1)

    def draw(index: int, only: str) -> View:
        (sample,) = split[np.array([index])]
        return view_sample(sample, {name: look(sample) for name, look in looks.items()}, shades, only)

    a, *b = counts.values()
    orders = {"wrong pixels": lambda only: -(a * (cells[only] & ~correct)).sum((1, 2))}
    orders |= {"IoU": lambda only: score(a, only)}
    if b:
        orders = {"gain of B": lambda only: score(a, only) - score(b[0], only)}
        orders |= {"loss of B": lambda only: score(b[0], only) - score(a, only)}
    orders |= {words: lambda _, key=key: key for words, key in (keys or {}).items()}
    return browse(split.names, choices, orders, draw, interactive)


def _choose_cells(counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """By words, the `(C, C)` cells of confusion matrices that are meant: of a class its row and its column."""
    cells = {ALL: np.ones((len(classes), len(classes)), bool)}
    for words in (*classes, *rank_confusions(counts, classes).index[:CONFUSIONS]):
        truth, predicted = (classes.index(name) for name in (words.split(CONFUSED) * 2)[:2])
        cells[words] = np.zeros_like(cells[ALL])
        cells[words][truth, predicted] = True
        if truth == predicted:
            cells[words][truth] = cells[words][:, truth] = True
    return cells


def rank_confusions(counts: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """Confusions by what they cost: the gain in mIoU if these pixels were predicted correctly.

    Args:
        counts: `(N, C, C)`, of which the pixels are pooled.
        classes: their names.

    Returns:
        Most costly first, by `A confused with B`: `cost` in mIoU over the classes in the ground truth, `pixels`,
        their `share` of the wrong pixels, and the `images` with them. Classes of the truth that are confused alone.
    """
    pooled = counts.sum(0)
    hits = np.diagonal(pooled)
    union = np.maximum(pooled.sum(0) + pooled.sum(1) - hits, 1)
    present = pooled.any(1)
    iou = np.where(present, hits / union, 0)
    wrong = pooled * ~np.eye(len(pooled), dtype=bool)
    fewer = np.maximum(union - wrong, 1)  # union of the predicted class without these pixels
    gain = wrong / union[:, None] + np.where(present, hits / fewer - iou, 0)
    cost = gain / max(present.sum(), 1)
    truth, predicted = np.nonzero(wrong)
    table = pd.DataFrame(
        {
            "cost": cost[truth, predicted],
            "pixels": wrong[truth, predicted],
            "share": wrong[truth, predicted] / max(wrong.sum(), 1),
            "images": (counts[:, truth, predicted] > 0).sum(0),
        },
        [classes[t] + CONFUSED + classes[p] for t, p in zip(truth, predicted, strict=True)],
    )
    return table.sort_values("cost", ascending=False, kind="stable")


def view_sample(
    sample: Samples, predicted: dict[str, "Predicted"], shades: ScalarMappable | None, only: str = ALL
) -> View:
    """One image with the predictions of no, one or two runs; class colours outside of what is chosen are faded.

    `only` is `ALL`, a class, or two with `CONFUSED` between them, whose pixels are outlined.
    """
    image, classes = sample.image[0], sample.classes
    runs = dict(zip(_run_titles(predicted), predicted.values(), strict=True))
    masks = {"ground truth" if runs else "labels": sample.labels_or_ignored[0]}
    masks |= {title: run.labels[0] for title, run in runs.items()}
    panels = {title: plots.colour_labels(mask, classes) for title, mask in masks.items()}
    chosen = (
        {} if only == ALL else _choose_pixels(masks, [classes.index(name) for name in only.split(CONFUSED)])
    )
    faded = plots.fade(image)
    for title, where in chosen.items():
        panels[title] = np.where(where[..., None], panels[title], faded)
    shown = ["RGB", plots.DEPTH, *panels]
    if len(runs) == 1:
        panels[plots.WRONG] = plots.colour_errors(image, *masks.values())
        shown = [*panels]
    elif runs:
        panels[plots.CHANGED] = plots.colour_changes(image, *masks.values())
        shown = [*panels][1:]
    panels |= {"RGB": image}
    if shades is not None:
        panels |= {plots.DEPTH: plots.colour_depth(sample.depth_or_missing[0], shades)}
    everywhere = np.logical_or.reduce([*chosen.values()]) if chosen else None
    for title in panels if chosen else ():
        panels[title] = plots.outline(panels[title], chosen.get(title, everywhere))
    sure = {
        f"confidence, {title}": run.confidence[0] for title, run in runs.items() if run.confidence is not None
    }
    return View(panels, masks | sure | {"depth": sample.depth_or_missing[0]}, classes, tuple(shown), shades)


def _run_titles(names: Sequence[str]) -> list[str]:
    return (
        [PREDICTION]
        if len(names) == 1
        else [f"{letter}: {name}" for letter, name in zip("AB", names, strict=False)]
    )


def _choose_pixels(masks: dict[str, np.ndarray], indices: list[int]) -> dict[str, np.ndarray]:
    """Of ground truth and predictions, the pixels of a class; of a confusion in all of them the same pixels."""
    truth, *predicted = masks.values()
    if len(indices) == 1:
        return {title: mask == indices[0] for title, mask in masks.items()}
    confused = np.logical_or.reduce([mask == indices[1] for mask in predicted]) & (truth == indices[0])
    return dict.fromkeys(masks, confused)


def runs_in_editor() -> bool:
    """Whether JupyterLab or another editor runs this cell: they say which one it is, papermill and nbval don't."""
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
