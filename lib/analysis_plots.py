"""Figures of explore and error_analysis, of the same family as those of `plots`: arrays in, `Figure` out."""

import cv2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lib.analysis import (
    CONFIDENCE_BINS,
    DEPTH_STEPS_M,
    REGION,
    STRATA,
    SURE,
    DataCounts,
    ErrorCounts,
    Leakage,
    calibration_error,
    class_shares,
    depth_quantiles,
    score_strata,
    with_and_without,
)
from lib.data import CLASS_NAMES, IGNORE_INDEX, Samples
from lib.metrics import class_accuracy, image_accuracy
from lib.plots import CLASS_COLOURS, GREY, STYLE, TRAIN_COLOUR, VALID_COLOUR, WIDTH, class_patches, colour_labels

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


def plot_batch(stored: np.ndarray, image: np.ndarray, label: np.ndarray, title: str) -> Figure:
    """A column for each image of a batch: as it is stored, as it trains, its labels; what is left empty is white."""
    count, (height, width) = len(image), image.shape[1:3]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3 * WIDTH / count * height / width + 0.3), layout="constrained")
        grid = figure.subplots(3, count, squeeze=False)
        for row, (name, pictures) in enumerate(
            {"stored": stored, "as it trains": image, "labels": colour_labels(label)}.items()
        ):
            grid[row, 0].set_ylabel(name)
            for axes, picture in zip(grid[row], pictures, strict=True):
                axes.imshow(picture)
        _hide_frames(grid)
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
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


def plot_class_shares(counts: DataCounts) -> Figure:
    """By class on a log scale: the share of labelled pixels (bars), and of images (rings)."""
    shares = class_shares(counts)[::-1]
    found = shares[shares.pixels > 0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        low = 10 ** np.floor(np.log10(found.pixels.min()) - 0.1)
        axes.barh(shares.index, shares.pixels - low, left=low, color=[COLOUR[name] for name in shares.index], **EDGED)
        axes.plot(shares.images, shares.index, "o", color=GREY, markerfacecolor="white")
        for name, share in shares.pixels.items():
            axes.text(max(share, low) * 1.06, name, f"{share:.2%}" if share < 0.1 else f"{share:.1%}", va="center",
                      fontsize="small", color=GREY)  # fmt: skip
        axes.set(xscale="log", xlim=(low, 1.3))
        axes.set_xlabel("share of the labelled pixels (bars) and of the images (rings), log scale")
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        ratio = found.pixels.iloc[-1] / found.pixels.iloc[0]
        axes.set_title(f"{found.index[-1]} has {ratio:.0f} times as many pixels as {found.index[0]}")
    return figure


def plot_depth(counts: DataCounts) -> Figure:
    """The distribution of depth, of all pixels and of each class (5, 25, 50, 75 and 95 % below)."""
    marks, measured = (0.05, 0.25, 0.5, 0.75, 0.95), counts.depth.sum(0)[1:]
    quantiles = {
        name: depth_quantiles(histogram, marks)
        for name, histogram in zip(CLASS_NAMES, counts.depth, strict=False)
        if histogram[1:].any()
    }
    names = sorted(quantiles, key=lambda name: -quantiles[name][2])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        overall, by_class = figure.subplots(1, 2, width_ratios=(1, 1.3))
        overall.stairs(measured / measured.sum(), DEPTH_STEPS_M, fill=True, color=VALID_COLOUR)
        low, *_, high = depth_quantiles(counts.depth.sum(0), marks)
        overall.set(title=f"Nine in ten pixels: {low:.1f} to {high:.1f} m", xlabel="depth (m)", yticks=[], xlim=(0, 10))
        overall.spines["left"].set_visible(False)
        for row, name in enumerate(names):
            least, lower, middle, upper, most = quantiles[name]
            by_class.hlines(row, least, most, color=GREY, linewidth=1, zorder=0)
            by_class.barh(row, upper - lower, left=lower, height=0.7, color=COLOUR[name], **EDGED)
            by_class.plot([middle, middle], [row - 0.35, row + 0.35], color="white", linewidth=3)
            by_class.plot([middle, middle], [row - 0.35, row + 0.35], color="black", linewidth=1)
        by_class.set_yticks(range(len(names)), names)
        by_class.set_title(f"{names[-1]} is nearest, {names[0]} farthest")
        by_class.set_xlabel("depth (m): box half of the pixels, line nine in ten")
        by_class.set_xlim(0, None)
    return figure


def plot_missing(counts: DataCounts) -> Figure:
    """Where in the frame, and on which classes, depth was not measured."""
    total, shares = counts.depth[:, 0].sum() / counts.depth.sum(), class_shares(counts)["without depth"]
    shares = shares.dropna().sort_values()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        frame, by_class = figure.subplots(1, 2)
        shown = frame.imshow(counts.missing, cmap="Blues", vmin=0, vmax=max(counts.missing.max(), 0.01))
        figure.colorbar(shown, ax=frame, shrink=0.7, format=PercentFormatter(1, decimals=0))
        frame.set_title(f"{total:.1%} of the pixels have no depth")
        by_class.barh(shares.index, shares, color=[COLOUR[name] for name in shares.index], **EDGED)
        by_class.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        by_class.set(xlabel="share of the class's pixels", title=f"It is missing most often on {shares.index[-1]}")
        _hide_frames(frame)
    return figure


def plot_meetings(counts: DataCounts) -> Figure:
    """Of the neighbours of each class (rows), the share of each other class (columns)."""
    total = counts.meetings.sum(1, keepdims=True)
    shares = np.where(total > 0, counts.meetings / np.maximum(total, 1), np.nan)
    one, other = np.unravel_index(counts.meetings.argmax(), counts.meetings.shape)
    title = f"{CLASS_NAMES[one]} and {CLASS_NAMES[other]} meet most often; in % of what the row's class meets"
    return _plot_matrix(shares, title, "class", "meets")


def plot_confusion(confusion: np.ndarray) -> Figure:
    """Row-normalised confusion of `(..., C, C)` counts."""
    pooled = confusion.reshape(-1, *confusion.shape[-2:]).sum(0)
    total, recall = pooled.sum(1, keepdims=True), class_accuracy(pooled)
    shares = np.where(total > 0, pooled / np.maximum(total, 1), np.nan)
    best, least = CLASS_NAMES[np.nanargmax(recall)], CLASS_NAMES[np.nanargmin(recall)]
    title = f"Of {best} {np.nanmax(recall):.0%} is found, of {least} {np.nanmin(recall):.0%}; in % of the true class"
    return _plot_matrix(shares, title, "truth", "prediction")


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


def plot_places(counts: DataCounts) -> Figure:
    """Where in the frame each class lives: a map for each, dark where most of its pixels are."""
    order = np.argsort(-counts.places.sum((1, 2)), kind="stable")
    height = np.nan_to_num(counts.places / counts.places.sum((1, 2), keepdims=True).clip(1))
    middle = (height * np.linspace(0, 1, height.shape[1])[:, None]).sum((1, 2))
    middle = np.where(counts.places.any((1, 2)), middle, np.nan)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
        grid = figure.subplots(2, 7)
        for axes, index in zip(grid.flat, order, strict=False):
            axes.imshow(counts.places[index], cmap="Blues", vmin=0, vmax=max(counts.places[index].max(), 1))
            axes.set_title(CLASS_NAMES[index], fontsize="small")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=COLOUR[CLASS_NAMES[index]], linewidth=2)
        grid.flat[-1].set_visible(False)
        top, bottom = CLASS_NAMES[np.nanargmin(middle)], CLASS_NAMES[np.nanargmax(middle)]
        figure.suptitle(f"{top} lies highest in the frame, {bottom} lowest", x=0.01, ha="left", fontsize="medium")
    return figure


def plot_leakage(leakage: dict[str, Leakage], image: np.ndarray, pairs: int = 2) -> Figure:
    """How much the best match of each validation image resembles it, and the closest pairs of the first split."""
    first = next(iter(leakage.values()))
    closest = np.argsort(-first.similarity)[:pairs]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        curves, pictures = figure.subfigures(1, 2, width_ratios=(1, 1.1))
        axes = curves.subplots()
        for (split, leak), colour in zip(leakage.items(), ("#d55e00", VALID_COLOUR), strict=False):
            share = 1 - np.arange(len(leak.similarity)) / len(leak.similarity)
            axes.step(np.sort(leak.similarity), share, color=colour, where="pre", label=split)
        axes.axvline(first.threshold, color=GREY, linewidth=1, linestyle=":")
        axes.text(first.threshold, 0.97, " near copies", color=GREY, va="top")
        found = ", ".join(f"{split} {leak.near_copies / len(leak.valid):.0%}" for split, leak in leakage.items())
        axes.set(title=f"Near copies: {found}", ylim=(0, 1))
        axes.set(xlabel="similarity to the best match", ylabel="share of validation images above")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="lower left")
        grid = pictures.subplots(2, len(closest), squeeze=False)
        for column, chosen in enumerate(closest):
            grid[0, column].imshow(image[first.valid[chosen]])
            grid[1, column].imshow(image[first.match[chosen]])
        grid[0, 0].set_ylabel("validates")
        grid[1, 0].set_ylabel("trains")
        grid[0, 0].set_title(f"Closest pairs of {next(iter(leakage))}")
        _hide_frames(grid)
    return figure


def plot_strata(errors: ErrorCounts) -> Figure:
    """Accuracy and mIoU by depth, distance to a boundary and size of the segment, and the mIoU by region."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        grid = figure.subplots(2, 2)
        for axes, (name, counts) in zip(grid.flat, errors.strata.items(), strict=True):
            table = score_strata(counts)
            if name == REGION:
                _draw_region(axes, table["mIoU"].to_numpy().reshape(3, 3))
                continue
            kept = table.pixels > 0
            table, bins = table[kept], np.array(STRATA[name])[kept]
            axes.bar(bins, table.pixels, color="0.9", label="share of the pixels")
            axes.plot(bins, table["pixel accuracy"], color=TRAIN_COLOUR, marker=".", label="pixel accuracy")
            axes.plot(bins, table["mIoU"], color=VALID_COLOUR, marker=".", label="mIoU")
            common = table["mIoU"].to_numpy() * np.where(table.pixels < 0.01, np.nan, 1)
            best, least = np.nanargmax(common), np.nanargmin(common)
            axes.set(xlabel=name, ylim=(0, 1))
            axes.set_title(f"mIoU {common[best]:.2f} at {bins[best]}, {common[least]:.2f} at {bins[least]}")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_region(axes: Axes, miou: np.ndarray) -> None:
    axes.imshow(miou, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), score in np.ndenumerate(miou):
        colour = "white" if score > 0.55 else "black"
        axes.text(column, row, f"{score:.2f}", ha="center", va="center", color=colour)
    names = STRATA[REGION]
    axes.set_title(f"mIoU: best {names[np.nanargmax(miou)]}, worst {names[np.nanargmin(miou)]}")
    axes.set(xticks=[], yticks=[], xlabel=REGION)
    axes.spines[:].set_visible(False)


def plot_calibration(calibration: np.ndarray) -> Figure:
    """Reliability diagram of all classes together; the gap between confidence and accuracy of each class."""
    pixels, confidence, right = np.moveaxis(calibration.sum(0), -1, 0)
    used = pixels > 0
    error = pd.Series([calibration_error(one) for one in calibration], index=CLASS_NAMES).dropna().sort_values()
    sums = calibration.sum(1)
    over = {name: total[1] >= total[2] for name, total in zip(CLASS_NAMES, sums, strict=True)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        diagram, by_class = figure.subplots(1, 2)
        edges = np.linspace(0, 1, CONFIDENCE_BINS + 1)
        diagram.stairs(pixels / pixels.sum(), edges, fill=True, color="0.9", label="share of the pixels")
        diagram.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="as right as sure")
        diagram.plot(confidence[used] / pixels[used], right[used] / pixels[used], color=VALID_COLOUR, marker=".",
                     label="this network")  # fmt: skip
        gap = (confidence.sum() - right.sum()) / pixels.sum()
        diagram.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        diagram.set_title(
            f"{abs(gap):.3f} {'more' if gap > 0 else 'less'} sure than right; ECE {calibration_error(calibration):.3f}"
        )
        diagram.legend(loc="upper left")
        by_class.barh(error.index, error, color=[COLOUR[name] for name in error.index], **EDGED)
        for row, (name, value) in enumerate(error.items()):
            by_class.text(
                value, row, " too sure" if over[name] else " too doubtful", va="center", fontsize="small", color=GREY
            )
        by_class.set(title=f"Least to be trusted: {error.index[-1]}", xlabel="ECE of the pixels named so")
        by_class.set_xlim(0, 1.3 * error.max())
    return figure


def plot_worst(samples: Samples, predicted: np.ndarray, confidence: np.ndarray, row_titles: list[str]) -> Figure:
    """A row for each sample: RGB, truth, prediction, errors in the colour named, pale where the network doubted."""
    count, (height, width) = len(samples), samples.size
    wrong = (samples.label != IGNORE_INDEX) & (samples.label != predicted)
    strength = np.where(wrong, np.where(confidence >= SURE, 1.0, 0.35), 0)[..., None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH / 4 * count * height / width + 0.9), layout="constrained")
        grid = figure.subplots(count, 4, squeeze=False)
        for row in range(count):
            grid[row, 0].imshow(samples.image[row])
            grid[row, 1].imshow(colour_labels(samples.label[row]))
            grid[row, 2].imshow(colour_labels(predicted[row]))
            grid[row, 3].imshow(strength[row] * colour_labels(predicted[row]) + (1 - strength[row]) * 0.93)
            grid[row, 0].set_ylabel(row_titles[row])
        for axes, title in zip(grid[0], ("RGB", "truth", "prediction", f"errors, solid if sure ({SURE})"), strict=True):
            axes.set_title(title)
        _hide_frames(grid)
        figure.legend(handles=class_patches(np.union1d(samples.label, predicted)), loc="outside lower center", ncols=7)
    return figure


def plot_image_scores(confusion: np.ndarray) -> Figure:
    """Accuracy of each image against its number of classes; of images with and without each class."""
    accuracy, truth = image_accuracy(confusion), confusion.sum(2)
    classes = (truth > 0.01 * truth.sum(1, keepdims=True)).sum(1)
    table = with_and_without(confusion).dropna()
    table = table.iloc[np.argsort(table["with"] - table["without"])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        scatter, by_class = figure.subplots(1, 2)
        jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(classes))
        scatter.plot(classes + jitter, accuracy, ".", color=VALID_COLOUR, alpha=0.6)
        scatter.set(xlabel="classes in the image", ylabel="pixel accuracy", ylim=(0, 1))
        if np.ptp(classes):  # else there is no correlation
            correlation = pd.Series(classes).corr(pd.Series(accuracy), method="spearman")
            effect = "more" if correlation < -0.2 else "fewer" if correlation > 0.2 else "as many"
            scatter.set_title(f"More classes, {effect} errors (rank correlation {correlation:+.2f})")
        rows = np.arange(len(table))
        by_class.hlines(rows, table["without"], table["with"], color="0.8", zorder=0)
        by_class.plot(table["without"], rows, "o", color=GREY, markerfacecolor="white", label="images without it")
        by_class.scatter(table["with"], rows, color=[COLOUR[name] for name in table.index], edgecolor=GREY, zorder=2,
                         label="images with it")  # fmt: skip
        by_class.set_yticks(rows, table.index)
        by_class.set(xlabel="mean pixel accuracy", title="Every class is in every image")
        if len(table):
            by_class.set_title(f"Images with {table.index[0]} are harder than the others")
        figure.legend(loc="outside lower right", ncols=2)
    return figure
