"""Folders of images as `Samples`: find the partners, decode, check."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from lib.classes import CLASS_NAMES, IGNORE_INDEX
from lib.data.samples import DataError, Samples, resize_image, resize_nearest
from lib.notebook import progress_bar

LAYOUT = "expected DATA/train/{image,depth,label} and DATA/test/{image,depth}"


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
