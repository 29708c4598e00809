"""What explore and error_analysis count, each in one pass over the images, and what the counts say in words."""

from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from torch import nn

from lib.data import CLASS_NAMES, IGNORE_INDEX, Samples, progress_bar, split_names
from lib.evaluation import predict_confidence
from lib.metrics import class_accuracy, fill_unlabelled, image_accuracy, iou, mean_iou, pixel_accuracy

CLASSES = len(CLASS_NAMES)
CELLS = (24, 32)  # of the frame, in which places are counted
DEPTH_STEPS_M = np.linspace(0, 10, 101)
NEARBY = 0.025  # of the width: classes meet over the unlabelled slivers that people leave between them
UNRELATED_IDS = 50  # frames with ids farther apart are taken to be of different scenes
CHANCE = 1e-4  # share of unrelated pairs of images that pass for near copies

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


@dataclass(frozen=True)
class DataCounts:
    """What is in labelled images.

    Attributes:
        pixels: `(N, C + 1)` pixels of each class in each image, the last column unlabelled.
        depth: `(C + 1, 101)` pixels by class and depth: missing, then `DEPTH_STEPS_M`.
        meetings: `(C, C)` pairs of nearby pixels of two classes, symmetric.
        places: `(C, 24, 32)` pixels of each class by cell of the frame.
        missing: `(24, 32)` share of pixels without measured depth by cell.
    """

    pixels: np.ndarray
    depth: np.ndarray
    meetings: np.ndarray
    places: np.ndarray
    missing: np.ndarray


def count_data(samples: Samples) -> DataCounts:
    """Count labelled images, one at a time."""
    pixels = np.zeros((len(samples), CLASSES + 1), np.int64)
    depths = np.zeros((CLASSES + 1, len(DEPTH_STEPS_M)), np.int64)
    meetings, cell = np.zeros((CLASSES, CLASSES), np.int64), _cells(samples.size, CELLS)
    places, missing = np.zeros((CLASSES + 1, *CELLS), np.int64), np.zeros(CELLS)
    for index in range(len(samples)):
        depth = samples.depth[index] if samples.measured is None else samples.depth[index] * samples.measured[index]
        label = np.minimum(samples.label[index], CLASSES).astype(np.int64)  # 255 becomes one more class
        step = np.where(depth == 0, 0, 1 + np.minimum(depth // 100, len(DEPTH_STEPS_M) - 2))
        pixels[index] = np.bincount(label.ravel(), minlength=CLASSES + 1)
        depths += _joint_counts(label, step, depths.shape)
        places += _joint_counts(label, cell, (CLASSES + 1, places[0].size)).reshape(places.shape)
        missing += np.bincount(cell[depth == 0], minlength=missing.size).reshape(CELLS)
        meetings += _count_meetings(label)
    frame = np.bincount(cell.ravel(), minlength=missing.size).reshape(CELLS)
    return DataCounts(pixels, depths, meetings, places[:CLASSES], missing / np.maximum(len(samples) * frame, 1))


def _cells(size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """The cell that each pixel of `(height, width)` belongs to."""
    row, column = (np.arange(length) * count // length for length, count in zip(size, cells, strict=True))
    return row[:, None] * cells[1] + column


def _joint_counts(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount((first * shape[1] + second).ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _count_meetings(label: np.ndarray) -> np.ndarray:
    reach, counts = max(1, round(NEARBY * label.shape[1])), 0
    for one, other in ((label[:, :-reach], label[:, reach:]), (label[:-reach], label[reach:])):
        counts = counts + _joint_counts(one, other, (CLASSES + 1, CLASSES + 1))[:CLASSES, :CLASSES]
    return (counts + counts.T) * ~np.eye(CLASSES, dtype=bool)


def class_shares(counts: DataCounts) -> pd.DataFrame:
    """By class, most common first: share of the labelled pixels, of the images, of its own pixels without depth."""
    total, depth = counts.pixels.sum(0)[:CLASSES], counts.depth[:CLASSES]
    shares = {
        "pixels": total / max(total.sum(), 1),
        "images": (counts.pixels[:, :CLASSES] > 0).mean(0),
        "without depth": np.where(total > 0, depth[:, 0] / np.maximum(total, 1), np.nan),
    }
    return pd.DataFrame(shares, index=list(CLASS_NAMES)).sort_values("pixels", ascending=False)


def depth_quantiles(histogram: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Metres below which these shares of the measured pixels lie, from a row of `DataCounts.depth`."""
    measured = np.cumsum(np.append(0, histogram[1:]))
    return np.interp(np.multiply(shares, measured[-1]), measured, DEPTH_STEPS_M)


@dataclass(frozen=True)
class Leakage:
    """What of a split's validation images is in training already.

    Attributes:
        train_count: images that train.
        valid: `(V,)` positions of those that validate.
        match: `(V,)` for each the position of the training image whose colours are most alike.
        similarity: `(V,)` of the two, 0..1.
        threshold: similarity from which two images count as near copies.
        neighbours: how many have a neighbouring id in training; None where names are no numbers.
    """

    train_count: int
    valid: np.ndarray
    match: np.ndarray
    similarity: np.ndarray
    threshold: float
    neighbours: int | None

    @property
    def near_copies(self) -> int:
        """How many have a near copy in training."""
        return int((self.similarity > self.threshold).sum())


def find_leakage(names: np.ndarray, image: np.ndarray) -> dict[str, Leakage]:
    """Of each split that these images allow, `random` and `blocks`.

    Images are compared by their colours alone, which a step aside does not change much. Near copies are
    more alike than 9,999 of 10,000 unrelated pairs: on NYUv2 9 % of the pairs of neighbouring ids are, and
    0.6 % where thumbnails are compared instead.
    """
    alike = _colour_signatures(image) @ _colour_signatures(image).T
    numbers = np.array([int(name) for name in names]) if all(name.isdecimal() for name in names.tolist()) else None
    order = np.arange(len(names)) if numbers is None else numbers
    unrelated = np.abs(order[:, None] - order) > min(UNRELATED_IDS, len(names) // 4)
    threshold = float(np.quantile(alike[unrelated], 1 - CHANCE)) if unrelated.any() else 1.0
    found = {}
    for split in ("random", "blocks") if numbers is not None else ("random",):
        train, valid = split_names(names, split)
        if min(len(train), len(valid)):
            best = alike[np.ix_(valid, train)].argmax(1)
            near = None if numbers is None else int(has_neighbour(numbers[valid], numbers[train]).sum())
            match = train[best]
            found[split] = Leakage(len(train), valid, match, alike[valid, match], threshold, near)
    return found


def has_neighbour(ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the ids have the one before or after them among the others."""
    return np.isin(ids - 1, others) | np.isin(ids + 1, others)


def _colour_signatures(image: np.ndarray) -> np.ndarray:
    """`(N, 4096)` unit vectors: roots of the shares of 4 x 32 x 32 colours in CIELAB."""
    counts = np.empty((len(image), 4096), np.float32)
    for index, picture in enumerate(image):
        light, green_red, blue_yellow = np.moveaxis(cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(np.int64), -1, 0)
        colour = (light // 64 * 32 + green_red // 8) * 32 + blue_yellow // 8
        counts[index] = np.bincount(colour.ravel(), minlength=4096)
    return np.sqrt(counts / counts.sum(1, keepdims=True))


def describe_leakage(leakage: dict[str, Leakage]) -> str:
    """A sentence for each split."""
    sentences = []
    for split, leak in leakage.items():
        count = len(leak.valid)
        found = {"a neighbouring id": leak.neighbours, "a near copy": leak.near_copies}
        signs = [f"{number} ({number / count:.0%}) have {sign}" for sign, number in found.items() if number is not None]
        sentences.append(f"Of the {count} images that validate in split `{split}`, {' and '.join(signs)} in training.")
    return " ".join(sentences) or "Too few images to split."


def describe_data(counts: DataCounts, leakage: dict[str, Leakage]) -> str:
    """The findings of explore in words."""
    shares, total = class_shares(counts), counts.pixels.sum()
    shares = shares[shares.pixels > 0]
    common, rare = shares.pixels.head(4), shares.pixels.tail(2)
    most, least = (", ".join(f"{name} {share:.2%}" for name, share in some.items()) for some in (common, rare))
    low, middle, high = depth_quantiles(counts.depth.sum(0), (0.05, 0.5, 0.95))
    return (
        f"Of the pixels of {len(counts.pixels)} labelled images, {counts.pixels[:, -1].sum() / total:.1%} have no "
        "label. "
        f"Most of the others, {common.sum():.0%}, are {most}; the rarest classes are {least}, and each weighs as much "
        f"in the mIoU as {common.index[0]}. Half of the depths are below {middle:.1f} m, nine in ten between {low:.1f} "
        f"and {high:.1f} m; {counts.depth[:, 0].sum() / total:.1%} of the pixels have none. {describe_leakage(leakage)}"
    )


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
