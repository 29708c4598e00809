"""Read folders of images as `Samples`: match files by name, decode, resize and cache."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.cache import Blocks, map_arrays, select_rows
from lib.data.decoding import SUFFIXES, decode_depth, decode_image, decode_label, depth_to_mm, upright_size
from lib.data.description import DESCRIPTION_FILE, Description, read_description
from lib.data.samples import DataError, MissingSplit, Split, resize_image, resize_nearest
from lib.data.sanity import check_files
from lib.data.validation import RUN_PREFIX, group_neighbouring_ids
from lib.progress import progress_bar

LAYOUT = "expected DATA/train/{image,depth,label} and DATA/test/{image,depth}, or what DATA/dataset.yaml says"
CHANNELS = {"image": (np.uint8, (3,)), "depth": (np.uint16, ()), "label": (np.uint8, ())}
CACHED_FROM = 128  # minimum number of images to cache; fewer are read in about a second
CACHE_VERSION = 2
BLOCK_SIZE = 64  # images in memory at a time while the cache is written
COCO = """. {path} may hold COCO annotations, not masks. To make masks in DATA/label (0 = unlabelled), run:
from pycocotools.coco import COCO; import numpy as np; from PIL import Image
coco = COCO("{path}")
for image in coco.loadImgs(coco.getImgIds()):
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    for found in coco.loadAnns(coco.getAnnIds(image["id"])):
        mask[coco.annToMask(found) == 1] = found["category_id"]
    Image.fromarray(mask).save("label/" + image["file_name"].rsplit(".", 1)[0] + ".png")"""
Files = dict[str, Path]  # the files of one image by kind: image, depth, label


def open_folder(root: Path, split: str) -> Split:
    """Open a split of a data folder, whose layout its `dataset.yaml` declares.

    If no scenes are declared, each run of neighbouring ids is a scene.

    Raises:
        DataError: if a folder or file is missing. Reading the split raises it for damaged files and
            implausible values.
        MissingSplit: if the split does not exist.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}. Check the parameter data")
    description = read_description(root)
    files = find_files(description, split)
    names = np.array(list(files))
    scene, default_validation = _choose_scenes(description, split, names)
    check = cache(partial(check_files, description, split, list(files.values())))  # runs only once

    def read(positions: np.ndarray, size: tuple[int, int] | None) -> list[dict[str, np.ndarray]]:
        if size is not None and len(positions) >= CACHED_FROM:
            arrays = _map_files(description, split, list(files.values()), size)
            return [select_rows(arrays, positions)]
        check()
        return _read_files([files[name] for name in names[positions]], size, description)

    return Split(
        names,
        description.class_names,
        read,
        scene,
        tuple(description.depth_range_m),
        validation="predefined" if "valid" in description.splits else default_validation,
        label_values=None if description.colours else tuple(description.by_value),
    )


def _choose_scenes(description: Description, split: str, names: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Return the `(N,)` scene of each image (None if unknown) and the default `validation` method."""
    if description.scene is not None or "{scene}" in description.folders["image"]:
        return _name_scenes(description, names), "scenes"
    other_split = {"train": "valid", "valid": "train"}.get(split)
    other_images = _find_images(description, other_split) if other_split in description.splits else {}
    # a run of ids may continue in the other split
    runs = group_neighbouring_ids(np.array([*names.tolist(), *other_images]))
    if runs is None:
        return None, "random"
    return np.array([f"{RUN_PREFIX}{run:04d}" for run in runs[: len(names)]]), "blocks"


def find_files(description: Description, split: str) -> dict[str, Files]:
    """Return `{name: {"image": path, "depth": path, "label": path}}` for a split, sorted by name.

    All images have the same kinds of files. `label` is absent if test labels are held back, `depth` if the
    data set has none.

    Raises:
        DataError: if a folder or file is missing, train or valid has no labels, or an image is in two splits.
        MissingSplit: if the split does not exist.
    """
    images = _find_images(description, split)
    if split != "test" and "label" not in description.folders:
        raise DataError(
            f"{description.root / DESCRIPTION_FILE}: folders has no label, but split {split!r} needs labels; "
            "add their folder, such as `label: label`"
        )
    partners = {kind: _match(description, split, kind) for kind in description.folders if kind != "image"}
    by_kind = {"image": images} | {kind: paths for kind, paths in partners.items() if paths is not None}
    if split == "test" and not by_kind.get("label", {}).keys() & images.keys():
        by_kind.pop("label", None)  # labels are held back
    names = images.keys()
    if not (description.root / description.splits[split]).is_file():  # only a list may leave files unused
        names = names | set().union(*by_kind.values())
    for kind, paths in by_kind.items():
        missing = sorted(name for name in names if name not in paths)
        if missing:
            raise DataError(
                f"{_split_root(description, split) / description.folders[kind]}: {len(missing)} of "
                f"{len(names)} files missing, the first is {missing[0]!r}; every image needs its "
                f"{', '.join(by_kind)} file under the same name"
            )
    for other in ("train", "valid", "test"):
        if other in description.splits and other != split != "train":
            _check_overlap(description, split, other, images)
    return {name: {kind: paths[name] for kind, paths in by_kind.items()} for name in sorted(names)}


def _find_images(description: Description, split: str) -> dict[str, Path]:
    """Return the images of a split as `{name: path}`."""
    root = description.root
    if split not in description.splits:
        raise MissingSplit(
            f"{root}: has no split {split!r}, expected one of: {', '.join(description.splits)}; name it in "
            f"{root / DESCRIPTION_FILE}"
        )
    images = _match(description, split, "image")
    is_list = (root / description.splits[split]).is_file()
    return {name: images[name] for name in _read_list(description, split, images)} if is_list else images


def _check_overlap(description: Description, split: str, other: str, images: dict[str, Path]) -> None:
    """Raise a DataError if an image is also in another split, even under another path or as a link."""
    try:
        other_files = {_identify(path) for path in _find_images(description, other).values()}
    except DataError:  # reported when that split is opened
        return
    shared = [name for name, path in images.items() if _identify(path) in other_files]
    if shared:
        split_path, other_path = (description.root / description.splits[name] for name in (split, other))
        reason = "training images can't validate or test" if other == "train" else "no image can do both"
        raise DataError(
            f"{split_path}: shares {len(shared)} images with {other_path}, the first is {shared[0]!r}; "
            f"{reason}: give split {split!r} other images, or leave it out of `splits`"
        )


def _identify(path: Path) -> tuple[int, int]:
    """Return device and inode, which are the same for all symbolic and hard links to a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _split_root(description: Description, split: str) -> Path:
    """Return the parent of `folders`: the split's folder, or DATA for lists or if `folders` has `{split}`."""
    split_path = description.root / description.splits[split]
    has_split_placeholder = any("{split}" in value for value in description.folders.values())
    return description.root if has_split_placeholder or split_path.is_file() else split_path


def _match(description: Description, split: str, kind: str) -> dict[str, Path] | None:
    """Return the files of a kind as `{name: path}` with names in Unicode NFC.

    Return None if the kind is optional and its folder is missing.
    """
    split_root = _split_root(description, split)
    value = description.folders[kind].replace("{split}", description.splits[split])
    pattern = os.path.normpath(value if "{name}" in value else f"{value}/{{name}}")
    top = split_root / os.path.dirname(pattern.partition("{")[0])
    if not top.is_dir():
        if (kind, split) == ("label", "test") or (kind == "depth" and "folders" not in description.stated):
            return None
        _reject_missing_folder(description, split, top)
    has_suffix = pattern.lower().endswith(SUFFIXES[kind])
    stem, suffix = os.path.splitext(pattern) if has_suffix else (pattern, "")
    regex = _compile(stem, f"(?i:{re.escape(suffix)})" if has_suffix else r"\.[^./]+")
    paths = {}
    skipped = Counter()
    for path in walk_files(top):
        match = regex.fullmatch(Path(os.path.relpath(path, split_root)).as_posix())
        if match is None:  # a file of another kind in the same folder
            continue
        if kind == "image" and path.suffix.lower() in (".heic", ".heif"):
            raise DataError(f"{path}: images of this kind can't be read; convert them to jpg, or remove them")
        if path.suffix.lower() not in SUFFIXES[kind]:
            skipped[path.suffix] += 1
            continue
        name = normalise_name("/".join(match.groups()))
        if paths.setdefault(name, path) != path:
            raise DataError(f"{path}: a second file named {name!r} beside {paths[name].name}; keep one")
    if not paths and (skipped or kind == "image"):
        found = "".join(f"{count} {suffix} files, " for suffix, count in skipped.items()) or "nothing, "
        expected = os.path.basename(pattern) if has_suffix else ", ".join(SUFFIXES[kind])
        raise DataError(f"{top}: found {found}expected files of: {expected}{_explain_json(description)}")
    return paths


def _reject_missing_folder(description: Description, split: str, top: Path) -> None:
    """Raise a DataError for the missing folder `top`, or a MissingSplit if a default split is missing."""
    is_declared = "splits" in description.stated
    split_path = description.root / description.splits[split]
    if is_declared and top.is_relative_to(split_path) and not split_path.exists():
        hint = "" if split == "train" else f", or write `{split}: null` if there is none"
        raise DataError(
            f"{split_path}: no such file or folder, expected that of split {split!r} in "
            f"{description.root / DESCRIPTION_FILE}; correct it there{hint}"
        )
    error = DataError if is_declared or split_path.exists() else MissingSplit
    raise error(f"{top}: no such folder; {LAYOUT}. Check the parameter data{_explain_json(description)}")


def _compile(pattern: str, suffix: str) -> re.Pattern:
    """Compile a value of `folders` to a regular expression with groups `name` and, if present, `scene`."""
    expression = re.escape(pattern)
    for group, subpattern in (("scene", "[^/]+"), ("name", ".+")):
        placeholder = re.escape(f"{{{group}}}")
        expression = expression.replace(placeholder, f"(?P<{group}>{subpattern})", 1).replace(
            placeholder, f"(?P={group})"
        )
    return re.compile(expression + suffix)


def _explain_json(description: Description) -> str:
    """Explain how to convert COCO annotations to masks if the data set has a `.json` file."""
    path = next(iter(sorted((*description.root.glob("*.json"), *description.root.glob("*/*.json")))), None)
    return COCO.format(path=path) if path else ""


def walk_files(top: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order.

    Hidden files and folders are skipped. Links are followed, but each real folder is entered only once.

    Raises:
        DataError: if a folder can't be listed.
    """
    entered = set()
    for folder, folders, files in os.walk(top, onerror=_reject_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(folder, file) for file in sorted(files) if not is_hidden(file))


def _reject_folder(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: can't be listed ({error.strerror}), expected a readable folder; check its "
        "permissions and the disk"
    ) from error


def is_hidden(name: str) -> bool:
    """Return whether a system or editor made it: .ipynb_checkpoints, ._x.jpg, @eaDir, $RECYCLE.BIN."""
    return name[0] in ".@$" or name in ("__MACOSX", "lost+found", "System Volume Information")


def normalise_name(name: str) -> str:
    """Normalise a name to Unicode NFC, because macOS may decompose it."""
    return unicodedata.normalize("NFC", name)


def _read_list(description: Description, split: str, images: dict[str, Path]) -> list[str]:
    """Return the sorted image names in a split's list.

    Each line is a name or the path of one of the image's files, relative to DATA. The extension is optional.
    """
    list_path = description.root / description.splits[split]
    known = {}
    for kind in description.folders:
        paths = images if kind == "image" else _match(description, split, kind) or {}
        for name, path in paths.items():
            relative = Path(os.path.relpath(path, description.root))
            spellings = (relative.as_posix(), relative.with_suffix("").as_posix(), f"{name}{path.suffix}")
            known |= dict.fromkeys(map(normalise_name, spellings), name)
    known |= {name: name for name in images}
    try:
        text = list_path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{list_path}: is not UTF-8 ({error}), expected a text file with a name a line; save it as UTF-8"
        ) from error
    stripped = (line.strip() for line in text.splitlines())
    lines = [normalise_name(os.path.normpath(line)) for line in stripped if line]
    unknown = [line for line in lines if line not in known]
    if unknown or not lines:
        summary = f"{len(unknown)} of {len(lines)} lines name no image"
        problem = f"{summary}, the first is {unknown[0]!r}" if unknown else "is empty"
        raise DataError(
            f"{list_path}: {problem}; expected a name a line, such as {next(iter(images), None)!r}, of "
            f"images in {description.root / description.folders['image']}"
        )
    names = [known[line] for line in lines]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise DataError(f"{list_path}: names {duplicates[0]!r} twice; list every image once")
    return sorted(names)


def _name_scenes(description: Description, names: np.ndarray) -> np.ndarray:
    """Return the `(N,)` scene of each image, looked up in a table or extracted from its name."""
    file = description.root / DESCRIPTION_FILE
    text = description.scene or "^([^/]+)/"
    if text.lower().endswith(".csv"):
        file = description.root / text
        try:
            table = pd.read_csv(file, dtype=str, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
            table = table[["name", "scene"]].dropna()
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{file}: can't be read ({error}); expected a table with the columns name,scene"
            ) from error
        table = table.assign(name=table["name"].map(normalise_name)).drop_duplicates()
        ambiguous = table["name"][table["name"].duplicated()].tolist()
        if ambiguous:
            raise DataError(
                f"{file}: gives {ambiguous[0]!r} two scenes, expected one; keep one line for each image"
            )
        scene_by_name = dict(zip(table["name"], table["scene"], strict=True))
        scenes = [scene_by_name.get(name) for name in names.tolist()]
    else:
        try:
            regex = re.compile(text)
        except re.error as error:
            raise DataError(f"{file}: scene is {text!r}, expected a regular expression ({error})") from error
        if regex.groups != 1:
            raise DataError(
                f"{file}: scene is {text!r} with {regex.groups} groups, expected one, such as '^([^/]+)/'"
            )
        scenes = [(match and match[1]) or None for match in map(regex.search, names.tolist())]
    if None in scenes:
        raise DataError(
            f"{file}: {scenes.count(None)} of {len(names)} images have no scene, the first is "
            f"{str(names[scenes.index(None)])!r}; every image needs one"
        )
    return np.array(scenes, str)


def _map_files(
    description: Description, split: str, files: list[Files], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the memory-mapped arrays of a split.

    Its files are checked only when the cache is written.
    """
    root = description.root  # relative or absolute: both give the same cache
    states = [(path, path.stat()) for paths in files for path in paths.values()]
    key = {
        "version": CACHE_VERSION,
        "kind": split,
        "size": list(size),
        "files": [[os.path.relpath(path, root), state.st_size, state.st_mtime_ns] for path, state in states],
        "description": description.model_dump(mode="json", exclude={"root"}, exclude_unset=True),
    }
    layout = {
        kind: (dtype, (len(files), *size, *axes))
        for kind, (dtype, axes) in CHANNELS.items()
        if kind in files[0]
    }

    def make() -> Blocks:
        check_files(description, split, files)
        yield from _read_blocks(files, size, description)

    return map_arrays(root, key, layout, make)


def _read_files(
    files: list[Files], size: tuple[int, int] | None, description: Description
) -> list[dict[str, np.ndarray]]:
    """Read arrays in file order, resized to `size` (height, width).

    If `size` is None, return one dict for each group of successive images with the same native size.
    """
    if not files:
        return [
            {kind: np.empty((0, *(size or (0, 0)), *axes), dtype) for kind, (dtype, axes) in CHANNELS.items()}
        ]
    groups = []
    for _, group in groupby(files, lambda paths: size or upright_size(paths["image"])):
        blocks = [arrays for _, arrays in _read_blocks(list(group), size, description)]
        groups.append({kind: np.concatenate([arrays[kind] for arrays in blocks]) for kind in blocks[0]})
    return groups


def _read_blocks(files: list[Files], size: tuple[int, int] | None, description: Description) -> Blocks:
    """Yield the positions and arrays of up to `BLOCK_SIZE` files at a time, decoded in parallel."""
    read = partial(read_sample, size=size, description=description)
    bar = progress_bar(f"reading {description.root}", len(files), disable=len(files) < BLOCK_SIZE)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(files), BLOCK_SIZE):
            block = list(pool.map(read, files[start : start + BLOCK_SIZE]))
            yield (
                start + np.arange(len(block)),
                {kind: np.stack([arrays[kind] for arrays in block]) for kind in block[0]},
            )
            bar.update(len(block))


def read_sample(
    paths: Files, size: tuple[int, int] | None, description: Description
) -> dict[str, np.ndarray]:
    """Read the arrays of one image by kind, at `size` (height, width) or at native size if None."""
    arrays = {"image": decode_image(paths["image"])}
    if path := paths.get("depth"):
        allow_8_bit = "depth_unit_mm" in description.stated
        depth = decode_depth(path, description.depth_bits, allow_8_bit, description.depth_missing)
        arrays["depth"] = depth_to_mm(depth, description.depth_unit_mm, description.depth_missing)
    if path := paths.get("label"):
        label = decode_label(path, bool(description.colours))
        arrays["label"] = description.to_indices(path, label)
    for kind, array in arrays.items():
        if array.shape[:2] != arrays["image"].shape[:2]:
            found, expected = ("x".join(map(str, pixels.shape[:2])) for pixels in (array, arrays["image"]))
            raise DataError(
                f"{paths[kind]}: {found}, but its image {paths['image'].name} is {expected}; image, depth "
                "and label must have the same size"
            )
    if size is None:
        return arrays
    return {
        kind: (resize_image if kind == "image" else resize_nearest)(array, size)
        for kind, array in arrays.items()
    }
