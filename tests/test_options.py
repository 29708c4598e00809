import subprocess
import sys
from pathlib import Path

import pytest

from lib.data import load_samples
from lib.options import OLDER_NAMES, SPLITS, VALIDATIONS, check_choice, explain_unknown


def refused(parameter, value, choices):
    with pytest.raises(ValueError) as error:
        check_choice(parameter, value, choices)
    return str(error.value)


def test_a_choice_is_one_of_several():
    check_choice("schedule", "cosine", ("cosine", "one_cycle"))
    check_choice("fold", 4, range(5))
    assert refused("schedule", "step", ("cosine", "one_cycle")) == (
        "schedule: found 'step', expected one of cosine, one_cycle"
    )


@pytest.mark.parametrize("value", [value for value in VALIDATIONS if value not in SPLITS])
def test_a_value_of_validation_given_to_split_names_validation(value):
    message = refused("split", value, SPLITS)
    assert message.startswith(f"split: found {value!r}, expected one of train, valid, test; ")
    assert f"validation: {value}" in message


@pytest.mark.parametrize("value", SPLITS)
def test_a_value_of_split_given_to_validation_names_split(value):
    message = refused("validation", value, VALIDATIONS)
    assert message.startswith(f"validation: found {value!r}, expected one of auto, predefined, ")
    assert f"split: {value}" in message


@pytest.mark.parametrize(("older", "newer"), [("given", "predefined"), ("official", "none")])
def test_an_older_value_of_validation_names_the_new_one(older, newer):
    assert refused("validation", older, VALIDATIONS) == (
        f"validation: found {older!r}, expected one of {', '.join(VALIDATIONS)}; it is called {newer} now"
    )
    assert "called" not in refused("split", older, SPLITS)


def test_what_is_no_choice_of_either_has_no_hint():
    assert refused("split", "vaild", SPLITS) == "split: found 'vaild', expected one of train, valid, test"
    assert refused("inputs", "train", ("rgb", "depth")) == "inputs: found 'train', expected one of rgb, depth"


def test_the_hint_reaches_those_who_load_data():
    with pytest.raises(ValueError, match="split: found 'blocks', .*; validation: blocks"):
        load_samples("synthetic", "blocks")
    with pytest.raises(ValueError, match="validation: found 'official', .*; it is called none now"):
        load_samples("synthetic", "train", "official")


@pytest.mark.parametrize(("older", "newer"), OLDER_NAMES.items())
def test_an_older_name_is_explained_where_its_new_one_is_known(older, newer):
    assert explain_unknown(older, ["epochs", newer]) == f"{older}: is called {newer} now"
    assert explain_unknown(older, ["epochs"]).startswith(f"{older}: no such parameter, ")


def test_an_unknown_name_names_the_nearest():
    assert explain_unknown("epoch", ("epochs", "seed")) == (
        "epoch: no such parameter, did you mean epochs? there are: epochs, seed"
    )
    assert explain_unknown("xyzzy", ("epochs", "seed")) == "xyzzy: no such parameter, there are: epochs, seed"


def test_options_are_checked_without_torch():
    """A mistyped parameter is told at once."""
    code = "import sys, lib.options\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
