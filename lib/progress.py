"""A progress bar for terminals, which lib.notebooks replaces by one that notebooks show."""

from collections.abc import Callable

from tqdm import tqdm


def terminal_bar(**options: object) -> tqdm:
    """A bar on stderr, silent where that is no terminal."""
    return tqdm(disable=None, **options)


_make_bar: Callable[..., tqdm] = terminal_bar


def use_bar(make: Callable[..., tqdm]) -> None:
    """Let `progress_bar` make its bars with this function, which takes the options of tqdm."""
    global _make_bar
    _make_bar = make


def progress_bar(label: str, total: int, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar; call its `update()` after each of `total` steps, in the end its `close()`."""
    options = {
        "desc": label,
        "total": total,
        "initial": initial,
        "mininterval": 0.5,
        "ncols": 100,
        "ascii": False,
    }
    return tqdm(disable=True, **options) if disable else _make_bar(**options)
