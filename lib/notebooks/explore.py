"""What is in the data: counts in one pass over the images, their figures, and leakage between splits."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from lib.data import MissingSplit, Samples, Split, iterate_samples
from lib.data.validation import RUN, read_numbers, split_names
from lib.notebooks import plots
from lib.progress import progress_bar

if TYPE_CHECKING:  # it needs torch, which takes seconds to import
    from lib.batches import RawBatch

DEPTH_STEPS = 100  # from 0 to the farthest end of the data's depth range
NEARBY = 0.025  # of the width, whatever the data: classes meet over the slivers that people leave unlabelled
FEW_IMAGES = 10
CHANCE = 1e-4  # share of unrelated pairs of images that pass for near-duplicates
COMPARED = 1000  # images, at equal steps, whose pairs with all others say what is unrelated
MANY, NEARLY_ALL = 20, 0.9  # images, and the share of them in one scene that is no use
ROWS = 256  # of a matrix of pairs in memory at a time


@dataclass(frozen=True)
class DataCounts:
    """What is in labelled images.

    Attributes:
        classes: names of the C classes.
        pixels: `(N, C + 1)` pixels of each class in each image, the last column unlabelled.
        depth: `(C + 1, 101)` pixels by class and depth: missing, then between `steps_m`, the last open to the top.
        adjacency: `(C, C)` pairs of nearby pixels of two classes, symmetric.
        depth_range_m: of the data, see `Samples`.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    depth: np.ndarray
    adjacency: np.ndarray
    depth_range_m: tuple[float, float]

    @property
    def steps_m(self) -> np.ndarray:
        """`(101,)` edges of the steps of depth."""
        return np.linspace(0, self.depth_range_m[1], DEPTH_STEPS + 1)

    @property
    def has_depth(self) -> bool:
        """Whether any was measured."""
        return bool(self.depth[:, 1:].any())


def count_data(samples: Samples) -> DataCounts:
    """Count labelled images, one at a time; where the data set has no depth, all of it is missing."""
    count = len(samples.classes)
    pixels = np.zeros((len(samples), count + 1), np.int64)
    depths = np.zeros((count + 1, DEPTH_STEPS + 1), np.int64)
    step_mm = 1000 * samples.depth_range_m[1] / DEPTH_STEPS
    adjacency = np.zeros((count, count), np.int64)
    with progress_bar("counting", len(samples)) as bar:
        for index in range(len(samples)):
            one = samples[index : index + 1]
            label = np.minimum(one.labels_or_ignored[0], count).astype(np.int64)  # 255 becomes one more class
            step = 1 + np.minimum(one.depth_or_missing[0] // step_mm, DEPTH_STEPS - 1).astype(np.int64)
            pixels[index] = np.bincount(label.ravel(), minlength=count + 1)
            depths += _joint_counts(label, step * one.measured_depth[0], depths.shape)
            adjacency += _count_adjacency(label, count)
            bar.update()
    return DataCounts(samples.classes, pixels, depths, adjacency, samples.depth_range_m)


def _joint_counts(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount((first * shape[1] + second).ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _count_adjacency(label: np.ndarray, count: int) -> np.ndarray:
    reach, counts = max(1, round(NEARBY * label.shape[1])), 0
    for one, other in ((label[:, :-reach], label[:, reach:]), (label[:-reach], label[reach:])):
        counts = counts + _joint_counts(one, other, (count + 1, count + 1))[:count, :count]
    return (counts + counts.T) * ~np.eye(count, dtype=bool)


def class_shares(counts: DataCounts) -> pd.DataFrame:
    """By class, most common first: share of the labelled pixels, of the images, of its own pixels without depth."""
    pixels, total = counts.pixels[:, :-1], counts.pixels[:, :-1].sum(0)
    shares = {"pixels": total / max(total.sum(), 1), "images": (pixels > 0).mean(0)}
    if counts.has_depth:
        shares["without depth"] = np.where(total > 0, counts.depth[:-1, 0] / np.maximum(total, 1), np.nan)
    return pd.DataFrame(shares, index=list(counts.classes)).sort_values("pixels", ascending=False)


def depth_quantiles(histogram: np.ndarray, shares: tuple[float, ...], steps_m: np.ndarray) -> np.ndarray:
    """Metres below which these shares of the measured pixels lie, from a row of `DataCounts.depth`."""
    measured = np.cumsum(np.append(0, histogram[1:]))
    return np.interp(np.multiply(shares, measured[-1]), measured, steps_m)


@dataclass(frozen=True)
class Leakage:
    """Which validation images resemble training images, for one way of choosing them.

    Attributes:
        train_count: training images.
        valid: `(V,)` positions of the validation images; those of a valid split come after all others.
        match: `(V,)` of the training image most like each in colour; of its own scene, where there is one.
        same_scene: `(V,)` bool, where there is one; None where scenes are unknown.
        nearest: `(V,)` bool, where the image with the nearest id is in training; None where names are no numbers.
        near_duplicates: how many resemble a training image more than 9,999 of 10,000 unrelated pairs do.
        copies: how many equal a training image in every pixel.
    """

    train_count: int
    valid: np.ndarray
    match: np.ndarray
    same_scene: np.ndarray | None
    nearest: np.ndarray | None
    near_duplicates: int
    copies: int = 0

    @property
    def by_chance(self) -> float:
        """How many near-duplicates to expect where no validation image has to do with any training image."""
        return len(self.valid) * (1 - (1 - CHANCE) ** self.train_count)


def find_leakage(samples: Samples, valid: Split | None = None) -> dict[str, Leakage]:
    """For each `validation` that these images allow.

    Images are compared by their colours alone, which a step aside does not change much: on NYUv2 9 % of the
    pairs of neighbouring ids are near-duplicates, and 0.6 % where thumbnails are compared instead. Those are taken to be
    unrelated between which a quarter of the images lies, in order of their names. Memory grows with the number of
    images, not with that of pairs.

    Args:
        samples: the images to train on, or to choose validation images among.
        valid: a split to validate on; its images are looked at too if it is the data set's own (`predefined`).
    """
    chosen = {}
    for validation in ("random", "blocks", "scenes"):
        with suppress(ValueError):  # these names or scenes do not allow it
            chosen[validation] = split_names(samples.names, validation, samples.scene)
    images = _Compared.of(samples)
    limit = images.near_duplicate_limit()
    if valid is not None and valid.validation == "predefined":
        images = images.join(_Compared.of(valid.load()))
        chosen["predefined"] = np.split(np.arange(len(images.names)), [len(samples)])
    return {
        validation: images.compare(*sides, limit)
        for validation, sides in chosen.items()
        if all(map(len, sides))
    }


class _Compared(NamedTuple):
    """What images are compared by: `(N,)` names, `(N, 4096)` colours, `(N,)` checksums, `(N,)` scene or None."""

    names: np.ndarray
    signatures: np.ndarray
    checksums: np.ndarray
    scene: np.ndarray | None

    @classmethod
    def of(cls, samples: Samples) -> "_Compared":
        checksums = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in samples.image])
        return cls(samples.names, _colour_signatures(samples.image), checksums, samples.scene)

    def join(self, other: "_Compared") -> "_Compared":
        """Both, one after the other."""
        unknown = self.scene is None or other.scene is None
        arrays = zip(self[:3], other[:3], strict=True)
        scene = None if unknown else np.append(self.scene, other.scene)
        return _Compared(*(np.concatenate(pair) for pair in arrays), scene)

    def near_duplicate_limit(self) -> float:
        """How alike unrelated images are at most, but for one pair in 10,000."""
        order = np.arange(len(self.names))
        some = order[:: -(-len(order) // COMPARED) or 1]
        unrelated = np.abs(some[:, None] - order) > len(order) // 4
        alike = (self.signatures[some] @ self.signatures.T)[unrelated]
        return np.quantile(alike, 1 - CHANCE) if alike.size else 1.0

    def compare(self, train: np.ndarray, valid: np.ndarray, limit: float) -> Leakage:
        """The images at these positions with one another."""
        match, same_scene, near_duplicates = np.empty(len(valid), int), None, 0
        if self.scene is not None:
            same_scene = np.isin(self.scene[valid], self.scene[train])
        for start in range(0, len(valid), ROWS):
            rows = valid[start : start + ROWS]
            alike = self.signatures[rows] @ self.signatures[train].T
            near_duplicates += int((alike.max(1) > limit).sum())
            if self.scene is not None:
                alike += 2 * (self.scene[rows][:, None] == self.scene[train])
            match[start : start + ROWS] = train[alike.argmax(1)]
        copies = np.isin(self.checksums[valid], self.checksums[train]).sum()
        nearest = find_nearest_in_training(self.names, train, valid)
        return Leakage(len(train), valid, match, same_scene, nearest, near_duplicates, int(copies))


def find_nearest_in_training(names: np.ndarray, train: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
    """`(V,)` bool: whether no id is nearer to that of a validation image than one in training; None without ids."""
    ids = read_numbers(names)
    if ids is None:
        return None
    here = np.sort(ids)
    at = np.searchsorted(here, ids[valid])
    edges = np.concatenate(([-np.inf], here, [np.inf]))  # the id itself stands at `at` + 1
    to_any = np.minimum(ids[valid] - edges[at], edges[at + 2] - ids[valid])
    trained = np.concatenate(([-np.inf], np.sort(ids[train]), [np.inf]))
    after = np.searchsorted(trained, ids[valid])
    to_trained = np.minimum(ids[valid] - trained[after - 1], trained[after] - ids[valid])
    return to_trained <= to_any


def _colour_signatures(image: np.ndarray) -> np.ndarray:
    """`(N, 4096)` unit vectors: roots of the shares of 4 x 32 x 32 colours in CIELAB."""
    signatures = np.empty((len(image), 4096), np.float32)
    for signature, picture in zip(signatures, image, strict=True):
        lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
        counts = cv2.calcHist([lab], [0, 1, 2], None, [4, 32, 32], [0, 256] * 3).ravel()
        signature[:] = np.sqrt(counts / counts.sum())
    return signatures


def describe_data(counts: DataCounts, train: Split, valid: Split) -> str:
    """In Markdown: what labelled images were read, how they are split, and warnings."""
    images, total = (counts.pixels[:, :-1] > 0).sum(0), counts.pixels.sum()
    missing, unlabelled = counts.depth[:, 0].sum() / total, counts.pixels[:, -1].sum() / total
    few, empty = ((images > 0) & (images < FEW_IMAGES)).sum(), (counts.pixels[:, :-1].sum(1) == 0).sum()
    absent = ", ".join(np.array(counts.classes)[images == 0])
    facts = [f"{len(counts.pixels)} images, {len(counts.classes)} classes"]
    facts += [f"{few} of them in fewer than {FEW_IMAGES} images"] * bool(few)
    warnings = {
        f"These classes are in no image: {absent}.{_explain_255(counts)}": absent,
        describe_one_scene(train.scene): describe_one_scene(train.scene),
        f"{empty} images have no labelled pixel.": empty,
    }
    warnings[f"{unlabelled:.1%} of the pixels are unlabelled."] = unlabelled > 0.5
    if counts.has_depth:
        steps, (near, far) = counts.depth[:, 1:].sum(0), counts.depth_range_m
        outside = (steps[counts.steps_m[1:] <= near].sum() + steps[-1]) / steps.sum()
        (median,) = depth_quantiles(counts.depth.sum(0), (0.5,), counts.steps_m)
        facts.append(f"median depth {'over ' * bool(median > counts.steps_m[-2])}{median:.1f} m")
        warnings[f"{missing:.1%} of the pixels have no depth."] = missing > 0.5
        warnings[
            f"{outside:.1%} of the depths lie beyond {near:g} to {far:g} m, to which networks clip them: check "
            "`depth_unit_mm` and `depth_range_m` in `dataset.yaml`."
        ] = outside > 0.2
    depth = [f"depth missing in {missing:.1%}"] * bool(missing) if counts.has_depth else ["no depth"]
    facts += [*depth, f"{unlabelled:.1%} unlabelled"]
    text = f"**{', '.join(facts)}; validation ({len(valid)} images, by {valid.validation}) "
    if valid.scene is None or train.scene is None:
        text += "may share scenes with training, because they are unknown.**"
    else:
        shared = np.isin(valid.scene, train.scene).sum()
        one, many = ("scene", "scenes")
        if train.scene[0].startswith(RUN):  # nothing names the scenes
            one, many = ("run of neighbouring ids", "runs of neighbouring ids")
        text += (
            f"shares {many} with training in {shared} of them.**"
            if shared
            else f"shares no {one} with training.**"
        )
    return text + "".join(f"\n- {warning}" for warning, applies in warnings.items() if applies)


def describe_one_scene(scene: np.ndarray | None) -> str:
    """What to write into dataset.yaml where one scene has nearly all of the images; else nothing."""
    share = (
        0
        if scene is None or len(scene) < MANY
        else np.unique(scene, return_counts=True)[1].max() / len(scene)
    )
    if share < NEARLY_ALL:
        return ""
    return (
        f"One scene has {share:.0%} of the images, so that nothing can be concluded about new scenes. (Names that are "
        "numbers are read as frames of a video.) If each image shows a scene of its own, write `scene: '^(.*)$'` into "
        "`dataset.yaml`; else name there a .csv with the columns name,scene."
    )


def _explain_255(counts: DataCounts) -> str:
    if not counts.pixels[:, -1].any():
        return ""
    return " If label values that are read as unlabelled mean one of them, such as 255, say so under `classes` and `ignore`."


def count_test_images(data: str, limit: int | None, classes: str | None) -> int | None:
    """How many images the test split has; None where there is no such split."""
    try:
        return len(iterate_samples(data, "test", limit=limit, classes=classes))
    except MissingSplit:
        return None


def plot_samples(samples: Samples, shades: ScalarMappable | None) -> Figure:
    """A row for each sample: RGB, depth, labels."""
    label, rows = samples.labels_or_ignored, []
    for at, image in enumerate(samples.image):
        labels = plots.colour_labels(label[at], samples.classes)
        depth = plots.colour_depth(samples.depth_or_missing[at], shades)
        rows.append({"RGB": image, plots.DEPTH: depth, "labels": labels})
    return plots.plot_grid(rows, samples.names.tolist(), plots.class_patches(samples.classes, label), shades)


def plot_batch(samples: Samples, batch: "RawBatch", shades: ScalarMappable | None) -> Figure:
    """A row for each image of a batch: as it is stored, then as it trains."""
    image, depth, label, _, position = (tensor.numpy() for tensor in batch)
    stored = samples[position]
    rows = []
    for at in range(len(stored)):
        row = {"stored": stored.image[at], "as it trains": image[at]}
        row |= {plots.DEPTH: plots.colour_depth(depth[at], shades)}
        rows.append(row | {"labels": plots.colour_labels(label[at], samples.classes)})
    return plots.plot_grid(rows, stored.names.tolist(), plots.class_patches(samples.classes, label), shades)


@plots.styled
def plot_class_shares(counts: DataCounts) -> Figure:
    """By class on a log scale: its share of the labelled pixels, and of the images."""
    shares = class_shares(counts)[::-1]
    shares = shares[shares.pixels > 0]
    rows = np.arange(len(shares))
    figure, axes = plots.new_figure(plots.rows_height(len(rows)) + 0.3)
    axes.hlines(rows, shares.pixels, shares.images, color="0.85", zorder=0)
    axes.plot(shares.pixels, rows, "o", color=plots.GREY, label="share of the labelled pixels")
    axes.plot(shares.images, rows, "|", color=plots.GREY, label="share of the images")
    for row, share in zip(rows, shares.pixels, strict=True):
        words = {"va": "center", "ha": "right", "fontsize": "small", "color": plots.GREY}
        axes.text(share / 1.15, row, plots.percent(share, 1 if share >= 0.01 else 2), **words)
    plots.label_rows(axes, shares.index)
    axes.set(xscale="log", xlim=(shares.pixels.min() / 3, 1.3))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ratio = shares.pixels.iloc[-1] / shares.pixels.iloc[0]
    plots.add_title(figure, f"{shares.index[-1]} has {ratio:.0f} times as many pixels as {shares.index[0]}")
    plots.add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


@plots.styled
def plot_depth(counts: DataCounts) -> Figure:
    """The distribution of depth, of all pixels and of each class."""
    total = counts.depth.sum(0)
    rows = zip(counts.classes, counts.depth, strict=False)
    boxes = {name: _box(row, counts.steps_m) for name, row in rows if row[1:].any()}
    names = sorted(boxes, key=lambda name: -boxes[name]["med"])
    heights = 1.5, plots.rows_height(len(names))
    figure, (overall, by_class) = plots.new_figure(sum(heights), 2, 1, sharex=True, height_ratios=heights)
    overall.stairs(total[1:], counts.steps_m, fill=True, color=plots.BAR_COLOUR)
    whole = _box(total, counts.steps_m)
    overall.set(
        title=f"All pixels: nine in ten from {whole['whislo']:.1f} to {whole['whishi']:.1f} m", yticks=[]
    )
    overall.spines["left"].set_visible(False)
    by_class.bxp(
        [boxes[name] for name in names], range(len(names)), widths=0.7, orientation="horizontal",
        patch_artist=True, showfliers=False, showcaps=False,
        medianprops={"color": "black", "linewidth": 1.5},
        boxprops={"facecolor": plots.BAR_COLOUR, "linewidth": 0}, whiskerprops={"color": plots.GREY},
    )  # fmt: skip
    plots.label_rows(by_class, names)
    by_class.set(xlabel=plots.DEPTH, title="By class: half of its pixels in the box, nine in ten on the line")
    by_class.set_xlim(0, depth_quantiles(total, (0.999,), counts.steps_m)[0])
    return figure


def _box(histogram: np.ndarray, steps_m: np.ndarray) -> dict[str, float]:
    quantiles = depth_quantiles(histogram, (0.05, 0.25, 0.5, 0.75, 0.95), steps_m)
    return dict(zip(("whislo", "q1", "med", "q3", "whishi"), quantiles.tolist(), strict=True))


def plot_adjacency(counts: DataCounts) -> Figure:
    """Of the neighbours of each class (rows), the share of each other class (columns)."""
    names = counts.classes
    table = pd.DataFrame(counts.adjacency, pd.Index(names, name="class"), pd.Index(names, name="adjacent to"))
    one, other = np.unravel_index(counts.adjacency.argmax(), counts.adjacency.shape)
    title = (
        f"{names[one]} and {names[other]} are adjacent most often; in % of what the row's class borders on"
    )
    return plots.plot_matrix(table.div(table.sum(axis=1), axis=0), title)


def tabulate_leakage(leakage: dict[str, Leakage]) -> pd.DataFrame:
    """For each `validation`: the images on both sides and how many validation images resemble training images."""
    rows = {}
    for validation, leak in leakage.items():
        rows[validation] = {
            "training images": leak.train_count,
            "validation images": len(leak.valid),
            "sharing a scene": "unknown" if leak.same_scene is None else leak.same_scene.sum(),
            "exact copies": leak.copies,
            "near-duplicates": leak.near_duplicates,
            "expected by chance": round(leak.by_chance, 1),
        }
    return pd.DataFrame.from_dict(rows, "index").rename_axis("validation by")


def plot_leaks(samples: Samples, leak: Leakage, count: int = 2) -> Figure:
    """Validation images beside the training image most like them: those of one scene first, then the most alike."""
    alike = [_colour_signatures(samples.image[side]) for side in (leak.valid, leak.match)]
    shared = np.zeros(len(leak.valid)) if leak.same_scene is None else leak.same_scene
    order = np.argsort(-2 * shared - (alike[0] * alike[1]).sum(1), kind="stable")[:count]
    pairs, captions = [], []
    for valid, train in zip(leak.valid[order], leak.match[order], strict=True):
        pairs.append({"validation": samples.image[valid], "most similar in training": samples.image[train]})
        captions.append(
            f"{samples.names[valid]} and {samples.names[train]}{_relation(samples, valid, train)}"
        )
    return plots.plot_grid(pairs, captions)


def _relation(samples: Samples, one: int, other: int) -> str:
    if samples.scene is None:
        return ""
    return ": same room, other view" if samples.scene[one] == samples.scene[other] else ": different rooms"
