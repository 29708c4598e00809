"""Figures from arrays: every function returns a `Figure`, none shows or saves it."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lib.classes import CLASS_NAMES, IGNORE_INDEX
from lib.data.samples import Samples

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


COLOUR = dict(zip(CLASS_NAMES, CLASS_COLOURS, strict=True))
EDGED = {"edgecolor": GREY, "linewidth": 0.5}  # so that the pale classes stand out from white
LAYERS = ("labels", "depth", "RGB")


def plot_samples(samples: Samples) -> Figure:
    """A row for each sample: RGB, depth with its scale, labels over RGB with their names."""
    count, (height, width) = len(samples), samples.size
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH / 3 * count * height / width + 0.7), layout="constrained")
        grid = figure.subplots(count, 3, squeeze=False)
        for row, axes in enumerate(grid):
            axes[0].imshow(samples.image[row])
            shown = axes[1].imshow(_depth_m(samples.depth[row]), cmap="viridis_r", vmin=0.5, vmax=_farthest(samples))
            axes[2].imshow(blend_labels(samples.image[row], samples.label[row], 0.65))
            write_names(axes[2], samples.label[row])
            axes[0].set_ylabel(samples.names[row])
        for axes, title in zip(grid[0], ("RGB", "depth (m)", "labels"), strict=True):
            axes.set_title(title)
        _hide_frames(grid)
        figure.colorbar(shown, ax=grid, location="bottom", shrink=0.3, aspect=30, pad=0.02)
    return figure


def plot_sample(samples: Samples, index: int, layer: str = "labels", opacity: float = 0.6, only: str = "all") -> Figure:
    """One sample large: a layer of `LAYERS` over RGB, the labels of all classes or of only one."""
    image, (height, width) = samples.image[index], samples.size
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 * WIDTH, 0.55 * WIDTH * height / width + 0.3), layout="constrained")
        axes = figure.subplots()
        axes.imshow(image)
        if layer == "depth":
            shown = axes.imshow(
                _depth_m(samples.depth[index]), cmap="viridis_r", vmin=0.5, vmax=_farthest(samples), alpha=opacity
            )
            figure.colorbar(shown, ax=axes, label="m")
        elif layer == "labels":
            label = samples.label[index]
            if only != "all":
                label = np.where(label == CLASS_NAMES.index(only), label, IGNORE_INDEX)
            axes.imshow(blend_labels(image, label, opacity))
            write_names(axes, label)
            shown = np.unique(label[label != IGNORE_INDEX])
            figure.legend(handles=class_patches(shown), loc="outside right center")
        axes.set_title(f"{samples.names[index]}: {layer}" + (f", only {only}" if only != "all" else ""))
        _hide_frames(axes)
    return figure


def blend_labels(image: np.ndarray, label: np.ndarray, opacity: float) -> np.ndarray:
    """Class colours over RGB `(H, W, 3)`, 0..1; unlabelled pixels keep theirs."""
    weight = np.where(label == IGNORE_INDEX, 0, opacity)[..., None]
    return weight * colour_labels(label) + (1 - weight) * image / 255


def write_names(axes: Axes, label: np.ndarray, least: float = 0.012) -> None:
    """The class's name in the middle of each segment that takes 1.2 % of the image or more."""
    for index in np.unique(label[label != IGNORE_INDEX]):
        # with a rim, so that a segment ends where the picture does
        mask = np.pad((label == index).astype(np.uint8), 1)
        count, segment, stats, _ = cv2.connectedComponentsWithStats(mask)
        for number in range(1, count):
            if stats[number, cv2.CC_STAT_AREA] >= least * label.size:
                room = cv2.distanceTransform((segment == number).astype(np.uint8), cv2.DIST_L2, 5)
                row, column = np.unravel_index(room.argmax(), room.shape)
                box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
                axes.text(
                    column - 1, row - 1, CLASS_NAMES[index], ha="center", va="center", fontsize=7, bbox=box,
                    clip_on=True,
                )  # fmt: skip


def _depth_m(depth: np.ndarray) -> np.ndarray:
    return np.where(depth == 0, np.nan, depth / 1000)


def _farthest(samples: Samples) -> float:
    return float(np.percentile(samples.depth[:: len(samples) // 50 + 1], 99.5)) / 1000


def _hide_frames(grid: np.ndarray | Axes) -> None:
    for axes in np.ravel(grid):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _plot_matrix(shares: np.ndarray, title: str, rows: str, columns: str) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.66 * WIDTH), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.55 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize="small")
        axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
        axes.set(title=title, ylabel=rows, xlabel=columns)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure
