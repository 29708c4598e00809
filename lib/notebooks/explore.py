"""Data exploration: pixel counts in one pass over the images, figures, and leakage between splits."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from lib.data import MissingSplit, Samples, Split, iterate_samples
from lib.data.validation import RUN_PREFIX, read_numbers, split_names
from lib.notebooks import plots
from lib.notebooks.browse import plot_samples
from lib.progress import progress_bar

if TYPE_CHECKING:  # imports torch, which takes seconds
    from lib.batches import RawBatch

DEPTH_BINS = 100  # histogram bins from 0 to the far end of the depth range
ADJACENCY_DISTANCE = 0.025  # share of the image width; bridges unlabelled slivers between adjacent regions
FALSE_POSITIVE_RATE = 1e-4  # share of unrelated image pairs that are counted as near-duplicates
MAX_REFERENCE_IMAGES = 1000  # evenly spaced images whose unrelated pairs set the near-duplicate limit
CHUNK_ROWS = 256  # rows of the similarity matrix held in memory at once


@dataclass(frozen=True)
class DataCounts:
    """Pixel counts of N labelled images.

    Attributes:
        classes: names of the C classes.
        pixels: `(N, C + 1)` pixels of each class in each image; the last column counts unlabelled pixels.
        depth: `(C + 1, 101)` pixels by class and depth bin; the last row counts unlabelled pixels. Bin 0 is
            missing depth, the others lie between `depth_edges_m`, and the last one includes larger depths.
        outside_range: number of pixels with measured depth outside `depth_range_m`.
        adjacency: `(C, C)` symmetric counts of nearby pixel pairs of two different classes.
        depth_range_m: depth range of the data, see `Samples`.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    depth: np.ndarray
    outside_range: int
    adjacency: np.ndarray
    depth_range_m: tuple[float, float]

    @property
    def depth_edges_m(self) -> np.ndarray:
        """`(101,)` edges of the depth bins, in metres."""
        return np.linspace(0, self.depth_range_m[1], DEPTH_BINS + 1)

    @property
    def unlabelled(self) -> float:
        """The share of unlabelled pixels."""
        return self.pixels[:, -1].sum() / self.pixels.sum()

    @property
    def has_depth(self) -> bool:
        """Whether any pixel has measured depth."""
        return bool(self.depth[:, 1:].any())


def count_data(samples: Samples) -> DataCounts:
    """Count the pixels of labelled images, one image at a time.

    If the data set has no depth, all pixels count as missing depth.
    """
    count = len(samples.classes)
    pixels = np.zeros((len(samples), count + 1), np.int64)
    depth = np.zeros((count + 1, DEPTH_BINS + 1), np.int64)
    near, far = samples.depth_range_m
    step_mm = 1000 * far / DEPTH_BINS
    outside_range = 0
    adjacency = np.zeros((count, count), np.int64)
    with progress_bar("counting", len(samples)) as bar:
        for index in range(len(samples)):
            sample = samples[index : index + 1]
            label = np.minimum(sample.labels_or_ignored[0], count).astype(np.int64)  # 255 becomes class C
            bins = 1 + np.minimum(sample.depth_or_missing[0] // step_mm, DEPTH_BINS - 1).astype(np.int64)
            pixels[index] = np.bincount(label.ravel(), minlength=count + 1)
            depth += _joint_histogram(label, bins * sample.measured_depth[0], depth.shape)
            depth_m = sample.depth_or_missing[sample.measured_depth] / 1000
            outside_range += int(((depth_m < near) | (depth_m > far)).sum())
            adjacency += _count_adjacency(label, count)
            bar.update()
    return DataCounts(samples.classes, pixels, depth, outside_range, adjacency, samples.depth_range_m)


def _joint_histogram(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount((first * shape[1] + second).ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _count_adjacency(label: np.ndarray, count: int) -> np.ndarray:
    offset = max(1, round(ADJACENCY_DISTANCE * label.shape[1]))
    pairs = ((label[:, :-offset], label[:, offset:]), (label[:-offset], label[offset:]))
    counts = sum(_joint_histogram(*pair, (count + 1, count + 1)) for pair in pairs)[:count, :count]
    return (counts + counts.T) * ~np.eye(count, dtype=bool)


def class_shares(counts: DataCounts) -> pd.DataFrame:
    """Tabulate the frequency of each class, the most common first.

    Returns:
        One row per class: `pixels`, its share of the labelled pixels; `images`, the share of images that
        contain it; and, if the data has depth, `without depth`, the share of its pixels without measured
        depth (NaN for an absent class).
    """
    total = counts.pixels[:, :-1].sum(0)
    shares = {"pixels": total / max(total.sum(), 1), "images": (counts.pixels[:, :-1] > 0).mean(0)}
    if counts.has_depth:
        shares["without depth"] = counts.depth[:-1, 0] / np.where(total > 0, total, np.nan)
    return pd.DataFrame(shares, index=list(counts.classes)).sort_values("pixels", ascending=False)


def depth_quantiles(
    histogram: np.ndarray, shares: tuple[float, ...], depth_edges_m: np.ndarray
) -> np.ndarray:
    """Return the quantiles of measured depth at `shares`, in metres, from a row of `DataCounts.depth`."""
    cumulative = np.cumsum(np.append(0, histogram[1:]))
    return np.interp(np.multiply(shares, cumulative[-1]), cumulative, depth_edges_m)


@dataclass(frozen=True)
class Leakage:
    """Leakage from training to validation images for one `validation` method.

    Attributes:
        train_count: number of training images.
        valid: `(V,)` positions of the validation images, from `train_count` on if the split is `predefined`.
        match: `(V,)` position of the training image with the most similar colours, taken from the same scene
            if the scene has training images.
        same_scene: `(V,)` bool, whether the scene has training images; None if scenes are unknown.
        near_duplicates: number of validation images that equal a training image, or are more similar to one
            than 9,999 of 10,000 unrelated pairs are to each other.
        copies: number of validation images that equal a training image in every pixel.
        false_positive_rate: share of unrelated pairs expected among the near-duplicates.
    """

    train_count: int
    valid: np.ndarray
    match: np.ndarray
    same_scene: np.ndarray | None
    near_duplicates: int
    copies: int = 0
    false_positive_rate: float = FALSE_POSITIVE_RATE


def find_leakage(samples: Samples, valid: Split | None = None) -> dict[str, Leakage]:
    """Measure leakage for each `validation` method that these images allow.

    Images are compared by colour alone, because a small camera movement hardly changes the colours: on NYUv2,
    9 % of the pairs of neighbouring ids are near-duplicates, but only 0.6 % if thumbnails are compared. The
    limit for near-duplicates is estimated from unrelated pairs: images that are more than a quarter of the
    data set apart in name order. Memory grows with the number of images, not with the number of pairs.

    Args:
        samples: the training images; all methods but `predefined` choose their validation images among them.
        valid: the validation split; its images are included only if it is `predefined`.

    Returns:
        The leakage by `validation` method, without methods that leave one of the two splits empty.
    """
    splits = {}
    for validation in ("random", "blocks", "scenes"):
        with suppress(ValueError):  # not possible with these names or scenes
            splits[validation] = split_names(samples.names, validation, samples.scene)
    subsets = [samples]
    if valid is not None and valid.validation == "predefined":
        subsets.append(valid.load())
        splits["predefined"] = np.split(np.arange(len(samples) + len(valid)), [len(samples)])
    signatures = np.stack([_colour_signature(image) for subset in subsets for image in subset.image])
    checksums = [hashlib.sha256(image.tobytes()).hexdigest() for subset in subsets for image in subset.image]
    has_scenes = all(subset.scene is not None for subset in subsets)
    scene = np.concatenate([subset.scene for subset in subsets]) if has_scenes else None
    limit, rate = _near_duplicate_limit(signatures[: len(samples)])
    return {
        validation: replace(
            _measure_leakage(signatures, np.array(checksums), scene, *positions, limit),
            false_positive_rate=rate,
        )
        for validation, positions in splits.items()
        if all(map(len, positions))
    }


def _near_duplicate_limit(signatures: np.ndarray) -> tuple[float, float]:
    """Return the similarity that 1 in 10,000 unrelated pairs exceeds, and the share of pairs that exceed it.

    The limit is 1 if there are no such pairs. If there are fewer than 10,000, a new pair exceeds the largest
    similarity of N pairs with a probability of about 1 in N.
    """
    positions = np.arange(len(signatures))
    references = positions[:: max(1, -(-len(positions) // MAX_REFERENCE_IMAGES))]
    unrelated = np.abs(references[:, None] - positions) > len(positions) // 4
    similarity = (signatures[references] @ signatures.T)[unrelated]
    pair_count = max(similarity.size // 2, 1)  # each pair of references occurs in both orders
    limit = np.quantile(similarity, 1 - FALSE_POSITIVE_RATE) if similarity.size else 1.0
    return limit, max(FALSE_POSITIVE_RATE, 1 / pair_count)


def _measure_leakage(
    signatures: np.ndarray,
    checksums: np.ndarray,
    scene: np.ndarray | None,
    train: np.ndarray,
    valid: np.ndarray,
    limit: float,
) -> Leakage:
    """Compare the validation images with the training images, both given as positions."""
    match = np.empty(len(valid), int)
    is_copy = np.isin(checksums[valid], checksums[train])
    near_duplicates = 0
    for start in range(0, len(valid), CHUNK_ROWS):
        chunk = valid[start : start + CHUNK_ROWS]
        similarity = signatures[chunk] @ signatures[train].T
        is_similar = similarity.max(1) > limit
        near_duplicates += int((is_similar | is_copy[start : start + CHUNK_ROWS]).sum())
        if scene is not None:
            similarity += 2 * (scene[chunk][:, None] == scene[train])
        match[start : start + CHUNK_ROWS] = train[similarity.argmax(1)]
    same_scene = None if scene is None else np.isin(scene[valid], scene[train])
    return Leakage(len(train), valid, match, same_scene, near_duplicates, int(is_copy.sum()))


def _colour_signature(image: np.ndarray) -> np.ndarray:
    """Return a `(4096,)` unit vector: square roots of a normalised 4 x 32 x 32 CIELAB histogram."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    counts = cv2.calcHist([lab], [0, 1, 2], None, [4, 32, 32], [0, 256] * 3).ravel()
    return np.sqrt(counts / counts.sum())


def describe_data(counts: DataCounts, train: Split, valid: Split) -> str:
    """Summarise the labelled images, their split and any warnings in Markdown."""
    scene_sharing = _describe_scenes(train, valid)
    summary = (
        f"**{len(counts.pixels)} images, {len(counts.classes)} classes, {_describe_depth(counts)}, "
        f"{plots.percent(counts.unlabelled, 1)} unlabelled; validation ({len(valid)} images, by "
        f"{valid.validation}) {scene_sharing}.**"
    )
    return "\n- ".join([summary, *_find_warnings(counts, train.scene)])


def conclude_data(shares: pd.DataFrame, train: Split, valid: Split) -> str:
    """Recommend a `validation` and list the rarest classes of `class_shares`, in Markdown.

    At most three classes, and at most half of those that occur, are listed.
    """
    present = shares.pixels[shares.pixels > 0]
    rare = present.tail(min(3, len(present) // 2))
    rare_classes = ", ".join(f"{name} ({plots.percent(share, 1)})" for name, share in rare.items())
    advice = (
        f"- Validate by **{valid.validation}**, the choice of `validation auto` for these images; it "
        f"{_describe_scenes(train, valid)}."
    )
    if not rare_classes:
        return advice
    subject, pronoun = ("class is", "It") if len(rare) == 1 else ("classes are", "They")
    return (
        f"{advice}\n"
        f"- The rarest {subject} **{rare_classes}** of the labelled pixels. {pronoun} will be hard to learn, "
        f"but mIoU weights each as much as {shares.index[0]} ({plots.percent(shares.pixels.iloc[0], 1)}). "
        "`class_weights median` does the same in the loss."
    )


def _describe_depth(counts: DataCounts) -> str:
    if not counts.has_depth:
        return "no depth"
    depth = counts.depth.sum(0)
    (median,) = depth_quantiles(depth, (0.5,), counts.depth_edges_m)
    over = "over " if median > counts.depth_edges_m[-2] else ""
    return f"median depth {over}{median:.1f} m, depth missing in {plots.percent(depth[0] / depth.sum(), 1)}"


def _describe_scenes(train: Split, valid: Split) -> str:
    """Describe how many validation images share a scene with training images.

    Scene names of numbered images that start with `RUN_PREFIX` are derived from image ids.
    """
    if train.scene is None or valid.scene is None:
        return "may share scenes with training, because the scenes are unknown"
    by_ids = train.scene[0].startswith(RUN_PREFIX) and read_numbers(train.names) is not None
    nouns = ("run of neighbouring ids", "runs of neighbouring ids") if by_ids else ("scene", "scenes")
    shared_count = np.isin(valid.scene, train.scene).sum()
    return (
        f"shares {nouns[1]} with training in {shared_count} of them"
        if shared_count
        else f"shares no {nouns[0]} with training"
    )


def _find_warnings(counts: DataCounts, scene: np.ndarray | None) -> list[str]:
    """Return warnings from sanity checks of the data."""
    absent = np.array(counts.classes)[~counts.pixels[:, :-1].any(0)]
    hint = (
        " If one of them has a label value that is read as unlabelled, such as 255, declare it under "
        "`classes` and `ignore`."
        if counts.unlabelled
        else ""
    )
    empty = (~counts.pixels[:, :-1].any(1)).sum()
    sizes = np.ones(1) if scene is None else np.unique(scene, return_counts=True)[1]
    depth = counts.depth.sum(0)
    near, far = counts.depth_range_m
    outside = counts.outside_range / max(depth[1:].sum(), 1)
    warnings = [
        (len(absent) > 0, f"These classes are in no image: {', '.join(absent)}.{hint}"),
        (
            sizes.sum() >= 20 and sizes.max() >= 0.9 * sizes.sum(),
            f"One scene has {plots.percent(sizes.max() / sizes.sum())} of the images, so nothing can be "
            "concluded about new scenes. (Images with numbers as names are treated as frames of a video.) If "
            "each image shows its own scene, write `scene: '^(.*)$'` into `dataset.yaml`; otherwise set "
            "`scene` to a .csv with the columns name,scene.",
        ),
        (empty > 0, f"{empty} images have no labelled pixel."),
        (
            counts.unlabelled > 0.5,
            f"{plots.percent(counts.unlabelled, 1)} of the pixels are unlabelled.",
        ),
        (
            counts.has_depth and depth[0] > 0.5 * depth.sum(),
            f"{plots.percent(depth[0] / depth.sum(), 1)} of the pixels have no depth.",
        ),
        (
            outside > 0.2,
            f"{plots.percent(outside, 1)} of the depths are outside {near:g} to {far:g} m, the range to "
            "which networks clip them: check `depth_unit_mm` and `depth_range_m` in `dataset.yaml`.",
        ),
    ]
    return [warning for applies, warning in warnings if applies]


def count_test_images(data: str, limit: int | None, classes: str | None) -> int | None:
    """Return the number of test images, or None if there is no test split."""
    try:
        return len(iterate_samples(data, "test", limit=limit, classes=classes))
    except MissingSplit:
        return None


def plot_batch(samples: Samples, batch: "RawBatch", depth_scale: ScalarMappable | None) -> Figure:
    """Draw the images of a training batch, including augmentation."""
    image, depth, label, _, position = (tensor.numpy() for tensor in batch)
    return plot_samples(replace(samples[position], image=image, depth=depth, label=label), depth_scale)


@plots.styled
def plot_depth(counts: DataCounts) -> Figure:
    """Draw a box plot of the measured depth of each class.

    Whiskers span the middle 90 % of a class. The title gives this range for all pixels.
    """
    quantiles = {"whislo": 0.05, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.95}
    boxes = {
        name: dict(
            zip(quantiles, depth_quantiles(row, (*quantiles.values(),), counts.depth_edges_m), strict=True)
        )
        for name, row in zip(counts.classes, counts.depth, strict=False)
        if row[1:].any()
    }
    names = sorted(boxes, key=lambda name: -boxes[name]["med"])
    figure, axes = plots.new_figure(plots.rows_height(len(names)))
    axes.bxp(
        [boxes[name] for name in names], range(len(names)), widths=0.7, orientation="horizontal",
        patch_artist=True, showfliers=False, showcaps=False,
        medianprops={"color": "black", "linewidth": 1.5},
        boxprops={"facecolor": plots.BAR_COLOUR, "linewidth": 0}, whiskerprops={"color": plots.GREY},
    )  # fmt: skip
    plots.label_rows(axes, names)
    near, far, farthest = depth_quantiles(counts.depth.sum(0), (0.05, 0.95, 0.999), counts.depth_edges_m)
    axes.set(
        title=f"All pixels: nine in ten from {near:.1f} to {far:.1f} m",
        xlabel=f"{plots.DEPTH}: half of a class in the box, nine in ten on the line",
        xlim=(0, farthest),
    )
    return figure


def plot_adjacency(counts: DataCounts) -> Figure:
    """Draw the share of each other class (columns) among the neighbours of each class (rows)."""
    names = counts.classes
    table = pd.DataFrame(counts.adjacency, pd.Index(names, name="class"), pd.Index(names, name="adjacent to"))
    return plots.plot_matrix(table.div(table.sum(axis=1), axis=0), "What each class borders on, in %")


def tabulate_leakage(leakage: dict[str, Leakage]) -> pd.DataFrame:
    """Tabulate image counts and leakage for each `validation` method."""
    rows = {
        validation: {
            "training images": leak.train_count,
            "validation images": len(leak.valid),
            "sharing a scene": "unknown" if leak.same_scene is None else leak.same_scene.sum(),
            "exact copies": leak.copies,
            "near-duplicates": leak.near_duplicates,
            "expected by chance": round(
                len(leak.valid) * (1 - (1 - leak.false_positive_rate) ** leak.train_count), 1
            ),
        }
        for validation, leak in leakage.items()
    }
    return pd.DataFrame.from_dict(rows, "index").rename_axis("validation by")


def plot_leaks(samples: Samples, leak: Leakage, count: int = 2) -> Figure:
    """Draw validation images, each next to the most similar training image.

    Pairs from the same scene come first, then the most similar pairs. At most `count` pairs are drawn.
    """
    signatures = [
        np.stack([_colour_signature(image) for image in samples.image[positions]])
        for positions in (leak.valid, leak.match)
    ]
    same_scene = np.zeros(len(leak.valid), bool) if leak.same_scene is None else leak.same_scene
    order = np.argsort(-2 * same_scene - (signatures[0] * signatures[1]).sum(1), kind="stable")[:count]
    pairs = []
    captions = []
    for valid, train, is_same in zip(leak.valid[order], leak.match[order], same_scene[order], strict=True):
        pairs.append({"validation": samples.image[valid], "most similar in training": samples.image[train]})
        relation = ": same scene, other view" if is_same else ""
        captions.append(f"{samples.names[valid]} and {samples.names[train]}{relation}")
    return plots.plot_grid(pairs, captions)
