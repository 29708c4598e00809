"""Sanity checks across files: the unit of depth, shifted labels, binary masks, unknown label values."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.classes import IGNORE_INDEX
from lib.data.decoding import decode_depth, decode_label
from lib.data.description import FILE, Description
from lib.data.samples import DataError, choose_evenly

SAMPLED = 50  # number of files checked per split, evenly spaced
# plausible median depth of an indoor split (NYUv2: 2552 for the split, 1014 to 6125 for single frames)
INDOORS_MM = (1250, 5000)
LARGEST, OFTEN = 65535, 0.01
UNITS = {
    1000: "for metres",
    10: "for centimetres",
    0.25: "for 4000 units a metre",
    0.2: "for 5000 units a metre",
    0.1: "for tenths of mm",
}
BACKGROUND = ("background", "other", "unlabelled", "unlabeled", "unknown", "void", "none", "ignore")
# minimum share of borders that adjoin 0 (NYUv2: 0.91 if 0 means unlabelled, 0.49 if 0 is `objects`)
BETWEEN = 0.75


class LabelLook(NamedTuple):
    """Statistics of a label file.

    Attributes:
        path: the label file.
        values: number of pixels of each value.
        borders: number of horizontally adjacent pixel pairs with different values.
        along_zero: number of these pairs in which one value is 0.
    """

    path: Path
    values: Counter[int]
    borders: int
    along_zero: int


def check_files(description: Description, split: str, files: list[dict[str, Path]]) -> None:
    """Check the depth and labels of a split across files.

    Raises:
        DataError: if all depth is missing, a label value is unknown, or a default of `dataset.yaml` is
            implausible. The message includes the line to write there.
    """
    depths = [paths["depth"] for paths in files if "depth" in paths]
    labels = [paths["label"] for paths in files if "label" in paths]
    if depths:
        _check_depth(description, split, look_at_depths(depths, description))
    if labels:
        look = partial(_look_at_label, description=description)
        seen = _look_at(look, _choose_sample(labels))
        _check_values(description, seen)
        if not {"first_label", "ignore", "colours"} & description.stated:
            _check_shift(description, split, seen)
        if not {"ignore", "colours"} & description.stated and _find_binary(description, seen):
            _check_binary(description, split, _look_at(look, labels))


def _choose_sample(paths: list[Path]) -> list[Path]:
    return [paths[at] for at in choose_evenly(len(paths), SAMPLED)]


def _look_at(look: Callable[[Path], tuple], paths: list[Path]) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, paths))


def look_at_depths(paths: list[Path], description: Description) -> np.ndarray:
    """Return the median depth and the share of the value 65535 in up to 50 evenly spaced files.

    Returns:
        `(N, 2)` float64. The median is over measured pixels in the unit of the files, NaN if there are none.
    """

    def look(path: Path) -> tuple[float, float]:
        depth = decode_depth(path, description.depth_bits, "depth_unit_mm" in description.stated)
        depth = depth[::4, ::4].astype(np.float64)  # float16 can't represent 65535
        measured = depth[np.isfinite(depth) & ~np.isin(depth, description.depth_missing) & (depth != LARGEST)]
        return np.median(measured) if measured.size else np.nan, (depth == LARGEST).mean()

    return np.array(_look_at(look, _choose_sample(paths)))


def _check_depth(description: Description, split: str, seen: np.ndarray) -> None:
    yaml = description.root / FILE
    where = f"{description.root}: the depth of split {split!r}"
    if np.isnan(seen[:, 0]).all():
        raise DataError(
            f"{where} is missing everywhere in {len(seen)} files; export it again, or leave it out: write "
            f"`folders: {{image: image, label: label}}` into {yaml}"
        )
    if "depth_missing" not in description.stated and seen[:, 1].mean() > OFTEN:
        raise DataError(
            f"{where} is {LARGEST} in {100 * seen[:, 1].mean():.0f} % of the pixels, the largest 16-bit "
            f"value. If it marks missing depth, write `depth_missing: [0, {LARGEST}]` into {yaml}, "
            "otherwise write `depth_missing: [0]`"
        )
    found, units = guess_units(seen[:, 0])
    if found and "depth_unit_mm" not in description.stated:
        lines = " or ".join(f"`depth_unit_mm: {unit}` {where_so}" for unit, where_so in units.items())
        raise DataError(
            f"{where} {found}: write into {yaml} {lines}. Depth that is not metric (disparity, relative, "
            "normalised) can't be used: leave it out with `folders: {image: image, label: label}`"
        )


def guess_units(medians: np.ndarray) -> tuple[str, dict[float, str]]:
    """Check whether the medians of depth files are plausible indoor depths in millimetres.

    Args:
        medians: `(N,)` median depth of each file, NaN if nothing was measured.

    Returns:
        A description of the problem, empty if none, and candidate units as `{mm per unit: explanation}`.
    """
    near, far = INDOORS_MM
    median = np.nanmedian(medians)
    if near <= median <= far:
        return "", {}
    units = {unit: name for unit, name in UNITS.items() if near / 2.5 <= median * unit <= far}
    found = f"has the median {median:g} in {len(medians)} files, expected {near} to {far} mm"
    return found, units | {1: "if these are mm"}


def _look_at_label(path: Path, description: Description) -> LabelLook:
    label = decode_label(path, bool(description.colours))
    values, counts = np.unique(label, return_counts=True)
    borders = label[:, 1:] != label[:, :-1]
    along = borders & (np.minimum(label[:, 1:], label[:, :-1]) == 0)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return LabelLook(path, Counter(pixels), borders.sum(), along.sum())


def _check_values(description: Description, seen: list[LabelLook]) -> None:
    """Raise one DataError for all values that are neither a class nor unlabelled."""
    pixels = sum((look.values for look in seen), Counter())
    known = {*description.by_value, *description.unlabelled}
    unknown = {value: count / pixels.total() for value, count in pixels.items() if value not in known}
    if unknown and description.ignore != "others":
        first = next(look.path for look in seen if look.values.keys() & unknown.keys())
        description.refuse_values(first, unknown, len(seen))


def _find_binary(description: Description, seen: list[LabelLook]) -> set[int]:
    """Return `{value}` if only one class and 255 occur, as in binary masks, else an empty set."""
    values = set().union(*(look.values for look in seen))
    found = values & description.by_value.keys()
    return found if IGNORE_INDEX in values and len(found) == 1 else set()


def _check_binary(description: Description, split: str, seen: list[LabelLook]) -> None:
    for value in _find_binary(description, seen):
        raise DataError(
            f"{description.root}: the labels of split {split!r} contain only {value} "
            f"({description.by_value[value]}) and 255, which means unlabelled by default. If these are "
            f"binary masks, write `classes: {{{value}: background, 255: object}}` and `ignore: []` into "
            f"{description.root / FILE}; if 255 means unlabelled, write `ignore: [255]`"
        )


def _check_shift(description: Description, split: str, seen: list[LabelLook]) -> None:
    """Raise a DataError if 0 seems to mean unlabelled.

    This is assumed if 255 never occurs, and 0 either never occurs or separates the other values in nearly
    every image. It is not assumed if class 0 has a name such as `background`.
    """
    has_zero = np.mean([0 in look.values for look in seen])
    between = sum(look.along_zero - BETWEEN * look.borders for look in seen) > 0
    shifted = (has_zero > 0.9 and between) or has_zero == 0
    has_255 = any(IGNORE_INDEX in look.values for look in seen)
    names = description.by_value
    if has_255 or not shifted or 0 not in names or names[0].lower() in BACKGROUND:
        return
    found = "0 separates nearly all other values" if has_zero else "0 never occurs"
    raise DataError(
        f"{description.root}: in the labels of split {split!r} {found}, and 255 never occurs, as if 0 "
        "meant unlabelled and classes began with 1. If so, write `first_label: 1` into "
        f"{description.root / FILE}; if 0 is {names[0]!r}, write `first_label: 0`"
    )
