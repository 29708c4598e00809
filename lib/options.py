"""Parameters: choices, and the names that they had before; checked without torch."""

import difflib
from collections.abc import Iterable

SPLITS = ("train", "valid", "test")
VALIDATIONS = ("auto", "predefined", "scenes", "blocks", "random", "none")
OLDER_NAMES = {  # to be dropped after the first tagged release
    "part": "split",
    "parts": "splits",
    "split": "validation",
    "keep": "checkpoint",
    "workers": "num_workers",
    "other": "compare_with",
    "where": "cluster",
}
_OLDER_VALUES = {"given": "predefined", "official": "none"}  # of validation


def check_choice(parameter: str, value: object, choices: Iterable) -> None:
    """Raise a ValueError that names the parameter and its choices, or the parameter that the value belongs to."""
    if value in choices:
        return
    hint = ""
    for sibling, values in (("split", SPLITS), ("validation", VALIDATIONS)):
        if {parameter, sibling} == {"split", "validation"} and value in values:
            hint = f"; {sibling}: {value} takes this value"
    if parameter == "validation" and value in _OLDER_VALUES:
        hint = f"; it is called {_OLDER_VALUES[value]} now"
    raise ValueError(f"{parameter}: found {value!r}, expected one of {', '.join(map(str, choices))}{hint}")


def explain_unknown(name: str, known: Iterable[str]) -> str:
    """What is wrong with a parameter or key that is not known: its new name, or the nearest one."""
    known = list(known)
    if OLDER_NAMES.get(name) in known:
        return f"{name}: is called {OLDER_NAMES[name]} now"
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{name}: no such parameter, {hint}there are: {', '.join(known)}"
