"""Where and why a run is wrong: counts in one pass of the model, and their figures."""

from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lib.classes import CLASS_NAMES, IGNORE_INDEX
from lib.data.samples import Samples
from lib.evaluation import predict_confidence
from lib.metrics import class_accuracy, fill_unlabelled, image_accuracy, iou, mean_iou, pixel_accuracy
from lib.notebook import progress_bar
from lib.plots import (
    COLOUR,
    EDGED,
    GREY,
    STYLE,
    TRAIN_COLOUR,
    VALID_COLOUR,
    WIDTH,
    _hide_frames,
    _plot_matrix,
    class_patches,
    colour_labels,
)

CLASSES = len(CLASS_NAMES)
CONFIDENCE_BINS = 15
SURE = 0.9  # the confidence from which the network counts as sure
# pixels are told apart by these edges
EDGES = {
    "depth (m)": (0.001, 1, 2, 3, 4, 6),
    "distance to a boundary (% of the width)": (1, 2, 4, 8, 16),
    "size of the segment (% of the image)": (0.3, 1, 3, 10, 30),
}
DEPTH, DISTANCE, SEGMENT = EDGES
REGION = "region of the image"
IN_WORDS = {
    DEPTH: ("at {} m", "at {} m"),
    DISTANCE: ("at {} % of the width from a boundary", "at {} %"),
    SEGMENT: ("in segments of {} % of the image", "of {} %"),
}
STRATA = {
    DEPTH: ("missing", "0-1", "1-2", "2-3", "3-4", "4-6", "over 6"),
    DISTANCE: ("0-1", "1-2", "2-4", "4-8", "8-16", "over 16"),
    SEGMENT: ("0-0.3", "0.3-1", "1-3", "3-10", "10-30", "over 30"),
    REGION: tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")),
}


def _cells(size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """The cell that each pixel of `(height, width)` belongs to."""
    row, column = (np.arange(length) * count // length for length, count in zip(size, cells, strict=True))
    return row[:, None] * cells[1] + column


def _joint_counts(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount((first * shape[1] + second).ravel(), minlength=shape[0] * shape[1]).reshape(shape)


@dataclass(frozen=True)
class ErrorCounts:
    """What is known of a model's errors on labelled images; rows of every `(C, C)` are the truth.

    Attributes:
        confusion: `(N, C, C)` pixels of each image.
        sure: `(N, C, C)` of them those with a confidence of `SURE` or more.
        strata: `{name: (bins, C, C)}` for the bins named in `STRATA`.
        calibration: `(C, 15, 3)` by class named and confidence: pixels, their summed confidence, right ones.
    """

    confusion: np.ndarray
    sure: np.ndarray
    strata: dict[str, np.ndarray]
    calibration: np.ndarray


def count_errors(
    model: nn.Module, samples: Samples, size: tuple[int, int], inputs: str, depth_encoding: str, batch_size: int
) -> ErrorCounts:
    """One pass of the model over labelled samples at their own size; it works at `size`.

    Raises:
        ValueError: samples without labels, or no sample.
    """
    if samples.label is None:
        raise ValueError("part: these images have no labels, so errors can't be counted; use part valid or train")
    confusion = np.zeros((2, len(samples), CLASSES, CLASSES), np.int64)
    strata = {name: np.zeros((len(bins), CLASSES, CLASSES), np.int64) for name, bins in STRATA.items()}
    calibration, index = np.zeros((CLASSES, CONFIDENCE_BINS, 3)), 0
    with progress_bar("predicting", len(samples)) as bar:
        for predicted, confidence in predict_confidence(model, samples, size, inputs, depth_encoding, batch_size):
            for named, how_sure in zip(predicted, confidence, strict=True):
                label, labelled = samples.label[index], samples.label[index] != IGNORE_INDEX
                pair = label[labelled].astype(np.int64) * CLASSES + named[labelled]
                sure = (how_sure[labelled] >= SURE).astype(np.int64)
                doubtful_and_sure = _joint_counts(sure, pair, (2, CLASSES**2)).reshape(2, CLASSES, CLASSES)
                confusion[:, index] = doubtful_and_sure.sum(0), doubtful_and_sure[1]
                for name, bins in pixel_strata(label, samples.depth[index]).items():
                    counts = strata[name]
                    counts += _joint_counts(bins[labelled], pair, (len(counts), CLASSES**2)).reshape(counts.shape)
                calibration += _count_confidence(label[labelled], named[labelled], how_sure[labelled])
                index += 1
            bar.update(len(predicted))
    return ErrorCounts(*confusion, strata, calibration)


def _count_confidence(label: np.ndarray, named: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    cell = named.astype(np.int64) * CONFIDENCE_BINS + bins
    weights = (None, confidence, label == named)
    sums = [np.bincount(cell, weight, CLASSES * CONFIDENCE_BINS) for weight in weights]
    return np.stack(sums, -1).reshape(CLASSES, CONFIDENCE_BINS, 3)


def pixel_strata(label: np.ndarray, depth: np.ndarray) -> dict[str, np.ndarray]:
    """For each name in `STRATA` the bin of every pixel, `(H, W)` integers."""
    values = {DEPTH: depth / 1000, DISTANCE: 100 * boundary_distance(label), SEGMENT: 100 * segment_shares(label)}
    bins = {name: np.searchsorted(EDGES[name], value, side="right") for name, value in values.items()}
    return bins | {REGION: _cells(label.shape, (3, 3))}


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest boundary between two classes, as a share of the width.

    Unlabelled pixels take the class of the nearest label first: the boundary runs in the middle of the
    slivers between segments, and where nothing is labelled on one side there is none.
    """
    label = fill_unlabelled(label)
    inside = np.ones(label.shape, np.uint8)
    across, down = label[:, 1:] == label[:, :-1], label[1:] == label[:-1]
    for half, same in ((inside[:, 1:], across), (inside[:, :-1], across), (inside[1:], down), (inside[:-1], down)):
        half &= same
    if inside.all():
        return np.ones(label.shape, np.float32)
    return (cv2.distanceTransform(inside, cv2.DIST_L2, 5) + 0.5) / label.shape[1]


def segment_shares(label: np.ndarray) -> np.ndarray:
    """Of each pixel, which share of the image its connected segment of one class takes."""
    shares = np.zeros(label.shape)
    for index in np.unique(label):
        _, segment, stats, _ = cv2.connectedComponentsWithStats((label == index).astype(np.uint8))
        stats[0, cv2.CC_STAT_AREA] = 0  # all other classes
        shares += stats[segment, cv2.CC_STAT_AREA] / label.size
    return shares


def score_strata(counts: np.ndarray) -> pd.DataFrame:
    """Share of the pixels, pixel accuracy and mIoU of each bin `(bins, C, C)`.

    The mIoU averages the classes that are in the bin's truth, or one stray pixel of another class would count
    as a whole class missed.
    """
    rows = []
    for bin_counts in counts:
        total, present = bin_counts.sum(), bin_counts.any(1)
        scores = (np.trace(bin_counts) / total, iou(bin_counts)[present].mean()) if total else (np.nan, np.nan)
        rows.append((total / max(counts.sum(), 1), *scores))
    return pd.DataFrame(rows, columns=["pixels", "pixel accuracy", "mIoU"])


def top_confusions(confusion: np.ndarray, count: int) -> pd.DataFrame:
    """The most frequent errors, with their share of the true class's pixels and of all errors."""
    pooled = confusion.reshape(-1, CLASSES, CLASSES).sum(0)
    wrong = pooled * ~np.eye(CLASSES, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    truth, named = np.unravel_index(order, wrong.shape)
    return pd.DataFrame({
        "truth": np.array(CLASS_NAMES)[truth],
        "named": np.array(CLASS_NAMES)[named],
        "of the class": wrong[truth, named] / np.maximum(pooled.sum(1)[truth], 1),
        "of all errors": wrong[truth, named] / max(wrong.sum(), 1),
    })  # fmt: skip


def calibration_error(calibration: np.ndarray) -> float:
    """Expected calibration error (ECE) of `(..., 15, 3)` counts; NaN without a pixel.

    The gap between confidence and accuracy, averaged over bins by their pixels (Guo et al., "On
    calibration of modern neural networks", ICML 2017).
    """
    pixels, confidence, right = np.moveaxis(calibration.reshape(-1, CONFIDENCE_BINS, 3).sum(0), -1, 0)
    return float(np.abs(confidence - right).sum() / pixels.sum()) if pixels.any() else np.nan


def with_and_without(confusion: np.ndarray, least: float = 0.01) -> pd.DataFrame:
    """Mean pixel accuracy of the images in which a class takes 1 % of the labelled pixels, and of the others."""
    accuracy, truth = image_accuracy(confusion), confusion.sum(2)
    holds = truth > least * truth.sum(1, keepdims=True)
    rows = [
        [accuracy[chosen].mean() if chosen.any() else np.nan for chosen in (column, ~column & (truth.sum(1) > 0))]
        for column in holds.T
    ]
    return pd.DataFrame(rows, index=list(CLASS_NAMES), columns=["with", "without"])


def describe_confusions(confusion: np.ndarray, count: int = 5) -> str:
    """The most frequent errors as a list."""
    return "\n".join(
        f"- {row.truth} taken for {row.named}: {row[3]:.0%} of its pixels, {row[4]:.0%} of the errors"
        for row in top_confusions(confusion, count).itertuples(name="Row")
    )


def describe_sure_errors(errors: ErrorCounts) -> str:
    """How often the network is sure and wrong, and with what."""
    return (
        f"It is sure of {errors.sure.sum() / errors.confusion.sum():.0%} of the pixels. {_sure_and_wrong(errors)} "
        f"Of those it is sure of, most often:\n\n{describe_confusions(errors.sure)}"
    )


def _sure_and_wrong(errors: ErrorCounts) -> str:
    wrong, share = _wrong(errors.sure), _wrong(errors.sure) / max(errors.sure.sum(), 1)
    return (
        f"Where it is sure, {share:.1%} are wrong, and these are {wrong / max(_wrong(errors.confusion), 1):.1%} of its "
        "errors."
    )


def _wrong(confusion: np.ndarray) -> int:
    pooled = confusion.reshape(-1, CLASSES, CLASSES).sum(0)
    return int(pooled.sum() - np.trace(pooled))


def describe_errors(errors: ErrorCounts, names: np.ndarray, run: str, part: str) -> str:
    """The findings of error_analysis in words."""
    pooled, accuracy = errors.confusion.sum(0), image_accuracy(errors.confusion)
    recall, first, edge = class_accuracy(pooled), top_confusions(pooled, 1).iloc[0], errors.strata[DISTANCE]
    gap = errors.calibration[..., 1].sum() / pooled.sum() - pixel_accuracy(pooled)
    return (
        f"**{run}** names {pixel_accuracy(pooled):.1%} of the labelled pixels of {len(names)} {part} images right "
        f"(mIoU {mean_iou(pooled):.3f}). Most often it takes {first.truth} for {first.named}, "
        f"{first['of all errors']:.0%} of its errors; least it finds of {CLASS_NAMES[np.nanargmin(recall)]} "
        f"({np.nanmin(recall):.0%} of the pixels). Within 1 % of the width from a boundary lie "
        f"{edge[0].sum() / edge.sum():.0%} of the pixels and {_wrong(edge[0]) / max(_wrong(edge), 1):.0%} of the "
        f"errors. Pixel accuracy goes {', '.join(_extremes(errors, name) for name in IN_WORDS)}. On average the "
        f"network is {abs(gap):.3f} {'more' if gap > 0 else 'less'} sure than right (ECE "
        f"{calibration_error(errors.calibration):.3f}). {_sure_and_wrong(errors)} The worst image is "
        f"{names[np.nanargmin(accuracy)]}, {np.nanmin(accuracy):.0%} right."
    )


def _extremes(errors: ErrorCounts, name: str) -> str:
    """Where the accuracy is lowest and highest, among bins with 1 % of the pixels or more."""
    table = score_strata(errors.strata[name]).set_index(np.array(STRATA[name]))
    accuracy = table["pixel accuracy"][table.pixels >= 0.01]
    least, best = IN_WORDS[name]
    return (
        f"from {accuracy.min():.2f} {least.format(accuracy.idxmin())} to {accuracy.max():.2f} "
        f"{best.format(accuracy.idxmax())}"
    )


def plot_confusion(confusion: np.ndarray) -> Figure:
    """Row-normalised confusion of `(..., C, C)` counts."""
    pooled = confusion.reshape(-1, *confusion.shape[-2:]).sum(0)
    total, recall = pooled.sum(1, keepdims=True), class_accuracy(pooled)
    shares = np.where(total > 0, pooled / np.maximum(total, 1), np.nan)
    best, least = CLASS_NAMES[np.nanargmax(recall)], CLASS_NAMES[np.nanargmin(recall)]
    title = f"Of {best} {np.nanmax(recall):.0%} is found, of {least} {np.nanmin(recall):.0%}; in % of the true class"
    return _plot_matrix(shares, title, "truth", "prediction")


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
