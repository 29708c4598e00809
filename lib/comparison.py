"""Runs to compare: which ones there are, whether they may be compared, which are of one recipe; their figures."""

from dataclasses import replace
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from lib import plots
from lib.classes import check_same_classes
from lib.data import PARTS
from lib.data.splits import FOLDS
from lib.metrics import iou, pixel_accuracy
from lib.parameters import check_choice
from lib.runs import BEFORE, PLACES, recipe, runs_folder
from lib.scoring import ScoredRun, read_scored
from lib.significance import SceneComparison, score_interval

LIB = Path(__file__).resolve().parent
TABLES = LIB / "data" / "tables"
NOTEBOOKS = LIB.parent / "notebooks"
EXAMPLE = NOTEBOOKS / "experiments" / "results" / "embedded"  # committed runs, without weights, in folders


def read_runs(runs: str, part: str, data: str | None = None) -> list[ScoredRun]:
    """The runs to compare, of which weights are not needed.

    Args:
        runs: names or paths of runs (with `*` for some of a folder), or of folders full of runs, with commas between;
            or `all`: every run in the folder of runs that is scored on the part. Where these are fewer than two,
            `all` takes the committed example.
        part: `train`, `valid` or `test`.
        data: with `all`, only runs scored on this data; None takes that of the latest evaluation.

    Raises:
        ValueError: a run that is missing or not scored.
    """
    check_choice("part", part, PARTS)
    if runs != "all":
        entries = [entry.strip() for entry in runs.split(",") if entry.strip()]
        return [run for entry in entries for run in _read_entry(entry, part)]
    files = sorted(runs_folder().glob(f"*/evaluation/{part}.json"), key=lambda path: path.stat().st_mtime)
    own = [read_scored(path.parents[1], part) for path in files if path.with_suffix(".npz").exists()]
    chosen = [run for run in own if Path(run.data).expanduser() == Path(data or own[-1].data).expanduser()]
    if len(chosen) < 2 and data is None:
        examples = sorted(path.parents[1] for path in EXAMPLE.glob(f"*/*/evaluation/{part}.json"))
        chosen = [replace(read_scored(run, part), group=run.parent.name) for run in examples] or chosen
    return sorted(chosen, key=lambda run: (run.group, run.name))


def _read_entry(entry: str, part: str) -> list[ScoredRun]:
    """A run, or all of a folder, which is then the group that they are of."""
    for home in (runs_folder(), Path(), NOTEBOOKS):
        folder = home / Path(entry).expanduser()
        if (folder / "parameters.json").exists():
            return [read_scored(folder, part)]
        if "*" in entry and (some := sorted(path.parent for path in map(Path, glob(f"{folder}/parameters.json")))):
            return [read_scored(run, part) for run in some]
        if inside := sorted(path.parent for path in folder.glob("*/parameters.json")):
            return [replace(read_scored(run, part), group=folder.name) for run in inside]
    there = ", ".join(sorted(path.parent.name for path in runs_folder().glob("*/parameters.json"))) or "none"
    raise ValueError(f"runs: found {entry!r}, which is no run; in {runs_folder()} there are: {there}")


def group_recipes(runs: list[ScoredRun], baseline: str | None = None) -> dict[str, list[ScoredRun]]:
    """Runs by recipe, the baseline's first, all on the same images; runs over five folds are joined.

    A recipe is named after the folder that its runs were named by, if that holds no other; after its only run; or
    after the parameters in which the recipes differ. Runs of two folders are never one recipe, so that a recipe can
    be held against itself.

    Args:
        runs: from `read_runs`.
        baseline: name of a run, or of a recipe; None takes the first.

    Raises:
        ValueError: runs that can't be compared, or no such baseline.
    """
    by_recipe: dict[tuple, list[ScoredRun]] = {}
    for run in _join_folds(runs):
        by_recipe.setdefault((run.group, recipe(run.parameters)), []).append(run)
    rows, named = [dict(kept) for _, kept in by_recipe], {}
    names = dict.fromkeys(name for row in rows for name in row)
    differing = [name for name in names if len({row[name] for row in rows if name in row}) > 1]
    groups = [group for group, _ in by_recipe]
    for (group, _), members in by_recipe.items():
        label = group if group and groups.count(group) == 1 else _label(members, differing)
        named[f"{label} ({members[0].name})" if label in named else label] = members
    for members in named.values():
        for run in members:
            _check_comparable(next(iter(named.values()))[0], run)
    first = [name for name, members in named.items() if baseline in (name, *(run.name for run in members))]
    if baseline is not None and not first:
        raise ValueError(f"baseline: found {baseline!r}, there are: {', '.join(named)}")
    return {name: named[name] for name in dict.fromkeys((*first[:1], *named))}


def _join_folds(runs: list[ScoredRun]) -> list[ScoredRun]:
    """Where runs are of several folds: those of one recipe and seed as one, if all five are there."""
    if len({run.parameters.get("fold", FOLDS - 1) for run in runs}) < 2:
        return runs
    groups: dict[tuple, dict[int, ScoredRun]] = {}
    for run in runs:
        key = run.group, recipe(run.parameters), run.parameters["seed"]
        groups.setdefault(key, {})[run.parameters.get("fold", FOLDS - 1)] = run
    whole = [folds for folds in groups.values() if set(folds) == set(range(FOLDS))]
    if not whole:
        there = "; ".join(f"seed {key[-1]}: {sorted(folds)}" for key, folds in groups.items())
        raise ValueError(f"runs: found folds {there}; expected one fold, or all of 0 to 4 of a seed; name other runs")
    return [_join([folds[fold] for fold in range(FOLDS)]) for folds in whole]


def _join(folds: list[ScoredRun]) -> ScoredRun:
    names = np.concatenate([run.names for run in folds])
    order = np.argsort(names)
    twice = names[order][1:][names[order][1:] == names[order][:-1]]
    if len(twice):
        raise ValueError(
            f"runs: the five folds of {folds[-1].name!r} are scored on the same images, such as {twice[0]}; joined are "
            "the validation parts, so use part valid, or name runs of one fold"
        )
    known = all(run.scene is not None for run in folds)
    return replace(
        folds[-1],
        name=f"five folds, seed {folds[-1].parameters['seed']}",
        names=names[order],
        counts=np.concatenate([run.counts for run in folds])[order],
        scene=np.concatenate([run.scene for run in folds])[order] if known else None,
        history=None,
        folds=len(folds),
    )


def _label(members: list[ScoredRun], differing: list[str]) -> str:
    parameters = members[0].parameters
    if "recipe" in parameters:
        return parameters["recipe"]
    values, kept = BEFORE | parameters, dict(recipe(parameters))
    values |= {name: Path(str(values[name])).name for name in PLACES if name in kept}
    label = ", ".join(f"{name} {values[name]}" for name in differing if name in kept)
    return members[0].name if len(members) == 1 or not label else label


def _check_comparable(first: ScoredRun, other: ScoredRun) -> None:
    check_same_classes(first.classes, other.classes, f"the run {first.name!r}", f"the run {other.name!r}")
    pair = f"runs: {first.name!r} and {other.name!r} can't be compared: "
    remedy = "; evaluate both on the same data, part and fold"
    if list(first.names) != list(other.names):
        only = sorted(set(first.names) ^ set(other.names))
        found = f"{len(first.names)} and {len(other.names)} images, {len(only)} of them in one only"
        raise ValueError(f"{pair}{found}{', such as ' + only[0] if only else ', in another order'}{remedy}")
    differing = (first.counts.sum(2) != other.counts.sum(2)).any(1)
    if differing.any():
        raise ValueError(
            f"{pair}the labels of {differing.sum()} of {len(differing)} images differ, such as those of "
            f"{first.names[differing.argmax()]}{remedy}"
        )


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
    return table.style.format("{:.3f}", subset=table.columns.drop("seed")).set_table_styles([one_line])


def read_published(table: str, experiments: str) -> pd.DataFrame:
    """Published figures of some experiments, names with commas between: `experiments`, `class_iou` or `progression`."""
    figures = pd.read_csv(TABLES / f"published_{table}.csv").set_index("experiment")
    names = [name.strip() for name in experiments.split(",") if name.strip()]
    unknown = sorted(set(names) - set(figures.index))
    if unknown:
        raise ValueError(f"published: found {', '.join(unknown)}, there are: {', '.join(figures.index.unique())}")
    return figures.loc[names]


@plots.styled
def plot_comparison(recipes: dict[str, list[ScoredRun]], differences: dict[str, SceneComparison | None]) -> Figure:
    """IoU by class of every run and the mean of its recipe; on the same rows differences to the first recipe.

    A filled mark has p < 0.05 (after Holm for classes).
    """
    differences = {name: result for name, result in differences.items() if result is not None}
    baseline, members = next(iter(recipes.items()))
    order = np.argsort(-np.nan_to_num(_scores_by_class(members).mean(0)[1:]), kind="stable")
    images = (members[0].counts.sum(2) > 0).sum(0)
    names = ["mIoU", *(f"{plots.shorten(members[0].classes[index], 20)} ({images[index]})" for index in order)]
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
        left.plot(-0.03, row, "s", color=colour, markeredgecolor=plots.GREY, markersize=7, clip_on=False, zorder=4)
    for axes in (left, right):
        axes.axhline(0.5, color="0.85", linewidth=1)
        axes.grid(axis="x", color="0.92")
    left.set_yticks(range(len(names)), names, fontsize="medium" if len(names) <= plots.FEW else "x-small")
    left.set(title="IoU by class (images with it)", xlabel="IoU", xlim=(-0.03, 1), ylim=(len(names) - 0.5, -0.5))
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
