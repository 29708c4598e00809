"""Samples of a data set, whatever its source."""

import os
from pathlib import Path

import numpy as np

from lib.data.folder import _list_files, _read_folder
from lib.data.nyuv2 import frame_names, read_frames
from lib.data.samples import DataError, Samples, resize_samples
from lib.data.scenes import make_scenes, room_names, scene_names
from lib.data.splits import SPLITS, _select, split_names
from lib.parameters import check_choice

__all__ = ["PARTS", "DataError", "Samples", "load_samples", "split_names"]

PARTS = ("train", "valid", "test")


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
        names = scene_names(part)[:limit]
        samples = make_scenes(_select(names, part, split, room_names(names)))
        return samples if size is None else resize_samples(samples, size)
    if Path(source).suffix == ".mat":
        names, scenes = (array[:limit] for array in frame_names(Path(source), part))
        return read_frames(Path(source), _select(names, part, split, scenes), size)
    files = _list_files(Path(source) / ("test" if part == "test" else "train"))
    names = np.array(sorted(files))[:limit]
    return _read_folder([files[name] for name in _select(names, part, split)], size)
