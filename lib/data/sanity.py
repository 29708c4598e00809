"""What no single file shows: another unit of depth, labels shifted by one, nothing measured."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from lib.data.decoding import decode_depth, decode_label
from lib.data.description import FILE, Description
from lib.data.samples import DataError

SAMPLED = 50  # files of a split, at equal steps of their order
INDOORS_MM = (
    500,
    5000,
)  # between these lies the median depth of a split: NYUv2 has 2552, its frames 1014 to 6125
LARGEST, OFTEN = 65535, 0.01
# what the median looks like that is no more than this
UNITS = (
    (20, "metres", 1000),
    (500, "centimetres", 10),
    (25_000, "5000 units a metre", 0.2),
    (1e9, "tenths of mm", 0.1),
)
BACKGROUND = ("background", "other", "unlabelled", "unlabeled", "unknown", "void", "none", "ignore")
# so much of the borders between values runs along 0: 0.91 where it means unlabelled on NYUv2, 0.49 for its objects
BETWEEN = 0.75


def check_files(description: Description, split: str, files: list[dict[str, Path]]) -> None:
    """Look at files of a split together.

    Raises:
        DataError: they can't be meant as the defaults of `dataset.yaml` take them; it has the line to write there.
    """
    sample = files[:: -(-len(files) // SAMPLED) or 1]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if sample and "depth" in sample[0]:
            look = partial(look_at_depth, description=description)
            _check_depth(
                description, split, np.array(list(pool.map(look, [paths["depth"] for paths in sample])))
            )
        if sample and "label" in sample[0] and not {"first_label", "ignore"} & description.stated:
            seen = np.array(list(pool.map(_look_at_label, [paths["label"] for paths in sample])))
            _check_labels(description, split, seen)


def look_at_depth(path: Path, description: Description) -> tuple[float, float]:
    """The median of what was measured, NaN where nothing was, and the share of the largest number."""
    depth = decode_depth(path, description.depth_bits, "depth_unit_mm" in description.stated)[::4, ::4]
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
    found, unit = guess_unit(seen[:, 0])
    if unit and "depth_unit_mm" not in description.stated:
        raise DataError(
            f"{where} {found}: write `depth_unit_mm: {unit}` into {yaml}, or `depth_unit_mm: 1` if these are mm"
        )


def guess_unit(medians: np.ndarray) -> tuple[str, float | None]:
    """What the medians of depth files look like, if they are no millimetres of rooms, and the unit they may have."""
    median = np.nanmedian(medians)
    if INDOORS_MM[0] <= median <= INDOORS_MM[1]:
        return "", None
    name, unit = next((name, unit) for most, name, unit in UNITS if median <= most)
    found = (
        f"has the median {median:g} in {len(medians)} files, expected {INDOORS_MM[0]} to {INDOORS_MM[1]} mm"
    )
    return f"{found}. It looks like {name}", unit


def _look_at_label(path: Path) -> tuple[int, int, int, int, int]:
    """The least value; whether there are 0 and 255; borders between values in rows, and those along 0."""
    label = decode_label(path)
    one, other = label[:, 1:], label[:, :-1]
    borders = one != other
    along = borders & ((one == 0) | (other == 0))
    return label.min(), (label == 0).any(), (label == 255).any(), borders.sum(), along.sum()


def _check_labels(description: Description, split: str, seen: np.ndarray) -> None:
    """0 that means unlabelled lies between all other values, and in nearly every image."""
    least, has_zero, has_255, borders, along = seen.T
    shifted = (has_zero.mean() > 0.9 and along.sum() > BETWEEN * borders.sum()) or least.min() > 0
    if (
        has_255.any()
        or not shifted
        or 0 not in description.values
        or description.classes[0].lower() in BACKGROUND
    ):
        return
    found = "0 lies between nearly all others" if has_zero.any() else "0 is never there"
    raise DataError(
        f"{description.root}: in the labels of split {split!r} {found}, and 255 is never there, as if 0 meant unlabelled "
        f"and classes began with 1. If so, write `first_label: 1` into {description.root / FILE}; if 0 is "
        f"{description.classes[0]!r}, `first_label: 0`"
    )
