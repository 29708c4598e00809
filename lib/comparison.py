"""Runs to compare: which ones, whether they may be, what was published, and verdicts in words."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.classes import CLASS_NAMES
from lib.data import PARTS
from lib.files import read_json
from lib.metrics import iou
from lib.parameters import check_choice
from lib.runs import find_run, read_history, read_parameters, runs_folder
from lib.significance import CONFIDENCE, PairedBootstrap, PairedSeeds, paired_seeds

TABLES = Path(__file__).parent / "data" / "tables"
SET_ASIDE = re.compile(r"\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d~*$")  # names of older runs, see start_run
NO_RECIPE = ("run_name", "seed", "workers", "device", "save_figures")  # what a recipe does not depend on


@dataclass(frozen=True)
class EvaluatedRun:
    """A run on one part of one data set: counts per image `(N, C, C)` at native size, and their scores."""

    name: str
    parameters: dict
    names: np.ndarray
    counts: np.ndarray
    scores: dict
    history: pd.DataFrame


def evaluated_runs(runs: str, part: str, data: str | None = None) -> list[EvaluatedRun]:
    """The runs to compare, by name or `all` (but for those set aside under a dated name), checked to be comparable.

    Args:
        runs: `all`, or names of run folders with commas between them.
        part: `train`, `valid` or `test`.
        data: with `all`, only runs evaluated on this data; None takes that of the latest evaluation.

    Raises:
        ValueError: a run that is missing or not evaluated, or runs on different images, labels or sizes.
    """
    check_choice("part", part, PARTS)
    if runs == "all":
        files = sorted(runs_folder().glob(f"*/evaluation/{part}.json"), key=lambda path: path.stat().st_mtime)
        files = [path for path in files if not SET_ASIDE.search(path.parents[1].name)]
        if data is None and files:
            data = read_json(files[-1])["data"]
        folders = sorted(path.parents[1] for path in files if read_json(path)["data"] == data)
    else:
        folders = [find_run(name.strip()) for name in runs.split(",")]
    evaluated = [_read_evaluated(folder, part) for folder in folders]
    for other in evaluated[1:]:
        _check_comparable(evaluated[0], other, part)
    return evaluated


def _read_evaluated(run: Path, part: str) -> EvaluatedRun:
    path = run / "evaluation" / f"{part}.npz"
    if not path.exists():
        raise ValueError(
            f"runs: {run.name!r} is not evaluated on part {part!r}; run "
            f"`papermill evaluate.ipynb evaluate.out.ipynb -p run {run.name} -p part {part}`"
        )
    with np.load(path) as saved:
        names, counts = saved["names"], saved["counts"]
    return EvaluatedRun(
        run.name, read_parameters(run), names, counts, read_json(path.with_suffix(".json")), read_history(run)
    )


def _check_comparable(first: EvaluatedRun, other: EvaluatedRun, part: str) -> None:
    pair = f"runs: {first.name!r} and {other.name!r} can't be compared on part {part!r}: "
    remedy = "; evaluate both on the same data and part"
    if first.counts.shape[1:] != other.counts.shape[1:]:
        raise ValueError(f"{pair}{first.counts.shape[1]} and {other.counts.shape[1]} classes{remedy}")
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


def scores_by_recipe(evaluated: list[EvaluatedRun], baseline: str | None) -> pd.DataFrame:
    """mIoU by seed (rows) and recipe (columns, named after their first run but for the seed, the baseline's first).

    Runs are of one recipe when their parameters differ in nothing that matters but the seed. Runs that
    repeat a seed count once, with their mean.
    """
    first_runs, rows = {}, []
    for run in sorted(evaluated, key=lambda run: run.name != baseline):
        recipe = {name: value for name, value in run.parameters.items() if name not in NO_RECIPE}
        if recipe.get("soft_iou_weight") == 0:
            recipe.pop("soft_iou_pooling", None)
        key = tuple(
            sorted((name, str(float(value) if type(value) is int else value)) for name, value in recipe.items())
        )
        label = run.name.partition("-seed=")[0]  # as plan_runs names the runs of a sweep
        first = first_runs.setdefault(key, run.name if label in first_runs.values() else label)
        rows.append({"recipe": first, "seed": run.parameters["seed"], "miou": run.scores["plain"]["miou"]})
    table = pd.DataFrame(rows, columns=["recipe", "seed", "miou"])
    return table.pivot_table("miou", "seed", "recipe", aggfunc="mean").reindex(columns=list(first_runs.values()))


def read_published(table: str, experiments: str) -> pd.DataFrame:
    """Published figures of some experiments, names with commas between: `experiments`, `class_iou` or `progression`."""
    figures = pd.read_csv(TABLES / f"published_{table}.csv").set_index("experiment")
    names = [name.strip() for name in experiments.split(",") if name.strip()]
    unknown = sorted(set(names) - set(figures.index))
    if unknown:
        raise ValueError(f"published: found {', '.join(unknown)}, there are: {', '.join(figures.index.unique())}")
    return figures.loc[names]


def class_tables(evaluated: list[EvaluatedRun], published: str) -> dict[str, pd.DataFrame]:
    """`{title: IoU by class and entry}`: published figures stand beside runs only where the data may be NYUv2's."""
    theirs = read_published("class_iou", published).T.add_suffix(" (published)")
    ours = pd.DataFrame({run.name: iou(run.counts) for run in evaluated}, index=list(CLASS_NAMES))
    if evaluated and evaluated[0].scores["data"] != "synthetic":
        note = "published figures are of NYUv2's validation images"
        return {f"Runs on {evaluated[0].scores['data']}; {note}": pd.concat((ours, theirs), axis=1)}
    tables = {"Runs on embedded scenes": ours, "Published, on 159 validation images of NYUv2": theirs}
    return {title: table for title, table in tables.items() if table.size}


def describe_selection(evaluated: list[EvaluatedRun], part: str) -> str:
    """What is compared, or what is missing for a comparison."""
    if len(evaluated) > 1:
        names, first = ", ".join(run.name for run in evaluated), evaluated[0]
        return f"{len(evaluated)} runs on {len(first.names)} {part} images of {first.scores['data']}: {names}."
    there = f"only {evaluated[0].name}" if evaluated else "none"
    return (
        f"A comparison needs two runs that are evaluated on one part of one data set; for part {part} there is {there}."
        " Make another with `papermill train.ipynb ce.out.ipynb -p run_name ce -p soft_iou_weight 0` and "
        "`papermill evaluate.ipynb evaluate.out.ipynb -p run ce`. Until then, the published experiments are compared "
        "with one another."
    )


def describe_published(experiments: str) -> str:
    """What the published figures say of the first experiments against the last, and what they can't say."""
    table = read_published("experiments", experiments)
    against = [
        f"{table.index[-1]} minus {name}: validation mIoU {table.valid_miou.iloc[-1] - row.valid_miou:+.4f}, "
        f"test {table.lb_score.iloc[-1] - row.lb_score:+.4f}. "
        for name, row in table.iloc[:-1].iterrows()
    ]
    return "".join(against) + (
        "Published experiments are single runs, without counts for each image and without a second seed, so no "
        "interval can be given: it can't be concluded whether the checkpoints differ on such images, nor whether the "
        "recipes do. Split random puts frames of one scene on both sides, so their validation scores flatter."
    )


def describe_checkpoints(result: PairedBootstrap, name_a: str, name_b: str, image_count: int, classes: tuple) -> str:
    """The verdict about two checkpoints on these images, in words."""
    low, high = result.interval
    text = (
        f"{name_b} against {name_a}, on these {image_count} images: mIoU {result.difference:+.4f} "
        f"(95 % interval {low:+.4f} to {high:+.4f}, swap test p = {result.p_value:.3g}). "
    )
    excluded, rejected = not low <= 0 <= high, result.p_value < 1 - CONFIDENCE
    if excluded != rejected:
        text += "Interval and test disagree, so a few images or a rare class decide. "
    if excluded and rejected:
        text += f"The checkpoint {name_b if result.difference > 0 else name_a} is better on images like these. "
    else:
        text += (
            f"Cannot tell which checkpoint is better: {image_count} images show a difference of "
            f"{result.detectable:.3f} or more (80 % power). "
        )
        text += f"One as small as this would take about {_rounded(result.images_needed)} images. "
    clear = [
        f"{name} ({difference:+.3f})"
        for name, difference, p_value in zip(classes, result.class_difference, result.class_p_value, strict=True)
        if p_value < 1 - CONFIDENCE
    ]
    return text + f"Classes that differ, after Holm's correction: {', '.join(clear) or 'none'}."


def describe_recipes(scores: pd.DataFrame) -> list[str]:
    """The verdicts about recipes in words: the first column of mIoU by seed against each other one."""
    first, *others = scores.columns if len(scores) else [None]
    sentences = []
    for other in others:
        both = scores[[first, other]].dropna()
        sentence = f"{other} against {first} as recipes, over {len(both)} paired seed{'s' * (len(both) != 1)}: "
        if len(both) < 3:
            sentence += (
                "at least 3 are needed. With fewer, nothing says whether the recipe or the seed made the difference; "
                "train and evaluate both with more seeds (`-p seed 1`, `-p seed 2`, ...)."
            )
        else:
            sentence += _describe_seeds(paired_seeds(both[first], both[other]), first, other)
        sentences.append(sentence)
    return sentences


def _describe_seeds(result: PairedSeeds, name_a: str, name_b: str) -> str:
    low, high = result.interval
    text = f"mIoU {result.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, p = {result.p_value:.3g}). "
    if not low <= 0 <= high:
        return text + f"The recipe {name_b if result.difference > 0 else name_a} is better."
    needed = f"A difference of this size would take about {_rounded(result.seeds_needed)} seeds."
    return text + "Cannot tell which recipe is better. " + needed


def _rounded(count: float) -> str:
    """Two digits: more would pretend to know."""
    if not count < 1e6:
        return "a million or more"
    return f"{int(float(f'{np.ceil(count):.2g}')):,}"
