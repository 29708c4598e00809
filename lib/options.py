"""The table of parameters: allowed values and older names.

The notebooks check their parameters against it before they import torch.
"""

import difflib
import math
from collections.abc import Collection
from typing import NamedTuple

SPLITS = ("train", "valid", "test")
FOLDS = 5
RENAMED_PARAMETERS = {  # remove after the first tagged release
    "part": "split",
    "parts": "splits",
    "split": "validation",
    "keep": "checkpoint",
    "start_from": "init_from",
    "workers": "num_workers",
    "other": "compare_with",
    "where": "cluster",
}
_RENAMED_VALUES = {"given": "predefined", "official": "none"}  # older values of validation


class Range(NamedTuple):
    """A number in the range [minimum, below), or in (minimum, below) if `excludes_minimum`."""

    kind: type
    minimum: float
    below: float = math.inf
    excludes_minimum: bool = False

    def __contains__(self, value: object) -> bool:
        allowed = (int, float) if self.kind is float else (int,)
        if type(value) not in allowed:
            return False
        return self.minimum <= value < self.below and not (self.excludes_minimum and value == self.minimum)

    def __str__(self) -> str:
        number = "a number" if self.kind is float else "a whole number"
        if self.below < math.inf:
            start = "above" if self.excludes_minimum else "from"
            return f"{number} {start} {self.minimum} and below {self.below}"
        return f"{number} of {self.minimum} or more"


OPTIONS: dict[str, tuple | Range] = {
    # data
    "split": SPLITS,
    "validation": ("auto", "predefined", "scenes", "blocks", "random", "none"),
    "fold": tuple(range(FOLDS)),
    "limit": Range(int, 1),
    "depth_unit_mm": Range(float, 1e-6, 10**6),
    "image_height": Range(int, 1),
    "image_width": Range(int, 1),
    "augment": ("none", "exp061", "crops", "crops_colour", "zooms", "zooms_colour"),
    # network
    "inputs": ("rgb", "depth", "rgbd", "rgbd_xy"),
    "depth_encoding": ("inverse", "linear", "log"),
    "rgb_normalisation": ("weights", "exp061"),
    # loss
    "soft_iou_weight": Range(float, 0),
    "soft_iou_pooling": ("batch", "image", "exp061"),
    "class_weights": ("none", "median"),
    "lovasz_weight": Range(float, 0),
    "depth_weight": Range(float, 0),
    # optimisation
    "epochs": Range(int, 1),
    "batch_size": Range(int, 1),
    "learning_rate": Range(float, 0, 1, excludes_minimum=True),
    "weight_decay": Range(float, 0),
    "schedule": ("one_cycle", "cosine"),
    "encoder_lr_scale": Range(float, 0),
    "checkpoint": ("best", "last"),
    "seed": Range(int, 0),
    # run
    "shown": Range(int, 1),
    "num_workers": Range(int, 0),
    "precision": ("auto", "fp32", "bf16"),
    "tta": ("none", "flip", "scales"),
}


def check_options(**values: object) -> None:
    """Check parameter values against `OPTIONS`.

    Names that are not in the table are ignored, and `limit` and `depth_unit_mm` may be None.

    Raises:
        ValueError: if a value is not allowed. The message gives the first such value and the allowed ones.
    """
    for name, value in values.items():
        option = OPTIONS.get(name)
        if option is None or (value is None and name in ("limit", "depth_unit_mm")):
            continue
        if not isinstance(option, Range):
            check_choice(name, value, option)
        elif value not in option:
            raise ValueError(f"{name}: found {value!r}, expected {option}")


def check_choice(parameter: str, value: object, choices: Collection) -> None:
    """Raise a ValueError if a value is not one of the choices.

    The message lists the choices. If the value belongs to another parameter or has been renamed, the message
    suggests the right setting.
    """
    if value in choices:
        return
    hint = ""
    alternative = {"split": "validation", "validation": "split"}.get(parameter)
    if alternative and value in OPTIONS[alternative]:
        hint = f"; did you mean {alternative}: {value}?"
    elif alternative and str(value) in _RENAMED_VALUES:
        hint = f"; it is called validation: {_RENAMED_VALUES[value]} now"
    raise ValueError(f"{parameter}: found {value!r}, expected one of {', '.join(map(str, choices))}{hint}")


def explain_unknown(name: str, known: Collection[str]) -> str:
    """Return an error message for an unknown parameter or key, with its new name or the closest match."""
    if RENAMED_PARAMETERS.get(name) in known:
        return f"{name}: is called {RENAMED_PARAMETERS[name]} now"
    matches = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {matches[0]}? " if matches else ""
    return f"{name}: no such parameter, {hint}there are: {', '.join(known)}"
