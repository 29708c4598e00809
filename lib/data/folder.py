"""Folders of images as `Samples`: find the partners, decode, check."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from lib.classes import IGNORE_INDEX, MOST_CLASSES, NYUV2_13
from lib.data.samples import DataError, Samples, Source, resize_image, resize_nearest
from lib.data.splits import number_runs
from lib.notebook import progress_bar

LAYOUT = "expected DATA/train/{image,depth,label} and DATA/test/{image,depth}"
KINDS = ("image", "depth", "label")
MANY = 64  # files from which a bar shows how far reading is


@dataclass(frozen=True)
class Description:
    """What `dataset.yaml` says of a folder; every key has a default.

    Attributes:
        classes: names in the order of their indices.
    """

    classes: tuple[str, ...] = NYUV2_13


def read_description(root: Path) -> Description:
    """The `dataset.yaml` of a folder, or the defaults where there is none.

    Raises:
        DataError: no YAML mapping, an unknown key, or a value that can't be meant.
    """
    path = root / "dataset.yaml"
    if not path.exists():
        return Description()
    try:
        content = yaml.safe_load(path.read_bytes())  # which finds its encoding, whatever the system's is
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is no YAML ({error})") from error
    content = {} if content is None else content  # nothing, or comments alone
    known = list(Description.__dataclass_fields__)
    if not isinstance(content, dict) or set(content) - set(known):
        found = ", ".join(map(str, set(content) - set(known))) if isinstance(content, dict) else repr(content)
        raise DataError(f"{path}: found {found}, expected keys of: {', '.join(known)}")
    return Description(classes=_check_classes(path, content.get("classes", NYUV2_13)))


def _check_classes(path: Path, classes: object) -> tuple[str, ...]:
    names = classes if isinstance(classes, (list, tuple)) else []
    if not 2 <= len(names) <= MOST_CLASSES or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{path}: classes is {classes!r}, expected a list of 2 to {MOST_CLASSES} names in the order of their "
            "indices, such as [bed, books, ceiling]; quote names that YAML reads otherwise, such as 'no'"
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{path}: classes names {', '.join(twice)} twice; every class needs a name of its own")
    return tuple(names)


def open_folder(root: Path, part: str) -> Source:
    """The images below `root/train`, or of part `test` below `root/test`; runs of neighbouring ids are scenes.

    Raises:
        DataError: a missing folder or partner; when they are read, a damaged file or values that can't be meant.
    """
    description = read_description(root)
    files = _list_files(root / ("test" if part == "test" else "train"))
    names = np.array(sorted(files))
    runs = number_runs(names)
    scene = None if runs is None else np.array([f"run_{run:04d}" for run in runs])

    def read(positions: np.ndarray, size: tuple[int, int] | None) -> list[Samples]:
        return _read_files([files[name] for name in names[positions]], size, len(description.classes))

    return Source(names, scene, description.classes, read, "random" if runs is None else "blocks")


def _list_files(folder: Path) -> dict[str, dict[str, Path]]:
    """`{name: {"image": path, "depth": path, "label": path}}` of a part, every partner present."""
    for kind in KINDS:
        optional = kind == "label" and folder.name == "test"
        if not (folder / kind).is_dir() and not optional:
            raise DataError(f"{folder / kind}: no such folder; {LAYOUT}. Check the parameter data")
    found = {kind: _stems(folder / kind) for kind in KINDS if (folder / kind).is_dir()}
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


def _read_files(files: list[dict[str, Path]], size: tuple[int, int] | None, class_count: int) -> list[Samples]:
    """In order; at their native size one `Samples` for each stretch of files of one size."""
    if not files:
        height, width = size or (0, 0)
        empty = np.empty((0, height, width), np.uint8)
        image = np.empty((0, height, width, 3), np.uint8)
        return [Samples(np.array([], dtype=str), image, empty.astype(np.uint16), empty)]
    stretches = [files] if size else [list(stretch) for _, stretch in groupby(files, _native_size)]
    return [_read_stretch(stretch, size, class_count) for stretch in stretches]


def _native_size(paths: dict[str, Path]) -> tuple[int, int]:
    try:
        with Image.open(paths["image"]) as picture:
            return picture.size
    except OSError as error:
        raise _undecodable(paths["image"], error) from error


def _read_stretch(files: list[dict[str, Path]], size: tuple[int, int] | None, class_count: int) -> Samples:
    """Decode in parallel, resize once, stack."""
    read = partial(_read_sample, size=size, class_count=class_count)
    names = np.array([paths["image"].stem for paths in files], dtype=str)
    stacks = {kind: np.empty((len(files), *array.shape), array.dtype) for kind, array in read(files[0]).items()}

    def fill(position: int) -> None:
        for kind, array in read(files[position]).items():
            stacks[kind][position] = array

    label = f"reading {files[0]['image'].parents[1]}"
    bar = progress_bar(label, len(files), disable=len(files) < MANY)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for _ in pool.map(fill, range(len(files))):
            bar.update()
    return Samples(names, **stacks)


def _read_sample(paths: dict[str, Path], size: tuple[int, int] | None, class_count: int) -> dict[str, np.ndarray]:
    checks = {"image": _check_image, "depth": _check_depth, "label": partial(_check_label, class_count=class_count)}
    arrays = {kind: checks[kind](path, _decode(path)) for kind, path in paths.items()}
    for kind, array in arrays.items():
        if array.shape[:2] != arrays["image"].shape[:2]:
            raise DataError(
                f"{paths[kind]}: {_dimensions(array)}, but its image {paths['image'].name} is "
                f"{_dimensions(arrays['image'])}; image, depth and label must have one size"
            )
    if size is None:
        return arrays
    resize = {"image": resize_image, "depth": resize_nearest, "label": resize_nearest}
    return {kind: resize[kind](array, size) for kind, array in arrays.items()}


def _decode(path: Path) -> np.ndarray:
    # Pillow, because OpenCV returns the readable half of a truncated JPEG without an error.
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except Exception as error:
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: can't be decoded ({error}); it is damaged or no image, copy it again")


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


def _check_label(path: Path, label: np.ndarray, class_count: int) -> np.ndarray:
    if label.dtype != np.uint8 or label.ndim != 2:
        raise DataError(f"{path}: found {_describe(label)}, expected one channel of 8 bits with class indices")
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    wrong = [int(value) for value in present if value >= class_count and value != IGNORE_INDEX]
    if wrong:
        raise DataError(
            f"{path}: label values {wrong[:8]}, expected 0..{class_count - 1} and {IGNORE_INDEX} = ignore; "
            "name the classes of other label sets in DATA/dataset.yaml, a list under the key classes"
        )
    return label


def _dimensions(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"


def _describe(array: np.ndarray) -> str:
    channels = array.shape[2] if array.ndim == 3 else 1
    return f"{channels} channel{'s' * (channels > 1)} of {array.dtype}"
