import typing

import pytest
from IPython.core.interactiveshell import InteractiveShell

from lib.notebooks.parameters import check_parameters

DECLARED = """epochs: int = 3
limit: typing.Optional[int] = None
rate: float = 0.1
resume: bool = False
name: str = "a"
"""
TEXT = "; papermill's -p reads 001 as a number, -r as text: `-r name 001`"
CAPITAL = "; papermill knows True, False and None with a capital only"


@pytest.fixture
def notebook(monkeypatch):
    """A function that runs cells in a fresh IPython and returns what check_parameters makes of them."""

    def run(*cells):
        shell = InteractiveShell()
        shell.user_ns["typing"] = typing
        monkeypatch.setattr("lib.notebooks.parameters.get_ipython", lambda: shell)
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
        ("name = 1", "name: found 1, expected str" + TEXT),  # of `-p name 001`
    ],
)  # fmt: skip
def test_mistakes(notebook, assignment, message):
    with pytest.raises(ValueError, match=r".") as error:
        notebook(DECLARED, f"# Parameters\n{assignment}\n")
    assert str(error.value) == message


def test_an_older_name_is_refused_with_its_new_one(notebook):
    declared = DECLARED + 'split: str = "test"\nvalidation: str = "auto"\ncheckpoint: str = "best"\n'
    with pytest.raises(ValueError) as error:
        notebook(declared, '# Parameters\npart = "valid"\nkeep = "last"\nworkers = 2\n')
    first, second, third = str(error.value).splitlines()
    assert (first, second) == ("part: is called split now", "keep: is called checkpoint now")
    assert third.startswith("workers: no such parameter, ")  # this notebook has no num_workers either
    assert (
        notebook(declared, '# Parameters\nsplit = "valid"\n')["split"] == "valid"
    )  # a name of its own by now


def test_all_mistakes_at_once(notebook):
    with pytest.raises(ValueError, match=r"^epoch: no such(.|\n)*\nrate: found 'x'"):
        notebook(DECLARED, '# Parameters\nepoch = 5\nrate = "x"\n')


def test_outside_a_notebook(monkeypatch):
    monkeypatch.setattr("lib.notebooks.parameters.get_ipython", lambda: None)
    assert check_parameters() == {}
