"""What is in the data: counts in one pass over the images, their figures, and leakage between parts."""

from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lib.classes import CLASS_NAMES
from lib.data.samples import Samples
from lib.data.splits import split_names
from lib.errors import CLASSES, _cells, _joint_counts
from lib.plots import COLOUR, EDGED, GREY, STYLE, VALID_COLOUR, WIDTH, _hide_frames, _plot_matrix, colour_labels

CELLS = (24, 32)  # of the frame, in which places are counted
DEPTH_STEPS_M = np.linspace(0, 10, 101)
NEARBY = 0.025  # of the width: classes meet over the unlabelled slivers that people leave between them
UNRELATED_IDS = 50  # frames with ids farther apart are taken to be of different scenes
CHANCE = 1e-4  # share of unrelated pairs of images that pass for near copies


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
