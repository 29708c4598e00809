"""Load the samples of a data set from any supported source."""

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
    """Load one split of a data set.

    Args:
        source: `"synthetic"` for the built-in synthetic scenes, the path of `nyu_depth_v2_labeled.mat`, or
            the path of a folder with `train/{image,depth,label}` and `test/{image,depth}`. A `dataset.yaml`
            in the folder can declare another layout, see `lib/data/README.md`.
        split: `"train"`, `"valid"` or `"test"`. Train and valid are both chosen from the training images,
            unless the predefined valid split is used.
        validation: how the validation images are chosen.
            `"random"`: 20 % of the images, as in Exp061.
            `"blocks"`: every fifth run of neighbouring ids.
            `"scenes"`: a fifth of the scenes, which must be known.
            `"none"`: no validation images; all images are in train.
            `"predefined"`: the data set's own valid split.
            `"auto"`: the first of `predefined`, `scenes`, `blocks` and `random` that the data allow. The
            built-in synthetic scenes start with `blocks`.
        size: (height, width) to resize to, see `resize_samples`; None keeps the native size.
        limit: use only the first N images; train and valid are split from these. The test split and a
            predefined valid split are limited to their own first N images.
        classes: class set of the .mat file, `nyuv2_13` (default) or `nyuv2_40`; None for other sources,
            which define their own classes.
        fold: index (0 to 4) of the fold used for validation by `blocks` and `scenes`.

    Raises:
        ValueError: if an argument is invalid or not possible for the data, or `limit` leaves a split empty.
        DataError: if a folder or partner file is missing, a file is damaged, image sizes differ, values are
            not valid RGB, depth or labels, or no pixel of a train or valid split is labelled.
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
    """Like `load_samples`, but read the images on each iteration, in batches of images of equal size.

    Args:
        batch_size: maximum number of images per batch. The other arguments are those of `load_samples`.
    """
    check_options(split=split, validation=validation, fold=fold, limit=limit, batch_size=batch_size)
    if size is not None and min(size) < 1:
        raise ValueError(f"size: found {size}, expected a height and a width of at least 1 pixel")
    opened = _open_source(source, "test" if split == "test" else "train", classes, limit)
    chosen_validation = choose_validation(validation, opened, fold)
    if split == "valid" and chosen_validation == "predefined":
        opened = _open_source(source, split, classes, limit)
    elif split != "test":
        opened = opened.select(select_split(opened, split, chosen_validation, fold))
    loaded_with = {
        "data": str(source),
        "validation": validation,
        "limit": limit,
        "classes": classes,
        "fold": fold,
        "chosen_validation": chosen_validation,
        **dict(zip(("image_height", "image_width"), size or (), strict=False)),
    }
    return replace(
        opened,
        split=split,
        size=size,
        batch_size=batch_size,
        data=str(source),
        validation=chosen_validation,
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
