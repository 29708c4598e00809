"""Class colours, image grids, matrices and curves.

Functions named `plot_*` return a `Figure` without showing it.
"""

import io
import itertools
import logging
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import cv2
import matplotlib
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib.classes import IGNORE_INDEX
from lib.data.samples import Samples, choose_evenly
from lib.files import ROOT
from lib.metrics import DEPTH, chance_iou

FIGURES = ROOT / "figures"  # figures of the README, saved by notebooks

# Fixed colours in all figures. For normal, protanopic and deuteranopic vision, they differ by at least 12
# (CIEDE2000) from each other and from the greys of faded images.
CLASS_COLOURS = {
    "bed": "#883355", "books": "#eeee44", "ceiling": "#ddddaa", "chair": "#dd9922", "floor": "#886644",
    "furniture": "#009977", "objects": "#ee5577", "picture": "#9944aa", "sofa": "#331166", "table": "#224422",
    "tv": "#222222", "wall": "#99aabb", "window": "#22aaee",
}  # fmt: skip
# Colours of all other classes, in class order. Each is as far as possible from its predecessors, the colours
# above and the greys of images. Distances are measured in CIELAB with compressed chroma, because differences
# between vivid colours are less visible. From the 97th class on, the colours repeat.
OTHER_COLOURS = [
    "#446677", "#33cc11", "#11eecc", "#ee88ee", "#668811", "#bb1111", "#551111", "#1177ee", "#bb9988",
    "#1111ee", "#997788", "#334477", "#dd6633", "#33ccdd", "#99aa77", "#2299aa", "#667766", "#eeaabb",
    "#554444", "#554411", "#ccbbee", "#ee22aa", "#99ee88", "#aabb11", "#117733", "#771177", "#441133",
    "#8888bb", "#bbeeee", "#44cc88", "#eebb88", "#112244", "#114455", "#116655", "#88bbaa", "#cc55ee",
    "#773311", "#aa5555", "#aa7711", "#775577", "#11aa44", "#cc1166", "#666622", "#ee8877", "#556699",
    "#bb99bb", "#99ccee", "#1188bb", "#dd77aa", "#aaddbb", "#888888", "#5544aa", "#553355", "#aa9944",
    "#aa88ee", "#776666", "#ee2233", "#aa5511", "#779988", "#aa5588", "#6655ee", "#99dd22", "#eecc55",
    "#333322", "#555544", "#eeccdd", "#998866", "#aacc88", "#77aa33", "#aa7766", "#112211", "#881122",
    "#eeddcc", "#113333", "#11ccbb", "#333344", "#221122", "#668855", "#99aaee", "#aaaa99", "#335555",
    "#661133", "#22ee99", "#22ee22", "#1111aa", "#331111", "#447777", "#8811dd", "#668899", "#cc8855",
    "#553322", "#774444", "#ddeedd", "#aa1177", "#335511", "#66aa77",
]  # fmt: skip
FADED = 204  # darkest grey of images under class colours
DIMMED = 130  # darkest grey of images under other colours
HATCH = (187, 255)  # greys of the stripes on unlabelled pixels
TRAIN_COLOUR = "#999999"
VALID_COLOUR = "#0072b2"
WRONG_COLOUR = "#cc0000"
BAR_COLOUR = "#c8c8c8"  # bars that are labelled by name
GREY = "#666666"
FIGURE_WIDTH = 8  # inches; fits a notebook
TILE_WIDTH = 200  # minimum width in pixels of an image in a figure
WIDE_TILE_WIDTH = 256  # minimum width if there are at most three images per row
DPI = 100  # of image figures, which are laid out in whole pixels
TILE_GAP = 8  # pixels between images
LEVEL_STEP = 17  # between the 16 levels per channel of a saved figure, which include all class colours
LINE_HEIGHT = 20  # height in pixels of a line of text
ERRORS_TITLE = "wrong pixels"
CHANGES_TITLE = "B fixes (blue), breaks (red)"
TERMS = {  # loss terms and their labels in figures
    "cross_entropy": "cross-entropy", "soft_iou": "1 - soft IoU", "lovasz": "Lovász-softmax",
    "depth_l1": "depth L1",
}  # fmt: skip
FEW = 20  # up to this many classes, matrices show numbers and rows are taller
# Fallback fonts for Chinese, Japanese and Korean names, in order of preference.
ASIAN_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans",
    "Apple SD Gothic Neo", "Arial Unicode MS",
)  # fmt: skip
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font may lack the normal weight
FONTS = [name for name in ASIAN_FONTS if name in font_manager.get_font_names()]
styled = matplotlib.rc_context({  # used as a decorator
    "figure.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "figure.titlesize": "medium",
    "legend.frameon": False, "image.interpolation": "nearest",
    "text.parse_math": False,  # names may contain dollar signs
    "font.family": [*matplotlib.rcParams["font.family"], *FONTS],
})  # fmt: skip


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """Return the colour of each class by name.

    The colours of NYUv2's 13 classes are fixed and always included; other classes get theirs in class order.
    """
    others = [name for name in classes if name not in CLASS_COLOURS]
    return {**dict(zip(others, itertools.cycle(OTHER_COLOURS), strict=False)), **CLASS_COLOURS}


@cache
def _colour_table(classes: tuple[str, ...]) -> np.ndarray:
    """Return the class colours `(C + 1, 3)` uint8; the last row is for unlabelled pixels."""
    colours = class_colours(classes)
    rgb = [*(to_rgb(colours[name]) for name in classes), (0, 0, 0)]
    return np.round(np.multiply(rgb, 255)).astype(np.uint8)


def colour_labels(label: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Convert class indices `(H, W)` to colours `(H, W, 3)` uint8, with unlabelled pixels hatched."""
    coloured = np.take(_colour_table(tuple(classes)), label, axis=0, mode="clip")
    rows, columns = np.nonzero(label == IGNORE_INDEX)
    stripe_width = max(1, label.shape[1] // 60)
    coloured[rows, columns] = np.take(HATCH, (rows + columns) // stripe_width % 2)[:, None]
    return coloured


def colour_errors(image: np.ndarray, label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Draw the wrong pixels in one colour over the dimmed RGB image."""
    return overlay_masks(image, {WRONG_COLOUR: (label != IGNORE_INDEX) & (label != predicted)})


def colour_changes(image: np.ndarray, label: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Draw the pixels that are correct only in B or only in A, in two colours over the dimmed RGB image."""
    labelled = label != IGNORE_INDEX
    fixed = labelled & (label == b) & (label != a)
    broken = labelled & (label == a) & (label != b)
    return overlay_masks(image, {VALID_COLOUR: fixed, WRONG_COLOUR: broken})


def outline(picture: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Draw a black line, surrounded by a white one, around the chosen pixels `(H, W)` of an image."""
    outlined = picture.copy()
    thickness = max(1, round(chosen.shape[1] / 320))
    inside = chosen.astype(np.uint8)
    for colour, radius in ((255, 2 * thickness), (0, thickness)):
        outlined[cv2.dilate(inside, np.ones((3, 3), np.uint8), iterations=radius) > inside] = colour
    return outlined


def overlay_masks(image: np.ndarray, chosen: dict[str, np.ndarray]) -> np.ndarray:
    """Overlay colours on the dimmed RGB image; `chosen` maps each colour to a `(H, W)` bool mask."""
    coloured = fade(image, DIMMED)
    for colour, mask in chosen.items():
        coloured[mask] = np.round(np.multiply(to_rgb(colour), 255))
    return coloured


def fade(image: np.ndarray, darkest: int = FADED) -> np.ndarray:
    """Convert RGB `(H, W, 3)` uint8 to 18 greys from `darkest` to white, in the same shape.

    None of the greys from `FADED` on is a class colour, so that every colour can be read as a class.
    """
    grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) // 15
    levels = np.linspace(darkest, 255, 18).astype(np.uint8)
    return np.repeat(levels[grey][..., None], 3, axis=-1)


def choose_depth_scale(pieces: Iterable[Samples]) -> ScalarMappable | None:
    """Return a colour scale of depth in metres; None without depth.

    It spans percentiles 0.5 to 99.5 of the depth in up to 50 samples per piece.
    """
    depth = np.concatenate(
        [piece.depth_or_missing[choose_evenly(len(piece), 50)].ravel() for piece in pieces]
    )
    if not depth.any():
        return None
    return ScalarMappable(Normalize(*np.percentile(depth[depth > 0], (0.5, 99.5)) / 1000), "viridis_r")


def colour_depth(depth: np.ndarray, depth_scale: ScalarMappable) -> np.ndarray:
    """Convert depth `(H, W)` in millimetres to colours `(H, W, 3)` uint8; missing depth is white."""
    table = depth_scale.to_rgba(np.arange(2**16) / 1000, bytes=True)[:, :3]
    table[0] = 255
    return np.take(table, depth, axis=0)


def shorten(name: str, length: int = 28) -> str:
    """Shorten a name to at most `length` characters by replacing its middle with an ellipsis."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def percent(share: float, digits: int = 0) -> str:
    """Format a share 0..1 as a percentage, such as `36.6 %`."""
    return f"{100 * share:.{digits}f} %"


def class_patches(classes: Sequence[str], labels: Sequence[np.ndarray]) -> list[Patch]:
    """Return legend patches of the classes in arrays of labels, and of unlabelled pixels (255) if present."""
    colours = class_colours(classes)
    present = sorted(set().union(*(np.unique(label).tolist() for label in labels)))
    patches = [  # the edges make pale colours visible on white
        Patch(facecolor=colours[classes[index]], label=shorten(classes[index]), edgecolor=GREY, linewidth=0.5)
        for index in present
        if index != IGNORE_INDEX
    ]
    if IGNORE_INDEX in present:
        patches.append(
            Patch(label="unlabelled", facecolor="white", edgecolor="0.6", hatch="/////", linewidth=0.5)
        )
    return patches


def add_legend(figure: Figure, handles: Sequence) -> None:
    """Add a legend below the figure, in as many columns as fit, and increase the height of the figure."""
    if not handles:
        return
    lines, columns = _legend_lines(handles, figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small")


def add_title(figure: Figure, title: str) -> None:
    """Add a left-aligned title to the figure, wrapped to as many lines as it needs."""
    figure.suptitle(textwrap.fill(title, 95), x=0.01, ha="left")


def new_figure(
    height: float, *grid: int, width: float = FIGURE_WIDTH, **options: object
) -> tuple[Figure, Axes | np.ndarray]:
    """Create a figure (size in inches) and its axes; `grid` and `options` are passed to `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **options)


def fit_tile(picture: np.ndarray, least: int = WIDE_TILE_WIDTH) -> np.ndarray:
    """Scale an array `(H, W, ...)` by an integer factor to at least this width, without interpolation."""
    step = max(1, picture.shape[1] // least)
    zoom = -(-least // picture.shape[1])
    return picture[::step, ::step].repeat(zoom, 0).repeat(zoom, 1)


@styled
def plot_grid(
    rows: Sequence[dict[str, np.ndarray]],
    captions: Sequence[str] = (),
    legend: Sequence[Patch] = (),
    colour_scale: ScalarMappable | None = None,
    colour_scale_label: str = DEPTH,
) -> Figure:
    """Draw a grid of images, whose sizes may differ, in whole pixels so that class colours stay exact.

    Args:
        rows: one dict per row of `(H, W, 3)` uint8 images by title, with the same titles in all rows.
        captions: text below each row.
        legend: legend patches, see `class_patches`.
        colour_scale: colour scale, shown as a colour bar; None for no colour bar.
        colour_scale_label: label of the colour bar.
    """
    min_width = TILE_WIDTH if len(rows[0]) > 3 else WIDE_TILE_WIDTH
    tiles = [{title: fit_tile(tile, min_width) for title, tile in row.items()} for row in rows]
    width = max(sum(tile.shape[1] + TILE_GAP for tile in row.values()) - TILE_GAP for row in tiles)
    legend_lines, columns = _legend_lines(legend, width / DPI)
    footer_height = TILE_GAP + LINE_HEIGHT * (legend_lines + 2 * (colour_scale is not None))
    row_heights = [max(map(len, row.values())) + TILE_GAP + LINE_HEIGHT * bool(captions) for row in tiles]
    height = footer_height + LINE_HEIGHT + sum(row_heights)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    top = height - LINE_HEIGHT
    for row, row_height, caption in itertools.zip_longest(tiles, row_heights, captions, fillvalue=""):
        left = 0
        for title, tile in row.items():
            tile_height, tile_width = tile.shape[:2]
            axes = figure.add_axes(
                (left / width, (top - tile_height) / height, tile_width / width, tile_height / height)
            )
            axes.imshow(tile, aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="0.8", linewidth=0.5)
            axes.set_title(shorten(title, tile_width // 8) if row is tiles[0] else "", pad=4)
            left += tile_width + TILE_GAP
        top -= row_height
        figure.text(0, (top + TILE_GAP) / height, shorten(caption, width // 7), fontsize="small")
    if colour_scale is not None:
        bar = figure.add_axes(
            (
                LINE_HEIGHT / width,
                LINE_HEIGHT * (legend_lines + 1) / height,
                240 / width,
                0.5 * LINE_HEIGHT / height,
            )
        )
        figure.colorbar(colour_scale, cax=bar, orientation="horizontal").ax.tick_params(labelsize="small")
        bar.text(1.05, 0.5, colour_scale_label, transform=bar.transAxes, va="center", fontsize="small")
    if legend:
        figure.legend(handles=legend, loc="lower left", ncols=columns, fontsize="small", borderaxespad=0)
    return figure


def _legend_lines(handles: Sequence, inches: float) -> tuple[int, int]:
    """Return the number of lines and columns of a legend of this width."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(len(handles), int(inches / (0.6 + 0.08 * longest))))
    return -(-len(handles) // columns), columns


@styled
def label_regions(axes: Axes, label: np.ndarray, classes: Sequence[str], least: float = 0.02) -> None:
    """Write the class name at the innermost point of each connected region.

    Args:
        axes: axes that show the image.
        label: `(H, W)` class indices, 255 = ignore.
        classes: names of the classes.
        least: minimum size of a region, as a share of the image.
    """
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
    for index, _, mask in large_regions(label, least, connectivity=8):
        padded = np.pad(mask.astype(np.uint8), 1)  # regions end at the image border
        distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)
        row, column = np.unravel_index(distance.argmax(), distance.shape)
        side = ("left", "center", "right")[np.digitize(column / label.shape[1], (0.12, 0.88))]
        axes.text(
            column - 1, row - 1, shorten(classes[index], 14), ha=side, va="center", fontsize=8, bbox=box
        )


def large_regions(
    label: np.ndarray, least: float, connectivity: int
) -> Iterator[tuple[int, tuple[int, int, int, int], np.ndarray]]:
    """Find the large connected regions of each class, ignoring unlabelled pixels.

    Args:
        label: `(H, W)` class indices, 255 = ignore.
        least: minimum size of a region, as a share of the image.
        connectivity: 4 or 8 neighbours per pixel.

    Yields:
        Class index, bounding box (left, top, right, bottom; right and bottom exclusive) and `(H, W)` bool
        mask of each region.
    """
    for index in set(np.unique(label).tolist()) - {IGNORE_INDEX}:
        class_mask = (label == index).astype(np.uint8)
        _, components, stats, _ = cv2.connectedComponentsWithStats(class_mask, connectivity=connectivity)
        for component in 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= least * label.size):
            left, top, width, height = stats[component, :4].tolist()
            yield index, (left, top, left + width, top + height), components == component


def draw_marks(axes: Axes, x: np.ndarray, y: np.ndarray, filled: np.ndarray, colour: str | tuple) -> None:
    """Draw marks at the `(N,)` points x, y, with a white centre where `filled` is False."""
    for mask, face_colour in ((filled, colour), (~filled, "white")):
        axes.plot(x[mask], y[mask], "o", color=colour, markerfacecolor=face_colour)


def rows_height(count: int) -> float:
    """Return the height in inches of a figure with one row for each of `count` classes."""
    return 1.1 + (0.22 if count <= FEW else 0.15) * count


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label rows 0, 1, ... from the bottom with names, in a small font if there are more than 20."""
    size = "medium" if len(names) <= FEW else "x-small"
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], fontsize=size)
    axes.set_ylim(-0.7, len(names) - 0.3)


@styled
def plot_matrix(shares: pd.DataFrame, title: str) -> Figure:
    """Draw a matrix of shares 0..1 by class, with percentages in the cells if there are at most 20 classes.

    The axes are labelled with the names of the index and the columns of `shares`.
    """
    import seaborn  # imported here because it takes a second or two, which training should not wait for

    is_small = len(shares) <= FEW
    numbers = (100 * shares).map(lambda share: f"{share:.0f}" if share >= 0.5 else "") if is_small else None
    column_names, row_names = ([shorten(name) for name in names] for names in (shares.columns, shares.index))
    figure, axes = new_figure(rows_height(len(shares)) + 1.5)
    seaborn.heatmap(
        shares, vmin=0, vmax=1, cmap="Greys", ax=axes, xticklabels=column_names, yticklabels=row_names,
        annot=numbers, fmt="", annot_kws={"fontsize": "small"},
        cbar=not is_small, cbar_kws={"shrink": 0.4, "fraction": 0.03},
    )  # fmt: skip
    axes.tick_params(
        axis="x", length=0, labelsize="medium" if is_small else "xx-small", rotation=40 if is_small else 90
    )
    axes.tick_params(axis="y", length=0, labelsize="medium" if is_small else "x-small", rotation=0)
    add_title(figure, title)
    return figure


@styled
def plot_history(history: pd.DataFrame, epochs: int, terms: dict[str, float]) -> Figure:
    """Plot the total loss, the validation scores and each loss term by epoch.

    Args:
        history: the rows that `fit` has yielded so far.
        epochs: total number of epochs, which sets the range of the x-axis.
        terms: weight of each loss term by its name in `TERMS`; terms of weight 0 are left out.
    """
    labels = {name: TERMS[name] for name, weight in terms.items() if weight}
    weighted = [f"{terms[name]:g} ({label})" if terms[name] != 1 else label for name, label in labels.items()]
    titles = {"loss": f"Loss: {' + '.join(weighted)}", **labels}
    figure = Figure(figsize=(FIGURE_WIDTH, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    loss_axes, score_axes = above.subplots(1, 2)
    term_axes = below.subplots(1, len(labels), squeeze=False)[0]
    for axes, (name, title) in zip([loss_axes, *term_axes], titles.items(), strict=True):
        axes.plot(history.epoch, history[f"train_{name}"], color=TRAIN_COLOUR, marker=".", label="training")
        axes.plot(history.epoch, history[f"valid_{name}"], color=VALID_COLOUR, marker=".", label="validation")
        axes.set_title(title, fontsize="medium" if len(title) < 45 else "small")
    score_axes.plot(history.epoch, history.valid_pixel_acc, ".--", color=VALID_COLOUR)
    score_axes.plot(history.epoch, history.valid_miou, ".-", color=VALID_COLOUR)
    score_axes.set(title="No validation images", ylim=(0, 1))
    score_axes.set_ylabel("mIoU (solid), accuracy (dashed)", fontsize="small")
    if history.valid_miou.notna().any():
        best = history.loc[history.valid_miou.idxmax()]
        score_axes.set_title(f"Best validation mIoU: {best.valid_miou:.3f} at epoch {best.epoch:.0f}")
    for axes in (loss_axes, score_axes, *term_axes):
        axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    add_legend(figure, loss_axes.lines[:2])
    return figure


@styled
def plot_class_iou(table: pd.DataFrame, title: str, mean: float | None) -> Figure:
    """Plot the IoU by class, best first; a class that does not occur (NaN) has no bar.

    Args:
        table: one row per class with its `IoU` and optionally, all together, `low` and `high` (ends of the
            95 % interval), `images` (number of images with the class) and `support` (share of the pixels).
        mean: mIoU, drawn as a reference line; None for no line.
    """
    table = table.sort_values("IoU", ascending=False, kind="stable")[::-1]
    rows = np.arange(len(table))
    figure, axes = new_figure(rows_height(len(table)))
    axes.barh(rows, table.IoU, color=BAR_COLOUR)
    if mean is not None:
        axes.axvline(mean, color=GREY, linestyle=":", label=f"mIoU {mean:.3f}")
    names = table.index
    if "support" in table:
        names = [f"{shorten(name, 20)} ({count:.0f})" for name, count in table.images.items()]
        _draw_intervals(axes, table.low, table.high)
        axes.plot(
            chance_iou(table.support),
            rows,
            "|",
            color="#e8a06c",
            ms=9,
            mew=1.5,
            label="chance level",
        )
    for row, value in enumerate(table.IoU):
        text = "none seen" if np.isnan(value) else f"{value:.2f}"
        axes.text(1.03, row, text, va="center", color=GREY, fontsize="small")
    label_rows(axes, names)
    axes.set(xlabel="IoU", xlim=(0, 1))
    add_title(figure, title)
    add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _draw_intervals(axes: Axes, low: pd.Series, high: pd.Series) -> None:
    """Draw the interval of each row, with an arrowhead at an end that is cut at 0 or 1."""
    rows = np.arange(len(low))
    label = "95 % interval" if low.notna().any() else None
    axes.hlines(rows, low, high, color="black", linewidth=1.2, label=label)
    for marker, ends, limit in (("<", low, 0), (">", high, 1)):
        cut_rows = rows[ends == limit]
        if len(cut_rows):
            axes.plot(
                np.full(len(cut_rows), limit), cut_rows, marker, label=f"interval cut at {limit}",
                color="black", clip_on=False, markersize=5, linestyle="none",
            )  # fmt: skip


@styled
def plot_curves(histories: dict[str, list[pd.DataFrame]], title: str, colours: dict[str, tuple]) -> Figure:
    """Plot validation mIoU by epoch, with one line per run in the colour of its recipe."""
    figure, axes = new_figure(2.8)
    for name, runs in histories.items():
        for number, history in enumerate(runs):
            label = "_" if number else shorten(name, 60)  # one legend entry per recipe
            axes.plot(history.epoch, history.valid_miou, ".-", color=colours[name], linewidth=1, label=label)
    axes.set(title=title, xlabel="epoch", ylabel="validation mIoU", ylim=(0, None))
    add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def run_colours(names: Iterable[str]) -> dict[str, tuple]:
    """Assign a colour-blind-safe colour to each run or recipe; from the ninth on, all are grey.

    Call it once per notebook and pass the result to every figure, so that each recipe keeps its colour.
    """
    import seaborn  # imported here, see `plot_matrix`

    palette = seaborn.color_palette("colorblind")
    eight = [*palette[:7], palette[9]]  # the eighth is grey
    colours = itertools.chain(eight, itertools.repeat((0.6, 0.6, 0.6)))
    return dict(zip(names, colours, strict=False))


def show_small_figures() -> None:
    """Make the running notebook display and save figures as encoded by `small_png`."""
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """Encode a figure as a PNG with 16 levels per channel, which halves its size.

    Class colours stay exact, but the antialiased edges of text do not. The figure is saved with its margins.
    IPython would crop them and thereby shift images by fractions of a pixel.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pixels = cv2.imdecode(np.frombuffer(buffer.getbuffer(), np.uint8), cv2.IMREAD_COLOR)
    rounded = np.round(pixels / LEVEL_STEP).astype(np.uint8) * LEVEL_STEP
    return cv2.imencode(".png", rounded, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
