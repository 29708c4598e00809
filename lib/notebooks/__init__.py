"""Code used only by notebooks. Modules named after a notebook belong to that notebook."""

import io
from typing import TYPE_CHECKING

import IPython.display
from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm

from lib.classes import escape_html, escape_markdown
from lib.progress import terminal_bar, use_bar

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler


class Markdown(IPython.display.Markdown):
    """Markdown with escaped HTML, so that names in the text can't inject code."""

    def __init__(self, text: str) -> None:
        super().__init__(escape_markdown(text))


def style(table: "pd.DataFrame") -> "Styler":
    """Return a `Styler` in which HTML in values and labels is escaped, unlike in `DataFrame.style`."""
    return table.map(_escape_value).rename(index=_escape_value, columns=_escape_value).style


def _escape_value(value: object) -> object:
    return escape_html(value) if isinstance(value, str) else value


class _Bar(tqdm):
    """A tqdm bar whose final state is saved in the notebook (a tqdm.auto bar shows 0 % when reopened)."""

    handle = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = {"text/plain": msg or str(self)}
        if self.handle is None:
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)


def notebook_bar(**options: object) -> tqdm:
    """Create a progress bar for a notebook or, outside of one, for the terminal."""
    if getattr(get_ipython(), "kernel", None) is None:
        return terminal_bar(**options)
    return _Bar(file=io.StringIO(), **options)  # discards the newline that tqdm writes on closing


use_bar(notebook_bar)
