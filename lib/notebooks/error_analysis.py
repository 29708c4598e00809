"""Where and why a run is wrong: counts in one pass of the model, and their figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from lib import metrics
from lib.classes import IGNORE_INDEX
from lib.data import Samples
from lib.evaluation import predict
from lib.notebooks import plots
from lib.notebooks.plots import DEPTH
from lib.progress import progress_bar

CONFIDENCE_BINS = 15
SPLITS_IN_WORDS = {"train": "training", "valid": "validation", "test": "test"}
DISTANCE = "distance to a boundary (% of the width)"
REGION = "size of the region (% of the image)"
CONFUSED = " confused with "


def strata_edges(farthest_m: float) -> dict[str, tuple[float, ...]]:
    """Edges between the bins that pixels are told apart by; the first bin of the depth is missing depth."""
    depth = (0.001, *(round(share * farthest_m, 6) for share in (0.1, 0.2, 0.3, 0.4, 0.6)))
    return {DEPTH: depth, DISTANCE: (1, 2, 4, 8, 16), REGION: (0.3, 1, 3, 10, 30)}


def name_bins(name: str, edges: tuple[float, ...]) -> list[str]:
    """The bins of a stratum in words."""
    if name == DEPTH:
        return ["missing", *name_bins("", edges[1:])]
    return [f"{low:g}-{high:g}" for low, high in pairwise((0, *edges))] + [f"over {edges[-1]:g}"]


@dataclass(frozen=True)
class ErrorCounts:
    """What is known of a model's errors on N labelled images; rows of every `(C, C)` are the truth.

    Attributes:
        classes: names of the C classes.
        names: `(N,)` of the images.
        confusion: `(N, C, C)` pixels of each image.
        strata: `{name: (bins, C, C)}` for the bins between `edges`.
        calibration: `(C, 15, 3)` by predicted class and confidence: pixels, their summed confidence, correct ones.
        edges: see `strata_edges`; those of the depth follow the range that the network was made for.
    """

    classes: tuple[str, ...]
    names: np.ndarray
    confusion: np.ndarray
    strata: dict[str, np.ndarray]
    calibration: np.ndarray
    edges: dict[str, tuple[float, ...]]


def count_errors(model: nn.Module, samples: Samples | Iterable[Samples], batch_size: int = 8) -> ErrorCounts:
    """One pass of the model over labelled samples, or pieces of them, at their own size; only counts are kept.

    Raises:
        ValueError: samples without labels, no sample, or classes that are not the network's.
    """
    count, edges = len(model.config.classes), strata_edges(model.config.depth_range_m[1])
    names, confusion = [], []
    strata = {name: np.zeros((len(between) + 1, count, count), np.int64) for name, between in edges.items()}
    calibration = np.zeros((count, CONFIDENCE_BINS, 3))
    with progress_bar("predicting", len(samples)) as bar:
        for batch, predicted, confidence, *_ in predict(model, samples, batch_size, confidence=True):
            if batch.label is None:
                raise ValueError(
                    "split: these images have no labels, so errors can't be counted; use another split"
                )
            names.append(batch.names)
            confusion.append(metrics.confusion_counts(predicted, batch.label, count))
            images = zip(batch.label, batch.depth_or_missing, predicted, confidence, strict=True)
            for label, depth, named, how_sure in images:
                labelled = label != IGNORE_INDEX
                pair = label[labelled].astype(np.int64) * count + named[labelled]
                for name, bins in pixel_strata(label, depth, edges).items():
                    cells = np.bincount(bins[labelled] * count**2 + pair, minlength=strata[name].size)
                    strata[name] += cells.reshape(strata[name].shape)
                calibration += _count_confidence(label[labelled], named[labelled], how_sure[labelled], count)
            bar.update(len(batch))
    if not names:
        raise ValueError(
            "split: found no image; with validation none there are no validation images, use another split"
        )
    whole = map(np.concatenate, (names, confusion))
    return ErrorCounts(model.config.classes, *whole, strata, calibration, edges)


def _count_confidence(label: np.ndarray, named: np.ndarray, confidence: np.ndarray, count: int) -> np.ndarray:
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    cell = named.astype(np.int64) * CONFIDENCE_BINS + bins
    sums = [
        np.bincount(cell, weights, count * CONFIDENCE_BINS) for weights in (None, confidence, label == named)
    ]
    return np.stack(sums, -1).reshape(count, CONFIDENCE_BINS, 3)


def pixel_strata(
    label: np.ndarray, depth: np.ndarray, edges: dict[str, tuple[float, ...]]
) -> dict[str, np.ndarray]:
    """For each name in `edges` the bin of every pixel, `(H, W)` integers."""
    values = {
        DEPTH: depth / 1000,
        DISTANCE: 100 * boundary_distance(label),
        REGION: 100 * region_shares(label),
    }
    return {name: np.searchsorted(between, values[name], side="right") for name, between in edges.items()}


def boundary_distance(label: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest boundary between two classes, as a share of the width.

    Unlabelled pixels take the class of the nearest label first: the boundary runs in the middle of the
    slivers between segments, and where nothing is labelled on one side there is none.
    """
    label = metrics.fill_unlabelled(label)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))  # a pixel and its four neighbours
    inside = (cv2.erode(label, cross) == cv2.dilate(label, cross)).astype(np.uint8)
    if inside.all():
        return np.ones(label.shape, np.float32)
    return (cv2.distanceTransform(inside, cv2.DIST_L2, 5) + 0.5) / label.shape[1]


def region_shares(label: np.ndarray) -> np.ndarray:
    """Of each pixel, which share of the image its connected segment of one class takes."""
    shares = np.zeros(label.shape)
    for index in np.unique(label):
        _, segment, stats, _ = cv2.connectedComponentsWithStats((label == index).astype(np.uint8))
        stats[0, cv2.CC_STAT_AREA] = 0  # all other classes
        shares += stats[segment, cv2.CC_STAT_AREA] / label.size
    return shares


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


def score_strata(counts: np.ndarray) -> pd.DataFrame:
    """Share of the pixels, pixel accuracy and mIoU of each bin `(bins, C, C)`.

    The mIoU averages the classes that are in the bin's truth, or one stray pixel of another class would count
    as a whole class missed.
    """
    rows = []
    for bin_counts in counts:
        total, present = bin_counts.sum(), bin_counts.any(1)
        scores = (
            (np.trace(bin_counts) / total, metrics.iou(bin_counts)[present].mean())
            if total
            else (np.nan, np.nan)
        )
        rows.append((total / max(counts.sum(), 1), *scores))
    return pd.DataFrame(rows, columns=["pixels", "pixel accuracy", "mIoU"])


def calibration_error(calibration: np.ndarray) -> float:
    """Expected calibration error (ECE) of `(..., 15, 3)` counts; NaN without a pixel.

    The gap between confidence and accuracy, averaged over bins by their pixels (Guo et al., "On
    calibration of modern neural networks", ICML 2017).
    """
    pixels, confidence, right = np.moveaxis(calibration.reshape(-1, CONFIDENCE_BINS, 3).sum(0), -1, 0)
    return float(np.abs(confidence - right).sum() / pixels.sum()) if pixels.any() else np.nan


def describe_errors(errors: ErrorCounts, run: str, split: str) -> str:
    """The findings of error_analysis in words."""
    pooled, accuracy = errors.confusion.sum(0), metrics.image_accuracy(errors.confusion)
    edge, wrong = errors.strata[DISTANCE], pooled * ~np.eye(len(pooled), dtype=bool)
    truth, named = np.unravel_index(wrong.argmax(), wrong.shape)
    score, recall = metrics.pixel_accuracy(pooled), metrics.class_accuracy(pooled)
    least = np.nanargmin(recall)
    near = (edge[0].sum() - np.trace(edge[0])) / max(wrong.sum(), 1)
    return (
        f"In {len(errors.names)} {SPLITS_IN_WORDS[split]} images **{run}** names {score:.1%} of the pixels right "
        f"(mIoU {metrics.mean_truth_iou(pooled):.3f}). Its most frequent error is {errors.classes[truth]} confused with "
        f"{errors.classes[named]}, {wrong.max() / max(wrong.sum(), 1):.0%} of the wrong pixels; it "
        f"finds the smallest share of {errors.classes[least]}, {recall[least]:.0%}. Of all pixels "
        f"{edge[0].sum() / edge.sum():.0%} lie within 1 % of the image's width from a boundary, of the wrong ones "
        f"{near:.0%}. The network is "
        f"{_describe_gap(errors.calibration)}. The worst image is {errors.names[np.nanargmin(accuracy)]}, "
        f"{np.nanmin(accuracy):.0%} right."
    )


def _describe_gap(calibration: np.ndarray) -> str:
    pixels, confidence, right = calibration.sum((0, 1))
    gap = 100 * (confidence - right) / pixels
    over = "over" if gap > 0 else "under"
    return f"{over}-confident by {abs(gap):.1f} points (ECE {calibration_error(calibration):.3f})"


def plot_confusion(errors: ErrorCounts) -> Figure:
    """Of each true class (rows), the share that was given each name."""
    images = (errors.confusion.sum(2) > 0).sum(0)
    truth = [f"{name} ({count})" for name, count in zip(errors.classes, images, strict=True)]
    rows, columns = pd.Index(truth, name="truth (images)"), pd.Index(errors.classes, name="prediction")
    table = pd.DataFrame(errors.confusion.sum(0), rows, columns)
    return plots.plot_matrix(
        table.div(table.sum(axis=1), axis=0), "What each class was predicted as, in % of its pixels"
    )


@plots.styled
def plot_strata(errors: ErrorCounts) -> Figure:
    """Pixel accuracy and mIoU by depth, where it is known, distance to a boundary and size of the segment."""
    known = {name: counts for name, counts in errors.strata.items() if name != DEPTH or counts[1:].any()}
    figure, grid = plots.new_figure(3, 1, len(known), sharey=True, squeeze=False)
    for axes, (name, counts) in zip(grid[0], known.items(), strict=True):
        table = score_strata(counts)
        kept = table.pixels > 0
        table, bins = table[kept], np.array(name_bins(name, errors.edges[name]))[kept]
        axes.bar(bins, table.pixels, color="0.9", label="share of the pixels")
        axes.plot(bins, table["pixel accuracy"], color=plots.TRAIN_COLOUR, marker=".", label="pixel accuracy")
        axes.plot(bins, table["mIoU"], color=plots.VALID_COLOUR, marker=".", label="mIoU")
        axes.set(title=f"by {name}".replace(" (", "\n("), ylim=(0, 1))
        axes.tick_params(axis="x", labelsize="small", rotation=60)
    plots.add_legend(figure, grid[0, 0].get_legend_handles_labels()[0])
    return figure


@plots.styled
def plot_calibration(errors: ErrorCounts) -> Figure:
    """Reliability diagram of all classes together; by class, confidence minus accuracy."""
    pixels, confidence, right = np.moveaxis(errors.calibration.sum(0), -1, 0)
    used, colours = pixels > 0, plots.class_colours(errors.classes)
    by_class = pd.DataFrame(
        errors.calibration.sum(1), list(errors.classes), ["pixels", "confidence", "right"]
    )
    by_class = by_class[by_class.pixels > 0]
    gap = (100 * (by_class.confidence - by_class.right) / by_class.pixels).sort_values()
    figure, (diagram, bars) = plots.new_figure(max(3.4, plots.rows_height(len(gap))), 1, 2)
    edges = np.linspace(0, 1, CONFIDENCE_BINS + 1)
    diagram.stairs(pixels / pixels.sum(), edges, fill=True, color="0.9", label="share of the pixels")
    diagram.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
    diagram.plot(confidence[used] / pixels[used], right[used] / pixels[used], color=plots.VALID_COLOUR, marker=".",
                 label="this network")  # fmt: skip
    diagram.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    diagram.legend(loc="upper left")
    drawn = bars.barh(range(len(gap)), gap, color=[colours[name] for name in gap.index], **plots.EDGED)
    bars.bar_label(drawn, fmt="{:+.1f}", padding=2, fontsize="small", color=plots.GREY)
    bars.axvline(0, color=plots.GREY, linewidth=1)
    bars.margins(x=0.2)
    plots.label_rows(bars, gap.index)
    bars.set(title="by predicted class", xlabel="confidence minus accuracy (points)")
    plots.add_title(figure, f"The network is {_describe_gap(errors.calibration)}")
    return figure
