import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.data import load_samples
from lib.options import OPTIONS, RENAMED_PARAMETERS, Range, check_choice, check_options, explain_unknown

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", "rgbdd", "inputs: found 'rgbdd', expected one of rgb, depth, rgbd, rgbd_xy"),
        ("epochs", 0, "epochs: found 0, expected a whole number of 1 or more"),
        ("epochs", 2.5, "epochs: found 2.5, expected a whole number of 1 or more"),
        ("epochs", True, "epochs: found True, expected a whole number of 1 or more"),
        ("weight_decay", -0.1, "weight_decay: found -0.1, expected a number of 0 or more"),
        ("weight_decay", float("nan"), "weight_decay: found nan, expected a number of 0 or more"),
        ("depth_weight", float("inf"), "depth_weight: found inf, expected a number of 0 or more"),
        ("learning_rate", 0, "learning_rate: found 0, expected a number above 0 and below 1"),
        ("learning_rate", 1, "learning_rate: found 1, expected a number above 0 and below 1"),
        ("fold", 5, "fold: found 5, expected one of 0, 1, 2, 3, 4"),
        ("limit", 0, "limit: found 0, expected a whole number of 1 or more"),
        ("shown", 0, "shown: found 0, expected a whole number of 1 or more"),
        ("depth_unit_mm", 0, "depth_unit_mm: found 0, expected a number from 1e-06 and below 1000000"),
        ("depth_unit_mm", -1, "depth_unit_mm: found -1, expected a number from 1e-06 and below 1000000"),
        (
            "split",
            "blocks",
            "found 'blocks', expected one of train, valid, test; did you mean validation: blocks?",
        ),
        ("validation", "test", "scenes, blocks, random, none; did you mean split: test?"),
        ("validation", "official", "it is called validation: none now"),
        ("split", "given", "it is called validation: predefined now"),
        ("split", ["valid"], "split: found ['valid'], expected one of train, valid, test"),
    ],
)
def test_invalid_option_values_are_refused(name, value, message):
    with pytest.raises(ValueError) as error:
        check_options(**{name: value})
    assert message in str(error.value)


def test_valid_values_and_unlisted_names_are_accepted():
    check_options(
        epochs=1, learning_rate=0.5, weight_decay=0, soft_iou_weight=1.5, limit=None, run_name="", fold=4
    )
    check_options(depth_unit_mm=None, shown=1)
    check_options(depth_unit_mm=0.2)
    check_options(depth_unit_mm=1000)
    for name, option in OPTIONS.items():
        if not isinstance(option, Range):
            for value in option:
                check_options(**{name: value})


def test_notebook_defaults_are_valid():
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        (source,) = [
            "".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])
        ]
        defaults = {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}
        check_options(**defaults)


def test_check_choice_accepts_only_the_given_values():
    check_choice("baseline", "a", ["a", "b"])
    with pytest.raises(ValueError, match="baseline: found 'c', expected one of a, b"):
        check_choice("baseline", "c", ["a", "b"])


def test_unknown_parameter_error_suggests_a_name():
    known = ["split", "validation", "epochs"]
    assert explain_unknown("part", known) == "part: is called split now"
    assert explain_unknown("split", ["validation"]) == "split: is called validation now"
    assert explain_unknown("epoch", known) == (
        "epoch: no such parameter, did you mean epochs? there are: split, validation, epochs"
    )
    assert explain_unknown("keep", known).startswith(
        "keep: no such parameter, there are"
    )  # its new name, `checkpoint`, is not known here


def test_parameters_are_checked_without_torch():
    code = "import sys, lib.notebooks.parameters; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=NOTEBOOKS.parent, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("older", "newer"), RENAMED_PARAMETERS.items())
def test_older_name_is_explained_if_its_new_name_is_known(older, newer):
    assert explain_unknown(older, ["epochs", newer]) == f"{older}: is called {newer} now"
    assert explain_unknown(older, ["epochs"]).startswith(f"{older}: no such parameter, ")


def test_load_samples_errors_suggest_the_right_parameter():
    with pytest.raises(ValueError, match="split: found 'blocks', .*; did you mean validation: blocks"):
        load_samples("synthetic", "blocks")
    with pytest.raises(
        ValueError, match="validation: found 'official', .*; it is called validation: none now"
    ):
        load_samples("synthetic", "train", "official")
