"""Colours of classes, grids of pictures, matrices and curves: every function returns a `Figure`, none shows it."""

import io
import textwrap
from collections.abc import Iterable, Sequence

import cv2
import matplotlib
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lib.classes import IGNORE_INDEX
from lib.data.samples import Samples
from lib.files import ROOT

FIGURES = ROOT / "figures"  # where notebooks save what the README shows

# One colour for each class in every figure, at least 12.5 apart (CIEDE2000) to normal, protanope and
# deuteranope eyes, and as far from the faded pictures that errors are drawn on.
CLASS_COLOURS = {
    "bed": "#893059", "books": "#eef03c", "ceiling": "#c8e8a0", "chair": "#dca01c", "floor": "#866e3c",
    "furniture": "#349585", "objects": "#e6557f", "picture": "#9e3ea8", "sofa": "#320c6a", "table": "#244b1d",
    "tv": "#1f1b1a", "wall": "#9aaac0", "window": "#1aa2f4",
}  # fmt: skip
FADED, HATCH = (0.8, 1.0), (0.7, 1.0)  # greys of faded pictures, of the stripes on unlabelled pixels
TRAIN_COLOUR, VALID_COLOUR, GREY = "#999999", "#0072b2", "#666666"
EDGED = {"edgecolor": GREY, "linewidth": 0.5}  # so that pale classes stand out from the page
WIDTH = 8  # inches, so that a figure fits a notebook
DEPTH = "depth (m)"  # title of a column of pictures
HALO = [withStroke(linewidth=3, foreground="white")]  # so that black lines are seen on dark colours
FEW = 20  # classes up to which matrices show numbers and rows are wide
styled = matplotlib.rc_context({  # a decorator
    "figure.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "figure.titlesize": "medium",
    "legend.frameon": False, "image.interpolation": "nearest",
})  # fmt: skip


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """A colour for each name: NYUv2's 13 have theirs in every set, others get what is farthest from all before."""
    others = [name for name in classes if name not in CLASS_COLOURS]
    return {**dict(zip(others, _spread_colours(len(others)), strict=True)), **CLASS_COLOURS}


def _spread_colours(count: int) -> list[str]:
    steps = np.linspace(0.05, 0.95, 11)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    places = _perceived(candidates)
    taken = _perceived(np.array([to_rgb(colour) for colour in [*CLASS_COLOURS.values(), "0.8", "white"]]))
    distance = np.linalg.norm(places[:, None] - taken, axis=-1).min(1)
    chosen = []
    for _ in range(count):
        farthest = distance.argmax()
        chosen.append(to_hex(candidates[farthest]))
        distance = np.minimum(distance, np.linalg.norm(places - places[farthest], axis=1))
    return chosen


def _perceived(colours: np.ndarray) -> np.ndarray:
    """`(N, 3)` CIELAB with the chroma compressed, as differences between vivid colours count less to the eye."""
    lab = cv2.cvtColor(colours[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    chroma = 1e-6 + 0.045 * np.linalg.norm(lab[:, 1:], axis=1, keepdims=True)
    return np.hstack((lab[:, :1], lab[:, 1:] * np.log1p(chroma) / chroma))


def colour_labels(label: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Class indices `(H, W)` as colours `(H, W, 3)` in 0..1; unlabelled pixels are hatched."""
    colours = class_colours(classes)
    table = np.array([*(to_rgb(colours[name]) for name in classes), (0, 0, 0)])
    row, column = np.ogrid[: label.shape[0], : label.shape[1]]
    stripe = max(1, label.shape[1] // 60)
    hatch = np.take(HATCH, (row + column) // stripe % 2)[..., None]
    ignored = label == IGNORE_INDEX
    return np.where(ignored[..., None], hatch, table[np.where(ignored, len(classes), label)])


def blend_labels(image: np.ndarray, label: np.ndarray, classes: Sequence[str], opacity: float) -> np.ndarray:
    """Class colours over RGB `(H, W, 3)`, 0..1."""
    return opacity * colour_labels(label, classes) + (1 - opacity) * image / 255


def colour_errors(
    image: np.ndarray, label: np.ndarray, predicted: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """Wrong pixels in the colour of the class they were given, over the faded RGB image."""
    return colour_where((label != IGNORE_INDEX) & (label != predicted), image, predicted, classes)


def colour_where(
    chosen: np.ndarray, image: np.ndarray, label: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """Class colours of the chosen pixels `(H, W)` over the faded RGB image."""
    return np.where(chosen[..., None], colour_labels(label, classes), fade(image))


def fade(image: np.ndarray) -> np.ndarray:
    """RGB `(H, W, 3)` as pale greys that no class has, so that colours on it are read as classes."""
    grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    low, high = FADED
    return np.repeat((low + (high - low) * grey / 255)[..., None], 3, axis=-1)


def depth_shades(pieces: Sequence[Samples]) -> ScalarMappable | None:
    """The scale of depth in metres that suits these samples, white for missing; None where there is no depth."""
    depth = np.concatenate([piece.depth_or_missing[:: len(piece) // 50 + 1].ravel() for piece in pieces])
    if not depth.any():
        return None
    low, high = np.percentile(depth[depth > 0], (0.5, 99.5)) / 1000
    return ScalarMappable(Normalize(low, high), matplotlib.colormaps["viridis_r"].with_extremes(bad="white"))


def colour_depth(depth: np.ndarray, shades: ScalarMappable | None) -> np.ndarray | None:
    """Millimetres `(H, W)` as colours `(H, W, 3)`; None without shades."""
    return None if shades is None else shades.to_rgba(np.where(depth == 0, np.nan, depth / 1000))[..., :3]


def shorten(name: str, length: int = 28) -> str:
    """A name without its middle, if it is longer than that."""
    return (
        name
        if len(name) <= length
        else f"{name[: length // 2]}…{name[len(name) + 1 + length // 2 - length :]}"
    )


def class_patches(classes: Sequence[str], labels: Sequence[np.ndarray]) -> list[Patch]:
    """Of a legend: the classes in arrays of labels, and unlabelled if 255 is in one."""
    colours, present = (
        class_colours(classes),
        sorted(set().union(*(np.unique(label).tolist() for label in labels))),
    )
    patches = [
        Patch(facecolor=colours[classes[i]], label=shorten(classes[i]), **EDGED) for i in present if i != 255
    ]
    if IGNORE_INDEX in present:
        patches.append(
            Patch(facecolor="white", edgecolor="0.6", hatch="/////", linewidth=0.5, label="unlabelled")
        )
    return patches


def add_legend(figure: Figure, handles: Sequence) -> None:
    """A legend below everything, in as many columns as there is room for; the figure grows by its height."""
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), int(figure.get_figwidth() / (0.6 + 0.08 * longest)))
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small")


def add_title(figure: Figure, title: str) -> None:
    """A title from the left edge of the figure, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(title, 95), x=0.01, ha="left")


def new_figure(
    height: float, *grid: int, width: float = WIDTH, **options: object
) -> tuple[Figure, Axes | np.ndarray]:
    """A figure of so many inches, and its axes: `grid` and `options` as `Figure.subplots` takes them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **options)


@styled
def plot_grid(
    rows: Sequence[dict[str, np.ndarray | None]],
    row_titles: Sequence[str] | None = None,
    legend: Sequence[Patch] = (),
    shades: ScalarMappable | None = None,
    width: float = WIDTH,
) -> Figure:
    """Coloured pictures, of which sizes may differ.

    Args:
        rows: pictures `(H, W, 3)` by the title of their column, the same in all rows; None leaves a column out.
        row_titles: written beside the rows.
        legend: see `class_patches`.
        shades: of depth, for its colour bar.
        width: of the figure, inches.
    """
    rows = [{title: picture for title, picture in row.items() if picture is not None} for row in rows]
    titles = list(rows[0])
    inches = width / len(titles)  # of a picture's width
    heights = [inches * max(picture.shape[0] / picture.shape[1] for picture in row.values()) for row in rows]
    figure = Figure(figsize=(width, sum(heights) + (0.3 if shades is None else 0.8)), layout="compressed")
    grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for line, row, title, height in zip(grid, rows, row_titles or [""] * len(rows), heights, strict=True):
        line[0].set_ylabel(shorten(title, int(14 * height)), fontsize="small")
        for axes, picture in zip(line, row.values(), strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="0.8", linewidth=0.5)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(shorten(title, int(12 * inches)))
    if shades is not None:
        figure.colorbar(shades, ax=grid, location="bottom", shrink=0.3, aspect=30, pad=0.02, label=DEPTH)
    add_legend(figure, legend)
    return figure


def plot_predictions(
    samples: Samples | Sequence[Samples],
    predicted: Sequence[np.ndarray],
    row_titles: Sequence[str] | None = None,
    errors: bool = False,
) -> Figure:
    """A row for each image: RGB, depth, truth (where there are any), prediction and, if asked, `colour_errors`.

    Samples are of one size, or pieces of which each has its own; `predicted` are class indices `(H, W)` of each image.
    """
    pieces = [samples] if isinstance(samples, Samples) else samples
    images = [(piece, at) for piece in pieces for at in range(len(piece))]
    classes, shades = pieces[0].classes, depth_shades(pieces)
    rows, shown = [], list(predicted)
    for (piece, at), named in zip(images, predicted, strict=True):
        row = {"RGB": piece.image[at], DEPTH: colour_depth(piece.depth_or_missing[at], shades)}
        if piece.label is not None:
            shown.append(piece.label[at])
            row["ground truth"] = colour_labels(piece.label[at], classes)
        row["prediction"] = colour_labels(named, classes)
        if errors:
            row["errors"] = colour_errors(piece.image[at], piece.labels_or_ignored[at], named, classes)
        rows.append(row)
    return plot_grid(rows, row_titles, class_patches(classes, shown), shades)


def write_names(axes: Axes, label: np.ndarray, classes: Sequence[str], least: float = 0.012) -> None:
    """The class's name at the innermost point of each connected region that takes 1.2 % of `(H, W)` or more."""
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
    for index in set(np.unique(label).tolist()) - {IGNORE_INDEX}:
        rimmed = np.pad((label == index).astype(np.uint8), 1)  # so that a region ends where the picture does
        _, region, stats, _ = cv2.connectedComponentsWithStats(rimmed)
        for number in 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= least * label.size):
            room = cv2.distanceTransform((region == number).astype(np.uint8), cv2.DIST_L2, 5)
            row, column = np.unravel_index(room.argmax(), room.shape)
            across = column / label.shape[1]
            side = "left" if across < 0.12 else "right" if across > 0.88 else "center"
            axes.text(
                column - 1, row - 1, shorten(classes[index], 14), ha=side, va="center", fontsize=6, bbox=box
            )


def rows_height(count: int) -> float:
    """Inches of a figure with a row for each of so many classes."""
    return 1.1 + (0.22 if count <= FEW else 0.15) * count


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names beside rows 0, 1, ..., from below, that stay apart however many there are."""
    size = "medium" if len(names) <= FEW else "x-small"
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], fontsize=size)
    axes.set_ylim(-0.7, len(names) - 0.3)


@styled
def plot_matrix(shares: pd.DataFrame, title: str) -> Figure:
    """Shares 0..1 by class (rows and columns, whose index names say what they are), with numbers if they are few."""
    import seaborn  # here: it takes a second or two to load, and training should not wait for it

    few = len(shares) <= FEW
    numbers = (100 * shares).map(lambda share: f"{share:.0f}" if share >= 0.5 else "") if few else None
    across, down = ([shorten(name) for name in names] for names in (shares.columns, shares.index))
    figure, axes = new_figure(rows_height(len(shares)) + 1.5)
    seaborn.heatmap(
        shares, vmin=0, vmax=1, cmap="Blues", ax=axes, xticklabels=across, yticklabels=down,
        annot=numbers, fmt="", annot_kws={"fontsize": "small"},
        cbar=not few, cbar_kws={"shrink": 0.4, "fraction": 0.03},
    )  # fmt: skip
    axes.tick_params(
        axis="x", length=0, labelsize="medium" if few else "xx-small", rotation=40 if few else 90
    )
    axes.tick_params(axis="y", length=0, labelsize="medium" if few else "x-small", rotation=0)
    add_title(figure, title)
    return figure


@styled
def plot_history(history: pd.DataFrame, epochs: int, terms: dict[str, float]) -> Figure:
    """Total loss, validation scores and each term of the loss by epoch, over the whole span of `epochs`.

    The history holds the rows of `fit` so far, `terms` the weight of each term by its name there; 0 leaves it out.
    """
    used = [name for name, weight in terms.items() if weight]
    words = [name.replace("_", " ").replace("iou", "IoU").replace("l1", "L1") for name in used]
    total = " + ".join(
        f"{terms[name]:g} {word}".removeprefix("1 ") for name, word in zip(used, words, strict=True)
    )
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    loss, score = above.subplots(1, 2)
    small = below.subplots(1, len(used), squeeze=False)[0]
    for axes, name, title in zip([loss, *small], ["loss", *used], [f"Loss: {total}", *words], strict=True):
        axes.plot(history.epoch, history[f"train_{name}"], color=TRAIN_COLOUR, marker=".", label="training")
        axes.plot(history.epoch, history[f"valid_{name}"], color=VALID_COLOUR, marker=".", label="validation")
        axes.set_title(title, fontsize="medium" if len(title) < 45 else "small")
    loss.legend()
    score.plot(history.epoch, history.valid_pixel_acc, color=TRAIN_COLOUR, marker=".", label="pixel accuracy")
    score.plot(history.epoch, history.valid_miou, color=VALID_COLOUR, marker=".", label="mIoU")
    score.set(title="No validation images", ylim=(0, 1))
    if history.valid_miou.notna().any():
        best = history.loc[history.valid_miou.idxmax()]
        score.plot(best.epoch, best.valid_miou, "o", color=VALID_COLOUR)
        score.set_title(f"Best validation mIoU: {best.valid_miou:.3f} at epoch {best.epoch:.0f}")
    score.legend(loc="upper left")
    for axes in (loss, score, *small):
        axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@styled
def plot_class_iou(table: pd.DataFrame, title: str, mean: float | None) -> Figure:
    """IoU by class, best first; a class that does not occur (NaN) has no bar.

    Args:
        table: by class its `IoU` and, where these are known, the ends of its interval, `low` and `high`, the number
            of `images` with it, and its `support`, the share of the pixels, p: who guesses by it gets p / (2 - p).
        mean: the mIoU, for a line to hold classes against, if it is known.
    """
    table = table.sort_values("IoU", ascending=False, kind="stable")[::-1]
    rows, colours = np.arange(len(table)), class_colours(table.index)
    figure, axes = new_figure(rows_height(len(table)))
    axes.barh(rows, table.IoU, color=[colours[name] for name in table.index], **EDGED)
    if mean is not None:
        axes.axvline(mean, color=GREY, linestyle=":", label=f"mIoU {mean:.3f}")
    names = table.index
    if "support" in table:
        names = [f"{shorten(name, 20)} ({count:.0f})" for name, count in table.images.items()]
        known = "95 % interval" if table.low.notna().any() else None
        axes.hlines(rows, table.low, table.high, color="black", label=known, path_effects=HALO)
        guess = table.support / (2 - table.support)
        axes.plot(guess, rows, "|", color="#d55e00", ms=9, mew=2, label="chance level")
    for row, value in enumerate(table.IoU):
        text = "none seen" if np.isnan(value) else f"{value:.2f}"
        axes.text(1.01, row, text, va="center", color=GREY, fontsize="small")
    label_rows(axes, names)
    axes.set(xlabel="IoU", xlim=(0, 1))
    add_title(figure, title)
    add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


@styled
def plot_curves(histories: dict[str, list[pd.DataFrame]], title: str, colours: dict[str, tuple]) -> Figure:
    """Validation mIoU by epoch, a line for each run in the colour of its recipe."""
    figure, axes = new_figure(2.8)
    for name, runs in histories.items():
        for number, history in enumerate(runs):
            label = "_" if number else shorten(name, 60)  # once in the legend
            axes.plot(
                history.epoch, history.valid_miou, marker=".", linewidth=1, color=colours[name], label=label
            )
    axes.set(title=title, xlabel="epoch", ylabel="validation mIoU", ylim=(0, None))
    add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def run_colours(names: Iterable[str]) -> dict[str, tuple]:
    """A colour for each run or recipe, apart for colour-blind readers; grey from the ninth on.

    Make it once in a notebook and hand it to every figure, so that a recipe keeps its colour.
    """
    import seaborn  # here, see `plot_matrix`

    names = list(names)
    colours = [*seaborn.color_palette("colorblind", 8), *[(0.6, 0.6, 0.6)] * len(names)]
    return dict(zip(names, colours, strict=False))


def show_small_figures() -> None:
    """Let the running notebook keep its figures as PNGs of 256 colours, a third of their size."""
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """A PNG of 256 colours, chosen by an octree, which keeps those that are rare; its page stays white."""
    picture, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    image = Image.open(picture).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    palette, page = image.getpalette(), image.getpixel((0, 0))  # a mean of what is nearly white
    palette[3 * page : 3 * page + 3] = 255, 255, 255
    image.putpalette(palette)
    image.save(reduced, "PNG", optimize=True)
    return reduced.getvalue()
