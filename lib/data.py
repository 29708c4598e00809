"""RGB-D samples as arrays: the folder reader and the train/validation splits."""

import io
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from IPython import get_ipython
from IPython.display import display
from PIL import Image
from tqdm import tqdm

CLASS_NAMES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip
IGNORE_INDEX = 255

PARTS = ("train", "valid", "test")
SPLITS = ("random", "blocks", "scenes", "official")
SPLIT_SEED = 42  # never a run's own seed, so that runs with different seeds stay comparable
LAYOUT = "expected DATA/train/{image,depth,label} and DATA/test/{image,depth}"


class DataError(ValueError):
    """Data that can't be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Samples:
    """RGB-D images as arrays with one common index.

    Attributes:
        names: `(N,)` file names without suffix.
        image: `(N, H, W, 3)` uint8 RGB.
        depth: `(N, H, W)` uint16 millimetres, 0 = missing.
        label: `(N, H, W)` uint8 class indices, 255 = ignore; None where labels are held back.
        measured: `(N, H, W)` bool, where the sensor measured; None where depth is not hole-filled.
    """

    names: np.ndarray
    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray | None = None
    measured: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[1:3]

    def __getitem__(self, index: slice | np.ndarray) -> "Samples":
        """The samples at a slice, or at an array of positions."""
        arrays = (self.names, self.image, self.depth, self.label, self.measured)
        return Samples(*(None if array is None else array[index] for array in arrays))


def load_samples(
    source: str | os.PathLike,
    part: str,
    split: str = "random",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Samples:
    """Read one part of a data set.

    Args:
        source: `"synthetic"` for the embedded scenes; the path of `nyu_depth_v2_labeled.mat`; or a
            folder with `train/{image,depth,label}` and `test/{image,depth}`: images png or jpg, depth
            16-bit PNG in millimetres, labels 8-bit PNG with 0..12 and 255 = ignore.
        part: `"train"`, `"valid"` (both cut from the training images by `split`) or `"test"`.
        split: `"random"` (20 % of the images validate, as in Exp061), `"blocks"` (every fifth run
            of consecutive ids validates), `"scenes"` (20 % of the named scenes validate, where the
            source has names) or `"official"` (all train, `"valid"` is empty).
        size: (height, width) to resize to, RGB by area, depth and label by nearest neighbour;
            None keeps the native size.
        limit: use only the first N images, before splitting.

    Raises:
        ValueError: an unknown part or split, or a limit that leaves a part empty.
        DataError: a missing folder or partner, a damaged file, sizes that differ, or values
            that can't be RGB, millimetres or class indices.
    """
    check_choice("part", part, PARTS)
    check_choice("split", split, SPLITS)
    if size is not None and min(size) < 1:
        raise ValueError(f"size: found {size}, expected a height and a width of at least 1 pixel")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, expected a number of images of at least 1, or None for all")
    if source == "synthetic":
        from lib.scenes import make_scenes, room_names, scene_names  # scenes builds on this module

        names = scene_names(part)[:limit]
        samples = make_scenes(_select(names, part, split, room_names(names)))
        return samples if size is None else resize_samples(samples, size)
    if Path(source).suffix == ".mat":
        from lib.matfile import frame_names, read_frames  # so does matfile

        names, scenes = (array[:limit] for array in frame_names(Path(source), part))
        return read_frames(Path(source), _select(names, part, split, scenes), size)
    files = _list_files(Path(source) / ("test" if part == "test" else "train"))
    names = np.array(sorted(files))[:limit]
    return _read_folder([files[name] for name in _select(names, part, split)], size)


def check_choice(parameter: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the parameter and what there is."""
    if value not in choices:
        raise ValueError(f"{parameter}: found {value!r}, expected one of {', '.join(choices)}")


def split_names(names: np.ndarray, split: str, scenes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the sorted `names` that train and that validate; `scenes` names the scene of each.

    `random` equals scikit-learn's `train_test_split(test_size=0.2, random_state=42)`, order
    included, because batches of the validation loss form in that order.
    """
    everything = np.arange(len(names))
    if split == "official":
        return everything, everything[:0]
    if split == "random":
        order = np.random.RandomState(SPLIT_SEED).permutation(len(names))
        valid_count = math.ceil(0.2 * len(names))
        return order[valid_count:], order[:valid_count]
    if split == "scenes":
        if scenes is None:
            raise ValueError("split: 'scenes' needs the .mat file, folders do not name their scenes; use 'blocks'")
        found = np.random.RandomState(SPLIT_SEED).permutation(np.unique(scenes))
        validates = np.isin(scenes, found[: math.ceil(0.2 * len(found))])
        return everything[~validates], everything[validates]
    blocks = _consecutive_blocks(names)
    valid = np.concatenate(blocks[4::5]) if len(blocks) >= 5 else everything[:0]
    return np.setdiff1d(everything, valid), valid


def _consecutive_blocks(names: np.ndarray) -> list[np.ndarray]:
    """Maximal runs of consecutive ids, as positions: nearly the scenes of NYUv2."""
    try:
        ids = np.array([int(name) for name in names.tolist()])
    except ValueError as error:
        found = str(error).rsplit(maxsplit=1)[-1]
        raise ValueError(
            f"split: 'blocks' needs numbers as file names, found {found}; use split 'random' or 'official'"
        ) from None
    order = np.argsort(ids)
    return np.split(order, np.flatnonzero(np.diff(ids[order]) != 1) + 1)


def _select(names: np.ndarray, part: str, split: str, scenes: np.ndarray | None = None) -> np.ndarray:
    if part == "test":
        return names
    train, valid = split_names(names, split, scenes)
    if split != "official" and min(len(train), len(valid)) == 0:
        raise ValueError(
            f"split: {split!r} leaves {len(train)} images to train and {len(valid)} to validate out of "
            f"{len(names)}; raise limit, or use split 'random' (2 images or more) or 'official'"
        )
    return names[train if part == "train" else valid]


def _list_files(folder: Path) -> dict[str, dict[str, Path]]:
    """`{name: {"image": path, "depth": path, "label": path}}` of a part, every partner present."""
    kinds = ("image", "depth", "label")
    for kind in kinds:
        optional = kind == "label" and folder.name == "test"
        if not (folder / kind).is_dir() and not optional:
            raise DataError(f"{folder / kind}: no such folder; {LAYOUT}. Check the parameter data")
    found = {kind: _stems(folder / kind) for kind in kinds if (folder / kind).is_dir()}
    if not found["image"]:
        raise DataError(f"{folder / 'image'}: holds no png or jpg file; {LAYOUT}")
    everything = set().union(*found.values())
    for kind, stems in found.items():
        missing = sorted(everything - set(stems))
        if missing:
            raise DataError(
                f"{folder / kind}: {len(missing)} of {len(everything)} files missing, the first is "
                f"{missing[0]!r}; every image needs its {', '.join(found)} file under the same name"
            )
    return {name: {kind: stems[name] for kind, stems in found.items()} for name in found["image"]}


def _stems(folder: Path) -> dict[str, Path]:
    suffixes = (".png", ".jpg", ".jpeg") if folder.name == "image" else (".png",)
    stems: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in stems:
                raise DataError(f"{path}: a second file named {path.stem!r} beside {stems[path.stem].name}; keep one")
            stems[path.stem] = path
    return stems


def _read_folder(files: list[dict[str, Path]], size: tuple[int, int] | None) -> Samples:
    """Decode in parallel, resize once, stack."""
    names = np.array([paths["image"].stem for paths in files], dtype=str)
    if not files:
        height, width = size or (0, 0)
        empty = np.empty((0, height, width), np.uint8)
        return Samples(names, np.empty((0, height, width, 3), np.uint8), empty.astype(np.uint16), empty)
    first = _read_sample(files[0], size)
    stacks = [np.empty((len(files), *array.shape), array.dtype) for array in first]

    def fill(position: int) -> None:
        arrays = _read_sample(files[position], size)
        if arrays[0].shape != first[0].shape:
            raise DataError(
                f"{files[position]['image']}: {_dimensions(arrays[0])}, but {files[0]['image'].name} is "
                f"{_dimensions(first[0])}; images of different sizes can't be read at their native size: "
                "give a size"
            )
        for stack, array in zip(stacks, arrays, strict=True):
            stack[position] = array

    label = f"reading {files[0]['image'].parents[1]}"
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(label, len(files)) as bar:
        for _ in pool.map(fill, range(len(files))):
            bar.update()
    return Samples(names, *stacks)


def _read_sample(paths: dict[str, Path], size: tuple[int, int] | None) -> list[np.ndarray]:
    checks = {"image": _check_image, "depth": _check_depth, "label": _check_label}
    arrays = {kind: checks[kind](path, _decode(path)) for kind, path in paths.items()}
    for kind, array in arrays.items():
        if array.shape[:2] != arrays["image"].shape[:2]:
            raise DataError(
                f"{paths[kind]}: {_dimensions(array)}, but its image {paths['image'].name} is "
                f"{_dimensions(arrays['image'])}; image, depth and label must have one size"
            )
    if size is None:
        return list(arrays.values())
    resize = {"image": resize_image, "depth": resize_nearest, "label": resize_nearest}
    return [resize[kind](array, size) for kind, array in arrays.items()]


def _decode(path: Path) -> np.ndarray:
    # Pillow, because OpenCV returns the readable half of a truncated JPEG without an error.
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except Exception as error:
        raise DataError(f"{path}: can't be decoded ({error}); it is damaged or no image, copy it again") from error


def _check_image(path: Path, image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"{path}: found {_describe(image)}, expected 8-bit RGB (3 channels); convert the file, "
            "for example with Pillow's image.convert('RGB')"
        )
    return image


def _check_depth(path: Path, depth: np.ndarray) -> np.ndarray:
    if depth.ndim != 2 or depth.dtype.kind not in "iu" or depth.dtype.itemsize < 2:
        raise DataError(
            f"{path}: found {_describe(depth)}, expected one channel of 16 bits in millimetres; "
            "8-bit depth has lost its scale, export it again from the source"
        )
    sample = depth[::4, ::4]
    sample = sample[sample > 0]
    median = float(np.median(sample)) if sample.size else 1000.0
    if not 100 <= median <= 20_000:
        guess = "metres: multiply by 1000" if median < 100 else "a finer unit: divide to get millimetres"
        raise DataError(
            f"{path}: median depth {median:g}, expected millimetres of an indoor scene (100 to 20000). "
            f"This looks like {guess}, and write 16-bit PNG"
        )
    return depth.astype(np.uint16)


def _check_label(path: Path, label: np.ndarray) -> np.ndarray:
    if label.dtype != np.uint8 or label.ndim != 2:
        raise DataError(f"{path}: found {_describe(label)}, expected one channel of 8 bits with class indices")
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    wrong = [int(value) for value in present if value >= len(CLASS_NAMES) and value != IGNORE_INDEX]
    if wrong:
        raise DataError(
            f"{path}: label values {wrong[:8]}, expected 0..{len(CLASS_NAMES) - 1} and {IGNORE_INDEX} = ignore; "
            "map other label sets to the 13 classes first (bed = 0 .. window = 12)"
        )
    return label


def _dimensions(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _describe(array: np.ndarray) -> str:
    channels = array.shape[2] if array.ndim == 3 else 1
    return f"{channels} channel{'s' * (channels > 1)} of {array.dtype}"


def resize_samples(samples: Samples, size: tuple[int, int]) -> Samples:
    """RGB by area (linear when enlarging); depth, label and measured by nearest neighbour."""
    if samples.size == tuple(size):
        return samples
    nearest = [
        None if stack is None else _stack([resize_nearest(array, size) for array in stack], stack, size)
        for stack in (samples.depth, samples.label, samples.measured)
    ]
    image = _stack([resize_image(image, size) for image in samples.image], samples.image, size)
    return Samples(samples.names, image, *nearest)


def _stack(arrays: list[np.ndarray], like: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack(arrays) if arrays else np.empty((0, *size, *like.shape[3:]), like.dtype)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W, 3)` image to (height, width)."""
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one `(H, W)` array without inventing values."""
    # INTER_NEAREST would take each block's upper left pixel and so shift depth against RGB.
    resized = cv2.resize(array.view(np.uint8) if array.dtype == bool else array, size[::-1],
                         interpolation=cv2.INTER_NEAREST_EXACT)  # fmt: skip
    return resized.view(bool) if array.dtype == bool else resized


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


class _Bar(tqdm):
    """A tqdm bar whose last state stays in a saved notebook (that of tqdm.auto reopens at 0 %)."""

    handle = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = {"text/plain": msg or str(self)}
        if self.handle is None:
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)


def progress_bar(label: str, total: int, initial: int = 0) -> tqdm:
    """A bar for notebooks and terminals; call its `update()`, in the end its `close()`."""
    options = {"desc": label, "total": total, "initial": initial, "mininterval": 0.5, "ncols": 100, "ascii": False}
    if getattr(get_ipython(), "kernel", None) is not None:
        return _Bar(file=io.StringIO(), **options)  # a closing tqdm ends the line of its file
    return tqdm(disable=None, **options)  # None: silent where there is no terminal
