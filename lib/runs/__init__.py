"""A run's folder: open it, say what is there of it, write and read it, report."""

import datetime
import itertools
import os
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
from lib.files import ROOT, hold_run, read_json, write_atomically, write_json, write_text
from lib.metrics import averaged_classes, chance_miou, mean_iou, pixel_accuracy, truth_iou
from lib.model import weights_digest

RECORDED = ("commit", "tree_unchanged", "processor")  # facts about a run, not parameters of it
MAY_CHANGE = ("num_workers", "save_figures")  # when a run is resumed; neither changes its result
WEIGHTS = ("encoder_weights", "init_from")  # files of weights, known by a digest
PLACES = ("data", *WEIGHTS)  # paths, which may differ from machine to machine


LONGEST_NAME = 200  # bytes of a run's name: disks take 255 with what is put before and behind it


def runs_folder() -> Path:
    """Where runs are kept: `runs/` beside `lib/`, unless the environment variable RUNS_DIR says otherwise."""
    return Path(os.environ.get("RUNS_DIR") or ROOT / "runs").expanduser()


def list_runs(having: str = "parameters.json") -> str:
    """Names of the runs that have a file, for a message."""
    return ", ".join(sorted(path.parent.name for path in runs_folder().glob(f"*/{having}"))) or "none"


@contextmanager
def open_run(
    parameters: dict[str, object],
    resume: bool = False,
    samples: Sequence[Samples] = (),
) -> Iterator[Path]:
    """The folder of a new run, or of an interrupted one; no other process has it until the end of the block.

    An older run of that name is kept under a dated name in `older/`, and comes back where the block fails
    before anything was computed.

    Args:
        parameters: of the notebook, `run_name` among them.
        resume: go on with the run of that name.
        samples: what it will train and validate on, refused if loaded with other parameters than these.

    Raises:
        ValueError: a name that is no plain folder name; nothing to resume; other parameters than the run's.
        RuntimeError: another process has the run.
    """
    run_name = parameters["run_name"]
    if (
        not run_name
        or len(os.fsencode(run_name)) > LONGEST_NAME
        or run_name in ("older", "notebooks")
        or set(run_name) & set('/\\:*?"<>|')
        or run_name[0] == "."
    ):
        raise ValueError(
            f"run_name: found {run_name!r}, expected a plain folder name such as 'exp061' of at most "
            f"{LONGEST_NAME} bytes"
        )
    run = runs_folder() / run_name
    saved = {name: value for name, value in parameters.items() if name != "resume"}
    saved |= weights_digests(parameters)
    for name, value in itertools.chain(*((loaded.loaded_with or {}).items() for loaded in samples)):
        if saved.get(name, value) != value:
            raise ValueError(
                f"{name}: is {saved[name]!r} now, but the samples were loaded with {value!r}; run the cell "
                "that loads the data again, and then this one"
            )
    if resume:
        _check_resumable(run, saved)
    with hold_run(run):
        older = None if resume else _set_aside(run)
        run.mkdir(exist_ok=True)
        if not _is_begun(run):
            write_json(saved | _record(), run / "parameters.json")
            _write_images(run, samples)
        try:
            yield run
        except BaseException:
            if older is not None and not _is_begun(run):
                shutil.rmtree(run)
                older.rename(run)
            raise


def _is_begun(run: Path) -> bool:
    """Whether anything has been computed."""
    return run_state(run).trained or (run / "last.pt").exists()


def _write_images(run: Path, samples: Sequence[Samples]) -> None:
    """Which images train and validate, for the day when the data set has others."""
    if len(samples) == 2 and samples[0].loaded_with is not None:
        train, valid = (one.names.tolist() for one in samples)
        chosen = {"validation": samples[0].loaded_with["chosen_validation"], "train": train, "valid": valid}
        write_json(chosen, run / "images.json")


def read_images(run: Path) -> dict:
    """How validation images were chosen, and image names by split; empty if the run did not record them."""
    return read_json(run / "images.json") if (run / "images.json").exists() else {}


def _record() -> dict[str, object]:
    """The commit of the code, whether its tree was unchanged, and the processor; None for what is unknown."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    recorded = {"commit": None, "tree_unchanged": None, "processor": describe_processor()}
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        recorded |= {"commit": commit.removesuffix("-dirty"), "tree_unchanged": not commit.endswith("-dirty")}
    return recorded


def weights_digests(parameters: dict) -> dict[str, str]:
    """The digests of the files of weights that a run begins with, as parameters `NAME_digest`."""
    init_from = parameters.get("init_from")
    digests = {
        "encoder_weights_digest": weights_digest(parameters.get("encoder_weights")),
        "init_from_digest": weights_digest(find_weights(init_from)) if init_from else None,
    }
    return {name: digest for name, digest in digests.items() if digest is not None}


def _set_aside(run: Path) -> Path | None:
    """Where an older run of that name is now, with the time when it was finished; None if there was none."""
    if not run.exists():
        return None
    finished = datetime.datetime.fromtimestamp(run.stat().st_mtime)
    older = run.parent / "older" / f"{run.name}.{finished:%Y-%m-%dT%H-%M-%S.%f}"
    older.parent.mkdir(exist_ok=True)
    return run.rename(older)


def _check_resumable(run: Path, parameters: dict[str, object]) -> None:
    if not (run / "parameters.json").exists():
        raise ValueError(
            f"resume: no run {run.name!r} in {run.parent}, there are: {list_runs()}; start it with resume "
            "False"
        )
    saved = read_parameters(run)
    same_file = [  # perhaps elsewhere
        name for name in WEIGHTS if parameters.get(f"{name}_digest") == saved.get(f"{name}_digest", "unknown")
    ]
    differing = [
        f"{name} = {saved.get(name, 'unknown')!r} (found {parameters.get(name, 'unknown')!r})"
        for name in saved | parameters
        if name not in (*MAY_CHANGE, *RECORDED, *same_file)
        and name not in ("device", "precision")  # what these come to is held against the checkpoint
        and saved.get(name, "unknown") != parameters.get(name, "unknown")
    ]
    if differing:
        hint = ""
        if saved.get("epochs") != parameters.get("epochs"):
            hint = (
                "; epochs can't change, because the learning rates of all epochs were scheduled at the start"
            )
        raise ValueError(
            f"resume: {run.name!r} was started with {', '.join(differing)}; resume it with its own "
            f"parameters, or start another run_name with resume False{hint}"
        )


class RunState(NamedTuple):
    """What is there of a run.

    Attributes:
        epochs: that it was started for; 0 where nothing is there, or where it was not trained here.
        done: epochs that are finished.
        trained: whether all of them are, with the report.
        evaluated: splits that it was scored on, or predicted where labels are held back.
    """

    epochs: int
    done: int
    trained: bool
    evaluated: tuple[str, ...]

    def describe(self) -> str:
        """In words, before it trains."""
        if self.trained:
            return f"is finished, all {self.epochs} epochs are done; nothing changes"
        if self.done:
            return f"resumes, {self.done} of {self.epochs} epochs are done"
        return "starts from the beginning"


def run_state(run: Path) -> RunState:
    """See `RunState`; of any folder, also one that does not exist."""
    epochs = read_parameters(run).get("epochs", 0) if (run / "parameters.json").exists() else 0
    done = len(read_history(run)) if (run / "history.csv").exists() else 0
    trained = 0 < epochs <= done and (run / "report.md").exists()
    evaluated = sorted(path.stem for path in (run / "evaluation").glob("*.json"))
    return RunState(epochs, done, trained, tuple(evaluated))


def write_history(run: Path, history: list[dict]) -> None:
    """One row per epoch so far."""
    write_text(pd.DataFrame(history).to_csv(index=False), run / "history.csv")


def read_history(run: Path) -> pd.DataFrame:
    """The rows that `write_history` wrote."""
    text = pd.read_csv(run / "history.csv", dtype=str)  # pandas 2 rounds numbers that it reads itself
    return text.astype(float).astype({"epoch": int})


def write_scores(run: Path, row: dict, valid: Evaluation | None) -> None:
    """The kept epoch's row of history, its scores and counts at the working size; None: nothing validates."""
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
    shutil.rmtree(run / "evaluation", ignore_errors=True)  # of an earlier best epoch
    write_json(scores, run / "scores.json")


def write_counts(path: Path, counted: Counts) -> None:
    """The names, counts, classes and, where they are known, scenes."""
    arrays = {"names": counted.names, "counts": counted.counts, "classes": np.array(counted.classes)}
    scene = {} if counted.scene is None else {"scene": counted.scene}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays, **scene))


def read_counts(path: Path) -> Counts:
    """What `write_counts` wrote."""
    with np.load(path) as saved:
        return Counts(saved["names"], saved.get("scene"), tuple(saved["classes"].tolist()), saved["counts"])


def read_scores(run: Path) -> dict:
    """What `write_scores` wrote, without the counts."""
    return read_json(run / "scores.json")


def read_parameters(run: Path) -> dict:
    """The parameters that a run was started with."""
    return read_json(run / "parameters.json")


def check_version(run_name: str, parameters: dict[str, object]) -> None:
    """Raises a ValueError for parameters with their names of before the first release."""
    if "validation" not in parameters:
        raise ValueError(
            f"run {run_name!r} was trained before parameters were renamed, so its parameters.json has no "
            "`validation`; train it again"
        )


def find_run(run: str, parameter: str = "run") -> Path:
    """The folder of a trained run: `latest`, a name, or a path, which a parameter of the notebook holds.

    Raises:
        ValueError: there is none; the message names the command that makes one.
    """
    file = runs_folder() / Path(run).expanduser() / "best.pt"  # an absolute path stays what it is
    if run == "latest":
        file = max(runs_folder().glob("*/best.pt"), key=lambda path: path.stat().st_mtime, default=file)
    if not file.exists():
        raise ValueError(
            f"{parameter}: found {run!r}, trained runs in {runs_folder()}: {list_runs('best.pt')}. Make one "
            "with `papermill train.ipynb out.ipynb`"
        )
    return file.parent


def find_weights(init_from: str) -> Path:
    """The `best.pt` that training begins with: a path, or that of a run by name."""
    path = Path(init_from).expanduser()
    if path.suffix == ".pt" and path.is_file():
        return path
    return find_run(init_from, "init_from") / "best.pt"
