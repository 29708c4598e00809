"""Atomic writing of checkpoints, JSON and text files, and locks on run folders."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]  # root folder of the repository

# checksums take a third of the saving time, and torch.load does not verify them
torch.serialization.set_crc32_options(False)


class CheckpointError(ValueError):
    """Raised when a checkpoint can't be used. The message contains the path and the remedy."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    `write` fills a temporary file in the same folder, which is then renamed to `path`. A reader never sees a
    partial file. Of several writers at the same time, each has its own temporary file.

    Raises:
        OSError: if the file can't be written, for example on a full disk. An earlier file is kept intact.
    """
    temporary_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(temporary_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise OSError(
            f"{path}: could not be written ({error}); an earlier file of that name is intact. "
            "Free disk space or check the permissions, then resume the run"
        ) from error
    finally:
        temporary_path.unlink(missing_ok=True)  # it exists only after an error or an interruption


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically, encoded as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file atomically. NaN and infinity, which JSON does not allow, become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    write_text(json.dumps(finite, indent=2) + "\n", path)


def read_json(path: Path) -> dict:
    """Read a JSON file of a run.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); the run is incomplete, train it again") from error


@contextmanager
def lock_run(run: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Lock a run for this process until the block ends.

    The lock of a process that was just killed may persist for a moment; `wait_seconds` allows for this.
    Temporary files that such a process left in the run's folder are deleted.

    Raises:
        RuntimeError: if another process still holds the lock after `wait_seconds`, or the disk does not
            support locks.
    """
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.with_name(f".{run.name}.lock")).acquire(timeout=wait_seconds)
    except Timeout:
        raise RuntimeError(
            f"run_name: {run.name!r} is in use by another process; wait for it, or choose another run_name"
        ) from None
    except OSError as error:  # flock fails on network disks; its error has no path
        raise RuntimeError(
            f"RUNS_DIR: files in {run.parent} can't be locked ({error.strerror}); set the environment "
            "variable RUNS_DIR to a folder on a local disk"
        ) from error
    with lock:
        for leftover in run.rglob(".*.unfinished"):
            leftover.unlink(missing_ok=True)
        yield


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint atomically with `torch.save`; raise an OSError if it can't be written."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str, expected: tuple[str, ...]) -> dict:
    """Load a checkpoint written by `save_checkpoint`. Only data is read; no code in the file is executed.

    Raises:
        CheckpointError: if the file is missing, damaged or from another program, or lacks an expected key.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen exception types for damaged or foreign files
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise CheckpointError(
            f"{path}: can't be read ({reason}), expected a checkpoint that train.ipynb wrote; it is "
            "truncated or from another program: copy it again, or train again with resume False"
        ) from error
    found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
    if not set(expected) <= set(found):
        raise CheckpointError(
            f"{path}: found {', '.join(found) or 'nothing'}, expected {', '.join(expected)}; it is from "
            "another version or another program: train again with resume False, or use the version "
            "that wrote it"
        )
    return checkpoint
