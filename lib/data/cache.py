"""Arrays of a data set at their working size, memory-mapped, in a folder of the user's."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from lib.data.samples import DataError

Layout = dict[str, tuple[type, tuple[int, ...]]]  # dtype and shape by name
Blocks = Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]  # rows, and what is to stand in them
ABANDONED_S = 24 * 3600  # what is unfinished for that long was killed


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/rgbd-notebooks`, where that is not set `~/.cache/rgbd-notebooks`, or a temporary folder."""
    with suppress(OSError, RuntimeError):  # not to be written, or a user without a home
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
    """The arrays that were made of a source, mapped; made now where there are none for this key.

    Each process makes them in a folder of its own and then gives it the name of its key, so that two that want the
    same one end up with one of two equal ones. Arrays made of another state of the source are deleted.

    Args:
        source: of the arrays.
        key: all that they depend on, as JSON has it; its `size` and `kind` may be wanted at the same time as others.
        layout: of the arrays.
        blocks: yields what the arrays hold.

    Raises:
        DataError: they can't be written.
    """
    root = cache_root()
    wanted = _digest([str(source.resolve()), *(key[name] for name in ("kind", "size"))])
    folder = root / f"{source.stem}-{'x'.join(map(str, key['size']))}-{wanted}-{_digest(key)}"
    if (arrays := _open(folder, layout)) is not None:
        return arrays
    try:
        with tempfile.TemporaryDirectory(
            ".unfinished", f"{folder.name}.", root, ignore_cleanup_errors=True
        ) as made:
            _write(Path(made), layout, blocks())
            arrays = _open(Path(made), layout)  # stay mapped, whatever happens to their names
            for other in root.glob(f"*-{wanted}-*"):
                if _is_stale(other, folder, layout):
                    shutil.rmtree(other, ignore_errors=True)
            with suppress(OSError):  # another process was as fast
                Path(made).rename(folder)
            return arrays
    except OSError as error:
        needed = sum(
            np.dtype(dtype).itemsize * np.prod(shape, dtype=float) for dtype, shape in layout.values()
        )
        raise DataError(
            f"{folder}: the cache of {source} could not be made ({error}); it needs {needed / 1e9:.1f} GB there, and "
            "the data must be whole. Free disk space, or set the environment variable XDG_CACHE_HOME to another disk"
        ) from error


def select_rows(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """What runs on stays on disk; other selections are read into memory."""
    runs_on = len(rows) and (np.diff(rows) == 1).all()
    return {name: array[rows[0] : rows[-1] + 1] if runs_on else array[rows] for name, array in arrays.items()}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _open(folder: Path, layout: Layout) -> dict[str, np.ndarray] | None:
    """The mapped arrays, or None where they are not there, or not whole."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in layout}
    except (OSError, ValueError):  # missing, or cut short
        return None
    return arrays if all(array.shape == layout[name][1] for name, array in arrays.items()) else None


def _is_stale(other: Path, folder: Path, layout: Layout) -> bool:
    """Never what another process may have mapped: on a network disk it would go on to read nothing."""
    if other.name.endswith(".unfinished"):
        return time.time() - other.stat().st_mtime > ABANDONED_S
    return other != folder or _open(folder, layout) is None


def _write(folder: Path, layout: Layout, blocks: Blocks) -> None:
    """Row by row, by plain writes: on a full disk these are errors, where a map would kill the process."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in layout}
        starts = {}
        for name, (dtype, shape) in layout.items():
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
            starts[name] = files[name].tell()
        for rows, arrays in blocks:
            for name, array in arrays.items():
                for row, frame in zip(rows.tolist(), array, strict=True):
                    files[name].seek(starts[name] + row * frame.nbytes)
                    files[name].write(frame.tobytes())
