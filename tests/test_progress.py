from tqdm import tqdm

import lib.notebooks
from lib import progress
from lib.progress import progress_bar, use_bar


def test_bars_in_a_notebook_end_in_their_last_state(monkeypatch):
    """What a saved notebook shows when it is reopened is the last that was displayed."""
    shown = []

    class Handle:
        def update(self, text, raw):
            shown.append(text["text/plain"])

    class Shell:
        kernel = object()

    monkeypatch.setattr(lib.notebooks, "get_ipython", Shell)
    monkeypatch.setattr(
        lib.notebooks, "display", lambda text, raw, display_id: shown.append(text["text/plain"]) or Handle()
    )
    with progress_bar("reading", 3) as bar:
        for _ in range(3):
            bar.update()
    assert shown[0].startswith("reading:   0%")
    assert "100%" in shown[-1]
    assert "3/3" in shown[-1]


def test_bars_are_silent_where_there_is_no_terminal(monkeypatch, capfd):
    monkeypatch.setattr(lib.notebooks, "get_ipython", lambda: None)
    with progress_bar("reading", 3) as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


def test_bars_are_made_by_the_function_that_is_installed(monkeypatch):
    made = []
    monkeypatch.setattr(progress, "_make_bar", progress._make_bar)  # put back in the end
    use_bar(lambda **options: made.append(options) or tqdm(disable=True, **options))
    progress_bar("reading", 3, initial=1).close()
    progress_bar("reading", 3, disable=True).close()
    (options,) = made
    assert (options["desc"], options["total"], options["initial"]) == ("reading", 3, 1)


def test_lib_itself_shows_the_bar_of_a_terminal(monkeypatch, capfd):
    """A script that imports nothing of lib.notebooks."""
    monkeypatch.setattr(progress, "_make_bar", progress.terminal_bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar("reading", 3) as bar:
        bar.update(3)
    assert "reading: 100%" in capfd.readouterr().err
