import io
import typing

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.colors import to_rgb
from PIL import Image

from lib.explore import class_shares, count_data, plot_class_shares
from lib.notebook import check_parameters, small_png
from lib.plots import CLASS_COLOURS

DECLARED = """epochs: int = 3
limit: typing.Optional[int] = None
rate: float = 0.1
resume: bool = False
name: str = "a"
"""
CAPITAL = "; papermill knows True, False and None with a capital only"


@pytest.fixture
def notebook(monkeypatch):
    """A function that runs cells in a fresh IPython and returns what check_parameters makes of them."""

    def run(*cells):
        shell = InteractiveShell()
        shell.user_ns["typing"] = typing
        monkeypatch.setattr("lib.notebook.get_ipython", lambda: shell)
        for cell in cells:
            shell.run_cell(cell, store_history=True).raise_error()
        return check_parameters()

    return run


def test_defaults(notebook):
    assert notebook(DECLARED) == {"epochs": 3, "limit": None, "rate": 0.1, "resume": False, "name": "a"}


def test_injected_values(notebook):
    values = notebook(DECLARED, "# Parameters\nepochs = 5\nlimit = 20\nrate = 1\nresume = True\n")
    assert values == {"epochs": 5, "limit": 20, "rate": 1, "resume": True, "name": "a"}


def test_values_edited_by_hand(notebook):
    assert notebook(DECLARED, DECLARED.replace("= 3", "= 7"), "other = 1")["epochs"] == 7


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch = 5", "epoch: no such parameter, did you mean epochs? there are: epochs, limit, rate, resume, name"),
        ("xyzzy = 5", "xyzzy: no such parameter, there are: epochs, limit, rate, resume, name"),
        ('rate = "1e-4"', "rate: found '1e-4', expected float; in YAML write 0.0001, because 1e-4 is read as text"),
        ('resume = "false"', "resume: found 'false', expected bool" + CAPITAL),
        ('limit = "none"', "limit: found 'none', expected int or None" + CAPITAL),
        ("epochs = 3.0", "epochs: found 3.0, expected int"),
        ("epochs = True", "epochs: found True, expected int"),
        ("rate = True", "rate: found True, expected float"),
        ("name = None", "name: found None, expected str"),
    ],
)  # fmt: skip
def test_mistakes(notebook, assignment, message):
    with pytest.raises(ValueError, match=r".") as error:
        notebook(DECLARED, f"# Parameters\n{assignment}\n")
    assert str(error.value) == message


def test_all_mistakes_at_once(notebook):
    with pytest.raises(ValueError, match=r"^epoch: no such(.|\n)*\nrate: found 'x'"):
        notebook(DECLARED, '# Parameters\nepoch = 5\nrate = "x"\n')


def test_outside_a_notebook(monkeypatch):
    monkeypatch.setattr("lib.notebook.get_ipython", lambda: None)
    assert check_parameters() == {}


def test_small_pictures_keep_rare_colours(scenes):
    counts = count_data(scenes)
    figure = plot_class_shares(counts)
    small, large = small_png(figure), io.BytesIO()
    figure.savefig(large, format="png", bbox_inches="tight")
    assert len(small) < 0.6 * len(large.getvalue())
    pixels = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).reshape(-1, 3).astype(int)
    shares = class_shares(counts).pixels
    for name in shares.index[shares > 0]:
        assert np.abs(pixels - 255 * np.array(to_rgb(CLASS_COLOURS[name]))).max(1).min() < 12, name
