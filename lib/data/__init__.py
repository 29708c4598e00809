"""Samples of a data set, whatever its source."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.classes import IGNORE_INDEX
from lib.data.folder import open_folder
from lib.data.nyuv2 import open_file
from lib.data.samples import DataError, Pieces, Samples, Source
from lib.data.synthetic import open_scenes
from lib.data.validation import SPLITS, choose_split, select_part
from lib.options import check_choice

__all__ = ["PARTS", "DataError", "Pieces", "Samples", "iterate_samples", "load_samples"]

PARTS = ("train", "valid", "test")


def load_samples(
    source: str | os.PathLike,
    part: str,
    split: str = "auto",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    classes: str | None = None,
    fold: int = 4,
) -> Samples:
    """Read one part of a data set.

    Args:
        source: `"synthetic"` for the embedded scenes; the path of `nyu_depth_v2_labeled.mat`; or a
            folder with `train/{image,depth,label}` and `test/{image,depth}`, or as its `dataset.yaml` says;
            see README.md here.
        part: `"train"`, `"valid"` (both cut from the training images by `split`, if not `given`) or `"test"`.
        split: `"random"` (20 % of the images validate, as in Exp061), `"blocks"` (every fifth run
            of neighbouring ids validates), `"scenes"` (a fifth of the scenes validates, where they
            are known), `"official"` (all train, `"valid"` is empty), `"given"` (the data set's own part
            validates), or `"auto"`: `given`, `scenes`, `blocks` or `random`, the first that the data allow;
            the embedded scenes begin with `blocks`.
        size: (height, width) to resize to, RGB by area, depth and label by nearest neighbour;
            None keeps the native size.
        limit: use only the first N images, before splitting; of a given part, its first N.
        classes: class set of the .mat file, `nyuv2_13` (None) or `nyuv2_40`; other sources know theirs.
        fold: which of the five folds of `blocks` or `scenes` validates, 0 to 4.

    Raises:
        ValueError: an unknown part or split, or a limit that leaves a part empty.
        DataError: a missing folder or partner, a damaged file, sizes that differ, values that can't be RGB, depth
            or labels, or a part to train or validate on in which nothing is labelled.
    """
    pieces = iterate_samples(source, part, split, size, limit, classes, fold)
    first, *others = pieces[np.arange(len(pieces))]
    if others:
        raise DataError(
            f"{source}: {first.names[-1]} is {'x'.join(map(str, first.size))}, {others[0].names[0]} is "
            f"{'x'.join(map(str, others[0].size))}; images of different sizes can't be read at their native size into "
            "one array: give a size, or read them with iterate_samples"
        )
    labelled = first.label is None or any((one != IGNORE_INDEX).any() for one in first.label)
    if part != "test" and len(first) and not labelled:
        raise DataError(
            f"{source}: nothing is labelled in the {len(first)} images of part {part!r} (split {pieces.split}); look "
            "at the labels, at `ignore` in DATA/dataset.yaml and at limit"
        )
    made_with = {"data": str(source), "split": split, "limit": limit, "classes": classes, "fold": fold}
    made_with |= {"chosen_split": pieces.split}
    if size is not None:
        made_with |= {"image_height": size[0], "image_width": size[1]}
    return replace(first, made_with=made_with)


def iterate_samples(
    source: str | os.PathLike,
    part: str,
    split: str = "auto",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    classes: str | None = None,
    fold: int = 4,
    batch_size: int = 8,
) -> Pieces:
    """As `load_samples`, but read in pieces of up to `batch_size` images of one size, each time it is iterated over."""
    check_choice("part", part, PARTS)
    check_choice("split", split, SPLITS)
    if size is not None and min(size) < 1:
        raise ValueError(f"size: found {size}, expected a height and a width of at least 1 pixel")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: found {value}, expected a number of images of at least 1")
    opened = _open_source(source, "test" if part == "test" else "train", classes, limit)
    chosen = choose_split(split, opened, fold)
    if part == "valid" and chosen == "given":
        opened = _open_source(source, part, classes, limit)
    elif part != "test":
        opened = opened.select(select_part(opened, part, chosen, fold))
    return Pieces(opened, size, batch_size, chosen, str(source))


def _open_source(source: str | os.PathLike, part: str, classes: str | None, limit: int | None) -> Source:
    path = Path(source).expanduser()
    if path.suffix == ".mat":
        opened = open_file(path, part, classes)
    elif classes not in (None, "nyuv2_13") or (classes and source != "synthetic"):
        raise ValueError(
            f"classes: found {classes!r} with data {str(source)!r}, expected None: only the .mat file leaves a choice. "
            "A folder names its classes in DATA/dataset.yaml"
        )
    else:
        opened = open_scenes(part) if source == "synthetic" else open_folder(path, part)
    return opened.select(np.arange(len(opened.names))[:limit])
