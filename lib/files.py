"""Files that are whole or not there: checkpoints, JSON, text, locks."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]  # of the repository

torch.serialization.set_crc32_options(
    False
)  # checksums take a third of the time, and torch.load never looks at them


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and the remedy."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: no reader ever sees half a file.

    Raises:
        OSError: it can't be written, a full disk for example; an earlier file is intact.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"{path}: could not be written ({error}); an earlier file of that name is intact. "
            "Free disk space or check the permissions, then resume the run"
        ) from error


def write_text(text: str, path: Path) -> None:
    """A text file, whole or not there."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(content: dict, path: Path) -> None:
    """A JSON file, whole or not there; NaN and infinity become null, which JSON knows."""
    finite = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    write_text(json.dumps(finite, indent=2) + "\n", path)


def read_json(path: Path) -> dict:
    """The content of one of a run's JSON files; a ValueError says which one is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); the run is incomplete, train it again") from error


@contextmanager
def hold_run(run: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Let no other process have the run: one that was just killed may still hold it for a while.

    Raises:
        RuntimeError: another process has it all the time, or the disk knows no locks.
    """
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(run.with_name(f".{run.name}.lock")).acquire(timeout=wait_seconds)
    except Timeout:
        raise RuntimeError(
            f"run_name: {run.name!r} is being trained by another process; wait for it, or choose another "
            "run_name"
        ) from None
    except OSError as error:  # of flock, on network disks, without a path
        raise RuntimeError(
            f"RUNS_DIR: files in {run.parent} can't be locked ({error.strerror}); set the environment "
            "variable RUNS_DIR to a folder on a local disk"
        ) from error
    with held:
        yield


def save_checkpoint(state: dict, path: Path) -> None:
    """`torch.save` that never leaves half a file; raises OSError where it can't be written."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str, expected: tuple[str, ...]) -> dict:
    """What `save_checkpoint` wrote: data only, nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, from elsewhere, or lacks an expected entry.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or foreign file
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise CheckpointError(
            f"{path}: can't be read ({reason}), expected a checkpoint that train.ipynb wrote; it is "
            "truncated or from another program: copy it again, or train again with resume False"
        ) from error
    found = sorted(map(str, saved)) if isinstance(saved, dict) else [type(saved).__name__]
    if not set(expected) <= set(found):
        raise CheckpointError(
            f"{path}: found {', '.join(found) or 'nothing'}, expected {', '.join(expected)}; it is from "
            "another version or another program: train again with resume False, or use the version "
            "that wrote it"
        )
    return saved
