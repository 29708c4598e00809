"""Results of runs: which there are, of which recipe, and whether they may be compared."""

from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from lib.classes import check_same_classes
from lib.data import PARTS
from lib.data.validation import FOLDS, number_runs
from lib.files import ROOT, read_json
from lib.metrics import mean_truth_iou
from lib.options import check_choice
from lib.runs import BEFORE, NO_RECIPE, PLACES, read_counts, read_history, read_parameters, runs_folder

NOTEBOOKS = ROOT / "notebooks"
EXAMPLE = NOTEBOOKS / "experiments" / "results" / "embedded"  # committed runs, without weights, in folders


@dataclass(frozen=True)
class ScoredRun:
    """A run on one part of one data set, or on all five folds of it; `names` to `classes` as in `Counts`."""

    name: str
    parameters: dict
    data: str
    split: str | None
    names: np.ndarray
    counts: np.ndarray
    scene: np.ndarray | None
    classes: tuple[str, ...]
    history: pd.DataFrame | None
    folds: int = 1
    group: str = ""  # the folder of runs that it was named by
    folder: Path | None = None  # the run's own; of five folds that of the last

    @property
    def score(self) -> float:
        """mIoU over the classes in the truth, pooled over all images."""
        return mean_truth_iou(self.counts)


def read_scored(run: Path, part: str) -> ScoredRun:
    """A run as `score_run` left it, of which the weights are not needed.

    Raises:
        ValueError: it is not scored on that part.
    """
    path = run / "evaluation" / f"{part}.npz"
    if not (path.exists() and path.with_suffix(".json").exists()):  # which is there last
        raise ValueError(
            f"runs: {run.name!r} is not evaluated on part {part!r}; run "
            f"`papermill evaluate.ipynb evaluate.out.ipynb -p run {run.name} -p part {part}`"
        )
    facts, history = read_json(path.with_suffix(".json")), run / "history.csv"
    counts, parameters = read_counts(path), read_parameters(run)
    split = facts.get("split", None if part == "test" else parameters.get("split"))
    if counts.scene is None and split != "random":  # older counts; of a random part names are no runs
        runs = number_runs(counts.names)
        first = None if runs is None else pd.Series(counts.names).groupby(runs).transform("first")
        counts = counts._replace(scene=None if runs is None else first.to_numpy(str))
    return ScoredRun(
        name=run.name,
        parameters=parameters,
        data=facts["data"],
        split=split,
        history=read_history(run) if history.exists() else None,
        folder=run,
        **counts._asdict(),
    )


def recipe(parameters: dict[str, object]) -> tuple[tuple[str, str], ...]:
    """What makes runs the same recipe: every parameter that matters, but seed and fold; hashable."""
    kept = {name: value for name, value in (BEFORE | parameters).items() if name not in NO_RECIPE}
    if "encoder_weights_digest" in kept:  # the same file may lie elsewhere
        kept["encoder_weights"] = kept.pop("encoder_weights_digest")
    if "data" in kept:
        kept["data"] = Path(kept["data"]).name
    if kept.get("soft_iou_weight") == 0:  # without the term, its form is no difference
        kept.pop("soft_iou_pooling", None)
    as_float = {name: float(value) if type(value) is int else value for name, value in kept.items()}
    return tuple(sorted((name, str(value)) for name, value in as_float.items()))


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
