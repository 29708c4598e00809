"""Refuse parameters that are none of what there is."""

from collections.abc import Iterable


def check_choice(parameter: str, value: object, choices: Iterable) -> None:
    """Raise a ValueError that names the parameter and what there is."""
    if value not in choices:
        raise ValueError(f"{parameter}: found {value!r}, expected one of {', '.join(map(str, choices))}")
