import lib.notebooks
from lib.progress import progress_bar


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
