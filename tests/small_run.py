"""Runs of a second on built-in synthetic scenes, also such that kill themselves: `python small_run.py NAME WRITE MOMENT ...`."""

import os
import signal
import sys
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lib  # noqa: F401
from lib import training
from lib.batches import training_loader
from lib.data import load_samples
from lib.data.samples import Samples
from lib.runs import open_run
from lib.training import build_network, fit, total_loss

ENCODER = "tu-test_resnet.r160_in1k"  # what the tests of segmentation-models-pytorch use: 0.4 million weights
PARAMETERS = {
    "seed": 0, "image_height": 48, "image_width": 64, "inputs": "rgbd", "depth_encoding": "inverse",
    "architecture": "deeplabv3plus", "encoder": ENCODER, "encoder_weights": None, "soft_iou_weight": 0.5,
    "soft_iou_pooling": "batch", "depth_weight": 0.1, "epochs": 3, "batch_size": 4, "learning_rate": 1e-3,
    "weight_decay": 1e-4, "schedule": "one_cycle", "ema_decay": 0.0, "checkpoint": "best", "augment": "crops",
    "num_workers": 0, "precision": "fp32", "device": "cpu",
}  # fmt: skip
FOR_FIT = (
    "epochs",
    "learning_rate",
    "weight_decay",
    "schedule",
    "ema_decay",
    "checkpoint",
    "precision",
    "device",
)
MOMENTS = ("half", "whole", "after")  # of a file: half written, whole beside the earlier one, in its place


def small_samples() -> Samples:
    """A dozen scenes at half their size to train on, and three to validate."""
    scenes = load_samples("synthetic", "train", "none", limit=16)
    return scenes.map(lambda array: array[:, ::2, ::2] if array.ndim >= 3 else array)


def fit_run(run: Path, parameters: dict, train: Samples, valid: Samples) -> list[dict]:
    """What the training cell does; the history without the times."""
    loader = training_loader(
        train, *(parameters[name] for name in ("augment", "batch_size", "num_workers", "seed"))
    )
    weights = {name: parameters[name] for name in ("soft_iou_weight", "soft_iou_pooling", "depth_weight")}
    build, loss = (
        partial(build_network, parameters, train.classes, train.depth_range_m),
        partial(total_loss, **weights),
    )
    rows = fit(build, loader, valid, run, loss=loss, **{name: parameters[name] for name in FOR_FIT})
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def train(
    run_name: str, samples: Samples, resume: bool = False, held_out: int = 3, **parameters
) -> list[dict]:
    """The history of a run of that name; the last `held_out` samples validate."""
    parameters = PARAMETERS | {"run_name": run_name} | parameters
    first_valid = len(samples) - held_out
    with open_run(parameters, resume) as run:
        return fit_run(run, parameters, samples[:first_valid], samples[first_valid:])


def kill_at(write: int, moment: str) -> None:
    """Kill this process at a moment of its n-th atomic write, as a power cut would."""
    written, placed, sync, replace = count(1), count(1), os.fsync, os.replace

    def fsync(file: int) -> None:
        sync(file)
        if next(written) == write and moment != "after":
            os.ftruncate(file, os.fstat(file).st_size // (2 if moment == "half" else 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_die(*paths: object) -> None:
        replace(*paths)
        if next(placed) == write and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = fsync, replace_and_die


if __name__ == "__main__":
    samples, training.CHECKPOINT_SECONDS = small_samples(), -1
    for name, write, moment in zip(*(iter(sys.argv[1:]),) * 3, strict=True):
        if os.fork() == 0:  # each run is killed in a process of its own, and all have been imported once
            kill_at(int(write), moment)
            train(name, samples)
            os._exit(0)
        print(name, os.wait()[1], flush=True)
