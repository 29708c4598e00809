"""Read, write, select and group scored runs for comparison, without needing their weights."""

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
    METADATA,
    PATH_PARAMETERS,
    RESUME_MAY_CHANGE,
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
NON_RECIPE_PARAMETERS = {
    *RESUME_MAY_CHANGE,
    *METADATA,
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
    """A run scored on one split of a data set, or the pooled runs of all five folds.

    Attributes:
        name: name of the run.
        group: study arm under which the run is shown; if None, its recipe.
        parameters: parameters of `train.ipynb`, or those recorded for external predictions.
        split: `train`, `valid` or `test`.
        data: the data set, as given when the run was scored.
        validation: how the validation images were chosen; None on the test split.
        strata: as in `Evaluation`; None if not available, for example after `select`.
        history: one row per epoch; None for external predictions and pooled folds.
        commit, tree_unchanged, processor: code version and hardware recorded by the run; None if unknown.
        image_fold: `(N,)` fold in which each image was scored; None unless folds are pooled.
        folder: folder of the run, with its predictions; None for pooled folds and runs from `read_results`.
        masks: `(H, W)` predictions of a few images by name, for runs without a folder.
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
        """Whether five runs are pooled, each scored on its own fold."""
        return self.image_fold is not None

    def has_same_images(self, other: "ScoredRun") -> bool:
        """Whether both were scored on the same images with the same labels."""
        truths = [run.counts.sum(2) for run in (self, other)]
        return np.array_equal(self.names, other.names) and np.array_equal(*truths)

    def select(self, chosen: np.ndarray) -> "ScoredRun":
        """Return the run restricted to some of its images, given as positions or an `(N,)` bool mask."""
        by_image = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, strata=None, **{name: array[chosen] for name, array in by_image.items()})

    def read_masks(self, names: Iterable[str]) -> list[np.ndarray]:
        """Return the predictions `(H, W)` for the named images.

        Raises:
            FileNotFoundError: if a prediction was not saved.
        """
        if self.folder is not None:
            return read_masks(masks_folder(self.folder, self.split), names)
        missing = [name for name in names if name not in (self.masks or {})]
        if missing:
            raise FileNotFoundError(2, "not saved", f"{missing[0]}.png")
        return [self.masks[name] for name in names]


def read_scored(run: Path, split: str) -> ScoredRun:
    """Read a run scored by `score_run` from its folder.

    Raises:
        ValueError: if the run is not scored on the split, the labels of the split are held back, or the run
            was trained with an older version.
    """
    path = run / "evaluation" / f"{split}.json"  # written last
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
        parameters={name: value for name, value in parameters.items() if name not in METADATA},
        split=split,
        data=facts["data"],
        validation=facts["validation"],
        history=read_history(run) if (run / "history.csv").exists() else None,
        folder=run,
        strata=dict(np.load(strata)) if strata.exists() else None,
        **{name: parameters.get(name) for name in METADATA},
        **vars(read_counts(path.with_suffix(".npz"))),
    )


def scored_folders(split: str) -> list[Path]:
    """Return the folders of comparable runs scored on a split, in order of evaluation."""
    files = sorted(runs_folder().glob(f"*/evaluation/{split}.json"), key=lambda path: path.stat().st_mtime)
    scored = [path.parents[1] for path in files if path.with_suffix(".npz").exists()]
    return [folder for folder in scored if "validation" in read_parameters(folder)]  # see check_version


def write_results(folder: Path, runs: Iterable[ScoredRun]) -> None:
    """Write runs to `runs.jsonl` and `counts.npz`.

    `runs.jsonl` has one line per run, with the paths of data, weights and predictions shortened to their last
    component. `counts.npz` stores names and scenes once per list of images.
    """
    lines = []
    arrays = {}
    image_lists: dict[tuple, str] = {}
    for number, run in enumerate(runs):
        image_list = {"names": run.names, "classes": np.array(run.classes)}
        image_list |= {} if run.scene is None else {"scene": run.scene}
        content = tuple((name, *array.tolist()) for name, array in image_list.items())
        images = image_lists.setdefault(content, f"images{len(image_lists)}")
        key = f"{number} {run.name}"  # run names may repeat
        arrays[f"counts/{key}"] = run.counts.astype(np.uint32)
        for prefix, named_arrays in (
            (images, image_list),
            (f"masks/{key}", run.masks),
            (f"strata/{key}", run.strata),
        ):
            arrays |= {f"{prefix}/{name}": array for name, array in (named_arrays or {}).items()}
        lines.append(json.dumps(_describe_run(run) | {"images": images, "counts": key}))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / COUNTS_FILE, lambda file: np.savez_compressed(file, **arrays))
    write_text("".join(f"{line}\n" for line in lines), folder / RUNS_FILE)  # last: it lists the arrays


def _describe_run(run: ScoredRun) -> dict:
    """Return the entry of a run in `runs.jsonl`."""
    parameters = _shorten_paths(run.parameters)
    history = None if run.history is None else run.history.astype(object).where(run.history.notna(), None)
    return {
        "name": run.name,
        "group": run.group,
        "parameters": {name: value for name, value in parameters.items() if name != "run_name"},
        **{name: getattr(run, name) for name in METADATA},
        "split": run.split,
        "data": Path(run.data).name,
        "validation": run.validation,
        "history": None if history is None else history.to_dict("list"),
    }


def _shorten_paths(parameters: dict[str, object]) -> dict[str, object]:
    """Shorten the paths of data, weights and predictions to their last component."""
    path_parameters = [name for name in (*PATH_PARAMETERS, "predictions") if parameters.get(name) is not None]
    return parameters | {name: Path(parameters[name]).name for name in path_parameters}


def read_results(folder: Path) -> list[ScoredRun]:
    """Read the runs that `write_results` wrote.

    Raises:
        ValueError: if one of the two files is missing or damaged, or lacks a run.
    """
    try:
        lines = [json.loads(line) for line in (folder / RUNS_FILE).read_text().splitlines()]
        with np.load(io.BytesIO((folder / COUNTS_FILE).read_bytes())) as archive:
            return [_read_line(line, archive) for line in lines]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen exception types
        raise ValueError(
            f"{folder}: can't be read as the results of a study ({error}); expected {RUNS_FILE} and "
            f"{COUNTS_FILE}, as `sweep.ipynb -p results` writes them"
        ) from error


def _read_arrays(archive: np.lib.npyio.NpzFile, prefix: str) -> dict[str, np.ndarray] | None:
    """Return the arrays whose names start with a prefix, which is removed; None if there are none."""
    names = [name for name in archive.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): archive[name] for name in names} or None


def _read_line(line: dict, archive: np.lib.npyio.NpzFile) -> ScoredRun:
    images = line.pop("images")
    history = line.pop("history")
    key = line.pop("counts", line["name"])
    return ScoredRun(
        **line,
        names=archive[f"{images}/names"],
        counts=archive[f"counts/{key}"].astype(np.int64),
        scene=archive.get(f"{images}/scene"),
        classes=tuple(archive[f"{images}/classes"].tolist()),
        history=None if history is None else pd.DataFrame(history),
        strata=_read_arrays(archive, f"strata/{key}/"),
        masks=_read_arrays(archive, f"masks/{key}/"),
    )


def recipe(parameters: dict[str, object]) -> tuple[tuple[str, str], ...]:
    """Return the recipe of a run in hashable form: all relevant parameters except seed and fold.

    Parameters that are None are left out.
    """
    return tuple((name, text) for name, text in _settings(parameters).items() if parameters[name] is not None)


def _settings(parameters: dict[str, object]) -> dict[str, str]:
    """Return the parameters that define the recipe as text, sorted by name, including those that are None."""
    kept = {
        name: parameters.get(f"{name}_digest", value)  # the same file may have another path
        for name, value in _shorten_paths(parameters).items()
        if name not in NON_RECIPE_PARAMETERS and not name.endswith("_digest")
    }
    if kept.get("soft_iou_weight") == 0:  # without this loss term, its pooling is irrelevant
        kept.pop("soft_iou_pooling", None)
    return {name: str(float(value) if type(value) is int else value) for name, value in sorted(kept.items())}


def identity(parameters: dict[str, object]) -> tuple:
    """Return the recipe, seed and fold, which identify a run wherever its data and weights are stored."""
    if not any(name.endswith("_digest") for name in parameters):
        parameters = parameters | weights_digests(parameters)
    return recipe(parameters), parameters["seed"], parameters["fold"]


def read_runs(runs: str, split: str, data: str | None = None, where: str | None = None) -> list[ScoredRun]:
    """Read the runs to compare, without their weights.

    Args:
        runs: comma-separated list of runs (names or paths) and of folders written by `write_results`, or
            `all`. Only the path of the runs folder may itself contain commas. `all` reads every run in the
            runs folder that is scored on the split. If there are fewer than two and `data` is None, it reads
            the committed example, together with your own run if that is on the same images.
        split: `train`, `valid` or `test`.
        data: with `all`, read only runs scored on this data set; if None, that of the latest evaluation.
        where: query over the runs' parameters, in the syntax of `pandas.DataFrame.query`; if None, all runs
            are returned.

    Raises:
        ValueError: if a run is missing or not scored, or the query is invalid or matches no run.
    """
    check_options(split=split)
    if runs == "all":
        scored = read_own_runs(split, data)
        if len(scored) < 2 and data is None:
            example = [run for run in read_results(EXAMPLE) if run.split == split]
            scored = example + [run for run in scored if not example or run.has_same_images(example[0])]
    else:
        root = re.escape(str(runs_folder()))  # removed, because it may contain commas
        entries = re.sub(rf"(^|,)\s*{root}[/\\]", r"\1", runs).split(",")
        scored = [
            run for entry in entries if entry.strip() for run in read_run_or_study(entry.strip(), split)
        ]
    return scored if where is None else select_runs(scored, where)


def read_own_runs(split: str, data: str | None) -> list[ScoredRun]:
    """Read the scored runs in the runs folder, sorted by name; see `data` of `read_runs`."""
    runs = [read_scored(folder, split) for folder in scored_folders(split)]
    places = [Path(run.data).expanduser().resolve() for run in runs]
    wanted = places[-1:] if data is None else [Path(data).expanduser().resolve()]
    chosen = [run for run, place in zip(runs, places, strict=True) if place in wanted]
    return sorted(chosen, key=lambda run: run.name)


def read_run_or_study(entry: str, split: str) -> list[ScoredRun]:
    """Read a run by name or path, or the runs of a study that were scored on the split."""
    for root in (runs_folder(), Path(), NOTEBOOKS):
        folder = root / Path(entry).expanduser()
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
    """Select runs by a query over their parameters, in the syntax of `pandas.DataFrame.query`.

    In the query, parameters that are None or missing are None, not NaN.

    Raises:
        ValueError: if the query can't be evaluated, or no run matches it.
    """
    names = dict.fromkeys(name for run in runs for name in run.parameters)
    table = pd.DataFrame(
        {name: pd.Series([run.parameters.get(name) for run in runs], dtype=object) for name in names}
    )
    try:
        is_matching = table.eval(where, engine="python")
        if not is_matching.map(type).isin((bool, np.bool_)).all():
            raise ValueError("it is not a condition")
    except Exception as error:  # pandas raises a dozen exception types
        raise ValueError(
            f"where: found {where!r}, which can't be evaluated ({error}); expected a query over the "
            f'parameters {", ".join(names)}, such as "soft_iou_weight in (0, 0.5) and classes.isnull()"'
        ) from error
    if not is_matching.any():
        values = "; ".join(f"{name}: {', '.join(sorted(table[name].map(str).unique()))}" for name in names)
        raise ValueError(f"where: {where!r} matches none of {len(runs)} runs; their parameters: {values}")
    return list(itertools.compress(runs, is_matching))


def group_recipes(runs: list[ScoredRun], baseline: str | None = None) -> dict[str, list[ScoredRun]]:
    """Group runs by recipe, with the baseline first, and pool the runs of five folds.

    All runs must be scored on the same images. A recipe is named after its group, its only run, the recipe
    name of external predictions, or the parameters in which the recipes differ. Runs of different groups are
    never merged into one recipe, so that a recipe can be compared with itself.

    Args:
        runs: runs from `read_runs`.
        baseline: name of a run or recipe; if None, the first recipe is the baseline.

    Raises:
        ValueError: if runs can't be compared, two runs of a group have the same recipe, seed and fold, or the
            baseline does not exist.
    """
    recipes = _name_recipes(_group(_pool_folds(runs)))
    for members in recipes.values():
        members.sort(key=lambda run: run.parameters["seed"])
        for run in members:
            _check_comparable(next(iter(recipes.values()))[0], run)
    _check_distinct(runs)
    if baseline is None:
        return recipes
    matches = [
        name for name, members in recipes.items() if baseline in (name, *(run.name for run in members))
    ]
    if not matches:
        raise ValueError(f"baseline: found {baseline!r}, there are: {', '.join(recipes)}")
    return {name: recipes[name] for name in dict.fromkeys((matches[0], *recipes))}


def _group(runs: Iterable[ScoredRun], *parameters: str) -> dict[tuple, list[ScoredRun]]:
    """Group runs by group, recipe and the given parameters, in order of first occurrence."""
    groups: dict[tuple, list[ScoredRun]] = {}
    for run in runs:
        key = (run.group, recipe(run.parameters), *map(run.parameters.get, parameters))
        groups.setdefault(key, []).append(run)
    return groups


def _check_distinct(runs: list[ScoredRun]) -> None:
    """Raise a ValueError if a recipe repeats a seed and fold, because these runs are not independent."""
    for (*_, seed, fold), members in _group(runs, "seed", "fold").items():
        if len(members) > 1:
            raise ValueError(
                f"runs: {members[0].name!r} and {members[1].name!r} have the same recipe, seed {seed} and "
                f"fold {fold}, but each seed counts once; name only one of them, or train or score the other "
                "with another seed (or, for external predictions, under another recipe)"
            )


def _name_recipes(by_recipe: dict[tuple, list[ScoredRun]]) -> dict[str, list[ScoredRun]]:
    settings = differing_settings(by_recipe)
    groups = [group for group, _ in by_recipe if group]
    recipes = {}
    for (group, key), members in by_recipe.items():
        label = group if groups.count(group) == 1 else _label(members, settings[group, key])
        while label in recipes:
            label = f"{label} ({members[0].name})"
        recipes[label] = members
    return recipes


def differing_settings(recipes: dict[Hashable, list[ScoredRun]]) -> dict[Hashable, str]:
    """Return the parameters of each recipe that differ between recipes, such as `learning_rate 0.003`."""
    table = pd.DataFrame([_settings(members[0].parameters) for members in recipes.values()], dtype=object)
    differing = table.columns[table.nunique() > 1]  # among the recipes that have them
    return {name: _describe_settings(members[0], differing) for name, members in recipes.items()}


def _describe_settings(run: ScoredRun, differing: Iterable[str]) -> str:
    values = _shorten_paths(run.parameters)
    known = _settings(run.parameters)
    return ", ".join(f"{name} {values[name]}" for name in differing if name in known)


def _label(members: list[ScoredRun], settings: str) -> str:
    run = members[0]
    if "recipe" in run.parameters:  # external predictions
        return run.parameters["recipe"]
    is_named = len(members) == 1 and not run.is_pooled  # five pooled runs have no name of their own
    if not settings or (is_named and len(run.name) <= len(settings)):
        return run.name
    return settings


def without_fold(recipes: dict[str, list[ScoredRun]], fold: int) -> dict[str, list[ScoredRun]]:
    """Exclude the images of one fold from pooled runs, for example the fold used for tuning.

    Raises:
        ValueError: if a run is not pooled over folds.
    """
    for run in itertools.chain(*recipes.values()):
        if not run.is_pooled:
            raise ValueError(
                f"fold: the run {run.name!r} is of one fold, expected runs pooled over five folds"
            )
    return {name: [run.select(run.image_fold != fold) for run in runs] for name, runs in recipes.items()}


def _pool_folds(runs: list[ScoredRun]) -> list[ScoredRun]:
    """Pool the runs of each recipe and seed over the five folds, leaving out incomplete sets.

    Runs are returned unchanged if all are on the same fold, or if each is the only one of its recipe and seed
    and all are scored on the same images, such as those of a test split.
    """
    groups = _group(runs, "seed")
    are_single = len(groups) == len(runs) and all(run.has_same_images(runs[0]) for run in runs)
    if are_single or len({run.parameters.get("fold") for run in runs}) < 2:
        return runs
    by_fold = {key: {run.parameters.get("fold"): run for run in members} for key, members in groups.items()}
    complete = [folds for folds in by_fold.values() if set(folds) == set(range(FOLDS))]
    if not complete:
        available = "; ".join(f"seed {key[-1]}: {sorted(folds)}" for key, folds in by_fold.items())
        raise ValueError(
            f"runs: found folds {available}; expected one fold, or all of 0 to 4 of a seed; name other runs"
        )
    return [_pool([folds[fold] for fold in range(FOLDS)]) for folds in complete]


def _pool(folds: list[ScoredRun]) -> ScoredRun:
    names = np.concatenate([run.names for run in folds])
    order = np.argsort(names)
    shared = np.sort(names[pd.Index(names).duplicated()])
    if len(shared):
        raise ValueError(
            f"runs: the five folds of {folds[-1].name!r} are scored on the same images, such as {shared[0]}; "
            "folds are pooled over their validation images, so use split valid, or name runs of one fold"
        )
    has_unknown_scenes = any(run.scene is None for run in folds)
    return replace(
        folds[-1],
        name=f"five folds, seed {folds[-1].parameters['seed']}",
        names=names[order],
        counts=np.concatenate([run.counts for run in folds])[order],
        scene=None if has_unknown_scenes else np.concatenate([run.scene for run in folds])[order],
        strata=_pool_strata(folds),
        image_fold=np.repeat(range(FOLDS), [len(run.names) for run in folds])[order],
        history=None,
        folder=None,
        masks=None,
    )


def _pool_strata(folds: list[ScoredRun]) -> dict[str, np.ndarray] | None:
    """Merge the strata of all folds, sorted by scene; None if a fold has none or two folds share a scene."""
    if any(run.strata is None for run in folds):
        return None
    scenes = np.concatenate([np.unique(run.scene) for run in folds])
    if len(np.unique(scenes)) < len(scenes):
        return None
    order = np.argsort(scenes)
    return {name: np.concatenate([run.strata[name] for run in folds])[order] for name in folds[0].strata}


def _check_comparable(first: ScoredRun, other: ScoredRun) -> None:
    check_same_classes(first.classes, other.classes, f"the run {first.name!r}", f"the run {other.name!r}")
    if first.has_same_images(other):
        return
    if list(first.names) != list(other.names):
        unshared = sorted(set(first.names) ^ set(other.names))
        detail = f"such as {unshared[0]}" if unshared else "in another order"
        reason = (
            f"{len(first.names)} and {len(other.names)} images, {len(unshared)} of them in one only, {detail}"
        )
    else:
        differing = first.names[(first.counts.sum(2) != other.counts.sum(2)).any(1)]
        reason = (
            f"the labels of {len(differing)} of {len(first.names)} images differ, such as those of "
            f"{differing[0]}"
        )
    raise ValueError(
        f"runs: {first.name!r} and {other.name!r} can't be compared: {reason}; evaluate both on the same "
        "data, split and fold"
    )
