"""Runs on built-in synthetic scenes that take about a second.

`python small_run.py NAME WRITE MOMENT ...` trains runs that kill themselves, see `kill_at`.
"""

import os
import signal
import sys
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lib  # noqa: F401
from lib.batches import training_loader
from lib.data import load_samples
from lib.data.samples import Samples
from lib.runs import checkpoints, open_run
from lib.training import Optimisation, build_network, build_objective, fit

ENCODER = "tu-test_resnet.r160_in1k"  # as in smp's tests; 0.4 million parameters
PARAMETERS = {
    "seed": 0, "image_height": 48, "image_width": 64, "inputs": "rgbd", "depth_encoding": "inverse",
    "architecture": "deeplabv3plus", "encoder": ENCODER, "encoder_weights": None,
    "rgb_normalisation": "weights", "init_from": None, "encoder_lr_scale": 1.0, "class_weights": "none", "lovasz_weight": 0.0, "soft_iou_weight": 0.5,
    "soft_iou_pooling": "batch", "depth_weight": 0.1, "epochs": 3, "batch_size": 4, "learning_rate": 1e-3,
    "weight_decay": 1e-4, "schedule": "one_cycle", "checkpoint": "best", "augment": "crops",
    "num_workers": 0, "precision": "fp32", "device": "cpu",
}  # fmt: skip
# of writing a file: half written, complete beside the earlier file, in place of the earlier file
MOMENTS = ("half", "whole", "after")


def small_samples() -> Samples:
    """16 scenes at half their size; by default, `train` uses the last three for validation."""
    scenes = load_samples("synthetic", "train", "none", limit=16)
    return scenes.map(lambda array: array[:, ::2, ::2] if array.ndim >= 3 else array)


def fit_run(run: Path, parameters: dict, train: Samples, valid: Samples) -> list[dict]:
    """Train like the training cell of train.ipynb and return the history without times."""
    loader = training_loader(
        train, *(parameters[name] for name in ("augment", "batch_size", "num_workers", "seed"))
    )
    build = partial(build_network, parameters, train.classes, train.depth_range_m)
    objective = build_objective(parameters, train)
    rows = fit(
        build,
        loader,
        valid,
        run,
        objective,
        Optimisation.of(parameters),
        parameters["precision"],
        parameters["device"],
    )
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def train(
    run_name: str, samples: Samples, resume: bool = False, held_out: int = 3, **parameters
) -> list[dict]:
    """Train a run and return its history. The last `held_out` samples are used for validation."""
    parameters = PARAMETERS | {"run_name": run_name} | parameters
    first_valid = len(samples) - held_out
    with open_run(parameters, resume) as run:
        return fit_run(run, parameters, samples[:first_valid], samples[first_valid:])


def kill_at(write: int, moment: str) -> None:
    """Kill this process at the given moment of the n-th atomic write (n = `write`), as a power cut would."""
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
    samples = small_samples()
    checkpoints.SAVE_INTERVAL_SECONDS = -1
    for name, write, moment in zip(*(iter(sys.argv[1:]),) * 3, strict=True):
        if os.fork() == 0:  # each run is killed in its own process; all share the imports
            kill_at(int(write), moment)
            train(name, samples)
            os._exit(0)
        print(name, os.wait()[1], flush=True)
