"""Runs to compare: which ones there are, whether they may be compared, and which are of one recipe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lib.classes import check_same_classes
from lib.data import PARTS
from lib.data.splits import FOLDS
from lib.files import read_json
from lib.metrics import pixel_accuracy
from lib.parameters import check_choice
from lib.runs import BEFORE, PLACES, recipe, runs_folder
from lib.scoring import ScoredRun, read_scored
from lib.significance import score_interval

LIB = Path(__file__).resolve().parent
TABLES = LIB / "data" / "tables"
EVIDENCE = LIB.parent / "notebooks" / "experiments" / "results"  # committed runs, without weights


def read_runs(runs: str, part: str, data: str | None = None) -> list[ScoredRun]:
    """The runs to compare, of which weights are not needed.

    Args:
        runs: names of run folders, paths of such, or paths of folders full of them, with commas between them;
            or `all`: those in the folder of runs, and where none is scored there, the committed evidence.
        part: `train`, `valid` or `test`.
        data: with `all`, only runs scored on this data; None takes that of the latest evaluation.

    Raises:
        ValueError: a run that is missing or not scored.
    """
    check_choice("part", part, PARTS)
    if runs != "all":
        entries = [entry.strip() for entry in runs.split(",") if entry.strip()]
        return [read_scored(folder, part) for entry in entries for folder in _find_folders(entry)]
    for home in (runs_folder(), EVIDENCE):
        files = sorted(home.glob(f"*/evaluation/{part}.json"), key=lambda path: path.stat().st_mtime)
        files = [path for path in files if path.with_suffix(".npz").exists()]  # labels were not held back
        if files:
            data = data or read_json(files[-1])["data"]
            found = [read_scored(path.parents[1], part) for path in sorted(files)]
            return [run for run in found if run.data == data]
    return []


def _find_folders(entry: str) -> list[Path]:
    for folder in (runs_folder() / Path(entry).expanduser(), Path(entry).expanduser()):
        if (folder / "parameters.json").exists():
            return [folder]
        if inside := sorted(path.parent for path in folder.glob("*/parameters.json")):
            return inside
    there = ", ".join(sorted(path.parent.name for path in runs_folder().glob("*/parameters.json"))) or "none"
    raise ValueError(f"runs: found {entry!r}, which is no run; in {runs_folder()} there are: {there}")


def group_recipes(runs: list[ScoredRun], baseline: str | None = None) -> dict[str, list[ScoredRun]]:
    """Runs by recipe, the baseline's first, all on the same images; runs over five folds are joined.

    A recipe is named after its only run, else after the parameters in which the recipes differ.

    Args:
        runs: from `read_runs`.
        baseline: name of a run, or of a recipe; None takes the first.

    Raises:
        ValueError: runs that can't be compared, or no such baseline.
    """
    by_recipe: dict[tuple, list[ScoredRun]] = {}
    for run in _join_folds(runs):
        by_recipe.setdefault(recipe(run.parameters), []).append(run)
    differing = _differing(list(by_recipe.values()))
    named = {}
    for members in by_recipe.values():
        label = _label(members, differing)
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
        key = recipe(run.parameters), run.parameters["seed"]
        groups.setdefault(key, {})[run.parameters.get("fold", FOLDS - 1)] = run
    whole = [folds for folds in groups.values() if set(folds) == set(range(FOLDS))]
    if not whole:
        there = "; ".join(f"seed {key[1]}: {sorted(folds)}" for key, folds in groups.items())
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
        names=names[order],
        counts=np.concatenate([run.counts for run in folds])[order],
        scene=np.concatenate([run.scene for run in folds])[order] if known else None,
        history=None,
        folds=len(folds),
    )


def _differing(recipes: list[list[ScoredRun]]) -> list[str]:
    """Parameters in which those recipes differ that have them."""
    rows = [dict(recipe(members[0].parameters)) for members in recipes]
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({row[name] for row in rows if name in row}) > 1]


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
    rows = []
    for name, members in recipes.items():
        for run in members:
            scored = score_interval(run.counts, run.scene)
            row = {"recipe": name, "run": run.name, "seed": run.parameters["seed"], "mIoU": scored.score}
            row |= dict(zip(("low", "high"), scored.interval, strict=True))
            rows.append(row | {"pixel accuracy": pixel_accuracy(run.counts)})
    return pd.DataFrame(rows).set_index(["recipe", "run"]) if rows else pd.DataFrame()


def read_published(table: str, experiments: str) -> pd.DataFrame:
    """Published figures of some experiments, names with commas between: `experiments`, `class_iou` or `progression`."""
    figures = pd.read_csv(TABLES / f"published_{table}.csv").set_index("experiment")
    names = [name.strip() for name in experiments.split(",") if name.strip()]
    unknown = sorted(set(names) - set(figures.index))
    if unknown:
        raise ValueError(f"published: found {', '.join(unknown)}, there are: {', '.join(figures.index.unique())}")
    return figures.loc[names]
