"""`dataset.yaml`: the layout of a data folder, and the meaning of its label and depth values."""

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.classes import IGNORE_INDEX, MAX_CLASSES, NYUV2_13
from lib.data.samples import DEPTH_RANGE_M, DataError
from lib.options import RENAMED_PARAMETERS, explain_unknown

DESCRIPTION_FILE = "dataset.yaml"
SIMILAR_NAME = re.compile(
    r"(dataset|data)\.ya?ml(\.txt)?", re.IGNORECASE
)  # file names that are easily confused with DESCRIPTION_FILE
MAX_LABEL_VALUES = 2**16  # 16-bit labels
MAX_LISTED = 300  # maximum number of values in an error message
MAX_DEPTH_M = 65.535  # largest depth in uint16 millimetres
NON_CLASS_NAMES = ("ignore", "background")  # names in `colours` that need not be classes
PLACEHOLDERS = {"{name}", "{scene}", "{split}"}  # in a value of `folders`

Text = Annotated[str, Field(min_length=1)]
Value = Annotated[int, Field(ge=0, lt=MAX_LABEL_VALUES)]
Byte = Annotated[int, Field(ge=0, le=255)]
Number = Annotated[float, Field(allow_inf_nan=False)]
ClassCount = Field(min_length=2, max_length=MAX_CLASSES)


class Description(BaseModel):
    """The content of `dataset.yaml` in the folder `root`, with defaults for missing keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    root: Path
    classes: Annotated[list[Text], ClassCount] | Annotated[dict[Value, Text], ClassCount] = Field(
        list(NYUV2_13),
        description=f"a list of 2 to {MAX_CLASSES} names in the order of their indices, such as "
        "[bed, books, ceiling], or {value: name} where label values have gaps; quote names that YAML reads "
        "otherwise, such as 'no'",
    )
    colours: dict[Text, Annotated[list[Byte], Field(min_length=3, max_length=3)]] | None = Field(
        None,
        description="a colour [red, green, blue] of 0..255 by name, such as {bed: [128, 0, 0], "
        "ignore: [0, 0, 0]}, or the name of CVAT's labelmap.txt",
    )
    first_label: Value = Field(
        0, description="the label value of the first class, a whole number from 0 to 65535"
    )
    ignore: list[Value] | Literal["others"] = Field(
        [IGNORE_INDEX],
        description="a list of label values, whole numbers from 0 to 65535, such as [0, 255], or others",
    )
    depth_unit_mm: Annotated[Number, Field(ge=1e-6, le=1e6)] = Field(
        1, description="millimetres of one unit, a number such as 0.2 or 10"
    )
    depth_missing: list[Number] = Field([0], description="a list of depth values, such as [0, 65535]")
    depth_bits: Literal["plain", "sun"] = Field("plain", description="plain, or sun")
    depth_range_m: Annotated[list[Number], Field(min_length=2, max_length=2)] = Field(
        list(DEPTH_RANGE_M),
        description=f"[nearest, farthest] in metres, above 0 and up to {MAX_DEPTH_M}, such as [0.71, 10]",
    )
    folders: dict[Literal["image", "depth", "label"], Text | None] = Field(
        {"image": "image", "depth": "depth", "label": "label"},
        description="the folder of image and, where there are, of depth and label, as relative paths with no "
        "placeholders but {name}, {scene} and {split}",
    )
    splits: dict[Literal["train", "valid", "test"], Text | None] = Field(
        {"train": "train", "test": "test"},
        description="folders or lists of names of train, valid or test, null for none",
    )
    scene: Text | None = Field(None, description="a regular expression, the name of a .csv file, or null")

    @field_validator("depth_range_m")
    @classmethod
    def _check_range(cls, value: list[float]) -> list[float]:
        if not 0 < value[0] < value[1] <= MAX_DEPTH_M:
            raise ValueError
        return value

    @field_validator("folders", "splits")
    @classmethod
    def _drop_none(cls, value: dict[str, str | None]) -> dict[str, str]:
        present = {name: text for name, text in value.items() if text is not None}
        if not present or not ("image" in present or set(present) <= {"train", "valid", "test"}):
            raise ValueError
        return present

    @field_validator("folders")
    @classmethod
    def _check_paths(cls, value: dict[str, str]) -> dict[str, str]:
        placeholders = set(re.findall("{.*?}", " ".join(value.values())))
        if not placeholders <= PLACEHOLDERS or any(map(os.path.isabs, value.values())):
            raise ValueError
        return value

    @property
    def stated(self) -> set[str]:
        """The keys given in the file, except those that are null."""
        return {key for key in self.model_fields_set if getattr(self, key) is not None} - {"root"}

    @cached_property
    def by_value(self) -> dict[int, str]:
        """Class names by label value or, with `colours`, by packed colour, in index order.

        Raises:
            DataError: if `colours` does not give each of 2 to 255 classes its own colour, or has other
                names than the classes, `ignore` and `background`.
        """
        if isinstance(self.classes, dict):
            return dict(sorted(self.classes.items()))
        return self._by_colour() if self.colours else dict(enumerate(self.classes, self.first_label))

    def _by_colour(self) -> dict[int, str]:
        colours = {name: pack_colours(colour) for name, colour in self.colours.items()}
        names = self.classes if "classes" in self.stated else [name for name in colours if name != "ignore"]
        problems = [f"no colour of class {name!r}" for name in names if name not in colours]
        problems += [f"a colour of {name!r}" for name in colours if name not in (*names, *NON_CLASS_NAMES)]
        if len(set(colours.values())) < len(colours):
            problems.append("two names of one colour")
        if not 2 <= len(names) <= MAX_CLASSES:
            problems.append(f"{len(names)} classes")
        if problems:
            raise DataError(
                f"{self.root / DESCRIPTION_FILE}: colours has {problems[0]}, expected 2 to {MAX_CLASSES} "
                "classes, each with its own colour; use the name ignore for a colour that means unlabelled"
            )
        return {colours[name]: name for name in names}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in index order."""
        return tuple(self.by_value.values())

    @property
    def unlabelled(self) -> list[int]:
        """Label values or, with `colours`, packed colours that mean unlabelled."""
        if self.colours:
            return sorted({pack_colours(colour) for colour in self.colours.values()} - self.by_value.keys())
        if self.ignore == "others":
            return []
        if self.first_label == 1 and "ignore" not in self.stated:
            return [0, IGNORE_INDEX]
        return self.ignore

    @cached_property
    def table(self) -> np.ndarray:
        """Lookup table from label value or packed colour to int16 class index, 255 = unlabelled, -1 = error.

        The last entry is for all values outside the table.
        """
        index_of_others = IGNORE_INDEX if self.ignore == "others" else -1
        table = np.full(1 + (2**24 if self.colours else MAX_LABEL_VALUES), index_of_others, np.int16)
        table[self.unlabelled] = IGNORE_INDEX
        table[list(self.by_value)] = range(len(self.by_value))
        return table

    def to_indices(self, path: Path, label: np.ndarray) -> np.ndarray:
        """Map the label values of the file `path` to uint8 class indices, 255 = unlabelled.

        Raises:
            DataError: if a value is neither a class nor unlabelled.
        """
        label = label.astype(np.int64)
        last_index = len(self.table) - 1
        indices = self.table[np.where((label >= 0) & (label < last_index), label, last_index)]
        if (indices < 0).any():
            values, counts = np.unique(label[indices < 0], return_counts=True)
            self.reject_values(path, dict(zip(values.tolist(), counts / label.size, strict=True)))
        return indices.astype(np.uint8)

    def reject_values(self, path: Path, shares: dict[int, float], file_count: int = 1) -> None:
        """Raise a DataError for label values that are neither a class nor unlabelled.

        Args:
            path: a file with such a value.
            shares: fraction of pixels of each value or packed colour.
            file_count: number of files that the fractions refer to.
        """
        yaml_path, values = self.root / DESCRIPTION_FILE, list(self.by_value)
        unknown = sorted(shares)[:MAX_LISTED]
        found = [list(value.to_bytes(3)) if self.colours else value for value in unknown]
        gaps = "" if len(values) == max(values) - min(values) + 1 else " with gaps"
        expected = (
            f"{min(values)}..{max(values)}{gaps} and {', '.join(map(str, self.unlabelled)) or 'nothing'} "
            "= unlabelled"
        )
        hint = f"list other classes under `classes`, and unlabelled values under `ignore`, in {yaml_path}"
        if self.colours:
            expected = "those of `colours`"
            hint = f"list them under `colours` in {yaml_path}, as classes or as `ignore`"
        elif not {"first_label", "ignore"} & self.stated and unknown == [max(values) + 1]:
            hint = f"if 0 means unlabelled, write `first_label: 1` into {yaml_path}"
        if len(shares) > 1:
            hint += "; `ignore: others` treats all values without a class as unlabelled"
        listed = ", ".join(
            f"{value}: {100 * shares[key]:.2f} %" for key, value in zip(unknown, found, strict=True)
        )
        raise DataError(
            f"{path}: label values {found}, expected {expected}; {hint}. Shares of the pixels in "
            f"{file_count} files: {listed}{' ...' if len(shares) > MAX_LISTED else ''}"
        )


KEYS = [key for key in Description.model_fields if key != "root"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that rejects a key given twice, of which yaml would use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)
        values = [self.construct_object(key, deep=True) for key in keys]
        for key, value in zip(keys, values, strict=True):
            if values.count(value) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{value!r} is given twice, expected once; keep one", problem_mark=key.start_mark
                )
        return mapping


def pack_colours(colour: list[int]) -> int:
    """Pack [red, green, blue] into one integer: red * 65536 + green * 256 + blue."""
    return int.from_bytes(bytes(colour))


def read_description(root: Path) -> Description:
    """Read the `dataset.yaml` of a folder, or return the defaults if there is none.

    Raises:
        DataError: if the file is not a YAML mapping or has an unknown key or an invalid value, or if there
            is only a file with a similar name.
    """
    path = root / DESCRIPTION_FILE
    if not path.exists():
        _reject_similar_names(root)
        return Description(root=root)
    try:
        content = yaml.load(path.read_bytes(), _UniqueKeyLoader)  # bytes, so that yaml detects the encoding
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not valid YAML ({error})") from error
    content = {} if content is None else content  # empty, or only comments
    unknown = [key for key in content if key not in KEYS] if isinstance(content, dict) else [repr(content)]
    if unknown:
        if RENAMED_PARAMETERS.get(unknown[0]) in KEYS:
            raise DataError(f"{path}: {explain_unknown(unknown[0], KEYS)}")
        raise DataError(f"{path}: found {', '.join(map(str, unknown))}, expected keys of: {', '.join(KEYS)}")
    if isinstance(content.get("colours"), str):
        content["colours"] = _read_label_map(root / content["colours"])
    try:
        description = Description(root=root, **content)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        expected = Description.model_fields[key].description
        raise DataError(f"{path}: {key} is {content[key]!r}, expected {expected}") from error
    _check_classes(path, description)
    return description


def _reject_similar_names(root: Path) -> None:
    """Raise a DataError for a file with a name similar to `dataset.yaml`.

    Ignoring it would give the labels NYUv2's class names.
    """
    paths = [path for path in (*root.glob("*"), *root.glob("*/*.y*ml*")) if SIMILAR_NAME.fullmatch(path.name)]
    if paths:
        raise DataError(
            f"{min(paths)}: is not read under this name, expected {root / DESCRIPTION_FILE}; rename or move "
            "it there with the keys of lib/data/README.md. If it belongs to another tool, remove it or write "
            f"an empty {DESCRIPTION_FILE}"
        )


def _read_label_map(path: Path) -> dict[str, list[int]]:
    """Read colours from CVAT's labelmap.txt, which has lines `name:red,green,blue:parts:actions`."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip() and line[0] != "#"]
        entries = [line.split(":") for line in lines]
        names = [name for name, *_ in entries]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{duplicates[0]!r} is listed twice")
        return {name: [int(number) for number in colour.split(",")] for name, colour, *_ in entries}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: can't be read as colours ({error}), expected lines such as `bed:128,0,0::`, "
            "one for each name"
        ) from error


def _check_classes(path: Path, description: Description) -> None:
    classes = description.classes
    names = list(classes.values() if isinstance(classes, dict) else classes)
    for key in ("colours", "first_label"):
        if key in description.stated and isinstance(classes, dict):
            raise DataError(
                f"{path}: {key} is {getattr(description, key)!r}, expected none if classes maps values to "
                "names"
            )
    if description.colours:
        _check_colours_alone(path, description)
    if description.first_label + len(classes) > MAX_LABEL_VALUES:
        raise DataError(
            f"{path}: first_label is {description.first_label}, expected label values up to "
            f"{MAX_LABEL_VALUES - 1}"
        )
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{path}: classes names {', '.join(duplicates)} twice; every class needs its own name"
        )
    conflicts = sorted(description.by_value.keys() & set(description.unlabelled))
    if conflicts:
        raise DataError(
            f"{path}: ignore is {description.ignore!r}, expected no value of a class, but {conflicts[0]} is "
            f"{description.by_value[conflicts[0]]!r}"
        )


def _check_colours_alone(path: Path, description: Description) -> None:
    """Raise a DataError for keys about label values beside `colours`, where they would have no effect."""
    harmless = {"first_label": [0], "ignore": [[], [IGNORE_INDEX], "others"]}
    for key, values in harmless.items():
        value = getattr(description, key)
        if value not in values:
            raise DataError(
                f"{path}: {key} is {value!r}, expected none beside colours; use the name ignore in colours "
                f"for a colour that means unlabelled, and leave {key} out"
            )
