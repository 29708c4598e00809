"""Folders of scored runs without weights, as a sweep leaves them, with counts made by hand."""

import json
from pathlib import Path

import numpy as np
from conftest import history

from lib.evaluation import Evaluation
from lib.files import write_json
from lib.runs import write_counts, write_history

CLASSES = ("floor", "wall", "chair")
SCENES = 8  # of three images each
DEFAULTS = {
    "data": "/nyu", "split": "blocks", "fold": 4, "limit": None, "classes": None, "epochs": 3, "seed": 0,
    "soft_iou_weight": 0.5, "soft_iou_pooling": "batch", "learning_rate": 0.003, "encoder_weights": None,
    "workers": 0, "device": "cpu",
}  # fmt: skip


def some_counts(rate: float = 0.7, seed: int = 0, scenes: int = SCENES, sd: float = 0.02) -> np.ndarray:
    """`(N, 3, 3)` of three images a scene; about this share of each class's pixels is found, scene by scene."""
    rng = np.random.default_rng(seed)
    truth = np.array([600, 300, 100]) + np.random.default_rng(99).integers(0, 90, (3 * scenes, 1))
    shares = rate + np.repeat(sd * rng.standard_normal((scenes, 3)), 3, 0) + 0.01 * rng.standard_normal((3 * scenes, 3))
    hits = np.rint(truth * shares.clip(0, 1)).astype(np.int64)
    counts = np.zeros((3 * scenes, 3, 3), np.int64)
    counts[:, range(3), range(3)] = hits
    counts[:, range(3), [1, 2, 0]] = truth - hits  # missed pixels are taken for the next class
    return counts


def names_of(count: int = 3 * SCENES, first: int = 0) -> list[str]:
    return [f"{number:06d}" for number in range(first, first + count)]


def slim_run(
    home: Path,
    name: str,
    counts: np.ndarray | None = None,
    *,
    names: list[str] | None = None,
    scene: list[str] | str | None = "threes",
    classes: tuple[str, ...] = CLASSES,
    part: str = "valid",
    chosen_split: str | None = "blocks",
    foreign: dict | None = None,
    **parameters: object,
) -> Path:
    """The folder of a run that was scored; parameters over the defaults, or those of foreign predictions alone."""
    run = home / name
    counts = some_counts() if counts is None else counts
    names = names_of(len(counts)) if names is None else names
    if scene == "threes":
        scene = [f"room {int(name) // 3}" for name in names]
    (run / "evaluation").mkdir(parents=True)
    given = DEFAULTS | parameters if foreign is None else foreign
    write_json({"run_name": name} | given, run / "parameters.json")
    if foreign is None:
        write_history(run, history(3))
    scenes = None if scene is None else np.array(scene)
    write_counts(
        run / "evaluation" / f"{part}.npz",
        Evaluation(np.array(names), scenes, tuple(classes), counts, [], None, None, None),
    )
    facts = {"data": given["data"], "images": len(counts), "labelled": True, "split": chosen_split}
    (run / "evaluation" / f"{part}.json").write_text(json.dumps(facts))
    return run
