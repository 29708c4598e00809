"""Browse images: by class, by confusion, the most harmful first; in JupyterLab with widgets, else the first one."""

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import anywidget
import cv2
import ipywidgets
import numpy as np
import traitlets
from IPython import get_ipython
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from lib.classes import IGNORE_INDEX
from lib.data import Samples, Split
from lib.data.samples import choose_evenly
from lib.evaluation import Predicted
from lib.metrics import image_accuracy, mean_truth_iou, truth_iou
from lib.notebooks import plots
from lib.notebooks.error_analysis import CONFUSED, rank_confusions

ALL = "all images"
CONFUSIONS = 20  # that can be chosen, the most costly first
LABELS = "labels"  # titles of panels
PREDICTION = "prediction"
WRONG = "wrong pixels"
CHANGED = "B fixes (blue), breaks (orange)"
LARGEST = 1280  # pixels of the longer side, at most
PHOTOGRAPHS = ("RGB", plots.DEPTH)  # panels that travel as JPEG
Look = Callable[[Samples], Predicted]
Order = Callable[[str], np.ndarray]


class View(NamedTuple):
    """One image.

    Attributes:
        panels: `(H, W, 3)` uint8 by title.
        values: `(H, W)` by name, to read out: uint8 class indices, float confidence, or uint16 millimetres.
    """

    panels: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


class Panels(anywidget.AnyWidget):
    """The panels of one image in the page; see browse.js."""

    _esm = Path(__file__).with_name("browse.js")
    image = traitlets.Dict().tag(sync=True)
    classes = traitlets.List().tag(sync=True)
    colours = traitlets.List().tag(sync=True)
    shown = traitlets.List().tag(sync=True)


class Browser:
    """Goes through images; JupyterLab shows it as widgets, papermill and nbval as the picture of one image.

    Args:
        names: `(N,)` of the images.
        choices: `(N,)` bool by words, which images can be chosen together; the first is chosen at first.
        orders: by words, of a choice the `(N,)` keys by which its images are sorted.
        draw: of an image's position and a choice.
        classes: names of the classes.
        shown: titles of the panels that are shown at first.
        shades: of depth.
        interactive: whether there are widgets; None where an editor runs the cell.
    """

    def __init__(
        self,
        names: Sequence[str],
        choices: dict[str, np.ndarray],
        orders: dict[str, Order],
        draw: Callable[[int, str], View],
        classes: tuple[str, ...],
        shown: Sequence[str],
        shades: ScalarMappable | None = None,
        interactive: bool | None = None,
    ) -> None:
        self.names = list(names)
        self.choices = {words: images for words, images in choices.items() if images.any()}
        self.orders = orders
        self.draw = draw
        self.classes = classes
        self.shown = list(shown)
        self.shades = shades
        self.interactive = runs_in_editor() if interactive is None else interactive
        self._coming: dict[tuple[int, str], Future] = {}
        self._thread = ThreadPoolExecutor(1)
        self._widgets = None
        self.choose(next(iter(self.choices)), next(iter(orders)))

    def choose(self, only: str | None = None, order: str | None = None) -> "Browser":
        """The images of one of `choices`, sorted by one of `orders`; None keeps what is chosen.

        Raises:
            ValueError: words that are no choice or no order.
        """
        for name, words, known in (("only", only, self.choices), ("order", order, self.orders)):
            if words is not None and words not in known:
                raise ValueError(f"{name}: found {words!r}, expected one of: {', '.join(known)}")
        self.only = only or self.only
        self.order = order or self.order
        ranked = np.argsort(self.orders[self.order](self.only), kind="stable")
        self.images = ranked[self.choices[self.only][ranked]].tolist()
        self.go(0)
        return self

    def go(self, position: int) -> None:
        """To one of the chosen images."""
        self.position = min(max(position, 0), len(self.images) - 1)
        if self._widgets is not None:
            self._widgets.update()

    def find(self, name: str) -> str:
        """Go to the first chosen image whose name begins like this; words where there is none."""
        found = [at for at, image in enumerate(self.images) if self.names[image].startswith(name)]
        if found:
            self.go(found[0])
            return ""
        elsewhere = any(known.startswith(name) for known in self.names)
        return f"{name} is not among these images" if elsewhere else f"no image is called {name}"

    @property
    def caption(self) -> str:
        """Name of the image, its place and what is chosen."""
        where = f"{self.position + 1} of {len(self.images)}"
        return f"{self.names[self.images[self.position]]} · {where} · {self.only}, by {self.order}"

    def encode(self) -> dict[str, object]:
        """The current image as the page takes it; the one after it is drawn in the meantime."""
        this, *after = [(image, self.only) for image in self.images[self.position : self.position + 2]]
        coming = {key: self._coming.get(key) or self._thread.submit(self._draw, *key) for key in (this, *after)}
        self._coming = coming
        return coming[this].result() | {"caption": self.caption}

    def _draw(self, image: int, only: str) -> dict[str, object]:
        return encode(self.draw(image, only))

    def plot(self) -> Figure:
        """The current image for readers without a kernel."""
        panels, values = self.draw(self.images[self.position], self.only)
        labels = [value for value in values.values() if value.dtype == np.uint8]
        legend = plots.class_patches(self.classes, labels)
        shades = self.shades if plots.DEPTH in self.shown else None
        row = {title: panels[title] for title in self.shown if title in panels}
        return plots.plot_grid([row], [self.caption], legend, shades)

    def _repr_mimebundle_(self, **options: object) -> dict[str, str]:
        picture = {"image/png": base64.b64encode(plots.small_png(self.plot())).decode()}
        if not self.interactive:
            return picture
        if self._widgets is None:
            self._widgets = Controls(self)
        return {**self._widgets._repr_mimebundle_(**options), **picture}


class Controls(ipywidgets.VBox):
    """The widgets of a browser."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.updating = False
        self.drawn = None
        colours = plots.class_colours(browser.classes)
        self.panels = Panels(
            classes=list(browser.classes),
            colours=[colours[name] for name in browser.classes],
            shown=browser.shown,
            layout={"width": "100%"},
        )
        self.picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start", "max_width": "100%"})
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "auto", "max_width": "100%"}}
        self.only = ipywidgets.Dropdown(options=list(browser.choices), description="show", **wide)
        self.order = ipywidgets.Dropdown(options=list(browser.orders), description="sorted by", **wide)
        self.slider = ipywidgets.IntSlider(min=1, continuous_update=False, readout=False)
        self.name = ipywidgets.Combobox(placeholder="name of an image", continuous_update=False)
        self.message = ipywidgets.Label()
        steps = {"Previous": -1, "Next": 1}
        buttons = [ipywidgets.Button(description=words, layout={"width": "90px"}) for words in steps]
        for button in buttons:
            button.on_click(lambda pressed: browser.go(browser.position + steps[pressed.description]))
        self.only.observe(self._when(lambda words: browser.choose(only=words)), "value")
        self.order.observe(self._when(lambda words: browser.choose(order=words)), "value")
        self.slider.observe(self._when(lambda number: browser.go(number - 1)), "value")
        self.name.observe(self._when(self._find), "value")
        self.panels.on_msg(self._hear)
        wrapped = {"flex_flow": "row wrap"}
        above = ipywidgets.HBox([self.only, self.order, self.name, self.message], layout=wrapped)
        below = ipywidgets.HBox([*buttons, self.slider], layout=wrapped)
        super().__init__([above, below, self.panels, self.picture])
        self.add_class("browse")
        self.update()

    def _when(self, act: Callable) -> Callable[[dict], None]:
        """What a control does when a person changes it, and not when `update` does."""
        return lambda change: None if self.updating else act(change["new"])

    def _find(self, name: str) -> None:
        unknown = self.browser.find(name)
        if unknown:
            self.message.value = unknown

    def _hear(self, _: object, content: dict, __: list) -> None:
        """The page has the panels, so that the plain picture can go; or an arrow key was pressed."""
        if content.get("ready"):
            self.picture.layout.display = "none"
        if "step" in content:
            self.browser.go(self.browser.position + content["step"])

    def update(self) -> None:
        """Show the browser's image: one drawing, whatever was changed."""
        browser = self.browser
        self.updating = True
        self.only.value = browser.only
        self.order.value = browser.order
        self.slider.max = len(browser.images)
        self.slider.value = browser.position + 1
        self.name.options = [browser.names[image] for image in browser.images]
        self.name.value = ""
        self.message.value = browser.caption
        self.updating = False
        drawn = browser.images[browser.position], browser.only
        if drawn == self.drawn:
            return
        self.drawn = drawn
        self.panels.image = browser.encode()
        if self.picture.layout.display != "none":
            self.picture.value = plots.small_png(browser.plot())


def encode(view: View) -> dict[str, object]:
    """A view as the page takes it: panels as JPEG or PNG, values as bytes."""
    step = -(-max(next(iter(view.panels.values())).shape) // LARGEST)
    panels, values = [], []
    for title, panel in view.panels.items():
        kind = (".jpg", []) if title in PHOTOGRAPHS else (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1])
        picture = cv2.imencode(kind[0], panel[::step, ::step, ::-1], kind[1])[1]
        panels.append({"title": title, "bytes": picture.tobytes()})
    for name, value in view.values.items():
        thinned = value[::step, ::step]
        if thinned.dtype.kind == "f":
            thinned = np.round(255 * thinned).astype(np.uint8)
            kind = "share"
        else:
            kind = "class" if thinned.dtype == np.uint8 else "millimetres"
        values.append({"name": name, "kind": kind, "bytes": thinned.tobytes()})
    height, width = thinned.shape
    size = {"width": width, "height": height, "step": step}
    return {"panels": panels, "values": values, **size}


def browse_samples(
    samples: Samples, shades: ScalarMappable | None = None, interactive: bool | None = None
) -> Browser:
    """Goes through labelled samples; `shades` of depth, None takes what suits them."""
    classes = samples.classes
    bins = {"minlength": IGNORE_INDEX + 1}
    pixels = np.array([np.bincount(label.ravel(), **bins) for label in samples.labels_or_ignored])
    choices = {ALL: np.ones(len(samples), bool)}
    choices |= {name: pixels[:, index] > 0 for index, name in enumerate(classes)}
    shades = shades or plots.depth_shades([samples])

    def draw(index: int, only: str) -> View:
        return view_sample(samples[[index]], {}, shades, only)

    def by_pixels(only: str) -> np.ndarray:
        return by_name(only) if only == ALL else -pixels[:, classes.index(only)]

    def by_name(_: str) -> np.ndarray:
        return np.arange(len(samples))

    orders = {"file name": by_name, "pixels of the class": by_pixels}
    shown = ("RGB", plots.DEPTH, LABELS)
    return Browser(samples.names, choices, orders, draw, classes, shown, shades, interactive)


def browse_results(
    split: Split,
    counts: dict[str, np.ndarray],
    looks: dict[str, Look],
    keys: dict[str, np.ndarray] | None = None,
    interactive: bool | None = None,
) -> Browser:
    """Goes through the results of one run from the worst image to the best; of two, from where B gains most.

    Args:
        split: the images.
        counts: by run, `(N, C, C)` confusion matrices of them.
        looks: by run, what predicts `Samples`; confidence may be None.
        keys: by words, `(N,)` by which images can be sorted too, the smallest first.
        interactive: as for `Browser`.
    """
    classes = split.classes
    together = sum(counts.values())
    ranked = rank_confusions(together, classes)[:CONFUSIONS]
    cells = {name: (at, at) for at, name in enumerate(classes)}
    cells |= {name: tuple(map(classes.index, name.split(CONFUSED))) for name in ranked.index}
    choices = {ALL: together.any((1, 2))}
    choices |= {name: _pixels(together, cell) > 0 for name, cell in cells.items()}
    shades = plots.depth_shades(split[choose_evenly(len(split), 8)])

    def draw(index: int, only: str) -> View:
        (sample,) = split[np.array([index])]
        return view_sample(sample, {name: look(sample) for name, look in looks.items()}, shades, only)

    orders = _order_results(counts, cells)
    orders |= {words: lambda only, key=key: key for words, key in (keys or {}).items()}
    runs = [f"{letter}: {name}" for letter, name in zip("AB", looks, strict=False)]
    shown = ("ground truth", PREDICTION, WRONG) if len(looks) == 1 else (*runs, CHANGED)
    return Browser(split.names, choices, orders, draw, classes, shown, shades, interactive)


def _pixels(counts: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """`(N,)` of a confusion, or of a class in ground truth or prediction."""
    truth, predicted = cell
    if truth != predicted:
        return counts[:, truth, predicted]
    return counts[:, truth].sum(1) + counts[:, :, truth].sum(1) - counts[:, truth, truth]


def _order_results(counts: dict[str, np.ndarray], cells: dict[str, tuple[int, int]]) -> dict[str, Order]:
    """Of one run its wrong pixels and IoU, of two the difference in IoU; of what is chosen."""

    def score(run: np.ndarray, only: str) -> np.ndarray:
        if only == ALL:
            return np.array([mean_truth_iou(image) if image.any() else np.nan for image in run])
        return np.array([truth_iou(image)[cells[only][0]] for image in run])

    def wrong(run: np.ndarray, only: str) -> np.ndarray:
        if only == ALL:
            return image_accuracy(run)
        truth, predicted = cells[only]
        return (truth == predicted) * run[:, truth, truth] - _pixels(run, cells[only])

    first, *others = counts.values()
    if not others:
        return {
            "wrong pixels": lambda only: wrong(first, only),
            "lowest IoU": lambda only: score(first, only),
        }
    return {
        "gain of B": lambda only: score(first, only) - score(others[0], only),
        "loss of B": lambda only: score(others[0], only) - score(first, only),
        "wrong pixels of A": lambda only: wrong(first, only),
        "wrong pixels of B": lambda only: wrong(others[0], only),
    }


def view_sample(
    sample: Samples, predicted: dict[str, Predicted], shades: ScalarMappable | None, only: str = ALL
) -> View:
    """One image with the predictions of no, one or two runs; outside of what is chosen, class colours are faded.

    `only` is `ALL`, a class, or two with `CONFUSED` between them, whose pixels are outlined.
    """
    image, label, classes = sample.image[0], sample.labels_or_ignored[0], sample.classes
    masks = {name: run.labels[0] for name, run in _titled(predicted).items()}
    truth = "ground truth" if predicted else LABELS
    coloured = {truth: label, **masks}
    panels = {name: plots.colour_labels(mask, classes) for name, mask in coloured.items()}
    where = _chosen(coloured, [classes.index(name) for name in only.split(CONFUSED)] if only != ALL else [])
    for name, chosen in where.items():
        panels[name] = np.where(chosen[..., None], panels[name], plots.fade(image))
    if len(masks) == 1:
        panels[WRONG] = plots.colour_errors(image, label, masks[PREDICTION])
    elif masks:
        panels[CHANGED] = plots.colour_changes(image, label, *masks.values())
    panels = {"RGB": plots.reduce_colours(image), plots.DEPTH: plots.colour_depth(sample.depth_or_missing[0], shades)} | panels
    panels = {name: panel for name, panel in panels.items() if panel is not None}
    anywhere = np.logical_or.reduce([*where.values()]) if where else None
    for name in panels.keys() if where else ():
        panels[name] = plots.outline(panels[name], where.get(name, anywhere))
    values = dict(coloured)
    for name, run in _titled(predicted).items():
        if run.confidence is not None:
            values["confidence" if len(masks) == 1 else f"confidence of {name[0]}"] = run.confidence[0]
    return View(panels, values | {"depth": sample.depth_or_missing[0]})


def _titled(predicted: dict[str, Predicted]) -> dict[str, Predicted]:
    if len(predicted) == 1:
        return {PREDICTION: run for run in predicted.values()}
    return {f"{letter}: {name}": run for letter, (name, run) in zip("AB", predicted.items(), strict=False)}


def _chosen(masks: dict[str, np.ndarray], indices: list[int]) -> dict[str, np.ndarray]:
    """Of ground truth and predictions, the pixels of a class; of a confusion in all of them the same pixels."""
    truth, *predicted = masks.values()
    if len(indices) < 2:
        return {name: mask == indices[0] for name, mask in masks.items()} if indices else {}
    confused = np.logical_or.reduce([mask == indices[1] for mask in predicted]) & (truth == indices[0])
    return dict.fromkeys(masks, confused)


def runs_in_editor() -> bool:
    """Whether JupyterLab or another editor runs this cell: they say which one it is, papermill and nbval don't."""
    kernel = getattr(get_ipython(), "kernel", None)
    return "cellId" in kernel.get_parent().get("metadata", {}) if kernel else False
