"""Figures from arrays: every function returns a `Figure`, none shows or saves it."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from lib.data import CLASS_NAMES, IGNORE_INDEX

FIGURES = Path(__file__).resolve().parents[1] / "figures"  # where notebooks save what the README shows

# One colour for each class in every figure, in the order of CLASS_NAMES: hues far apart for
# neighbours in a room, lightness spread so that they stay apart for colour-blind readers.
CLASS_COLOURS = (
    "#882255", "#ddcc77", "#f1f1e6", "#e69f00", "#8c6d46", "#44aa99", "#cc6677",
    "#aa4499", "#332288", "#117733", "#1a1a1a", "#bcc6d0", "#56b4e9",
)  # fmt: skip
IGNORE_COLOUR = "#ffffff"
TRAIN_COLOUR, VALID_COLOUR, GREY = "#999999", "#0072b2", "#666666"
WIDTH = 8  # inches, so that a figure fits a notebook
STYLE = {
    "figure.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": "medium", "legend.frameon": False,
    "image.interpolation": "nearest",
}  # fmt: skip


def show_small_figures() -> None:
    """Let the running notebook keep its figures as PNGs of 256 colours, a third of their size."""
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """A PNG of 256 colours, chosen by an octree, which keeps those that are rare."""
    picture, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    Image.open(picture).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(reduced, "PNG", optimize=True)
    return reduced.getvalue()


def plot_history(history: pd.DataFrame, epochs: int) -> Figure:
    """Loss and validation scores by epoch, over the whole span of `epochs` from the start."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        loss, score = figure.subplots(1, 2)
        loss.plot(history.epoch, history.train_loss, color=TRAIN_COLOUR, marker=".", label="training")
        loss.plot(history.epoch, history.valid_loss, color=VALID_COLOUR, marker=".", label="validation")
        loss.set(title="Loss", xlabel="epoch", xlim=(0.5, epochs + 0.5))
        loss.legend()
        score.plot(history.epoch, history.valid_pixel_acc, color=TRAIN_COLOUR, marker=".", label="pixel accuracy")
        score.plot(history.epoch, history.valid_miou, color=VALID_COLOUR, marker=".", label="mIoU")
        score.set(title="Nothing validates in this split", xlabel="epoch", xlim=(0.5, epochs + 0.5), ylim=(0, 1))
        if history.valid_miou.notna().any():
            best = history.loc[history.valid_miou.idxmax()]
            score.plot(best.epoch, best.valid_miou, "o", color=VALID_COLOUR)
            score.set_title(f"Best validation mIoU: {best.valid_miou:.3f} at epoch {best.epoch:.0f}")
        score.legend(loc="upper left")
    return figure


def plot_class_iou(iou: np.ndarray, name: str) -> Figure:
    """A bar for each class of the run of that name, best first; a class that does not occur (NaN) has none."""
    import seaborn  # here: it takes a second or two to load, and training should not wait for it

    table = pd.DataFrame({"class": CLASS_NAMES, "IoU": iou}).sort_values("IoU", ascending=False)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        palette = dict(zip(CLASS_NAMES, CLASS_COLOURS, strict=True))
        seaborn.barplot(
            table, x="class", y="IoU", hue="class", palette=palette, saturation=1, edgecolor=GREY, linewidth=0.5,
            legend=False, ax=axes,
        )  # fmt: skip
        for position, value in enumerate(table.IoU):
            text = "none\nseen" if np.isnan(value) else f"{value:.2f}"
            axes.text(position, np.nan_to_num(value) + 0.01, text, ha="center", color=GREY, fontsize="small")
        axes.set(xlabel="", ylabel="IoU", ylim=(0, 1))
        axes.tick_params(axis="x", labelsize="small")  # else long names touch
        if np.isfinite(iou).any():
            best, least = CLASS_NAMES[np.nanargmax(iou)], CLASS_NAMES[np.nanargmin(iou)]
            axes.set_title(f"{name}: {best} is learned best, {least} least")
    return figure


def plot_predictions(
    image: np.ndarray,
    depth: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    row_titles: list[str] | None = None,
    errors: bool = False,
) -> Figure:
    """Columns RGB, depth, truth, prediction and, if asked, errors; with a legend of the classes shown.

    Args:
        image: `(N, H, W, 3)` uint8, a row for each image.
        depth: `(N, H, W)` uint16 millimetres, 0 = missing (white).
        label: `(N, H, W)` uint8, 255 = ignore (white).
        prediction: `(N, H, W)` class indices.
        row_titles: written beside the rows.
        errors: add a column that shows wrong pixels in their predicted colour and nothing else.
    """
    rows, columns, (height, width) = len(image), 4 + errors, image.shape[1:3]
    depth_m = np.where(depth == 0, np.nan, depth / 1000)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH * rows * height / (columns * width) + 0.9), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, title in zip(grid[0], ("RGB", "depth (m)", "truth", "prediction", "errors"), strict=False):
            axes.set_title(title)
        for row in range(rows):
            grid[row, 0].imshow(image[row])
            shown = grid[row, 1].imshow(depth_m[row], cmap="viridis_r", vmin=0.5, vmax=np.nanmax(depth_m))
            grid[row, 2].imshow(colour_labels(label[row]))
            grid[row, 3].imshow(colour_labels(prediction[row]))
            if errors:
                grid[row, 4].imshow(_colour_errors(label[row], prediction[row]))
            if row_titles:
                grid[row, 0].set_ylabel(row_titles[row])
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="0.8", linewidth=0.5)
        figure.colorbar(shown, ax=grid[:, 1], location="bottom", shrink=0.8, aspect=30, pad=0.02)
        figure.legend(handles=class_patches(np.union1d(label, prediction)), loc="outside lower center", ncols=7)
    return figure


def _colour_errors(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    return colour_labels(np.where((label == prediction) | (label == IGNORE_INDEX), IGNORE_INDEX, prediction))


def plot_class_comparison(table: pd.DataFrame, title: str, published: tuple[str, ...] = ()) -> Figure:
    """IoU by class side by side: bars for up to three entries, dots for more.

    Args:
        table: `(C, entries)` IoU, a row for each class, a column for each run or published experiment.
        title: what the figure says.
        published: columns that are not runs of ours; drawn hatched or hollow.
    """
    order = table.mean(axis=1).sort_values(ascending=False).index
    labels = {name: f"{name}: mean {table[name].mean():.3f}" for name in table}
    colours = dict(zip(table, _colours(len(table.columns)), strict=True))
    offsets = np.linspace(-0.32, 0.32, 2 * len(labels) + 1)[1::2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.1 * len(labels)), layout="constrained")
        axes = figure.subplots()
        for offset, name in zip(offsets, table, strict=True):
            position, style = np.arange(len(order)) + offset, {"color": colours[name], "label": labels[name]}
            if len(labels) <= 3:
                hatch = "////" if name in published else None
                axes.bar(position, table[name][order], 0.64 / len(labels), hatch=hatch, edgecolor="white", **style)
            else:
                fill = "none" if name in published else colours[name]
                axes.plot(position, table[name][order], "o", markerfacecolor=fill, markersize=5, **style)
        for boundary in np.arange(len(order) - 1) + 0.5:
            axes.axvline(boundary, color="0.92", linewidth=0.8, zorder=0)
        axes.set(title=title, ylabel="IoU", ylim=(0, 1), xlim=(-0.5, len(order) - 0.5))
        axes.set_xticks(np.arange(len(order)), order, rotation=25, ha="right", rotation_mode="anchor")
        figure.legend(loc="outside lower center", ncols=min(len(labels), 3))
    return figure


def plot_differences(results: dict, baseline: str) -> Figure:
    """Difference to the baseline with 95 % intervals: the mIoU first, then each class.

    Args:
        results: `{run: PairedBootstrap of baseline and run}`; filled marks have p < 0.05 (Holm for classes).
        baseline: the run that all are compared to.
    """
    rows = ["mIoU", *CLASS_NAMES]
    offsets = np.linspace(0.3, -0.3, 2 * len(results) + 1)[1::2]
    colours = _colours(len(results) + 1)[1:]  # the first is the baseline's
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 0.9 * len(results)), layout="constrained")
        axes = figure.subplots()
        for offset, colour, (name, result) in zip(offsets, colours, results.items(), strict=True):
            middle = np.append(result.difference, result.class_difference)
            low, high = np.column_stack((result.interval, result.class_interval))
            clear = np.append(result.p_value, result.class_p_value) < 0.05
            position = -np.arange(len(rows)) + offset
            axes.hlines(position, low, high, color=colour, linewidth=1.5, label=name)
            axes.plot(middle[clear], position[clear], "o", color=colour)
            axes.plot(middle[~clear], position[~clear], "o", color=colour, markerfacecolor="white")
        axes.axvline(0, color=GREY, linewidth=1)
        axes.axhline(-0.5, color="0.85", linewidth=0.8)
        axes.set(title=f"Difference to {baseline}; filled: more than chance", xlabel="IoU difference, 95 % interval")
        axes.set_yticks(-np.arange(len(rows)), rows)
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.legend(loc="best")
    return figure


def plot_recipes(scores: pd.DataFrame) -> Figure:
    """mIoU by seed (rows) and recipe (columns): a dot for each run, a bar for the mean, runs of one seed joined."""
    colours = _colours(len(scores))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.5 * len(scores.columns)), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(scores.columns))
        for colour, (seed, by_recipe) in zip(colours, scores.iterrows(), strict=True):
            axes.plot(by_recipe, rows, ".-", color=colour, linewidth=0.8, markersize=9, label=f"seed {seed}")
        axes.plot(scores.mean(), rows, "|", color="black", markersize=20, label="mean")
        title = f"{scores.mean().idxmax()} has the highest mean" if scores.size else "No run is done"
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")  # names are long
        axes.set(xlabel="mIoU", ylim=(max(len(rows), 1) - 0.5, -0.5))
        axes.set_yticks(rows, scores.columns)
        if scores.size:
            figure.legend(loc="outside lower center", ncols=min(len(scores) + 1, 6))
    return figure


def plot_curves(histories: dict[str, pd.DataFrame], title: str) -> Figure:
    """Validation mIoU by epoch of several runs."""
    colours = _colours(len(histories))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        for colour, (name, history) in zip(colours, histories.items(), strict=True):
            axes.plot(history.epoch, history.valid_miou, marker=".", color=colour, label=name)
        axes.set(title=title, xlabel="epoch", ylabel="validation mIoU", ylim=(0, None))
        if histories:
            axes.legend(loc="lower right")
    return figure


def _colours(count: int) -> list[tuple[float, float, float]]:
    """That many colours for runs, apart for colour-blind readers."""
    import seaborn  # here, see `plot_class_iou`

    return seaborn.color_palette("colorblind", count)


def colour_labels(label: np.ndarray) -> np.ndarray:
    """Class indices, 255 = ignore, of any shape `(...)` as colours `(..., 3)` in 0..1."""
    colours = ListedColormap([*CLASS_COLOURS, IGNORE_COLOUR]).colors
    table = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    return table[np.where(label == IGNORE_INDEX, len(CLASS_NAMES), label)]


def class_patches(present: np.ndarray) -> list[Patch]:
    """Of a legend: the classes in an array of labels, and unlabelled if 255 is in it."""
    patches = [
        Patch(facecolor=CLASS_COLOURS[index], edgecolor=GREY, linewidth=0.5, label=CLASS_NAMES[index])
        for index in present
        if index != IGNORE_INDEX
    ]
    if IGNORE_INDEX in present:
        patches.append(Patch(facecolor=IGNORE_COLOUR, edgecolor=GREY, linewidth=0.5, label="unlabelled"))
    return patches
