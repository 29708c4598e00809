"""A run of seconds that a test can kill: `python small_run.py RUN_NAME`, in a folder of runs given by RUNS_DIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import lib  # noqa: F401
from lib import training
from lib.data import load_samples
from lib.data.samples import Samples
from lib.model import build_model
from lib.runs import start_run

OPTIONS = {
    "inputs": "rgbd", "depth_encoding": "inverse", "soft_iou_weight": 0.5, "soft_iou_pooling": "batch",
    "depth_weight": 0.1, "epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 1e-4,
    "schedule": "one_cycle", "ema_decay": 0.0, "augment": "crops", "workers": 0, "precision": "fp32", "device": "cpu", "seed": 0,
}  # fmt: skip


def small_samples() -> Samples:
    """A dozen scenes at half their size."""
    scenes = load_samples("synthetic", "train", "official", limit=16)
    return Samples(scenes.names, *(array[:, ::2, ::2] for array in (scenes.image, scenes.depth, scenes.label)))


def train(run_name: str, resume: bool, samples: Samples, **options) -> list[dict]:
    """The history of a run, without the times."""
    torch.manual_seed(OPTIONS["seed"])
    run = start_run(run_name, OPTIONS | options, resume)
    history = list(training.fit(build_model(), samples[:13], samples[13:], run, **OPTIONS | options))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


if __name__ == "__main__":
    training.CHECKPOINT_SECONDS = 0  # a checkpoint after every batch, so that many kills hit one
    samples = small_samples()
    print("training", flush=True)
    train(sys.argv[1], False, samples)
