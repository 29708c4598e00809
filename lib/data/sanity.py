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
from lib.data.decoding import decode_depth, decode_label, find_missing
from lib.data.description import DESCRIPTION_FILE, Description
from lib.data.samples import DataError, choose_evenly

SAMPLE_SIZE = 50  # number of files checked per split, evenly spaced
# plausible median depth of an indoor split (NYUv2: 2552 for the split, 1014 to 6125 for single frames)
INDOOR_MEDIAN_MM = (1250, 5000)
UINT16_MAX, MAX_SATURATED_SHARE = 65535, 0.01
MIN_SUN_SHARE = 0.95  # minimum share of multiples of 8: SUN RGB-D's bits of all depth below 8192 mm
UNITS = {
    1000: "for metres",
    10: "for centimetres",
    0.25: "for 4000 units a metre",
    0.2: "for 5000 units a metre",
    0.1: "for tenths of mm",
}
BACKGROUND_NAMES = ("background", "other", "unlabelled", "unlabeled", "unknown", "void", "none", "ignore")
# minimum share of borders that adjoin 0 (NYUv2: 0.91 if 0 means unlabelled, at most 0.46 if 0 is a class)
MIN_ZERO_BORDER_SHARE = 0.75


class LabelStats(NamedTuple):
    """Statistics of a label file.

    Attributes:
        path: the label file.
        values: number of pixels of each value.
        borders: number of horizontally adjacent pixel pairs with different values.
        zero_borders: number of these pairs in which one value is 0.
    """

    path: Path
    values: Counter[int]
    borders: int
    zero_borders: int


def check_files(description: Description, split: str, files: list[dict[str, Path]]) -> None:
    """Check the depth and labels of a split across files.

    Raises:
        DataError: if all depth is missing, a label value is unknown, or a default of `dataset.yaml` is
            implausible. The message includes the line to write there.
    """
    depth_paths = [paths["depth"] for paths in files if "depth" in paths]
    label_paths = [paths["label"] for paths in files if "label" in paths]
    if depth_paths:
        _check_depth(description, split, read_depth_stats(depth_paths, description))
    if label_paths:
        read_stats = partial(_read_label_stats, description=description)
        stats = _map_paths(read_stats, _choose_sample(label_paths))
        _check_values(description, stats)
        if not {"first_label", "ignore", "colours"} & description.stated:
            _check_shift(description, split, stats)
        if not {"ignore", "colours"} & description.stated and _find_binary(description, stats):
            _check_binary(description, split, _map_paths(read_stats, label_paths))


def _choose_sample(paths: list[Path]) -> list[Path]:
    return [paths[index] for index in choose_evenly(len(paths), SAMPLE_SIZE)]


def _map_paths(function: Callable[[Path], tuple], paths: list[Path]) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, paths))


def read_depth_stats(paths: list[Path], description: Description) -> np.ndarray:
    """Return statistics of the depth of up to 50 evenly spaced files.

    Returns:
        `(N, 3)` float64: the median of the measured pixels in the unit of the files, the share of the value
        65535, and the share of multiples of 8 among the measured pixels of 16-bit depth, 0 for other depth.
        Median and last share are NaN if no pixel is measured.
    """

    def read_stats(path: Path) -> tuple[float, float, float]:
        allow_8_bit = "depth_unit_mm" in description.stated
        stored = decode_depth(path, description.depth_bits, allow_8_bit, description.depth_missing)[::4, ::4]
        depth = stored.astype(np.float64)  # float16 can't represent 65535
        missing = find_missing(stored, description.depth_missing)
        saturated = depth == UINT16_MAX
        measured = depth[np.isfinite(depth) & ~missing & ~saturated]
        if not measured.size:
            return np.nan, saturated.mean(), np.nan
        is_uint16 = (stored.dtype.kind, stored.dtype.itemsize) == ("u", 2)
        return np.median(measured), saturated.mean(), (measured % 8 == 0).mean() * is_uint16

    return np.array(_map_paths(read_stats, _choose_sample(paths)))


def _check_depth(description: Description, split: str, stats: np.ndarray) -> None:
    yaml_path = description.root / DESCRIPTION_FILE
    subject = f"{description.root}: the depth of split {split!r}"
    if np.isnan(stats[:, 0]).all():
        raise DataError(
            f"{subject} is missing everywhere in {len(stats)} files; export it again, or leave it out: write "
            f"`folders: {{image: image, label: label}}` into {yaml_path}"
        )
    if "depth_missing" not in description.stated and stats[:, 1].mean() > MAX_SATURATED_SHARE:
        raise DataError(
            f"{subject} is {UINT16_MAX} in {100 * stats[:, 1].mean():.0f} % of the pixels, the largest "
            f"16-bit value. If it marks missing depth, write `depth_missing: [0, {UINT16_MAX}]` into "
            f"{yaml_path}, otherwise write `depth_missing: [0]`"
        )
    problem, units = guess_units(stats[:, 0])
    if problem and "depth_unit_mm" not in description.stated:
        lines = " or ".join(f"`depth_unit_mm: {unit}` {explanation}" for unit, explanation in units.items())
        is_multiple = np.nanmean(stats[:, 2]) > MIN_SUN_SHARE
        if "depth_bits" not in description.stated and is_multiple and not guess_units(stats[:, 0] / 8)[0]:
            lines = f"`depth_bits: sun` for SUN RGB-D or {lines}"
        raise DataError(
            f"{subject} {problem}: write into {yaml_path} {lines}. Depth that is not metric (disparity, "
            "relative, normalised) can't be used: leave it out with `folders: {image: image, label: label}`"
        )


def guess_units(medians: np.ndarray) -> tuple[str, dict[float, str]]:
    """Check whether the medians of depth files are plausible indoor depths in millimetres.

    Args:
        medians: `(N,)` median depth of each file, NaN if nothing was measured.

    Returns:
        A description of the problem, empty if none, and candidate units as `{mm per unit: explanation}`.
    """
    near, far = INDOOR_MEDIAN_MM
    median = np.nanmedian(medians)
    if near <= median <= far:
        return "", {}
    units = {unit: explanation for unit, explanation in UNITS.items() if near / 2.5 <= median * unit <= far}
    problem = f"has the median {median:g} in {len(medians)} files, expected {near} to {far} mm"
    return problem, units | {1: "if these are mm"}


def _read_label_stats(path: Path, description: Description) -> LabelStats:
    label = decode_label(path, bool(description.colours))
    values, counts = np.unique(label, return_counts=True)
    is_border = label[:, 1:] != label[:, :-1]
    zero_borders = is_border & (np.minimum(label[:, 1:], label[:, :-1]) == 0)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return LabelStats(path, Counter(pixels), is_border.sum(), zero_borders.sum())


def _check_values(description: Description, stats: list[LabelStats]) -> None:
    """Raise one DataError for all values that are neither a class nor unlabelled."""
    pixels = sum((label.values for label in stats), Counter())
    known = {*description.by_value, *description.unlabelled}
    unknown = {value: count / pixels.total() for value, count in pixels.items() if value not in known}
    if unknown and description.ignore != "others":
        path = next(label.path for label in stats if label.values.keys() & unknown.keys())
        description.reject_values(path, unknown, len(stats))


def _find_binary(description: Description, stats: list[LabelStats]) -> set[int]:
    """Return `{value}` if only one class and 255 occur, as in binary masks, else an empty set."""
    values = set().union(*(label.values for label in stats))
    class_values = values & description.by_value.keys()
    return class_values if IGNORE_INDEX in values and len(class_values) == 1 else set()


def _check_binary(description: Description, split: str, stats: list[LabelStats]) -> None:
    for value in _find_binary(description, stats):
        raise DataError(
            f"{description.root}: the labels of split {split!r} contain only {value} "
            f"({description.by_value[value]}) and 255, which means unlabelled by default. If these are "
            f"binary masks, write `classes: {{{value}: background, 255: object}}` and `ignore: []` into "
            f"{description.root / DESCRIPTION_FILE}; if 255 means unlabelled, write `ignore: [255]`"
        )


def _check_shift(description: Description, split: str, stats: list[LabelStats]) -> None:
    """Raise a DataError if 0 seems to mean unlabelled.

    This is assumed if 255 never occurs, and 0 either never occurs or separates the other values in nearly
    every image. It is not assumed if class 0 has a name such as `background`.
    """
    zero_share = np.mean([0 in label.values for label in stats])
    zero_separates = sum(label.zero_borders - MIN_ZERO_BORDER_SHARE * label.borders for label in stats) > 0
    is_shifted = (zero_share > 0.9 and zero_separates) or zero_share == 0
    has_255 = any(IGNORE_INDEX in label.values for label in stats)
    names = description.by_value
    if has_255 or not is_shifted or 0 not in names or names[0].lower() in BACKGROUND_NAMES:
        return
    found = "0 separates nearly all other values" if zero_share else "0 never occurs"
    remedy, entry = "write `first_label: 1`", "`first_label: 0`"
    if isinstance(description.classes, dict):  # which excludes first_label
        remedy, entry = "take 0 out of `classes` and write `ignore: [0, 255]`", "`ignore: [255]`"
    raise DataError(
        f"{description.root}: in the labels of split {split!r} {found}, and 255 never occurs, as if 0 "
        f"meant unlabelled and classes began with 1. If so, {remedy} into "
        f"{description.root / DESCRIPTION_FILE}; if 0 is {names[0]!r}, write {entry}"
    )
