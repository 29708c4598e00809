"""Error analysis: count the errors of a run in one pass of the model and plot the counts."""

import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import nn

from lib import metrics
from lib.classes import IGNORE_INDEX
from lib.data import Samples, Split
from lib.evaluation import Predicted, predict
from lib.metrics import DEPTH, DISTANCE, REGION, strata_counts, strata_edges
from lib.notebooks import plots, style
from lib.notebooks.browse import CONFUSED, rank_confusions
from lib.notebooks.plots import percent
from lib.runs.scoring import with_progress

CONFIDENCE_BINS = 15
NO_LABELS = "split: these images have no labels, so errors can't be counted; use another split"
SPLITS_IN_WORDS = {"train": "training", "valid": "validation", "test": "test"}


def name_bins(name: str, edges: tuple[float, ...]) -> list[str]:
    """Return a label for each bin of a stratum, such as `1-2`, `over 16` or `missing`."""
    if name == DEPTH:
        return ["missing", *name_bins("", edges[1:])]
    return [f"{low:g}-{high:g}" for low, high in pairwise((0, *edges))] + [f"over {edges[-1]:g}"]


@dataclass(frozen=True)
class ErrorCounts:
    """Error counts of a model on N labelled images.

    In every `(C, C)` confusion matrix, rows are the ground truth.

    Attributes:
        classes: names of the C classes.
        names: `(N,)` image names.
        confusion: `(N, C, C)` confusion matrix of each image, in pixels.
        strata: `{name: (bins, C, C)}` confusion matrices of the bins that `edges` separate.
        calibration: `(15, 3)` by confidence bin: pixels, sum of their confidence, correct pixels.
        confidence: `(N,)` mean confidence of each image, over all its pixels, also unlabelled ones.
        depth_error: `(N,)` mean relative error of the depth head in each image; NaN without a depth head or
            measured depth.
        edges: bin edges by stratum, see `strata_edges`; the depth edges depend on the network's depth range.
    """

    classes: tuple[str, ...]
    names: np.ndarray
    confusion: np.ndarray
    strata: dict[str, np.ndarray]
    calibration: np.ndarray
    confidence: np.ndarray
    depth_error: np.ndarray
    edges: dict[str, tuple[float, ...]]


def count_errors(model: nn.Module, samples: Samples | Split, batch_size: int = 8) -> ErrorCounts:
    """Predict labelled samples in one pass and count the errors at label resolution.

    Only the counts are kept in memory.

    Raises:
        ValueError: there are no samples, no pixel is labelled, or the classes differ from the network's.
    """
    count = len(model.config.classes)
    edges = strata_edges(model.config.depth_range_m[1])
    strata = {name: np.zeros((len(bounds) + 1, count, count), np.int64) for name, bounds in edges.items()}
    calibration = np.zeros((CONFIDENCE_BINS, 3))
    results = []
    for batch in with_progress(
        "predicting", len(samples), predict(model, samples, batch_size, confidence=True)
    ):
        if batch.samples.label is None:
            raise ValueError(NO_LABELS)
        confusion = metrics.confusion_counts(batch.labels, batch.samples.label, count)
        mean_confidence = batch.confidence.mean((1, 2))
        results.append((batch.samples.names, confusion, mean_confidence, _depth_errors(batch)))
        _count_pixels(batch, strata, calibration, edges)
    if not results:
        raise ValueError(
            "split: found no image; with validation none there are no validation images, use another split"
        )
    names, confusion, confidence, depth_error = map(np.concatenate, zip(*results, strict=True))
    if not confusion.any():
        raise ValueError(NO_LABELS)
    return ErrorCounts(
        model.config.classes, names, confusion, strata, calibration, confidence, depth_error, edges
    )


def _count_pixels(batch: Predicted, strata: dict, calibration: np.ndarray, edges: dict) -> None:
    """Add the labelled pixels of a batch to `strata` and `calibration`."""
    count = len(batch.samples.classes)
    for label, depth, predicted, confidence in zip(
        batch.samples.label, batch.samples.depth_or_missing, batch.labels, batch.confidence, strict=True
    ):
        for name, counts in strata_counts(predicted, label, depth, count, edges).items():
            strata[name] += counts
        labelled = label != IGNORE_INDEX
        labelled_confidence = confidence[labelled]
        bins = np.minimum((labelled_confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        for column, weights in enumerate((None, labelled_confidence, (label == predicted)[labelled])):
            calibration[:, column] += np.bincount(bins, weights, CONFIDENCE_BINS)


def _depth_errors(batch: Predicted) -> np.ndarray:
    """Return the `(B,)` mean relative depth errors; NaN without measured depth or a depth head."""
    if batch.depth_m is None:
        return np.full(len(batch.samples), np.nan)
    images = zip(
        batch.depth_m, batch.samples.depth_or_missing / 1000, batch.samples.measured_depth, strict=True
    )
    return np.array([metrics.depth_scores(metrics.depth_sums(*image))["abs_rel"] for image in images])


def show_confusions(errors: ErrorCounts, count: int = 10) -> Styler:
    """Tabulate the most costly confusions, each with the code that shows its images in the browser."""
    table = rank_confusions(errors.confusion, errors.classes).head(count)
    table["open"] = [
        f"browser.choose({json.dumps(confusion, ensure_ascii=False)})" for confusion in table.index
    ]
    formats = {"cost": "{:.4f}", "pixels": "{:,}", "share": lambda share: percent(share, 1)}
    return style(table).format(formats).set_properties(subset=["open"], **{"font-family": "monospace"})


def score_strata(counts: np.ndarray) -> pd.DataFrame:
    """Tabulate pixel share, pixel accuracy and mIoU of each bin, from `(bins, C, C)` confusion matrices.

    The mIoU averages the classes in the bin's ground truth; otherwise a single pixel predicted as another
    class would add an IoU of 0 to the mean. Scores of an empty bin are NaN.
    """
    total = pd.Series(counts.sum((1, 2)))
    return pd.DataFrame(
        {
            "pixels": total / max(total.sum(), 1),
            "pixel accuracy": np.trace(counts, axis1=1, axis2=2) / total,
            "mIoU": [metrics.mean_iou(matrix) if matrix.any() else np.nan for matrix in counts],
        }
    )


def calibration_error(calibration: np.ndarray) -> float:
    """Return the expected calibration error (ECE) of `(15, 3)` counts, or NaN without pixels.

    The ECE is the absolute gap between confidence and accuracy, averaged over bins with their pixel counts as
    weights (Guo et al., "On calibration of modern neural networks", ICML 2017).
    """
    pixels, confidence, correct = calibration.T
    return float(np.abs(confidence - correct).sum() / pixels.sum()) if pixels.any() else np.nan


def describe_errors(errors: ErrorCounts, run: str, split: str) -> str:
    """Summarise the errors in Markdown and suggest what to try against the most costly confusion."""
    pooled, accuracy = errors.confusion.sum(0), metrics.image_accuracy(errors.confusion)
    recall = metrics.class_accuracy(pooled)
    worst_class = np.nanargmin(recall)
    near_boundary = errors.strata[DISTANCE][0]
    error_share = (near_boundary.sum() - np.trace(near_boundary)) / max(pooled.sum() - np.trace(pooled), 1)
    lines = [
        f"On {len(errors.names)} {SPLITS_IN_WORDS[split]} images **{run}** has an mIoU of "
        f"**{metrics.mean_iou(pooled):.3f}** and a pixel accuracy of "
        f"{percent(metrics.pixel_accuracy(pooled), 1)}. The lowest recall is that of "
        f"{errors.classes[worst_class]}: {percent(recall[worst_class])}.",
        f"{percent(near_boundary.sum() / pooled.sum())} of all pixels but {percent(error_share)} of the "
        "errors lie within 1 % of the image width of a boundary. The network is "
        f"{_describe_calibration(errors.calibration)}.",
        f"The worst image is {errors.names[np.nanargmin(accuracy)]}: {percent(np.nanmin(accuracy))} of its "
        "pixels are correct.",
    ]
    return "\n".join(f"- {line}" for line in [*lines, *suggest_experiment(errors)])


def suggest_experiment(errors: ErrorCounts) -> list[str]:
    """Suggest what to try against the most costly confusion, based on where it occurs.

    Returns:
        A list of one sentence, empty if there are no errors.
    """
    ranked = rank_confusions(errors.confusion, errors.classes)
    if ranked.empty:
        return []
    worst = ranked.iloc[0]
    truth, predicted = map(errors.classes.index, worst.name.split(CONFUSED))
    support = errors.confusion.sum((0, 2))
    near_boundary, in_small_regions = (
        errors.strata[name][:2, truth, predicted].sum() for name in (DISTANCE, REGION)
    )
    causes = {
        "mostly within 2 % of the image width of a boundary: try a higher resolution (`image_height`, "
        "`image_width`)": (near_boundary > worst.pixels / 2),
        "mostly in regions below 1 % of the image: try a higher resolution, or `-p augment zooms`": (
            in_small_regions > worst.pixels / 2
        ),
        f"and {errors.classes[truth]} is rare: try `-p class_weights median`, or label more images with it": (
            support[truth] < np.median(support[support > 0])
        ),
        "in both directions: look at the labels of these two, then try pretrained `encoder_weights`": (
            errors.confusion[:, predicted, truth].sum() > worst.pixels / 2
        ),
        "in large regions of a common class: try more `epochs`, or pretrained `encoder_weights`": True,
    }
    cause = next(text for text, applies in causes.items() if applies)
    return [f"The most costly confusion is **{worst.name}** ({worst.cost:.3f} of mIoU), {cause}."]


def _describe_calibration(calibration: np.ndarray) -> str:
    pixels, confidence, correct = calibration.sum(0)
    gap = 100 * (confidence - correct) / pixels
    prefix = "over" if gap > 0 else "under"
    return f"{prefix}confident by {abs(gap):.1f} points (ECE {calibration_error(calibration):.3f})"


def plot_confusion(errors: ErrorCounts) -> Figure:
    """Draw the confusion matrix, normalised over each ground-truth class (row)."""
    image_counts = (errors.confusion.sum(2) > 0).sum(0)
    row_labels = [f"{name} ({count})" for name, count in zip(errors.classes, image_counts, strict=True)]
    rows = pd.Index(row_labels, name="ground truth (images)")
    table = pd.DataFrame(errors.confusion.sum(0), rows, pd.Index(errors.classes, name="prediction"))
    shares = table.div(table.sum(axis=1), axis=0)
    return plots.plot_matrix(shares, "What each class was predicted as, in % of its pixels")


@plots.styled
def plot_strata(errors: ErrorCounts) -> Figure:
    """Draw pixel accuracy and mIoU by depth (if known), distance to a boundary and region size."""
    known = {name: counts for name, counts in errors.strata.items() if name != DEPTH or counts[1:].any()}
    figure, grid = plots.new_figure(3, 1, len(known), sharey=True, squeeze=False)
    for axes, (name, counts) in zip(grid[0], known.items(), strict=True):
        table = score_strata(counts).set_axis(name_bins(name, errors.edges[name]))
        table = table[table.pixels > 0]
        axes.bar(table.index, table.pixels, color="0.9", label="share of the pixels")
        axes.plot(table["pixel accuracy"], ".--", color=plots.VALID_COLOUR, label="pixel accuracy")
        axes.plot(table["mIoU"], ".-", color=plots.VALID_COLOUR, label="mIoU")
        axes.set(title=f"by {name}".replace(" (", "\n("), ylim=(0, 1))
        axes.tick_params(axis="x", labelsize="small", rotation=60)
    plots.add_legend(figure, grid[0, 0].get_legend_handles_labels()[0])
    return figure


@plots.styled
def plot_calibration(errors: ErrorCounts) -> Figure:
    """Draw a reliability diagram and the share of pixels in each confidence bin."""
    pixels, confidence, correct = errors.calibration[errors.calibration[:, 0] > 0].T
    edges = np.linspace(0, 1, CONFIDENCE_BINS + 1)
    figure, axes = plots.new_figure(3.6, width=5)
    axes.stairs(
        errors.calibration[:, 0] / pixels.sum(), edges, fill=True, color="0.9", label="share of the pixels"
    )
    axes.plot([0, 1], [0, 1], ":", color=plots.GREY, linewidth=1, label="perfectly calibrated")
    axes.plot(confidence / pixels, correct / pixels, ".-", color=plots.VALID_COLOUR, label="this network")
    axes.set(
        title=f"The network is {_describe_calibration(errors.calibration)}",
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(0, 1),
        box_aspect=1,
    )
    axes.legend(loc="upper left")
    return figure
