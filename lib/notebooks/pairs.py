"""Two runs, image by image: on which images B scores higher than A, and what it fixes and breaks there."""

import numpy as np
from matplotlib.figure import Figure

from lib.classes import IGNORE_INDEX
from lib.data import Samples
from lib.metrics import mean_truth_iou
from lib.notebooks import plots
from lib.options import check_choice
from lib.runs.results import ScoredRun
from lib.runs.scoring import iterate_split


def choose_pair(recipes: dict[str, list[ScoredRun]], compare_with: str | None = None) -> dict[str, ScoredRun]:
    """By recipe, the first run of the baseline (A) and of another recipe (B); None takes the last, empty if alone."""
    if len(recipes) < 2:
        return {}
    baseline, *others = recipes
    if compare_with is not None:
        check_choice("compare_with", compare_with, others)
    return {name: recipes[name][0] for name in (baseline, compare_with or others[-1])}


def image_scores(counts: np.ndarray) -> np.ndarray:
    """mIoU of each image over the classes in its truth, `(N,)` of `(N, C, C)`; NaN without a labelled pixel."""
    return np.array([mean_truth_iou(image) if image.any() else np.nan for image in counts])


def choose_images(gains: np.ndarray) -> np.ndarray:
    """Positions of the two largest gains and of the largest loss, as far as there are."""
    order = np.argsort(-gains, kind="stable")[: np.isfinite(gains).sum()]
    return np.concatenate((order[:2][gains[order[:2]] > 0], order[-1:][gains[order[-1:]] < 0]))


@plots.styled
def plot_pair(pair: dict[str, ScoredRun]) -> Figure:
    """B against A, a dot for each image; those of `choose_images` are named."""
    (first, second), names = (
        (image_scores(run.counts) for run in pair.values()),
        next(iter(pair.values())).names,
    )
    gains, limit = second - first, min(1, 0.05 + np.nanmax((first, second)))
    figure, axes = plots.new_figure(4.6, width=5)
    axes.plot([0, 1], [0, 1], ":", color=plots.GREY, linewidth=1)
    axes.plot(first, second, "o", color=plots.VALID_COLOUR, alpha=0.5, markersize=4)
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
    for index in choose_images(gains):
        place = first[index], second[index]
        axes.plot(*place, "o", color="black", markerfacecolor="none")
        side, shift = ("right", -6) if place[0] > 0.5 * limit else ("left", 6)
        axes.annotate(plots.shorten(names[index], 20), place, (shift, 0), textcoords="offset points",
                      ha=side, va="center", fontsize="small", bbox=box)  # fmt: skip
    title = (
        f"B higher on {(gains > 0).sum()} of {np.isfinite(gains).sum()} images, lower on {(gains < 0).sum()}"
    )
    words = [f"{plots.shorten(name, 40)}, mIoU of an image" for name in pair]
    axes.set(title=title, xlabel=f"A: {words[0]}", ylabel=f"B: {words[1]}")
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    return figure


def plot_pair_images(pair: dict[str, ScoredRun]) -> Figure | str:
    """The images of `choose_images`: RGB, ground truth, A, B, what B fixes and breaks; or, in words, what is missing.

    Over the faded image, pixels that are correct only in B (fixes) or only in A (breaks), in the colour of the class
    that B predicts.
    """
    first, second = pair.values()
    gains = image_scores(second.counts) - image_scores(first.counts)
    chosen = choose_images(gains)
    try:
        masks = [run.read_masks(first.names[chosen].tolist()) for run in (first, second)]
    except FileNotFoundError as error:
        return f"No images: `{error.filename}` was not saved; pooled folds and studies have no predictions."
    try:
        images = _read_images(first, chosen)
    except ValueError as error:
        return f"No images, because they can't be read: {error}."
    rows = [_draw_row(*row) for row in zip(images, *masks, strict=True)]
    captions = [f"{first.names[index]}: {gains[index]:+.2f}" for index in chosen]
    shown = [*masks[0], *masks[1], *(sample.labels_or_ignored[0] for sample in images)]
    return plots.plot_grid(rows, captions, plots.class_patches(first.classes, shown))


def _draw_row(sample: Samples, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    image, label, classes = sample.image[0], sample.labels_or_ignored[0], sample.classes
    return {
        "RGB": plots.reduce_colours(image),
        "ground truth": plots.colour_labels(label, classes),
        "B fixes (blue), breaks (orange)": plots.colour_changes(image, label, a, b),
        "A": plots.colour_labels(a, classes),
        "B": plots.colour_labels(b, classes),
    }


def _read_images(run: ScoredRun, chosen: np.ndarray) -> list[Samples]:
    """The images at these positions of the run, one by one."""
    pieces = iterate_split(run.parameters, run.split, run.data)
    position = {name: at for at, name in enumerate(pieces.names.tolist())}
    missing = [name for name in run.names[chosen].tolist() if name not in position]
    if missing:
        raise ValueError(f"{run.data} has no {missing[0]}")
    positions = np.array([position[name] for name in run.names[chosen].tolist()])
    return [piece[[at]] for piece in pieces[positions] for at in range(len(piece))]
