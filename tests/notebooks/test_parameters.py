import typing

import pytest
from IPython.core.interactiveshell import InteractiveShell

from lib.notebooks.parameters import check_parameters

DECLARED = """epochs: int = 3
limit: typing.Optional[int] = None
unit: typing.Optional[float] = None
rate: float = 0.1
resume: bool = False
name: str = "a"
"""
TEXT = "; papermill's -p reads 001 as a number, -r as text: `-r name 001`"
CAPITAL = "; papermill knows True, False and None with a capital only"


@pytest.fixture
def notebook(monkeypatch):
    """A function that runs cells in a fresh IPython and returns the result of check_parameters."""

    def run(*cells):
        shell = InteractiveShell()
        shell.user_ns["typing"] = typing
        monkeypatch.setattr("lib.notebooks.parameters.get_ipython", lambda: shell)
        for cell in cells:
            shell.run_cell(cell, store_history=True).raise_error()
        return check_parameters()

    return run


def test_defaults_are_returned_if_nothing_is_injected(notebook):
    assert notebook(DECLARED) == {
        "epochs": 3,
        "limit": None,
        "unit": None,
        "rate": 0.1,
        "resume": False,
        "name": "a",
    }


def test_injected_values_override_defaults(notebook):
    values = notebook(DECLARED, "# Parameters\nepochs = 5\nlimit = 20\nrate = 1\nresume = True\n")
    assert values == {"epochs": 5, "limit": 20, "unit": None, "rate": 1, "resume": True, "name": "a"}


def test_values_edited_by_hand_are_returned(notebook):
    assert notebook(DECLARED, DECLARED.replace("= 3", "= 7"), "other = 1")["epochs"] == 7


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch = 5", "epoch: no such parameter, did you mean epochs? there are: epochs, limit, unit, rate, resume, name"),
        ("xyzzy = 5", "xyzzy: no such parameter, there are: epochs, limit, unit, rate, resume, name"),
        ('rate = "1e-4"', "rate: found '1e-4', expected float; in YAML write 0.0001, because 1e-4 is read as text"),
        ('rate = "-2.5E+3"', "rate: found '-2.5E+3', expected float; in YAML write 0.0001, because 1e-4 is read as text"),
        ('rate = "none"', "rate: found 'none', expected float"),
        ('unit = "none"', "unit: found 'none', expected float or None" + CAPITAL),
        ('unit = "1e1"', "unit: found '1e1', expected float or None; in YAML write 0.0001, because 1e-4 is read as text"),
        ('resume = "false"', "resume: found 'false', expected bool" + CAPITAL),
        ('limit = "none"', "limit: found 'none', expected int or None" + CAPITAL),
        ("epochs = 3.0", "epochs: found 3.0, expected int"),
        ("epochs = True", "epochs: found True, expected int"),
        ("rate = True", "rate: found True, expected float"),
        ("name = None", "name: found None, expected str"),
        ("name = 1", "name: found 1, expected str" + TEXT),  # from `-p name 001`
    ],
)  # fmt: skip
def test_error_explains_a_wrong_name_or_type(notebook, assignment, message):
    with pytest.raises(ValueError, match=r".") as error:
        notebook(DECLARED, f"# Parameters\n{assignment}\n")
    assert str(error.value) == message


def test_error_for_an_old_name_gives_the_new_name(notebook):
    declared = DECLARED + 'split: str = "test"\nvalidation: str = "auto"\ncheckpoint: str = "best"\n'
    with pytest.raises(ValueError) as error:
        notebook(declared, '# Parameters\npart = "valid"\nkeep = "last"\nworkers = 2\n')
    first, second, third = str(error.value).splitlines()
    assert (first, second) == ("part: is called split now", "keep: is called checkpoint now")
    assert third.startswith("workers: no such parameter, ")  # this notebook has no num_workers either
    # `split` is an old name of validation, but is also a current name
    assert notebook(declared, '# Parameters\nsplit = "valid"\n')["split"] == "valid"


def test_all_mistakes_are_reported_at_once(notebook):
    with pytest.raises(ValueError, match=r"^epoch: no such(.|\n)*\nrate: found 'x'"):
        notebook(DECLARED, '# Parameters\nepoch = 5\nrate = "x"\n')


def test_check_parameters_returns_nothing_outside_a_notebook(monkeypatch):
    monkeypatch.setattr("lib.notebooks.parameters.get_ipython", lambda: None)
    assert check_parameters() == {}
