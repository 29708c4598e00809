"""Folders of images as `Samples`: find the partners, decode, resize once, keep."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.cache import Blocks, map_arrays, select_rows
from lib.data.decoding import SUFFIXES, decode_depth, decode_image, decode_label, depth_to_mm, upright_size
from lib.data.description import FILE, Description, read_description
from lib.data.samples import DataError, Split, resize_image, resize_nearest
from lib.data.sanity import check_files
from lib.data.validation import number_runs
from lib.progress import progress_bar

LAYOUT = "expected DATA/train/{image,depth,label} and DATA/test/{image,depth}, or what DATA/dataset.yaml says"
CHANNELS = {"image": (np.uint8, (3,)), "depth": (np.uint16, ()), "label": (np.uint8, ())}
CACHED_FROM = 128  # images: fewer are read in about a second
CACHE_VERSION = 1
BLOCK = 64  # images in memory at a time while a cache is made
Files = dict[str, Path]  # of one image, by kind


def open_folder(root: Path, split: str) -> Split:
    """The images of a split as `dataset.yaml` describes it; runs of neighbouring ids are scenes, unless it names them.

    Raises:
        DataError: a missing folder or partner; when they are read, a damaged file or values that can't be meant.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}. Check the parameter data")
    description = read_description(root)
    files = find_files(description, split)
    names = np.array(list(files))
    runs = number_runs(names)
    prefix = (
        "valid_" if split == "valid" else ""
    )  # a split of its own, whose first run is not the first of training
    scene = None if runs is None else np.array([f"{prefix}run_{run:04d}" for run in runs])
    usual_validation = "random" if runs is None else "blocks"
    if description.scene is not None:
        scene, usual_validation = _name_scenes(description, names), "scenes"
    if "valid" in dict(description.splits):
        usual_validation = "predefined"
    judge = cache(partial(check_files, description, split, list(files.values())))  # once

    def read(positions: np.ndarray, size: tuple[int, int] | None) -> list[dict[str, np.ndarray]]:
        if size is not None and len(positions) >= CACHED_FROM:
            arrays = _map_files(description, split, list(files.values()), size)
            return [select_rows(arrays, positions)]
        judge()
        return _read_files([files[name] for name in names[positions]], size, description)

    known = {"depth_range_m": description.depth_range_m, "validation": usual_validation}
    return Split(names, description.classes, read, scene, **known)


def find_files(description: Description, split: str) -> dict[str, Files]:
    """`{name: {"image": path, "depth": path, "label": path}}` of a split, every partner present, in order."""
    root, splits = description.root, dict(description.splits)
    if split not in splits:
        raise DataError(
            f"{root}: has no split {split!r}, expected one of: {', '.join(splits)}; name it in {root / FILE}"
        )
    place = root / splits[split]
    base = root if place.is_file() else place
    found = {kind: _match(description, base, kind, value, split) for kind, value in description.folders}
    found = {kind: paths for kind, paths in found.items() if paths is not None}
    names = _listed(description, split, found) if place.is_file() else sorted(set().union(*found.values()))
    if split == "test" and not found.get("label", {}).keys() & set(names):
        found.pop("label", None)  # held back
    for kind, paths in found.items():
        missing = [name for name in names if name not in paths]
        if missing:
            raise DataError(
                f"{base / dict(description.folders)[kind]}: {len(missing)} of {len(names)} files missing, the first is "
                f"{missing[0]!r}; every image needs its {', '.join(found)} file under the same name"
            )
    return {name: {kind: paths[name] for kind, paths in found.items()} for name in names}


def _match(description: Description, base: Path, kind: str, value: str, split: str) -> dict[str, Path] | None:
    """The files of a kind by name; None where there need be none."""
    pattern = os.path.normpath(value if "{name}" in value else f"{value}/{{name}}")
    first, *rest = pattern.split("{name}")
    top = base / os.path.dirname(first)
    if not top.is_dir():
        if (kind, split) == ("label", "test") or (kind == "depth" and "folders" not in description.stated):
            return None
        raise DataError(f"{top}: no such folder; {LAYOUT}. Check the parameter data")
    whole = pattern.lower().endswith(SUFFIXES[kind])
    wanted = re.compile(re.escape(first) + "(?P<name>.+)" + "(?P=name)".join(map(re.escape, rest)))
    paths, others = {}, Counter()
    for folder, _, files in os.walk(top, followlinks=True):
        for path in (Path(folder, file) for file in sorted(files) if not file.startswith(".")):
            relative = Path(os.path.relpath(path, base))
            match = wanted.fullmatch((relative if whole else relative.with_suffix("")).as_posix())
            if match and path.suffix.lower() in SUFFIXES[kind]:
                if (twin := paths.setdefault(match["name"], path)) != path:
                    raise DataError(
                        f"{path}: a second file named {match['name']!r} beside {twin.name}; keep one"
                    )
            elif match:
                others[path.suffix] += 1
    if not paths and (others or kind == "image"):
        found = "".join(f"{count} {suffix} files, " for suffix, count in others.items()) or "nothing, "
        expected = os.path.basename(pattern) if whole else ", ".join(SUFFIXES[kind])
        raise DataError(f"{top}: found {found}expected files of: {expected}")
    return paths


def _listed(description: Description, split: str, found: dict[str, dict[str, Path]]) -> list[str]:
    """The names in a list: as they are, or as paths of files, which may lack the suffix."""
    places, known = {name: description.root / value for name, value in description.splits}, {}
    place, trained = places[split], places.get("train")
    for paths in found.values():
        for name, path in paths.items():
            relative = Path(os.path.relpath(path, description.root))
            known |= {relative.as_posix(): name, relative.with_suffix("").as_posix(): name}
    known |= {
        f"{name}{suffix}": name for name, path in found["image"].items() for suffix in ("", path.suffix)
    }
    lines = _read_lines(place)
    unknown = [line for line in lines if line not in known]
    if unknown or not lines:
        what = (
            f"{len(unknown)} of {len(lines)} lines name no image, the first is {unknown[0]!r}"
            if lines
            else "is empty"
        )
        raise DataError(
            f"{place}: {what}; expected a name a line, such as {next(iter(found['image']), None)!r}, of images in "
            f"{description.root / dict(description.folders)['image']}"
        )
    names = [known[line] for line in lines]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{place}: names {twice[0]!r} twice; every image once")
    listed = _read_lines(trained) if split != "train" and trained is not None and trained.is_file() else []
    if shared := sorted({known.get(line) for line in listed} & set(names)):
        what = f"shares {len(shared)} images with {trained}, the first is {shared[0]!r}"
        raise DataError(f"{place}: {what}; what was trained on is no test")
    return sorted(names)


def _read_lines(place: Path) -> list[str]:
    return [
        os.path.normpath(line.strip()) for line in place.read_text("utf-8-sig").splitlines() if line.strip()
    ]


def _name_scenes(description: Description, names: np.ndarray) -> np.ndarray:
    """The scene of each image, from a table or from its name."""
    file, text = description.root / FILE, description.scene
    if text.lower().endswith(".csv"):
        file = description.root / text
        try:
            scenes = (
                pd.read_csv(file, dtype=str, encoding="utf-8-sig").set_index("name").scene.dropna().to_dict()
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{file}: can't be read ({error}); expected a table with the columns name,scene"
            ) from error
        found = [scenes.get(name) for name in names.tolist()]
    else:
        try:
            wanted = re.compile(text)
        except re.error as error:
            raise DataError(f"{file}: scene is {text!r}, expected a regular expression ({error})") from error
        if wanted.groups != 1:
            raise DataError(
                f"{file}: scene is {text!r} with {wanted.groups} groups, expected one, such as '^([^/]+)/'"
            )
        found = [match and match[1] for match in map(wanted.search, names.tolist())]
    if None in found:
        raise DataError(
            f"{file}: gives {found.count(None)} of {len(names)} images no scene, the first is "
            f"{str(names[found.index(None)])!r}; every image needs one"
        )
    return np.array(found, str)


def _map_files(
    description: Description, split: str, files: list[Files], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """All images of a split, mapped; what was judged when they were kept is not judged again."""
    states = [(path, path.stat()) for paths in files for path in paths.values()]
    key = {"version": CACHE_VERSION, "kind": split, "size": list(size)}
    key["files"] = [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]
    text = description.root / FILE
    key["description"] = text.read_bytes().hex() if text.exists() else None
    layout = {
        kind: (dtype, (len(files), *size, *axes))
        for kind, (dtype, axes) in CHANNELS.items()
        if kind in files[0]
    }

    def make() -> Blocks:
        check_files(description, split, files)
        yield from _read_blocks(files, size, description)

    return map_arrays(description.root, key, layout, make)


def _read_files(
    files: list[Files], size: tuple[int, int] | None, description: Description
) -> list[dict[str, np.ndarray]]:
    """Arrays in order; at their native size for each stretch of files of one size."""
    if not files:
        height, width = size or (0, 0)
        return [
            {kind: np.empty((0, height, width, *axes), dtype) for kind, (dtype, axes) in CHANNELS.items()}
        ]
    sizes = [size] * len(files) if size else [upright_size(paths["image"]) for paths in files]
    pieces, start = [], 0
    for _, stretch in groupby(sizes):
        end, stacks = start + len(list(stretch)), {}
        for rows, arrays in _read_blocks(files[start:end], size, description):
            for kind, array in arrays.items():
                stacks.setdefault(kind, np.empty((end - start, *array.shape[1:]), array.dtype))[rows] = array
        pieces.append(stacks)
        start = end
    return pieces


def _read_blocks(files: list[Files], size: tuple[int, int] | None, description: Description) -> Blocks:
    """Positions and arrays of block after block, decoded in parallel."""
    read = partial(_read_sample, size=size, description=description)
    bar = progress_bar(f"reading {description.root}", len(files), disable=len(files) < BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(files), BLOCK):
            block = list(pool.map(read, files[start : start + BLOCK]))
            yield (
                start + np.arange(len(block)),
                {kind: np.stack([one[kind] for one in block]) for kind in block[0]},
            )
            bar.update(len(block))


def _read_sample(
    paths: Files, size: tuple[int, int] | None, description: Description
) -> dict[str, np.ndarray]:
    arrays = {"image": decode_image(paths["image"])}
    if path := paths.get("depth"):
        depth = decode_depth(path, description.depth_bits, takes_bytes="depth_unit_mm" in description.stated)
        arrays["depth"] = depth_to_mm(depth, description.depth_unit_mm, description.depth_missing)
    if path := paths.get("label"):
        arrays["label"] = description.to_indices(path, decode_label(path))
    for kind, array in arrays.items():
        if array.shape[:2] != arrays["image"].shape[:2]:
            found, expected = ("x".join(map(str, stack.shape[:2])) for stack in (array, arrays["image"]))
            raise DataError(
                f"{paths[kind]}: {found}, but its image {paths['image'].name} is {expected}; image, depth and label "
                "must have one size"
            )
    if size is None:
        return arrays
    return {
        kind: (resize_image if kind == "image" else resize_nearest)(array, size)
        for kind, array in arrays.items()
    }
