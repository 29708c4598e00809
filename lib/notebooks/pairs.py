"""Compare two runs, A and B, image by image: where B scores higher, and what it fixes and breaks."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lib.data import Split
from lib.notebooks import Markdown, plots
from lib.notebooks.browse import Browser, browse_results, image_scores
from lib.notebooks.conclusions import match_seeds, name_run
from lib.notebooks.evaluate import saved_predictor
from lib.options import check_choice
from lib.runs.results import ScoredRun
from lib.runs.scoring import iterate_split


def choose_pair(recipes: dict[str, list[ScoredRun]], compare_with: str | None = None) -> dict[str, ScoredRun]:
    """Choose one run of the baseline (A) and one of another recipe (B), with the same seed if possible.

    Args:
        recipes: runs by recipe, the baseline first.
        compare_with: name of recipe B; if None, the last recipe.

    Returns:
        The two runs by name, A first; empty if there is only one recipe.

    Raises:
        ValueError: if `compare_with` is not one of the other recipes.
    """
    if len(recipes) < 2:
        return {}
    baseline, *others = recipes
    other = compare_with or others[-1]
    check_choice("compare_with", other, others)
    pairs = match_seeds(recipes[baseline], recipes[other])
    first, second = pairs[0] if pairs else (recipes[baseline][0], recipes[other][0])
    return {name_run(first, baseline): first, name_run(second, other): second}


@plots.styled
def plot_pair(pair: dict[str, ScoredRun]) -> Figure:
    """Plot the mIoU of B against that of A, one dot per image; B scores higher above the diagonal."""
    first, second = (image_scores(run.counts) for run in pair.values())
    figure, axes = plots.new_figure(4.6, width=5)
    axes.plot([0, 1], [0, 1], ":", color=plots.GREY, linewidth=1)
    axes.plot(first, second, "o", color=plots.GREY, alpha=0.5, markersize=4)
    a_label, b_label = (f"{plots.shorten(name, 40)}, mIoU of an image" for name in pair)
    limits = (0, min(1, 0.05 + np.nanmax((first, second))))
    axes.set(
        title=f"B higher on {(second > first).sum()} of {np.isfinite(first).sum()} images, lower on "
        f"{(second < first).sum()}\n(no test: images of a scene are alike)",
        xlabel=f"A: {a_label}",
        ylabel=f"B: {b_label}",
        xlim=limits,
        ylim=limits,
        aspect="equal",
    )
    return figure


def browse_pair(pair: dict[str, ScoredRun], interactive: bool | None = None) -> Browser | Figure | Markdown:
    """Browse the images of both runs, the largest gain of B first.

    A study saves the predictions of a few images, and only these are shown. If predictions or images are
    missing, a message is returned instead. For `interactive` see `browse`.
    """
    first = next(iter(pair.values()))
    saved = [list(run.masks) for run in pair.values() if run.masks is not None]
    common = np.flatnonzero(np.all([np.isin(first.names, names) for names in [first.names, *saved]], axis=0))
    names = first.names[common].tolist()
    try:
        for run in pair.values():
            run.read_masks(names)
        all_images = iterate_split(first.parameters, first.split, first.data, run=first.folder)
        split = select_names(all_images, names)
    except FileNotFoundError as error:
        return Markdown(f"No images: the predictions of these runs were not kept (`{error.filename}`).")
    except ValueError as error:
        return Markdown(f"No images: {error}.")
    counts = {name: run.counts[common] for name, run in pair.items()}
    predictors = {name: saved_predictor(run.read_masks) for name, run in pair.items()}
    return browse_results(split, counts, predictors, interactive=interactive)


def select_names(split: Split, names: Sequence[str]) -> Split:
    """Return the split restricted to the named images, in the order of `names`.

    Raises:
        ValueError: if the split lacks one of the images.
    """
    position = {name: index for index, name in enumerate(split.names.tolist())}
    missing = [name for name in names if name not in position]
    if missing:
        raise ValueError(f"{split.data} has no {missing[0]}")
    return split.select(np.array([position[name] for name in names], int))
