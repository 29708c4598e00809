"""Scored runs with synthetic counts, as `read_scored` returns them or as folders without weights."""

from pathlib import Path

import numpy as np
import pandas as pd
from conftest import history

from lib.evaluation import Evaluation
from lib.files import write_json
from lib.runs import METADATA, write_counts, write_history
from lib.runs.results import ScoredRun

CLASSES = ("floor", "wall", "chair")
SCENES = 8  # with three images each
DEFAULTS = {
    "data": "/disk/nyu", "validation": "blocks", "fold": 4, "limit": None, "classes": None, "epochs": 3, "seed": 0,
    "soft_iou_weight": 0.5, "soft_iou_pooling": "batch", "learning_rate": 0.003, "encoder_weights": None,
    "num_workers": 0, "device": "cpu",
}  # fmt: skip


def some_counts(rate: float = 0.7, seed: int = 0, scenes: int = SCENES, sd: float = 0.02) -> np.ndarray:
    """Counts `(N, 3, 3)` with three images per scene.

    The recall of each class is about `rate` and varies by scene and image.
    """
    rng = np.random.default_rng(seed)
    truth = np.array([600, 300, 100]) + np.random.default_rng(99).integers(0, 90, (3 * scenes, 1))
    by_scene = np.repeat(sd * rng.standard_normal((scenes, 3)), 3, 0)
    recall = rate + by_scene + 0.01 * rng.standard_normal((3 * scenes, 3))
    hits = np.rint(truth * recall.clip(0, 1)).astype(np.int64)
    counts = np.zeros((3 * scenes, 3, 3), np.int64)
    counts[:, range(3), range(3)] = hits
    counts[:, range(3), [1, 2, 0]] = truth - hits  # missed pixels are confused with the next class
    return counts


def names_of(count: int = 3 * SCENES, first: int = 0) -> list[str]:
    """Image names, which are consecutive numbers."""
    return [f"{number:06d}" for number in range(first, first + count)]


def scored_run(
    name: str,
    counts: np.ndarray | None = None,
    *,
    names: list[str] | None = None,
    scene: np.ndarray | list[str] | str | None = "threes",
    classes: tuple[str, ...] = CLASSES,
    split: str = "valid",
    chosen_validation: str | None = "blocks",
    external: dict | None = None,
    **parameters: object,
) -> ScoredRun:
    """A run of three epochs, or external predictions if `external` is given.

    A run has `DEFAULTS` updated by `parameters`; external predictions have only the parameters in `external`.
    `parameters` may include the group and what a run records (commit, tree_unchanged, processor).
    """
    facts = {fact: parameters.pop(fact, None) for fact in ("group", *METADATA)}
    parameters = {"run_name": name} | (DEFAULTS | parameters if external is None else external)
    counts = some_counts() if counts is None else counts
    names = names_of(len(counts)) if names is None else names
    if isinstance(scene, str):
        scene = [f"room {int(image) // 3}" for image in names]
    return ScoredRun(
        name=name,
        parameters=parameters,
        split=split,
        data=parameters["data"],
        validation=chosen_validation,
        names=np.array(names),
        counts=counts,
        scene=None if scene is None else np.asarray(scene),
        classes=tuple(classes),
        history=pd.DataFrame(history(3)) if external is None else None,
        **facts,
    )


def scored_folder(home: Path, name: str, counts: np.ndarray | None = None, **options: object) -> Path:
    """Write the folder of a `scored_run`, without weights and predictions, and return its path."""
    run, folder = scored_run(name, counts, **options), home / name
    (folder / "evaluation").mkdir(parents=True)
    write_json(run.parameters | {fact: getattr(run, fact) for fact in METADATA}, folder / "parameters.json")
    if run.history is not None:
        write_history(folder, run.history.to_dict("records"))
    path = folder / "evaluation" / f"{run.split}.npz"
    write_counts(path, Evaluation(run.names, run.scene, run.classes, run.counts, [], None, None, None))
    facts = {"data": run.data, "validation": run.validation, "images": len(run.names), "labelled": True}
    write_json(facts, path.with_suffix(".json"))
    return folder
