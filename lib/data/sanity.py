"""Sanity checks that need many files: the unit of depth, shifted labels, binary masks, values that are no class."""

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.classes import IGNORE_INDEX
from lib.data.decoding import decode_depth, decode_label
from lib.data.description import FILE, Description
from lib.data.samples import DataError

SAMPLED = 50  # files of a split, at equal steps of their order
# between these lies the median depth of a split of rooms: NYUv2 has 2552, its frames 1014 to 6125
INDOORS_MM = (1250, 5000)
LARGEST, OFTEN = 65535, 0.01
UNITS = {
    1000: "metres",
    10: "centimetres",
    0.25: "4000 units a metre",
    0.2: "5000 units a metre",
    0.1: "tenths of mm",
}
BACKGROUND = ("background", "other", "unlabelled", "unlabeled", "unknown", "void", "none", "ignore")
# so much of the borders between values runs along 0: 0.91 where it means unlabelled on NYUv2, 0.49 for its objects
BETWEEN = 0.75


class LabelLook(NamedTuple):
    """What is in a label file.

    Attributes:
        path: of the file.
        values: pixels of each value.
        borders: pairs of neighbours in a row with two values.
        along_zero: those of them with 0.
    """

    path: Path
    values: Counter[int]
    borders: int
    along_zero: int


def check_files(description: Description, split: str, files: list[dict[str, Path]]) -> None:
    """Look at files of a split together.

    Raises:
        DataError: they can't be meant as the defaults of `dataset.yaml` take them; it has the line to write there.
    """
    sample = choose_evenly(files)
    if sample and "depth" in sample[0]:
        look = partial(look_at_depth, description=description)
        _check_depth(description, split, np.array(_look_at(look, sample, "depth")))
    if sample and "label" in sample[0]:
        look = partial(_look_at_label, description=description)
        seen = _look_at(look, sample, "label")
        _check_values(description, seen)
        if not {"first_label", "ignore", "colours"} & description.stated:
            _check_shift(description, split, seen)
        if not {"ignore", "colours"} & description.stated and _is_binary(description, seen):
            _check_binary(description, split, _look_at(look, files, "label"))


def choose_evenly(files: list) -> list:
    """At most 50 at equal steps of their order."""
    return files[:: -(-len(files) // SAMPLED) or 1]


def _look_at(look: partial, files: Iterable[dict[str, Path]], kind: str) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, [paths[kind] for paths in files]))


def look_at_depth(path: Path, description: Description) -> tuple[float, float]:
    """The median of what was measured, NaN where nothing was, and the share of the largest number."""
    depth = decode_depth(path, description.depth_bits, "depth_unit_mm" in description.stated)
    depth = depth[::4, ::4].astype(np.float64)  # 16 bits may not hold the largest number
    measured = depth[np.isfinite(depth) & ~np.isin(depth, description.depth_missing) & (depth != LARGEST)]
    return np.median(measured) if measured.size else np.nan, (depth == LARGEST).mean()


def _check_depth(description: Description, split: str, seen: np.ndarray) -> None:
    yaml, where = description.root / FILE, f"{description.root}: the depth of split {split!r}"
    if np.isnan(seen[:, 0]).all():
        raise DataError(
            f"{where} is missing everywhere in {len(seen)} files; export it again, or leave it out: write "
            f"`folders: {{image: image, label: label}}` into {yaml}"
        )
    if "depth_missing" not in description.stated and seen[:, 1].mean() > OFTEN:
        raise DataError(
            f"{where} is {LARGEST} in {seen[:, 1].mean():.0%} of the pixels, the largest of 16 bits. If it means "
            f"not measured, write `depth_missing: [0, {LARGEST}]` into {yaml}, else `depth_missing: [0]`"
        )
    found, units = guess_units(seen[:, 0])
    if found and "depth_unit_mm" not in description.stated:
        lines = [f"`depth_unit_mm: {unit}` for {name}" for unit, name in units.items()]
        lines.append("`depth_unit_mm: 1` if these are mm")
        raise DataError(
            f"{where} {found}: write into {yaml} {' or '.join(lines)}. Depth that is not metric (disparity, relative, "
            "normalised) can't be used: leave it out with `folders: {image: image, label: label}`"
        )


def guess_units(medians: np.ndarray) -> tuple[str, dict[float, str]]:
    """What the medians of depth files are, if they are no millimetres of rooms, and the units that would make them so."""
    median, (near, far) = np.nanmedian(medians), INDOORS_MM
    if near <= median <= far:
        return "", {}
    found = f"has the median {median:g} in {len(medians)} files, expected {near} to {far} mm"
    return found, {unit: name for unit, name in UNITS.items() if near / 2.5 <= median * unit <= far}


def _look_at_label(path: Path, description: Description) -> LabelLook:
    label = decode_label(path, bool(description.colours))
    values, counts = np.unique(label, return_counts=True)
    one, other = label[:, 1:], label[:, :-1]
    borders = one != other
    along = borders & ((one == 0) | (other == 0))
    pixels = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return LabelLook(path, pixels, borders.sum(), along.sum())


def _check_values(description: Description, seen: list[LabelLook]) -> None:
    """Name all values at once that are neither a class nor unlabelled."""
    pixels = sum((look.values for look in seen), Counter())
    known = {value for value in pixels if value < len(description.table) and description.table[value] >= 0}
    unknown = {value: count / pixels.total() for value, count in pixels.items() if value not in known}
    if unknown and description.ignore != "others":
        first = next(look.path for look in seen if look.values.keys() & unknown.keys())
        description.refuse_values(first, unknown, len(seen))


def _is_binary(description: Description, seen: list[LabelLook]) -> bool:
    """Whether one class occurs alone beside 255, which may then be another class."""
    values = set().union(*(look.values for look in seen))
    return IGNORE_INDEX in values and len(values & description.by_value.keys()) == 1


def _check_binary(description: Description, split: str, seen: list[LabelLook]) -> None:
    if not _is_binary(description, seen):
        return
    values = set().union(*(look.values for look in seen))
    (value,) = values & description.by_value.keys()
    yaml = description.root / FILE
    raise DataError(
        f"{description.root}: the labels of split {split!r} hold only {value} ({description.by_value[value]}) and 255, "
        f"which means unlabelled by default. If these are binary masks, write `classes: {{{value}: background, 255: "
        f"object}}` and `ignore: []` into {yaml}; if 255 means unlabelled, `ignore: [255]`"
    )


def _check_shift(description: Description, split: str, seen: list[LabelLook]) -> None:
    """0 that means unlabelled lies between all other values, and in nearly every image."""
    has_zero = np.mean([0 in look.values for look in seen])
    along, borders = sum(look.along_zero for look in seen), sum(look.borders for look in seen)
    shifted = (has_zero > 0.9 and along > BETWEEN * borders) or has_zero == 0
    has_255 = any(IGNORE_INDEX in look.values for look in seen)
    names = description.by_value
    if has_255 or not shifted or 0 not in names or names[0].lower() in BACKGROUND:
        return
    found = "0 lies between nearly all others" if has_zero else "0 is never there"
    raise DataError(
        f"{description.root}: in the labels of split {split!r} {found}, and 255 is never there, as if 0 meant unlabelled "
        f"and classes began with 1. If so, write `first_label: 1` into {description.root / FILE}; if 0 is "
        f"{names[0]!r}, `first_label: 0`"
    )
