"""What only notebooks need, a module for each notebook, named as it is."""

import io
from typing import TYPE_CHECKING

import IPython.display
from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm

from lib.classes import escape_html
from lib.progress import terminal_bar, use_bar

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler


class Markdown(IPython.display.Markdown):
    """Markdown without HTML: whatever names are in the text, they are shown and never run."""

    def __init__(self, text: str) -> None:
        super().__init__(escape_html(text))


def style(table: "pd.DataFrame") -> "Styler":
    """A table to be formatted whose names are shown as they are: pandas escapes none of a `Styler`."""
    return table.map(_escape_name).rename(index=_escape_name, columns=_escape_name).style


def _escape_name(value: object) -> object:
    return escape_html(value) if isinstance(value, str) else value


class _Bar(tqdm):
    """A tqdm bar whose last state stays in a saved notebook (that of tqdm.auto reopens at 0 %)."""

    handle = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = {"text/plain": msg or str(self)}
        if self.handle is None:
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)


def notebook_bar(**options: object) -> tqdm:
    """A bar that a notebook shows; outside of one, that of a terminal."""
    if getattr(get_ipython(), "kernel", None) is None:
        return terminal_bar(**options)
    return _Bar(file=io.StringIO(), **options)  # a closing tqdm ends the line of its file


use_bar(notebook_bar)
