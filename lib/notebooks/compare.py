"""Runs to compare: which ones there are, whether they may be compared, which are of one recipe; their figures."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from lib.files import ROOT
from lib.metrics import iou, pixel_accuracy
from lib.notebooks import plots, style
from lib.runs.results import ScoredRun
from lib.significance import SceneComparison, score_interval

TABLES = ROOT / "lib" / "data" / "tables"


def score_table(recipes: dict[str, list[ScoredRun]]) -> pd.DataFrame:
    """A row for each run: recipe, seed, mIoU with its interval over scenes, pixel accuracy."""
    columns, rows = ("recipe", "run", "seed", "mIoU", "low", "high", "pixel accuracy"), []
    for name, run in ((name, run) for name, members in recipes.items() for run in members):
        scored = score_interval(run.counts, run.scene)
        found = scored.score, *scored.interval, pixel_accuracy(run.counts)
        rows.append((name, run.name, run.parameters["seed"], *found))
    return pd.DataFrame(rows, columns=columns).set_index(["recipe", "run"]) if rows else pd.DataFrame()


def show_scores(table: pd.DataFrame) -> Styler:
    """The table of `score_table` for a notebook: three digits, names of runs on one line."""
    one_line = {"selector": "th", "props": "white-space: nowrap"}
    return style(table).format("{:.3f}", subset=table.columns.drop("seed")).set_table_styles([one_line])


def read_published(table: str, experiments: str) -> pd.DataFrame:
    """Published figures of some experiments, names with commas between: `experiments`, `class_iou` or `progression`."""
    figures = pd.read_csv(TABLES / f"published_{table}.csv").set_index("experiment")
    names = [name.strip() for name in experiments.split(",") if name.strip()]
    unknown = sorted(set(names) - set(figures.index))
    if unknown:
        raise ValueError(
            f"published: found {', '.join(unknown)}, there are: {', '.join(figures.index.unique())}"
        )
    return figures.loc[names]


@plots.styled
def plot_comparison(
    recipes: dict[str, list[ScoredRun]], differences: dict[str, SceneComparison | None]
) -> Figure:
    """IoU by class of every run and the mean of its recipe; on the same rows differences to the first recipe.

    A filled mark has p < 0.05 (after Holm for classes).
    """
    differences = {name: result for name, result in differences.items() if result is not None}
    baseline, members = next(iter(recipes.items()))
    order = np.argsort(-np.nan_to_num(_scores_by_class(members).mean(0)[1:]), kind="stable")
    images = (members[0].counts.sum(2) > 0).sum(0)
    names = [
        "mIoU",
        *(f"{plots.shorten(members[0].classes[index], 20)} ({images[index]})" for index in order),
    ]
    thickness = (0.22 if len(names) <= plots.FEW else 0.15) + 0.06 * max(len(differences) - 1, 0)
    height = 1 + thickness * len(names)
    figure, (left, right) = plots.new_figure(height, 1, 2, sharey=True, width_ratios=(1.2, 1))
    colours = dict(zip(recipes, plots.run_colours(len(recipes)), strict=True))
    for name, runs in recipes.items():
        _draw_scores(left, _scores_by_class(runs)[:, [0, *(order + 1)]], colours[name], name)
    offsets = np.linspace(-0.35, 0.35, 2 * len(differences) + 1)[1::2]
    for offset, (name, result) in zip(offsets, differences.items(), strict=True):
        _draw_differences(right, result, order, offset, colours[name], numbers=len(differences) == 1)
    swatches = plots.class_colours(members[0].classes)
    for row, index in enumerate(order, start=1):
        colour = swatches[members[0].classes[index]]
        left.plot(
            -0.03, row, "s", color=colour, markeredgecolor=plots.GREY, markersize=7, clip_on=False, zorder=4
        )
    for axes in (left, right):
        axes.axhline(0.5, color="0.85", linewidth=1)
        axes.grid(axis="x", color="0.92")
    left.set_yticks(range(len(names)), names, fontsize="medium" if len(names) <= plots.FEW else "x-small")
    left.set(
        title="IoU by class (images with it)", xlabel="IoU", xlim=(-0.03, 1), ylim=(len(names) - 0.5, -0.5)
    )
    right.axvline(0, color=plots.GREY, linewidth=1)
    baseline = baseline if len(baseline) <= 28 else "the first recipe"
    right.set(title=f"Difference to {baseline}", xlabel="difference in IoU, 95 % interval")
    plots.add_legend(figure, left.get_legend_handles_labels()[0])
    return figure


def _scores_by_class(members: list[ScoredRun]) -> np.ndarray:
    """`(runs, 1 + C)`: the mIoU of each, then its IoU by class."""
    return np.array([[run.score, *iou(run.counts)] for run in members])


def _draw_scores(axes: Axes, scores: np.ndarray, colour: tuple, name: str) -> None:
    """A small dot for each run, a large one for their mean."""
    rows, mean = np.arange(scores.shape[1]), scores.mean(0)
    label = f"{plots.shorten(name, 60)}: mIoU {mean[0]:.3f}"
    if len(scores) > 1:
        axes.plot(scores.T, rows, ".", color=colour, alpha=0.4, markersize=4)
        label += f", mean of {len(scores)}"
    axes.plot(mean, rows, "o", color=colour, label=label)


def _draw_differences(
    axes: Axes, result: SceneComparison, order: np.ndarray, offset: float, colour: tuple, numbers: bool
) -> None:
    middle = np.append(result.difference, result.class_difference[order])
    low, high = np.column_stack((result.interval, result.class_interval[:, order]))
    clear = np.append(result.p_value, result.class_p_value[order]) < 0.05
    rows = np.arange(len(middle)) + offset
    axes.hlines(rows, low, high, color=colour, linewidth=1.5)
    for filled, face in ((clear, colour), (~clear, "white")):
        axes.plot(middle[filled], rows[filled], "o", color=colour, markerfacecolor=face)
    for row, value in zip(rows, middle, strict=True):
        if numbers and np.isfinite(value):
            place = {"xy": (1.02, row), "xycoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate(f"{round(value, 3) + 0:+.3f}", color=plots.GREY, **place)


@plots.styled
def plot_published(table: pd.DataFrame) -> Figure:
    """IoU by class (rows) of published experiments (columns), a hollow dot each."""
    table = table.iloc[np.argsort(table.mean(axis=1))]
    figure, axes = plots.new_figure(plots.rows_height(len(table)))
    for name, colour in zip(table, plots.run_colours(len(table.columns)), strict=True):
        label = f"{name}: mean {table[name].mean():.3f}"
        axes.plot(table[name], range(len(table)), "o", color=colour, markerfacecolor="none", label=label)
    plots.label_rows(axes, table.index)
    axes.grid(color="0.92")
    axes.set(title="Published: single runs on 159 validation images of NYUv2", xlabel="IoU", xlim=(0, 1))
    plots.add_legend(figure, axes.get_legend_handles_labels()[0])
    return figure
