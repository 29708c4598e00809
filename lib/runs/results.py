"""Scored runs without their weights: from run folders or a study's two files, by recipe, for comparison."""

import io
import itertools
import json
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lib.classes import check_same_classes
from lib.evaluation import Counts
from lib.files import ROOT, read_json, write_atomically, write_text
from lib.metrics import mean_iou
from lib.options import FOLDS, check_options
from lib.runs import (
    MAY_CHANGE,
    PLACES,
    RECORDED,
    check_version,
    list_runs,
    read_counts,
    read_history,
    read_parameters,
    runs_folder,
    weights_digests,
)
from lib.runs.scoring import masks_folder, read_masks

NOTEBOOKS = ROOT / "notebooks"
EXAMPLE = NOTEBOOKS / "studies" / "example"
RUNS_FILE, COUNTS_FILE = "runs.jsonl", "counts.npz"
NO_RECIPE = {
    *MAY_CHANGE,
    *RECORDED,
    "run_name",
    "resume",
    "device",
    "seed",
    "fold",
    "predictions",
    "mask_values",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredRun(Counts):
    """A run on one split of one data set, or five runs pooled over all five folds.

    Attributes:
        name: of the run.
        group: the arm that it is shown under; None where that is its recipe.
        parameters: of `train.ipynb`, or of the predictions of another model.
        split: `train`, `valid` or `test`.
        data: the data set, as it was named when the run was scored.
        validation: how its validation images were chosen; None on the test split.
        strata: as in `Evaluation`; None where some of the images were selected.
        history: a row per epoch; None for external predictions and pooled folds.
        commit, tree_unchanged, processor: what the run recorded about its code and its machine.
        image_fold: `(N,)` the fold each image was scored in; None unless folds are pooled.
        folder: of the run, with its predictions.
        masks: predictions of a few images by name, where there is no folder.
    """

    name: str
    group: str | None
    parameters: dict
    split: str
    data: str
    validation: str | None
    strata: dict[str, np.ndarray] | None = None
    history: pd.DataFrame | None = None
    commit: str | None = None
    tree_unchanged: bool | None = None
    processor: str | None = None
    image_fold: np.ndarray | None = None
    folder: Path | None = None
    masks: dict[str, np.ndarray] | None = None

    @property
    def score(self) -> float:
        """mIoU over the classes in the ground truth, pooled over all images."""
        return mean_iou(self.counts)

    @property
    def is_pooled(self) -> bool:
        """Whether these are five runs, each scored on its own fold."""
        return self.image_fold is not None

    def shows_same_images(self, other: "ScoredRun") -> bool:
        """Whether both were scored on the same images with the same labels."""
        truths = [run.counts.sum(2) for run in (self, other)]
        return np.array_equal(self.names, other.names) and np.array_equal(*truths)

    def select(self, chosen: np.ndarray) -> "ScoredRun":
        """The same run on some of its images, `chosen` as positions or `(N,)` bool."""
        by_image = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, strata=None, **{name: array[chosen] for name, array in by_image.items()})

    def read_masks(self, names: Iterable[str]) -> list[np.ndarray]:
        """The predictions `(H, W)` of these images.

        Raises:
            FileNotFoundError: one was not saved.
        """
        if self.folder is not None:
            return read_masks(masks_folder(self.folder, self.split), names)
        missing = [name for name in names if name not in (self.masks or {})]
        if missing:
            raise FileNotFoundError(2, "not saved", f"{missing[0]}.png")
        return [self.masks[name] for name in names]


def read_scored(run: Path, split: str) -> ScoredRun:
    """A run from its folder, as `score_run` wrote it.

    Raises:
        ValueError: it is not scored on that split, or of an older version.
    """
    path = run / "evaluation" / f"{split}.json"  # which is written last
    if not path.exists():
        raise ValueError(
            f"runs: {run.name!r} is not evaluated on split {split!r}; run "
            f"`papermill evaluate.ipynb evaluate.out.ipynb -p run {run.name} -p split {split}`"
        )
    facts = read_json(path)
    if not facts["labelled"]:
        raise ValueError(
            f"runs: {run.name!r} has no score on split {split!r}, because its labels are held back; compare "
            "runs on split valid"
        )
    parameters = read_parameters(run)
    check_version(run.name, parameters)
    strata = path.with_suffix(".strata.npz")
    return ScoredRun(
        name=run.name,
        group=None,
        parameters={name: value for name, value in parameters.items() if name not in RECORDED},
        split=split,
        data=facts["data"],
        validation=facts["validation"],
        history=read_history(run) if (run / "history.csv").exists() else None,
        folder=run,
        strata=dict(np.load(strata)) if strata.exists() else None,
        **{name: parameters.get(name) for name in RECORDED},
        **vars(read_counts(path.with_suffix(".npz"))),
    )


def scored_folders(split: str) -> list[Path]:
    """Folders of the runs that are scored on a split and can be compared, the latest evaluation last."""
    files = sorted(runs_folder().glob(f"*/evaluation/{split}.json"), key=lambda path: path.stat().st_mtime)
    scored = [path.parents[1] for path in files if path.with_suffix(".npz").exists()]
    return [folder for folder in scored if "validation" in read_parameters(folder)]  # see check_version


def write_results(folder: Path, runs: Iterable[ScoredRun]) -> None:
    """Write runs as `runs.jsonl`, a line each, and `counts.npz`, with names and scenes once per image list.

    Paths of data and weights are cut to their last component.
    """
    lines = []
    arrays = {}
    lists: dict[tuple, str] = {}
    for number, run in enumerate(runs):
        listed = {"names": run.names, "classes": np.array(run.classes)}
        listed |= {} if run.scene is None else {"scene": run.scene}
        content = tuple((name, *array.tolist()) for name, array in listed.items())
        images = lists.setdefault(content, f"images{len(lists)}")
        key = f"{number} {run.name}"  # another run may have that name
        arrays[f"counts/{key}"] = run.counts.astype(np.uint32)
        for place, named in ((images, listed), (f"masks/{key}", run.masks), (f"strata/{key}", run.strata)):
            arrays |= {f"{place}/{name}": array for name, array in (named or {}).items()}
        lines.append(json.dumps(_describe_run(run) | {"images": images, "counts": key}))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / COUNTS_FILE, lambda file: np.savez_compressed(file, **arrays))
    write_text("".join(f"{line}\n" for line in lines), folder / RUNS_FILE)  # last: it says what is there


def _describe_run(run: ScoredRun) -> dict:
    """What `runs.jsonl` says of a run."""
    parameters = _cut_paths(run.parameters)
    history = None if run.history is None else run.history.astype(object).where(run.history.notna(), None)
    return {
        "name": run.name,
        "group": run.group,
        "parameters": {name: value for name, value in parameters.items() if name != "run_name"},
        **{name: getattr(run, name) for name in RECORDED},
        "split": run.split,
        "data": Path(run.data).name,
        "validation": run.validation,
        "history": None if history is None else history.to_dict("list"),
    }


def _cut_paths(parameters: dict[str, object]) -> dict[str, object]:
    """Parameters in which paths of data, weights and predictions are their last component."""
    places = [name for name in (*PLACES, "predictions") if parameters.get(name) is not None]
    return parameters | {name: Path(parameters[name]).name for name in places}


def read_results(folder: Path) -> list[ScoredRun]:
    """The runs that `write_results` wrote.

    Raises:
        ValueError: one of the two files is damaged or misses a run.
    """
    try:
        lines = [json.loads(line) for line in (folder / RUNS_FILE).read_text().splitlines()]
        with np.load(io.BytesIO((folder / COUNTS_FILE).read_bytes())) as saved:
            return [_read_line(line, saved) for line in lines]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise ValueError(
            f"{folder}: can't be read as the results of a study ({error}); expected {RUNS_FILE} and "
            f"{COUNTS_FILE}, as `sweep.ipynb -p results` writes them"
        ) from error


def _take(saved: np.lib.npyio.NpzFile, prefix: str) -> dict[str, np.ndarray] | None:
    """The arrays of which the names begin so, without that beginning; None if there are none."""
    names = [name for name in saved.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): saved[name] for name in names} or None


def _read_line(line: dict, saved: np.lib.npyio.NpzFile) -> ScoredRun:
    images = line.pop("images")
    history = line.pop("history")
    key = line.pop("counts", line["name"])
    return ScoredRun(
        **line,
        names=saved[f"{images}/names"],
        counts=saved[f"counts/{key}"].astype(np.int64),
        scene=saved.get(f"{images}/scene"),
        classes=tuple(saved[f"{images}/classes"].tolist()),
        history=None if history is None else pd.DataFrame(history),
        strata=_take(saved, f"strata/{key}/"),
        masks=_take(saved, f"masks/{key}/"),
    )


def recipe(parameters: dict[str, object]) -> tuple[tuple[str, str], ...]:
    """What makes runs the same recipe: every parameter that matters, but seed and fold; hashable."""
    return tuple((name, text) for name, text in _settings(parameters).items() if parameters[name] is not None)


def _settings(parameters: dict[str, object]) -> dict[str, str]:
    """The parameters that make the recipe, as text in the order of their names; None is a value, too."""
    kept = {
        name: parameters.get(f"{name}_digest", value)  # the same files may lie elsewhere
        for name, value in _cut_paths(parameters).items()
        if name not in NO_RECIPE and not name.endswith("_digest")
    }
    if kept.get("soft_iou_weight") == 0:  # without the term, its form is no difference
        kept.pop("soft_iou_pooling", None)
    return {name: str(float(value) if type(value) is int else value) for name, value in sorted(kept.items())}


def identity(parameters: dict[str, object]) -> tuple:
    """What makes a run that run: its recipe, seed and fold, wherever its data and weights lie."""
    if not any(name.endswith("_digest") for name in parameters):
        parameters = parameters | weights_digests(parameters)
    return recipe(parameters), parameters["seed"], parameters["fold"]


def read_runs(runs: str, split: str, data: str | None = None, where: str | None = None) -> list[ScoredRun]:
    """The runs to compare, of which weights are not needed.

    Args:
        runs: names or paths of runs, or folders of results as `write_results` makes them, with commas between
            (a path may have commas of its own in the folder of runs alone); or `all`: every run in the folder
            of runs that is scored on the split. Where these are fewer than two, `all` takes the committed
            example, and beside it a run of one's own on the same images.
        split: `train`, `valid` or `test`.
        data: with `all`, only runs scored on this data; None takes that of the latest evaluation.
        where: a query over the runs' parameters, as `pandas.DataFrame.query` takes it; None takes all.

    Raises:
        ValueError: a run that is missing or not scored, or a query that no run matches.
    """
    check_options(split=split)
    if runs == "all":
        found = read_own(split, data)
        if len(found) < 2 and data is None:
            example = [run for run in read_results(EXAMPLE) if run.split == split]
            found = example + [run for run in found if not example or run.shows_same_images(example[0])]
    else:
        home = re.escape(str(runs_folder()))  # may have commas; the names of runs in it stay
        entries = re.sub(rf"(^|,)\s*{home}[/\\]", r"\1", runs).split(",")
        found = [run for entry in entries if entry.strip() for run in read_entry(entry.strip(), split)]
    return found if where is None else select_runs(found, where)


def read_own(split: str, data: str | None) -> list[ScoredRun]:
    """The scored runs in the folder of runs, of this data or of that of the latest evaluation."""
    own = [read_scored(folder, split) for folder in scored_folders(split)]
    wanted = [run for run in own if Path(run.data).expanduser() == Path(data or own[-1].data).expanduser()]
    return sorted(wanted, key=lambda run: run.name)


def read_entry(entry: str, split: str) -> list[ScoredRun]:
    """A run by name or path, or the runs of a study that were scored on the split."""
    for home in (runs_folder(), Path(), NOTEBOOKS):
        folder = home / Path(entry).expanduser()
        if (folder / "parameters.json").exists():
            return [read_scored(folder, split)]
        if (folder / RUNS_FILE).exists():
            results = read_results(folder)
            splits = {run.split for run in results}
            if splits and split not in splits:
                raise ValueError(
                    f"split: found {split!r}, the runs of {entry} were scored on {', '.join(sorted(splits))}"
                )
            return [run for run in results if run.split == split]
    raise ValueError(
        f"runs: found {entry!r}, which is neither a run nor a folder with {RUNS_FILE}; runs in "
        f"{runs_folder()}: {list_runs()}"
    )


def select_runs(runs: list[ScoredRun], where: str) -> list[ScoredRun]:
    """The runs whose parameters match a query, as `pandas.DataFrame.query` takes it; None stays None there.

    Raises:
        ValueError: a query that can't be evaluated, or that no run matches.
    """
    names = dict.fromkeys(name for run in runs for name in run.parameters)
    table = pd.DataFrame(
        {name: pd.Series([run.parameters.get(name) for run in runs], dtype=object) for name in names}
    )
    try:
        is_matching = table.eval(where, engine="python")
        if not is_matching.map(type).isin((bool, np.bool_)).all():
            raise ValueError("it is not a condition")
    except Exception as error:  # pandas raises a dozen kinds for a query that it can't evaluate
        raise ValueError(
            f"where: found {where!r}, which can't be evaluated ({error}); expected a query over the "
            f'parameters {", ".join(names)}, such as "soft_iou_weight in (0, 0.5) and classes.isnull()"'
        ) from error
    if not is_matching.any():
        listed = "; ".join(f"{name}: {', '.join(sorted(table[name].map(str).unique()))}" for name in names)
        raise ValueError(f"where: {where!r} matches none of {len(runs)} runs; their parameters: {listed}")
    return list(itertools.compress(runs, is_matching))


def group_recipes(runs: list[ScoredRun], baseline: str | None = None) -> dict[str, list[ScoredRun]]:
    """Runs by recipe, the baseline's first, all on the same images; runs over five folds are pooled.

    A recipe is named after its group; after its only run; or after the parameters in which the recipes
    differ. Runs of two groups are never one recipe, so that a recipe can be compared with itself.

    Args:
        runs: from `read_runs`.
        baseline: name of a run, or of a recipe; None takes the first.

    Raises:
        ValueError: runs that can't be compared, a run of a recipe, seed and fold that is there already, or no
            such baseline.
    """
    named = _name_recipes(_group(_pool_folds(runs)))
    for members in named.values():
        members.sort(key=lambda run: run.parameters["seed"])
        for run in members:
            _check_comparable(next(iter(named.values()))[0], run)
    _check_distinct(runs)
    if baseline is None:
        return named
    first = [name for name, members in named.items() if baseline in (name, *(run.name for run in members))]
    if not first:
        raise ValueError(f"baseline: found {baseline!r}, there are: {', '.join(named)}")
    return {name: named[name] for name in dict.fromkeys((first[0], *named))}


def _group(runs: Iterable[ScoredRun], *parameters: str) -> dict[tuple, list[ScoredRun]]:
    """Runs by their group, recipe and these parameters, in the order in which they first occur."""
    groups: dict[tuple, list[ScoredRun]] = {}
    for run in runs:
        key = (run.group, recipe(run.parameters), *map(run.parameters.get, parameters))
        groups.setdefault(key, []).append(run)
    return groups


def _check_distinct(runs: list[ScoredRun]) -> None:
    """A seed counts once, however often it was trained or named: another run of it is no other draw."""
    for (*_, seed, fold), members in _group(runs, "seed", "fold").items():
        if len(members) > 1:
            raise ValueError(
                f"runs: {members[0].name!r} and {members[1].name!r} have the same recipe, seed {seed} and "
                f"fold {fold}, but each seed counts once; name only one of them, or train or score the other "
                "with another seed (or, for external predictions, under another recipe)"
            )


def _name_recipes(by_recipe: dict[tuple, list[ScoredRun]]) -> dict[str, list[ScoredRun]]:
    settings = settings_that_differ(by_recipe)
    groups = [group for group, _ in by_recipe if group]
    named = {}
    for (group, key), members in by_recipe.items():
        label = group if groups.count(group) == 1 else _label(members, settings[group, key])
        if label in named:
            label = f"{label} ({members[0].name})"
        named[label] = members
    return named


def settings_that_differ(recipes: dict[Hashable, list[ScoredRun]]) -> dict[Hashable, str]:
    """By recipe the parameters in which these recipes differ, such as `learning_rate 0.003`."""
    table = pd.DataFrame([_settings(members[0].parameters) for members in recipes.values()], dtype=object)
    differing = table.columns[table.nunique() > 1]  # among the recipes that know them
    return {name: _describe_settings(members[0], differing) for name, members in recipes.items()}


def _describe_settings(run: ScoredRun, differing: Iterable[str]) -> str:
    values = _cut_paths(run.parameters)
    known = _settings(run.parameters)
    return ", ".join(f"{name} {values[name]}" for name in differing if name in known)


def _label(members: list[ScoredRun], settings: str) -> str:
    run = members[0]
    if "recipe" in run.parameters:  # of external predictions
        return run.parameters["recipe"]
    if not settings or (len(members) == 1 and len(run.name) <= len(settings)):
        return run.name
    return settings


def without_fold(recipes: dict[str, list[ScoredRun]], fold: int) -> dict[str, list[ScoredRun]]:
    """Pooled runs on the images of the other folds, such as to leave out the fold of a tuning.

    Raises:
        ValueError: a run that is not pooled over folds.
    """
    for run in itertools.chain(*recipes.values()):
        if not run.is_pooled:
            raise ValueError(
                f"fold: the run {run.name!r} is of one fold, expected runs pooled over five folds"
            )
    return {name: [run.select(run.image_fold != fold) for run in runs] for name, runs in recipes.items()}


def _pool_folds(runs: list[ScoredRun]) -> list[ScoredRun]:
    """Where runs are of several folds: those of one recipe and seed as one, if all five are there."""
    if len({run.parameters.get("fold") for run in runs}) < 2:
        return runs
    groups = _group(runs, "seed")
    by_fold = {key: {run.parameters.get("fold"): run for run in members} for key, members in groups.items()}
    whole = [folds for folds in by_fold.values() if set(folds) == set(range(FOLDS))]
    if not whole:
        there = "; ".join(f"seed {key[-1]}: {sorted(folds)}" for key, folds in by_fold.items())
        raise ValueError(
            f"runs: found folds {there}; expected one fold, or all of 0 to 4 of a seed; name other runs"
        )
    return [_pool([folds[fold] for fold in range(FOLDS)]) for folds in whole]


def _pool(folds: list[ScoredRun]) -> ScoredRun:
    names = np.concatenate([run.names for run in folds])
    order = np.argsort(names)
    twice = np.sort(names[pd.Index(names).duplicated()])
    if len(twice):
        raise ValueError(
            f"runs: the five folds of {folds[-1].name!r} are scored on the same images, such as {twice[0]}; "
            "folds are pooled over their validation images, so use split valid, or name runs of one fold"
        )
    unknown = any(run.scene is None for run in folds)
    return replace(
        folds[-1],
        name=f"five folds, seed {folds[-1].parameters['seed']}",
        names=names[order],
        counts=np.concatenate([run.counts for run in folds])[order],
        scene=None if unknown else np.concatenate([run.scene for run in folds])[order],
        strata=_pool_strata(folds),
        image_fold=np.repeat(range(FOLDS), [len(run.names) for run in folds])[order],
        history=None,
        folder=None,
        masks=None,
    )


def _pool_strata(folds: list[ScoredRun]) -> dict[str, np.ndarray] | None:
    """The strata of all scenes in their order; None where a fold has none, or a scene is in two of them."""
    if any(run.strata is None for run in folds):
        return None
    scenes = np.concatenate([np.unique(run.scene) for run in folds])
    if len(np.unique(scenes)) < len(scenes):
        return None
    order = np.argsort(scenes)
    return {name: np.concatenate([run.strata[name] for run in folds])[order] for name in folds[0].strata}


def _check_comparable(first: ScoredRun, other: ScoredRun) -> None:
    check_same_classes(first.classes, other.classes, f"the run {first.name!r}", f"the run {other.name!r}")
    if first.shows_same_images(other):
        return
    if list(first.names) != list(other.names):
        only = sorted(set(first.names) ^ set(other.names))
        which = f"such as {only[0]}" if only else "in another order"
        found = f"{len(first.names)} and {len(other.names)} images, {len(only)} of them in one only, {which}"
    else:
        differing = first.names[(first.counts.sum(2) != other.counts.sum(2)).any(1)]
        found = (
            f"the labels of {len(differing)} of {len(first.names)} images differ, such as those of "
            f"{differing[0]}"
        )
    raise ValueError(
        f"runs: {first.name!r} and {other.name!r} can't be compared: {found}; evaluate both on the same "
        "data, split and fold"
    )
