"""`dataset.yaml`: what a folder says of its images, and what the values of its labels mean."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from lib.classes import IGNORE_INDEX, MOST_CLASSES, NYUV2_13
from lib.data.samples import DEPTH_RANGE_M, DataError
from lib.options import OLDER_NAMES, explain_unknown

FILE = "dataset.yaml"
MOST_VALUES = 2**16  # of labels of 16 bits
FARTHEST_M = 65.535  # millimetres in 16 bits


@dataclass(frozen=True)
class Description:
    """What `dataset.yaml` says of a folder: every key that is stated, and the defaults of the others.

    Attributes:
        root: the folder.
        stated: the keys that are in the file.
        classes: names in the order of their indices.
        values: the label value of each class.
        others: the keys as the file has them.
    """

    root: Path
    stated: frozenset[str] = frozenset()
    classes: tuple[str, ...] = NYUV2_13
    values: tuple[int, ...] = tuple(range(len(NYUV2_13)))
    ignore: tuple[int, ...] = (IGNORE_INDEX,)
    depth_unit_mm: float = 1.0
    depth_missing: tuple[float, ...] = (0,)
    depth_bits: str = "plain"
    depth_range_m: tuple[float, float] = DEPTH_RANGE_M
    folders: tuple[tuple[str, str], ...] = (("image", "image"), ("depth", "depth"), ("label", "label"))
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("test", "test"))
    scene: str | None = None

    @cached_property
    def table(self) -> np.ndarray:
        """`(65536,)` int16: the class index of each label value, 255 where it means unlabelled, else -1."""
        table = np.full(MOST_VALUES, -1, np.int16)
        table[list(self.ignore)] = IGNORE_INDEX
        table[list(self.values)] = range(len(self.classes))
        return table

    def to_indices(self, path: Path, label: np.ndarray) -> np.ndarray:
        """uint8 class indices, 255 = unlabelled, of the values in a file, which a `DataError` names."""
        indices = self.table[label.clip(0, MOST_VALUES - 1)]
        unknown = (indices < 0) | (label != label.clip(0, MOST_VALUES - 1))
        if not unknown.any():
            return indices.astype(np.uint8)
        first, last = min(self.values), max(self.values)
        gaps = "" if len(self.values) == last - first + 1 else " with gaps"
        found, ignored = np.unique(label[unknown]).tolist(), ", ".join(map(str, self.ignore)) or "nothing"
        hint = f"name other classes under `classes`, and what means unlabelled under `ignore`, in {self.root / FILE}"
        if not {"first_label", "ignore"} & self.stated and found == [last + 1]:
            hint = f"where 0 means unlabelled, write `first_label: 1` into {self.root / FILE}"
        raise DataError(
            f"{path}: label values {found[:8]}, expected {first}..{last}{gaps} and {ignored} = unlabelled; {hint}"
        )


def _is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_value(value: object) -> bool:
    return isinstance(value, int) and _is_number(value, 0, MOST_VALUES - 1)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _lists(value: object, check: Callable[[object], bool], least: int = 0, most: int = MOST_VALUES) -> bool:
    return isinstance(value, list) and least <= len(value) <= most and all(map(check, value))


def _maps(value: object, *keys: str) -> bool:
    """Whether it is a mapping of some of these keys to text, or to null."""
    texts = [text for text in value.values() if text is not None] if isinstance(value, dict) else []
    return bool(texts) and set(value) <= set(keys) and all(map(_is_text, texts))


def _are_classes(value: object) -> bool:
    names = list(value.values()) if isinstance(value, dict) and all(map(_is_value, value)) else value
    return _lists(names, _is_text, 2, MOST_CLASSES)


# by key: what its value must be, and how an error says so
CHECKS = {
    "classes": (
        _are_classes,
        f"a list of 2 to {MOST_CLASSES} names in the order of their indices, such as [bed, books, ceiling], or "
        "{value: name} where label values have gaps; quote names that YAML reads otherwise, such as 'no'",
    ),
    "first_label": (_is_value, "the label value of the first class, a whole number from 0 to 65535"),
    "ignore": (
        lambda value: _lists(value, _is_value),
        "a list of label values, whole numbers from 0 to 65535, such as [0, 255]",
    ),
    "depth_unit_mm": (
        lambda value: _is_number(value, 1e-6, 1e6),
        "millimetres of one unit, a number such as 0.2 or 10",
    ),
    "depth_missing": (lambda value: _lists(value, _is_number), "a list of depth values, such as [0, 65535]"),
    "depth_bits": (("plain", "sun").__contains__, "plain, or sun"),
    "depth_range_m": (
        lambda value: _lists(value, _is_number, 2, 2) and 0 < value[0] < value[1] <= FARTHEST_M,
        f"[nearest, farthest] in metres, above 0 and up to {FARTHEST_M}, such as [0.71, 10]",
    ),
    "folders": (
        lambda value: _maps(value, "image", "depth", "label") and value.get("image"),
        "the folder of image and, where there are, of depth and label",
    ),
    "splits": (
        lambda value: _maps(value, "train", "valid", "test"),
        "folders or lists of names of train, valid or test, null for none",
    ),
    "scene": (
        lambda value: value is None or _is_text(value),
        "a regular expression, the name of a .csv file, or null",
    ),
}


def read_description(root: Path) -> Description:
    """The `dataset.yaml` of a folder, or the defaults where there is none.

    Raises:
        DataError: no YAML mapping, an unknown key, or a value that can't be meant.
    """
    path = root / FILE
    if not path.exists():
        return Description(root)
    try:
        content = yaml.safe_load(path.read_bytes())  # which finds its encoding, whatever the system's is
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is no YAML ({error})") from error
    content = {} if content is None else content  # nothing, or comments alone
    older = [key for key in content if OLDER_NAMES.get(key) in CHECKS] if isinstance(content, dict) else []
    if older:
        raise DataError(f"{path}: {explain_unknown(older[0], CHECKS)}")
    if not isinstance(content, dict) or set(content) - set(CHECKS):
        found = (
            ", ".join(map(str, set(content) - set(CHECKS))) if isinstance(content, dict) else repr(content)
        )
        raise DataError(f"{path}: found {found}, expected keys of: {', '.join(CHECKS)}")
    for key, value in content.items():
        check, expected = CHECKS[key]
        if not check(value):
            raise DataError(f"{path}: {key} is {value!r}, expected {expected}")
    others = {key: value for key, value in content.items() if key not in ("classes", "first_label", "ignore")}
    for key, value in others.items():
        if isinstance(value, dict):
            others[key] = tuple((name, text) for name, text in value.items() if text is not None)
        elif isinstance(value, list):
            others[key] = tuple(map(float, value))
    return Description(root, frozenset(content), **_read_classes(path, content), **others)


def _read_classes(path: Path, content: dict) -> dict[str, tuple]:
    """Classes in the order of their values; 0 is unlabelled where classes begin with 1 and nothing else is said."""
    classes, first = content.get("classes", list(NYUV2_13)), content.get("first_label", 0)
    if isinstance(classes, dict) and "first_label" in content:
        raise DataError(f"{path}: first_label is {first!r}, expected none where classes maps values to names")
    by_value = dict(sorted(classes.items())) if isinstance(classes, dict) else dict(enumerate(classes, first))
    names = list(by_value.values())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{path}: classes names {', '.join(twice)} twice; every class needs a name of its own"
        )
    ignore = content.get("ignore", [0, IGNORE_INDEX] if first == 1 else [IGNORE_INDEX])
    if both := sorted(set(by_value) & set(ignore)):
        raise DataError(
            f"{path}: ignore is {ignore!r}, expected no value of a class, but {both[0]} is {by_value[both[0]]!r}"
        )
    if max(by_value) >= MOST_VALUES:
        raise DataError(f"{path}: first_label is {first!r}, expected label values up to {MOST_VALUES - 1}")
    return {"classes": tuple(names), "values": tuple(by_value), "ignore": tuple(ignore)}
