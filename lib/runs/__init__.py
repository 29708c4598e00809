"""Run folders: create or reopen them, check their progress, and read and write their files."""

import datetime
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data import Samples
from lib.device import describe_processor
from lib.evaluation import Counts, Evaluation
from lib.files import ROOT, lock_run, read_json, write_atomically, write_json, write_text
from lib.metrics import averaged_classes, chance_miou, mean_iou, pixel_accuracy, truth_iou
from lib.model import weights_digest

METADATA = ("commit", "tree_unchanged", "processor")  # metadata of a run, not parameters
RESUME_MAY_CHANGE = ("num_workers", "save_figures")  # may differ on resumption, without effect on results
WEIGHTS_PARAMETERS = ("encoder_weights", "init_from")  # weights files, identified by a digest
PATH_PARAMETERS = ("data", *WEIGHTS_PARAMETERS)  # paths, which may differ between machines
MAX_NAME_BYTES = 200  # file systems allow 255, including the prefixes and suffixes that are added
RUN_NAME = re.compile(r'(?!(older|notebooks)$)[^./\\:*?"<>|][^/\\:*?"<>|]*')  # a plain folder name


def runs_folder() -> Path:
    """Return the folder of all runs: RUNS_DIR if this environment variable is set, else `ROOT/runs`."""
    return Path(os.environ.get("RUNS_DIR") or ROOT / "runs").expanduser().resolve()


def list_runs(having: str = "parameters.json") -> str:
    """Return the names of the runs that contain a file, comma-separated for a message, or `none`."""
    return ", ".join(sorted(path.parent.name for path in runs_folder().glob(f"*/{having}"))) or "none"


@contextmanager
def open_run(
    parameters: dict[str, object],
    resume: bool = False,
    samples: Sequence[Samples] = (),
) -> Iterator[Path]:
    """Create or reopen a run's folder and lock it until the block ends.

    Unless `resume` is set, an existing run of the same name is moved to `older/` under a dated name. It is
    moved back if the block fails before any progress is saved.

    Args:
        parameters: all notebook parameters, including `run_name`.
        resume: continue the existing run of that name.
        samples: the training and validation samples; they must have been loaded with these parameters.

    Raises:
        ValueError: if `run_name` is not a plain folder name, there is no run to resume, or the samples or
            the run to resume have other parameters.
        RuntimeError: if another process has locked the run, or its folder can't be locked.
    """
    run = runs_folder() / _check_name(parameters["run_name"])
    run_parameters = {name: value for name, value in parameters.items() if name != "resume"}
    run_parameters |= weights_digests(parameters)
    for split in samples:
        _check_loaded_with(split.loaded_with or {}, run_parameters)
    if resume:
        _check_resumable(run, run_parameters)
    elif parameters.get("init_from") and find_weights(parameters["init_from"]).resolve().parent == run:
        raise ValueError(
            f"init_from: found {run.name!r}, the run that the new run of this name would replace; choose "
            "another run_name"
        )
    with lock_run(run):
        archived = None if resume else _archive_run(run)
        try:
            run.mkdir(exist_ok=True)
            if not _has_progress(run):
                write_json(run_parameters | _collect_metadata(), run / "parameters.json")
                _write_images(run, samples)
            yield run
        except BaseException:
            if archived is not None and not _has_progress(run):
                shutil.rmtree(run, ignore_errors=True)
                archived.rename(run)
            raise


def _check_name(run_name: str) -> str:
    if not RUN_NAME.fullmatch(run_name) or len(os.fsencode(run_name)) > MAX_NAME_BYTES:
        raise ValueError(
            f"run_name: found {run_name!r}, expected a plain folder name such as 'exp061' of at most "
            f"{MAX_NAME_BYTES} bytes"
        )
    return run_name


def _check_loaded_with(loaded_with: dict[str, object], parameters: dict[str, object]) -> None:
    """Raise a ValueError if parameters were changed after the samples were loaded."""
    for name, value in loaded_with.items():
        if parameters.get(name, value) != value:
            raise ValueError(
                f"{name}: is {parameters[name]!r} now, but the samples were loaded with {value!r}; run the "
                "cell that loads the data again, and then this one"
            )


def _has_progress(run: Path) -> bool:
    """Whether any training progress has been saved."""
    return run_state(run).trained or (run / "last.pt").exists()


def _write_images(run: Path, samples: Sequence[Samples]) -> None:
    """Save the names of the training and validation images, in case the data set changes later."""
    if len(samples) == 2 and samples[0].loaded_with is not None:
        train, valid = (split.names.tolist() for split in samples)
        images = {"validation": samples[0].loaded_with["chosen_validation"], "train": train, "valid": valid}
        write_json(images, run / "images.json")


def read_images(run: Path) -> dict:
    """Return how validation images were chosen, and image names by split; empty if they were not recorded."""
    return read_json(run / "images.json") if (run / "images.json").exists() else {}


def _collect_metadata() -> dict[str, object]:
    """Return the commit, whether the working tree was unchanged, and the processor; None if unknown."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    metadata = {"commit": None, "tree_unchanged": None, "processor": describe_processor()}
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        metadata |= {"commit": commit.removesuffix("-dirty"), "tree_unchanged": not commit.endswith("-dirty")}
    return metadata


def weights_digests(parameters: dict) -> dict[str, str]:
    """Return the digests of the weights files that initialise a run, as parameters `NAME_digest`."""
    init_from = parameters.get("init_from")
    digests = {
        "encoder_weights_digest": weights_digest(parameters.get("encoder_weights")),
        "init_from_digest": weights_digest(find_weights(init_from)) if init_from else None,
    }
    return {name: digest for name, digest in digests.items() if digest is not None}


def _archive_run(run: Path) -> Path | None:
    """Move an existing run to `older/` and return its new path, or None if there is no run.

    The new name contains the time of the folder's last change.
    """
    if not run.exists():
        return None
    modified = datetime.datetime.fromtimestamp(run.stat().st_mtime)
    archived = run.parent / "older" / f"{run.name}.{modified:%Y-%m-%dT%H-%M-%S.%f}"
    archived.parent.mkdir(exist_ok=True)
    return run.rename(archived)


def _check_resumable(run: Path, parameters: dict[str, object]) -> None:
    if not (run / "parameters.json").exists():
        raise ValueError(
            f"resume: no run {run.name!r} in {run.parent}, there are: {list_runs()}; start it with resume "
            "False"
        )
    saved = read_parameters(run)
    unchanged_weights = [  # their paths may differ
        name
        for name in WEIGHTS_PARAMETERS
        if parameters.get(f"{name}_digest") == saved.get(f"{name}_digest", "unknown")
    ]
    changed = [
        f"{name} = {saved.get(name, 'unknown')!r} (found {parameters.get(name, 'unknown')!r})"
        for name in saved | parameters
        if name not in (*RESUME_MAY_CHANGE, *METADATA, *unchanged_weights)
        and name not in ("device", "precision")  # `Checkpoint.restore` checks what `auto` selected
        and saved.get(name, "unknown") != parameters.get(name, "unknown")
    ]
    if changed:
        hint = ""
        if saved.get("epochs") != parameters.get("epochs"):
            hint = (
                "; epochs can't change, because the learning rates of all epochs were scheduled at the start"
            )
        raise ValueError(
            f"resume: {run.name!r} was started with {', '.join(changed)}; resume it with its own "
            f"parameters, or start another run_name with resume False{hint}"
        )


class RunState(NamedTuple):
    """The progress of a run.

    Attributes:
        epochs: planned number of epochs; 0 if the run does not exist or consists of external predictions.
        done: number of finished epochs.
        trained: whether all epochs are finished and the report is written.
        evaluated: splits that were scored, or only predicted if their labels are held back.
    """

    epochs: int
    done: int
    trained: bool
    evaluated: tuple[str, ...]

    def describe(self) -> str:
        """Describe the progress before training starts or resumes."""
        if self.trained:
            return f"is finished, all {self.epochs} epochs are done; nothing changes"
        if self.done:
            return f"resumes, {self.done} of {self.epochs} epochs are done"
        return "starts from the beginning"


def run_state(run: Path) -> RunState:
    """Return the progress of the run in a folder, which need not exist."""
    epochs = read_parameters(run).get("epochs", 0) if (run / "parameters.json").exists() else 0
    done = len(read_history(run)) if (run / "history.csv").exists() else 0
    trained = 0 < epochs <= done and (run / "report.md").exists()
    evaluated = sorted(path.stem for path in (run / "evaluation").glob("[!.]*.json"))
    return RunState(epochs, done, trained, tuple(evaluated))


def write_history(run: Path, history: list[dict]) -> None:
    """Write `history.csv`, with one row per epoch so far."""
    write_text(pd.DataFrame(history).to_csv(index=False), run / "history.csv")


def read_history(run: Path) -> pd.DataFrame:
    """Read the history saved by `write_history`."""
    text = pd.read_csv(run / "history.csv", dtype=str)  # pandas 2 does not parse floats exactly
    return text.astype(float).astype({"epoch": int})


def write_scores(run: Path, row: dict, valid: Evaluation | None) -> None:
    """Write the scores and, with validation images, the confusion matrices of the kept epoch.

    Both are computed at the training resolution. Evaluations of an earlier kept epoch are deleted.

    Args:
        run: folder of the run.
        row: history row of the epoch.
        valid: evaluation of the validation images; None if there are none.
    """
    scores = {"best_epoch": row["epoch"]} | {name: value for name, value in row.items() if name != "epoch"}
    if valid is not None:
        scores |= {
            "valid_miou": mean_iou(valid.counts),
            "valid_pixel_acc": pixel_accuracy(valid.counts),
            "averaged_classes": averaged_classes(valid.counts),
            "chance_miou": chance_miou(valid.counts),
            "class_iou": dict(zip(valid.classes, truth_iou(valid.counts).round(6).tolist(), strict=True)),
        }
        write_counts(run / "counts.npz", valid)
    shutil.rmtree(run / "evaluation", ignore_errors=True)  # of an earlier epoch
    write_json(scores, run / "scores.json")


def write_counts(path: Path, counted: Counts) -> None:
    """Write image names, confusion matrices, class names and, if known, scenes to an .npz file."""
    arrays = {"names": counted.names, "counts": counted.counts, "classes": np.array(counted.classes)}
    scene = {} if counted.scene is None else {"scene": counted.scene}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays, **scene))


def read_counts(path: Path) -> Counts:
    """Read a file saved by `write_counts`."""
    with np.load(path) as saved:
        return Counts(saved["names"], saved.get("scene"), tuple(saved["classes"].tolist()), saved["counts"])


def read_scores(run: Path) -> dict:
    """Read the scores saved by `write_scores`, without the confusion matrices."""
    return read_json(run / "scores.json")


def read_parameters(run: Path) -> dict:
    """Read the parameters that a run was started with, and its metadata (`METADATA`)."""
    return read_json(run / "parameters.json")


def check_version(run_name: str, parameters: dict[str, object]) -> None:
    """Raise a ValueError if the parameters have their names from before the first release."""
    if "validation" not in parameters:
        raise ValueError(
            f"run {run_name!r} was trained before parameters were renamed, so its parameters.json has no "
            "`validation`; train it again"
        )


def find_run(run: str, parameter: str = "run") -> Path:
    """Return the folder of a trained run, that is, one that contains `best.pt`.

    Args:
        run: name or path of the run, or `latest` for the one trained last.
        parameter: notebook parameter to mention in the error message.

    Raises:
        ValueError: if there is no such run; the message includes the command to train one.
    """
    file = runs_folder() / Path(run).expanduser() / "best.pt"  # an absolute path replaces runs_folder()
    if run == "latest":
        file = max(runs_folder().glob("*/best.pt"), key=lambda path: path.stat().st_mtime, default=file)
    if not file.exists():
        raise ValueError(
            f"{parameter}: found {run!r}, trained runs in {runs_folder()}: {list_runs('best.pt')}. Make one "
            "with `papermill train.ipynb out.ipynb`"
        )
    return file.parent


def find_weights(init_from: str) -> Path:
    """Return the weights file to start from: a .pt path, or the `best.pt` of a run, see `find_run`."""
    if init_from == "latest":  # it would be another run by the time that training begins
        raise ValueError("init_from: found 'latest', expected the name of a run or the path of a best.pt")
    path = Path(init_from).expanduser()
    if path.suffix == ".pt" and path.is_file():
        return path
    return find_run(init_from, "init_from") / "best.pt"
