"""Two runs, image by image: on which images B scores higher than A, and what it fixes and breaks there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lib.data import Samples, Split
from lib.metrics import mean_truth_iou
from lib.notebooks import plots
from lib.notebooks.browse import Browser, browse_results
from lib.notebooks.conclusions import match_seeds, name_run
from lib.notebooks.evaluate import saved_look
from lib.options import check_choice
from lib.runs.results import ScoredRun
from lib.runs.scoring import iterate_split


class Pair(NamedTuple):
    """Two runs on the same images, and what their recipes are called."""

    a: ScoredRun
    b: ScoredRun
    a_name: str
    b_name: str

    @property
    def gains(self) -> np.ndarray:
        """`(N,)` mIoU of each image in B minus that in A; NaN without a labelled pixel."""
        return image_scores(self.b.counts) - image_scores(self.a.counts)

    def open(self, chosen: np.ndarray) -> Split:
        """The images at these positions of the counts.

        Raises:
            ValueError: predictions that were not saved, or images that can't be read.
        """
        names = self.a.names[chosen].tolist()
        try:
            for run in (self.a, self.b):
                run.read_masks(names)
        except FileNotFoundError as error:
            raise ValueError(
                f"`{error.filename}` was not saved; pooled folds and studies have no predictions"
            ) from None
        return _select_names(
            iterate_split(self.a.parameters, self.a.split, self.a.data, run=self.a.folder), names
        )


def choose_pair(recipes: dict[str, list[ScoredRun]], compare_with: str | None = None) -> Pair | None:
    """A run of the baseline (A) and of another recipe (B), of one seed if possible, by default the last recipe.

    None if there is one recipe only.
    """
    if len(recipes) < 2:
        return None
    baseline, *others = recipes
    if compare_with is not None:
        check_choice("compare_with", compare_with, others)
    names = (baseline, compare_with or others[-1])
    sides = [recipes[name] for name in names]
    first, second = (*match_seeds(*sides), [side[0] for side in sides])[0]
    return Pair(first, second, name_run(first, names[0]), name_run(second, names[1]))


def image_scores(counts: np.ndarray) -> np.ndarray:
    """mIoU of each image over the classes in its truth, `(N,)` of `(N, C, C)`; NaN without a labelled pixel."""
    return np.array([mean_truth_iou(image) if image.any() else np.nan for image in counts])


def choose_images(gains: np.ndarray) -> np.ndarray:
    """Positions of the two largest gains and of the largest loss, as far as there are."""
    order = np.argsort(-gains, kind="stable")[: np.isfinite(gains).sum()]
    best = [at for at in order[:2] if gains[at] > 0]
    worst = [at for at in order[-1:] if gains[at] < 0]
    return np.array([*best, *worst], int)


@plots.styled
def plot_pair(pair: Pair) -> Figure:
    """B against A, a dot for each image; those of `choose_images` are named."""
    first, second = (image_scores(run.counts) for run in (pair.a, pair.b))
    gains = pair.gains
    limit = min(1, 0.05 + np.nanmax((first, second)))
    figure, axes = plots.new_figure(4.6, width=5)
    axes.plot([0, 1], [0, 1], ":", color=plots.GREY, linewidth=1)
    axes.plot(first, second, "o", color=plots.GREY, alpha=0.5, markersize=4)
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
    for index in choose_images(gains):
        place = first[index], second[index]
        axes.plot(*place, "o", color="black", markerfacecolor="none")
        side, shift = ("right", -6) if place[0] > 0.5 * limit else ("left", 6)
        axes.annotate(plots.shorten(pair.a.names[index], 20), place, (shift, 0), textcoords="offset points",
                      ha=side, va="center", fontsize="small", bbox=box)  # fmt: skip
    higher, lower = (gains > 0).sum(), (gains < 0).sum()
    title = f"B higher on {higher} of {np.isfinite(gains).sum()} images, lower on {lower}"
    a_words, b_words = (f"{plots.shorten(name, 40)}, mIoU of an image" for name in (pair.a_name, pair.b_name))
    axes.set(title=title, xlabel=f"A: {a_words}", ylabel=f"B: {b_words}")
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    return figure


def plot_pair_images(pair: Pair) -> Figure | str:
    """The images of `choose_images`: RGB, ground truth, A, B, what B fixes and breaks; or, in words, what is missing."""
    gains = pair.gains
    chosen = choose_images(gains)
    try:
        split = pair.open(chosen)
    except ValueError as error:
        return f"No images: {error}."
    samples = split_images(split)
    a_masks, b_masks = (run.read_masks(pair.a.names[chosen].tolist()) for run in (pair.a, pair.b))
    rows = [_draw_row(*row) for row in zip(samples, a_masks, b_masks, strict=True)]
    captions = [f"{pair.a.names[index]}: mIoU of B {gains[index]:+.2f}" for index in chosen]
    shown = [*a_masks, *b_masks, *(sample.labels_or_ignored[0] for sample in samples)]
    return plots.plot_grid(rows, captions, plots.class_patches(pair.a.classes, shown))


def _draw_row(sample: Samples, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    image, label, classes = sample.image[0], sample.labels_or_ignored[0], sample.classes
    return {
        "RGB": image,
        "ground truth": plots.colour_labels(label, classes),
        plots.CHANGED: plots.colour_changes(image, label, a, b),
        "A": plots.colour_labels(a, classes),
        "B": plots.colour_labels(b, classes),
    }


def browse_pair(pair: Pair, interactive: bool | None = None) -> Browser | Figure | None:
    """Goes through the images of both runs, from the largest gain of B on; None where they can't be read.

    A study keeps the predictions of a few images; these are shown.
    """
    runs = {pair.a_name: pair.a, pair.b_name: pair.b}
    kept = [list(run.masks) for run in runs.values() if run.masks is not None]
    there = np.flatnonzero(np.all([np.isin(pair.a.names, names) for names in [pair.a.names, *kept]], axis=0))
    try:
        split = pair.open(there)
    except ValueError:
        return None
    counts = {name: run.counts[there] for name, run in runs.items()}
    looks = {name: saved_look(run.read_masks) for name, run in runs.items()}
    return browse_results(split, counts, looks, interactive=interactive)


def read_images(split: Split, names: Sequence[str]) -> list[Samples]:
    """The images of these names, one by one.

    Raises:
        ValueError: the split has no such image.
    """
    return split_images(_select_names(split, names)) if len(names) else []


def split_images(split: Split) -> list[Samples]:
    """All images of a small split, one by one."""
    return [piece[[at]] for piece in split[np.arange(len(split))] for at in range(len(piece))]


def _select_names(split: Split, names: Sequence[str]) -> Split:
    position = {name: at for at, name in enumerate(split.names.tolist())}
    missing = [name for name in names if name not in position]
    if missing:
        raise ValueError(f"{split.data} has no {missing[0]}")
    return split.select(np.array([position[name] for name in names], int))
