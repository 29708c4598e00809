"""Progress bars for terminals. `lib.notebooks` replaces them with bars for notebooks."""

from collections.abc import Callable

from tqdm import tqdm


def terminal_bar(**options: object) -> tqdm:
    """Create a progress bar on stderr, disabled if stderr is not a terminal."""
    return tqdm(disable=None, **options)


_make_bar: Callable[..., tqdm] = terminal_bar


def use_bar(make: Callable[..., tqdm]) -> None:
    """Set the function with which `progress_bar` creates bars. The function takes the options of tqdm."""
    global _make_bar
    _make_bar = make


def progress_bar(label: str, total: int, initial: int = 0, disable: bool = False) -> tqdm:
    """Create a progress bar. Call `update()` after each of `total` steps and `close()` at the end."""
    options = {
        "desc": label,
        "total": total,
        "initial": initial,
        "mininterval": 0.5,
        "ncols": 100,
        "ascii": False,
    }
    return tqdm(disable=True, **options) if disable else _make_bar(**options)
