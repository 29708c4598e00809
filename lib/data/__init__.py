"""Samples of a data set, whatever its source."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data.folder import open_folder
from lib.data.nyuv2 import open_file
from lib.data.samples import DataError, MissingSplit, Samples, Split
from lib.data.synthetic import open_synthetic
from lib.data.validation import choose_validation, select_split
from lib.options import check_options

__all__ = ["DataError", "MissingSplit", "Samples", "Split", "iterate_samples", "load_samples"]


def load_samples(
    source: str | os.PathLike,
    split: str,
    validation: str = "auto",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    classes: str | None = None,
    fold: int = 4,
) -> Samples:
    """Read one split of a data set.

    Args:
        source: `"synthetic"` for the built-in synthetic scenes; the path of `nyu_depth_v2_labeled.mat`; or a
            folder with `train/{image,depth,label}` and `test/{image,depth}`, or as its `dataset.yaml` says;
            see README.md here.
        split: `"train"`, `"valid"` (both chosen from the training images by `validation`, unless
            `predefined`) or `"test"`.
        validation: `"random"` (20 % of the images validate, as in Exp061), `"blocks"` (every fifth run
            of neighbouring ids validates), `"scenes"` (a fifth of the scenes validates, where they
            are known), `"none"` (all train, `"valid"` is empty), `"predefined"` (the data set has its own
            valid split), or `"auto"`: `predefined`, `scenes`, `blocks` or `random`, the first that the data
            allow; the built-in synthetic scenes begin with `blocks`.
        size: (height, width) to resize to, RGB by area, depth and label by nearest neighbour;
            None keeps the native size.
        limit: use only the first N images, before splitting; of a given split, its first N.
        classes: class set of the .mat file, `nyuv2_13` (None) or `nyuv2_40`; other sources know theirs.
        fold: which of the five folds of `blocks` or `scenes` validates, 0 to 4.

    Raises:
        ValueError: an unknown `split` or `validation`, or a limit that leaves a split empty.
        DataError: a missing folder or partner, a damaged file, sizes that differ, values that can't be RGB,
            depth or labels, or a split to train or validate on in which nothing is labelled.
    """
    return iterate_samples(source, split, validation, size, limit, classes, fold).load()


def iterate_samples(
    source: str | os.PathLike,
    split: str,
    validation: str = "auto",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    classes: str | None = None,
    fold: int = 4,
    batch_size: int = 8,
) -> Split:
    """As `load_samples`, but read in each iteration, in pieces of up to `batch_size` images of one size."""
    check_options(split=split, validation=validation, fold=fold, limit=limit, batch_size=batch_size)
    if size is not None and min(size) < 1:
        raise ValueError(f"size: found {size}, expected a height and a width of at least 1 pixel")
    opened = _open_source(source, "test" if split == "test" else "train", classes, limit)
    chosen = choose_validation(validation, opened, fold)
    if split == "valid" and chosen == "predefined":
        opened = _open_source(source, split, classes, limit)
    elif split != "test":
        opened = opened.select(select_split(opened, split, chosen, fold))
    loaded_with = {
        "data": str(source),
        "validation": validation,
        "limit": limit,
        "classes": classes,
        "fold": fold,
        "chosen_validation": chosen,
        **dict(zip(("image_height", "image_width"), size or (), strict=False)),
    }
    return replace(
        opened,
        split=split,
        size=size,
        batch_size=batch_size,
        data=str(source),
        validation=chosen,
        loaded_with=loaded_with,
    )


def _open_source(source: str | os.PathLike, split: str, classes: str | None, limit: int | None) -> Split:
    path = Path(source).expanduser()
    if classes and path.suffix != ".mat" and (source, classes) != ("synthetic", "nyuv2_13"):
        raise ValueError(
            f"classes: found {classes!r} with data {str(source)!r}, expected None: only the .mat file has "
            "a choice of class sets. Declare the classes of a folder in DATA/dataset.yaml"
        )
    if path.suffix == ".mat":
        opened = open_file(path, split, classes)
    else:
        opened = open_synthetic(split) if source == "synthetic" else open_folder(path, split)
    return opened.select(np.arange(len(opened.names))[:limit])
