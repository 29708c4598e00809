from tqdm import tqdm

import lib.notebooks
from lib import progress
from lib.progress import progress_bar, use_bar


def test_notebook_bar_shows_its_final_state(monkeypatch):
    """A saved notebook, when reopened, shows what was displayed last."""
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


def test_bar_prints_nothing_without_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(lib.notebooks, "get_ipython", lambda: None)
    with progress_bar("reading", 3) as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


def test_use_bar_replaces_the_bar_factory(monkeypatch):
    made = []
    monkeypatch.setattr(progress, "_make_bar", progress._make_bar)  # restored after the test
    use_bar(lambda **options: made.append(options) or tqdm(disable=True, **options))
    progress_bar("reading", 3, initial=1).close()
    progress_bar("reading", 3, disable=True).close()
    (options,) = made
    assert (options["desc"], options["total"], options["initial"]) == ("reading", 3, 1)


def test_default_bar_is_shown_in_a_terminal(monkeypatch, capfd):
    """Scripts that import nothing from lib.notebooks get this bar."""
    monkeypatch.setattr(progress, "_make_bar", progress.terminal_bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar("reading", 3) as bar:
        bar.update(3)
    assert "reading: 100%" in capfd.readouterr().err
