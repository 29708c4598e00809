"""Score tables, introductory text, and figures for the comparison of runs."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from lib.metrics import mean_iou, pixel_accuracy, strata_edges, truth_iou
from lib.notebooks import plots, style
from lib.notebooks.conclusions import Result
from lib.notebooks.error_analysis import name_bins
from lib.runs.results import EXAMPLE, ScoredRun, differing_settings, read_own_runs
from lib.significance import (
    LEVEL,
    CheckpointComparison,
    SceneComparison,
    compare_recipes,
    score_interval,
)

A_A_ARM = "baseline_again"  # group in the committed example
EXAMPLE_NOTE = (
    f"This is the committed example (studies/{EXAMPLE.name}). `{A_A_ARM}` is `baseline` with other seeds, an "
    "A/A pair: a significant difference would be a false alarm, which 5 % of such comparisons give. "
    "`tenth_learning_rate` has a tenth of the learning rate, a real effect that the recipe test should find."
)


def score_table(recipes: dict[str, list[ScoredRun]]) -> pd.DataFrame:
    """Return the mIoU of each run, its 95 % interval over scenes, and its pixel accuracy.

    The index is the recipe and the seed, with the name of the run if it is the only one of its recipe.
    """
    columns = ("recipe", "run", "mIoU", "low", "high", "pixel accuracy")
    rows = []
    for name, members in recipes.items():
        for run in members:
            seed = f"seed {run.parameters['seed']}"
            label = seed if len(members) > 1 else f"{run.name}, {seed}"
            estimate = score_interval(run.counts, run.scene)
            rows.append((name, label, estimate.score, *estimate.interval, pixel_accuracy(run.counts)))
    return pd.DataFrame(rows, columns=columns).set_index(["recipe", "run"]) if rows else pd.DataFrame()


def show_scores(table: pd.DataFrame) -> Styler:
    """Format the table from `score_table` with three decimals and without line breaks in run names."""
    one_line = {"selector": "th", "props": "white-space: nowrap"}
    return style(table).format("{:.3f}").set_table_styles([one_line])


def introduce_runs(
    runs: list[ScoredRun], recipes: dict[str, list[ScoredRun]], split: str, where: str | None = None
) -> str:
    """Describe in Markdown how many runs are compared, on which data, and how the recipes differ.

    Differences that are already the name of the recipe are left out. If the committed example is shown, it is
    explained, and your own runs that were scored on other images are listed.
    """
    data = ", ".join(sorted({run.data for run in runs}))
    intro = f"{len(runs)} runs match and were" if where else f"{len(runs)} runs were"
    lines = [f"{intro} scored on split {split} of {data or 'no data'}."]
    shown_count = sum(map(len, recipes.values()))
    if shown_count < len(runs):
        lines[0] += f" The five folds of each recipe and seed count as one run: {shown_count} are shown."
    if any(run.group == A_A_ARM for run in runs):
        lines.append(EXAMPLE_NOTE)
        absent = {run.name for run in read_own_runs(split, None)} - {run.name for run in runs}
        lines += [
            f"Your run {name} was scored on other images, so it is not shown here." for name in sorted(absent)
        ]
    settings = differing_settings(recipes).items()
    differing = [f"- {name}: {values}" for name, values in settings if values and values != name]
    if differing:
        lines.append("\n".join(differing))
    return "\n\n".join(lines)


@plots.styled
def plot_comparison(
    recipes: dict[str, list[ScoredRun]], results: dict[str, Result], colours: dict[str, tuple]
) -> Figure:
    """Plot the IoU by class of all runs and recipe means and, on the right, differences from the baseline.

    The differences come from the recipe test if available, otherwise from the checkpoint test of the pair. A
    filled mark is significant by the recipe test (p < 0.05). P-values and intervals are Bonferroni-adjusted,
    those of the mIoU for the number of comparisons and those of a class for the number of classes tested.
    Intervals are cut where an IoU would leave 0..1, and a triangle marks the cut.

    Args:
        recipes: runs by recipe, the baseline first.
        results: results by name of the other recipes.
        colours: colours of the recipes by name, see `run_colours`.
    """
    tests = {name: result.recipe_test or result.checkpoint_test for name, result in results.items()}
    available = {name: test for name, test in tests.items() if test is not None}
    baseline, members = next(iter(recipes.items()))
    means = _scores_by_class(members).mean(0)
    order = np.argsort(-np.nan_to_num(means[1:]), kind="stable")
    row_height = (0.22 if len(order) < plots.FEW else 0.15) + 0.06 * max(len(available) - 1, 0)
    figure, (left, right) = plots.new_figure(
        1 + row_height * (1 + len(order)), 1, 2, sharey=True, width_ratios=(1.2, 1)
    )
    columns = [0, *(order + 1)]
    for name, runs in recipes.items():
        _draw_scores(left, _scores_by_class(runs)[:, columns], colours[name], name)
    edges = np.linspace(-0.35, 0.35, len(available) + 1)  # of the recipes' bands within a row
    offsets = (edges[:-1] + edges[1:]) / 2
    is_cut = False
    for offset, (name, test) in zip(offsets, available.items(), strict=True):
        is_cut |= _draw_differences(right, test, order, offset, colours[name], means[columns])
        if len(available) == 1:
            _annotate_differences(right, np.append(test.difference, test.class_difference[order]))
    _mark_unpredicted(right, recipes, order)
    for axes in (left, right):
        axes.axhline(0.5, color="0.85", linewidth=1)
        axes.grid(axis="x", color="0.92")
    _label_classes(left, members[0], order)
    left.set(
        title="IoU by class (number of images)", xlabel="IoU", xlim=(-0.03, 1), ylim=(len(order) + 0.5, -0.5)
    )
    right.axvline(0, color=plots.GREY, linewidth=1)
    baseline = baseline if len(baseline) <= 28 else "the first recipe"
    right.set(title=f"Difference from {baseline}", xlabel=_describe_marks(available.values(), is_cut))
    plots.add_legend(figure, left.get_legend_handles_labels()[0])
    return figure


def _describe_marks(tests: Iterable[SceneComparison], is_cut: bool) -> str:
    """Return the axis label of the right panel, which may show both recipe and checkpoint tests."""
    is_single = [isinstance(test, CheckpointComparison) for test in tests]
    lines = [
        (bool(is_single), "difference, adjusted 95 % interval"),
        (not is_single, "difference in IoU"),
        (not all(is_single), "filled: p < 0.05 by the recipe test"),
        (any(is_single), "one run: checkpoint test, not recipes"),
        (is_cut, "triangle: cut at IoU 0 or 1"),
    ]
    return "\n".join(line for applies, line in lines if applies)


def _label_classes(axes: Axes, run: ScoredRun, order: np.ndarray) -> None:
    """Label the rows with class names and the number of images that contain the class."""
    images = (run.counts.sum(2) > 0).sum(0)
    names = ["mIoU", *(f"{plots.shorten(run.classes[index], 20)} ({images[index]})" for index in order)]
    axes.set_yticks(range(len(names)), names, fontsize="medium" if len(names) <= plots.FEW else "x-small")


def _mark_unpredicted(axes: Axes, recipes: dict[str, list[ScoredRun]], order: np.ndarray) -> None:
    """Annotate the classes whose IoU is 0 because no run predicts them."""
    counts = [run.counts.sum(0) for runs in recipes.values() for run in runs]
    unpredicted = (counts[0].sum(1) > 0) & (sum(counts).sum(0) == 0)
    low, high = axes.get_xlim()
    side = "right" if high < -low else "left"  # the wider side of 0
    for row in 1 + np.flatnonzero(unpredicted[order]):
        text = f"   not predicted by {'either' if len(recipes) == 2 else 'any'}   "
        axes.annotate(text, (0, row), ha=side, va="center", fontsize="small", color=plots.GREY)


def _scores_by_class(members: list[ScoredRun]) -> np.ndarray:
    """Return `(runs, 1 + C)` scores: the mIoU of each run, then its IoU by class in the ground truth."""
    return np.array([[run.score, *truth_iou(run.counts)] for run in members])


def _draw_scores(axes: Axes, scores: np.ndarray, colour: tuple, name: str) -> None:
    """Draw a small dot for each run and a large dot for their mean."""
    rows = np.arange(scores.shape[1])
    mean = scores.mean(0)
    runs = "one run" if len(scores) == 1 else f"mean of {len(scores)} runs (small dots)"
    axes.plot(scores.T, rows, ".", color=colour, alpha=0.4, markersize=4)
    axes.plot(mean, rows, "o", color=colour, label=f"{plots.shorten(name, 60)}: mIoU {mean[0]:.3f}, {runs}")


def _draw_differences(
    axes: Axes, test: SceneComparison, order: np.ndarray, offset: float, colour: tuple, baseline: np.ndarray
) -> bool:
    """Draw a mark and an interval per row and return whether an interval was cut.

    `baseline` is the `(1 + C,)` mIoU and class IoU of the baseline, in the order of the rows.
    """
    differences = np.append(test.difference, test.class_difference[order])
    interval = np.column_stack((test.interval, test.class_interval[:, order]))
    clipped = interval.clip(-baseline, 1 - baseline)
    significant = np.append(test.p_value, test.class_p_value[order]) < LEVEL
    if isinstance(test, CheckpointComparison):
        significant[:] = False  # a filled mark would suggest a difference between recipes
    rows = np.arange(len(differences)) + offset
    axes.hlines(rows, *clipped, color=colour, linewidth=1.5)
    is_cut = np.isfinite(clipped) & (clipped != interval)
    for ends, cut, marker in zip(clipped, is_cut, "<>", strict=True):
        axes.plot(ends[cut], rows[cut], marker, color=colour, markersize=5)
    plots.draw_marks(axes, differences, rows, significant, colour)
    return bool(is_cut.any())


def _annotate_differences(axes: Axes, differences: np.ndarray) -> None:
    for row in np.flatnonzero(np.isfinite(differences)):
        text = f"{round(differences[row], 3) + 0:+.3f}"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", color=plots.GREY)


def compare_strata(baseline: list[ScoredRun], members: list[ScoredRun], farthest_m: float) -> pd.DataFrame:
    """Perform the recipe test separately on the pixels of each bin of each available stratum, such as depth.

    Args:
        baseline: runs of the baseline recipe with strata.
        members: runs of the other recipe with strata, on the same scenes.
        farthest_m: upper end of the depth range, in metres, with which the strata were counted.

    Returns:
        One row per stratum and bin with pixels: the bin's share of the pixels, the mIoU of the baseline over
        the classes in the bin, the difference, the ends of its interval, and p. Interval and p are
        Bonferroni-adjusted for the number of bins of the stratum.
    """
    rows = []
    for name, edges in strata_edges(farthest_m).items():
        if name not in (baseline[0].strata or {}):
            continue
        sides = [
            np.stack([run.strata[name] for run in side]).astype(np.int64) for side in (baseline, members)
        ]
        pixels = sides[0][0].sum((0, 2, 3))
        bins = np.flatnonzero(pixels)
        for index in bins:
            baseline_counts, other_counts = (side[:, :, index] for side in sides)
            test = compare_recipes(baseline_counts, other_counts, None).adjusted(len(bins))
            score = np.mean([mean_iou(run) for run in baseline_counts])
            numbers = (test.difference, *test.interval, test.p_value)
            rows.append((name, name_bins(name, edges)[index], pixels[index] / pixels.sum(), score, *numbers))
    columns = ["stratum", "bin", "pixels", "mIoU of the baseline", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


@plots.styled
def plot_strata_differences(table: pd.DataFrame, title: str) -> Figure:
    """Plot the differences from `compare_strata` with their intervals, one panel per stratum.

    Filled marks are significant (p < 0.05).
    """
    strata = table.groupby("stratum", sort=False)
    figure, grid = plots.new_figure(3, 1, len(strata), sharey=True, squeeze=False)
    for axes, (name, rows) in zip(grid[0], strata, strict=True):
        positions = np.arange(len(rows))
        axes.vlines(positions, rows.low, rows.high, color=plots.VALID_COLOUR, linewidth=1.5)
        plots.draw_marks(
            axes, positions, rows.difference.to_numpy(), (rows.p < LEVEL).to_numpy(), plots.VALID_COLOUR
        )
        axes.axhline(0, color=plots.GREY, linewidth=1)
        axes.set(title=f"by {name}".replace(" (", "\n("), xticks=positions, xticklabels=rows.bin)
        axes.grid(axis="y", color="0.92")
    grid[0, 0].set_ylabel("difference in mIoU, 95 % interval")
    plots.add_title(figure, title)
    return figure
