"""Cache the arrays of a data set at the working size as memory-mapped files in the user's cache folder."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from lib.data.samples import DataError

Layout = dict[str, tuple[type, tuple[int, ...]]]  # dtype and shape of each array, by name
Blocks = Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]  # row indices, content by array name


def cache_root() -> Path:
    """Create and return the cache folder.

    This is `$XDG_CACHE_HOME/rgbd-notebooks`, or `~/.cache/rgbd-notebooks` if the variable is unset. If that
    folder is not writable, a temporary folder is used.
    """
    with suppress(OSError, RuntimeError):  # not writable, or no home folder
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rgbd-notebooks"
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    root = Path(tempfile.gettempdir(), f"rgbd-notebooks-{getattr(os, 'getuid', int)()}")
    root.mkdir(exist_ok=True)
    return root


def map_arrays(
    source: Path, key: dict, layout: Layout, blocks: Callable[[], Blocks]
) -> dict[str, np.ndarray]:
    """Return the memory-mapped arrays of a source from the cache, and create them if none match the key.

    The arrays and their key are in a folder named after source, kind and size. The key is written last. While
    one process creates the arrays, other processes that need them wait.

    Args:
        source: path of the data set; relative paths and links are resolved.
        key: everything the arrays depend on, JSON-serialisable, including `kind` and `size`.
        layout: dtype and shape of each array.
        blocks: function that returns an iterable of (row indices, content of these rows by array name).

    Raises:
        DataError: if the arrays can't be written.
    """
    path_hash = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
    stem = source.resolve().stem.encode()[:200].decode(errors="ignore")  # file names end at 255 bytes
    name_parts = (stem, key["kind"], "x".join(map(str, key["size"])), path_hash)
    folder = cache_root() / "-".join(name_parts)
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if _open(folder, key, layout) is None:
                _write(folder, key, layout, blocks)
            return _open(folder, key, layout)
    except (OSError, NotImplementedError) as error:  # for example, the disk is full or does not support locks
        needed = sum(
            np.dtype(dtype).itemsize * np.prod(shape, dtype=float) for dtype, shape in layout.values()
        )
        raise DataError(
            f"{folder}: the cache of {source} could not be made ({error}); it needs {needed / 1e9:.1f} GB "
            "there. Check that the data are intact, free disk space, or set the environment variable "
            "XDG_CACHE_HOME to another disk"
        ) from error


def select_rows(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Select rows of all arrays. Contiguous rows stay memory-mapped; others are read into memory."""
    index = slice(rows[0], rows[-1] + 1) if len(rows) and (np.diff(rows) == 1).all() else rows
    return {name: array[index] for name, array in arrays.items()}


def _open(folder: Path, key: dict, layout: Layout) -> dict[str, np.ndarray] | None:
    """Return the mapped arrays, or None if they are missing, truncated or made for another key."""
    with suppress(OSError, ValueError):
        if (folder / "key.json").read_text() == json.dumps(key):
            return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in layout}
    return None


def _write(folder: Path, key: dict, layout: Layout, blocks: Callable[[], Blocks]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        arrays = {name: _allocate_memmap(folder / f"{name}.npy", *layout[name]) for name in layout}
        for rows, block in blocks():
            for name, array in block.items():
                arrays[name][rows] = array
        (folder / "key.json").write_text(json.dumps(key))
    except BaseException:  # also remove the files on an interrupt
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _allocate_memmap(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """Create a memory-mapped array, and reserve its disk space if the platform supports this.

    Otherwise, a full disk would kill the process during a write to the map instead of raising an error.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
