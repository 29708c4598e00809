"""Read the official `nyu_depth_v2_labeled.mat` as `Samples`, through a memory-mapped cache.

MATLAB writes the file as HDF5 with every array transposed: `images` `(N, 3, 640, 480)` uint8,
`depths` (holes filled) and `rawDepths` (0 = not measured) `(N, 640, 480)` float32 metres, `labels`
`(N, 640, 480)` uint16 raw ids 0..894, `scenes` references to text. `tables/nyuv2_classes.csv` maps
raw ids to the 13 and 40 classes (0 = unlabelled). `tables/nyuv2_split.csv` contains the official split.
Both tables were generated from the published `classMapping40.mat`, `class13Mapping.mat` and `splits.mat`.
"""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from lib.classes import IGNORE_INDEX, NYUV2_13, NYUV2_40
from lib.data.cache import Blocks, map_arrays, select_rows
from lib.data.samples import DataError, Split, resize_stack
from lib.options import check_choice
from lib.progress import progress_bar

TABLES = Path(__file__).parent / "tables"
ARRAYS = {"images": "uint8", "depths": "float32", "rawDepths": "float32", "labels": "uint16"}
CACHED = {
    "image": (np.uint8, (3,)),
    "depth": (np.uint16, ()),
    "label": (np.uint8, ()),
    "measured": (np.bool_, ()),
}
BLOCK_SIZE = 16  # frames in memory at a time: 80 MB at 480x640
CACHE_VERSION = 4
CLASS_SETS = {"nyuv2_13": ("class13", NYUV2_13), "nyuv2_40": ("class40", NYUV2_40)}


def open_file(path: Path, split: str, classes: str | None) -> Split:
    """Open the official training or test split.

    Names are 0-based frame ids. Scenes are those of the file.

    Args:
        path: path to `nyu_depth_v2_labeled.mat`.
        split: `test`; any other value opens the training split.
        classes: `nyuv2_13` (also if None) or `nyuv2_40`.
    """
    class_set = classes or "nyuv2_13"
    check_choice("classes", class_set, CLASS_SETS)
    with _open(path) as file:
        references = file["scenes"][:].ravel()
        scenes = np.array(["".join(map(chr, file[reference][:].ravel())) for reference in references])
    ids = _official_ids(len(scenes), "test" if split == "test" else "train")

    def read(positions: np.ndarray, size: tuple[int, int] | None) -> list[dict[str, np.ndarray]]:
        return [_read_frames(path, ids[positions], size, class_set)]

    names = np.array([f"{frame:06d}" for frame in ids])
    return Split(names, CLASS_SETS[class_set][1], read, scenes[ids], validation="scenes")


def _read_frames(
    path: Path, ids: np.ndarray, size: tuple[int, int] | None, class_set: str
) -> dict[str, np.ndarray]:
    """Return frames at `size` (height, width), or at their native size if None.

    The first call for a size and a class set converts the whole file.
    """
    with _open(path) as file:
        count, width, height = file["labels"].shape
        status = path.stat()
        key = {
            "version": CACHE_VERSION,
            "bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "size": list(size or (height, width)),
            "kind": class_set,
        }
        layout = {
            name: (dtype, (count, *key["size"], *channels)) for name, (dtype, channels) in CACHED.items()
        }
        arrays = map_arrays(path, key, layout, lambda: _read_blocks(file, tuple(key["size"]), class_set))
    return select_rows(arrays, _cache_rows(count)[ids])


def _official_ids(count: int, split: str) -> np.ndarray:
    """Return the 0-based ids below `count` of the official split `train` or `test`."""
    return pd.read_csv(TABLES / "nyuv2_split.csv").query("id < @count and split == @split").id.to_numpy()


def _cache_rows(count: int) -> np.ndarray:
    """Return the cache row of each frame: first the official training split, then the test split."""
    return np.argsort(np.append(_official_ids(count, "train"), _official_ids(count, "test")))


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise DataError(f"{path}: no such file; check the parameter data")
    try:
        file = h5py.File(path, locking=False)  # not every disk supports locks, and reading needs none
    except OSError as error:
        raise DataError(
            f"{path}: can't be opened as HDF5 ({error}); expected nyu_depth_v2_labeled.mat (2.8 GB, "
            "MATLAB version 7.3; splits.mat has version 5). Repeat the download if it was incomplete"
        ) from error
    _check_layout(path, file)
    return file


def _check_layout(path: Path, file: h5py.File) -> None:
    missing = [name for name in (*ARRAYS, "scenes") if name not in file]
    if missing:
        raise DataError(
            f"{path}: found {', '.join(sorted(file)) or 'nothing'}, {', '.join(missing)} missing; expected "
            "the labelled data set, nyu_depth_v2_labeled.mat"
        )
    count, *frame_shape = file["labels"].shape
    if file["scenes"].size != count:
        raise DataError(
            f"{path}: has scenes for {file['scenes'].size} images, expected {count}, one for each label; use "
            "the file as published"
        )
    for name, dtype in ARRAYS.items():
        shape = (count, 3, *frame_shape) if name == "images" else (count, *frame_shape)
        if file[name].dtype != dtype or file[name].shape != shape or not 0 < count <= 1449:
            raise DataError(
                f"{path}: {name} is {file[name].dtype} {file[name].shape}, expected {dtype} {shape} of at "
                "most 1449 frames as MATLAB writes them; use the file as it was published"
            )


def _read_blocks(file: h5py.File, size: tuple[int, int], class_set: str) -> Blocks:
    """Yield the cache rows and resized arrays of all frames, `BLOCK_SIZE` frames at a time."""
    rows = _cache_rows(len(file["labels"]))
    with progress_bar(f"reading {file.filename}", len(rows)) as bar:
        for start in range(0, len(rows), BLOCK_SIZE):
            block = _read_block(file, start, class_set)
            block_rows = rows[start : start + BLOCK_SIZE]
            yield block_rows, {name: resize_stack(stack, size) for name, stack in block.items()}
            bar.update(len(block_rows))


def _read_block(file: h5py.File, start: int, class_set: str) -> dict[str, np.ndarray]:
    """Read up to `BLOCK_SIZE` frames from `start` and convert them to the layout and units of `Samples`."""
    images, depths, raw_depths, labels = (file[name][start : start + BLOCK_SIZE] for name in ARRAYS)
    if labels.max() > 894:
        raise DataError(
            f"{file.filename}: label {labels.max()} in frames {start} on, expected raw ids 0..894"
        )
    if not (np.isfinite(depths).all() and 0.1 < np.median(depths) < 20):
        raise DataError(
            f"{file.filename}: median depth {np.median(depths):g} in frames {start} on, expected metres of "
            "an indoor scene (0.1 to 20); use the file as it was published"
        )
    arrays = {
        "image": images,
        "depth": np.rint(1000 * depths).clip(0, 65535).astype(np.uint16),
        "label": class_table(class_set)[labels],
        "measured": raw_depths > 0,
    }
    return {name: np.ascontiguousarray(np.moveaxis(array.T, -1, 0)) for name, array in arrays.items()}


def class_table(class_set: str) -> np.ndarray:
    """Return the `(895,)` uint8 class index of each raw id, 255 = unlabelled."""
    class_ids = pd.read_csv(TABLES / "nyuv2_classes.csv")[CLASS_SETS[class_set][0]].to_numpy()
    return np.where(class_ids == 0, IGNORE_INDEX, class_ids - 1).astype(np.uint8)
