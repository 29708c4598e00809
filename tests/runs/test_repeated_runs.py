"""Each seed counts once: a seed that was trained or listed twice is rejected."""

import numpy as np
import pytest
from conftest import evaluation, history

from lib.runs import open_run, write_history, write_scores
from lib.runs.results import group_recipes, read_runs
from lib.runs.scoring import write_evaluation


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that writes the folder of a scored run."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))

    def make(name, **parameters):
        scored = evaluation(np.full((2, 2, 2), 5), classes=("x", "y"))
        with open_run({"run_name": name, "data": "d", "validation": "random"} | parameters) as run:
            write_history(run, history(1))
            write_scores(run, history(1)[0], scored)
            facts = {"data": "d", "images": 2, "labelled": True, "validation": None}
            write_evaluation(run, "test", facts, {"plain": scored})

    return make


def names(recipes):
    return {name: [run.name for run in runs] for name, runs in recipes.items()}


@pytest.mark.parametrize(
    ("runs", "first", "second"),
    [
        ("a, b", "a", "b"),  # trained twice
        ("a, c, a", "a", "a"),  # listed twice
        ("a, {root}/a", "a", "a"),  # listed by name and by path
    ],
)
def test_repeated_seed_in_a_recipe_is_rejected(trained, tmp_path, runs, first, second):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(name, seed=seed, fold=4)
    with pytest.raises(ValueError) as error:
        group_recipes(read_runs(runs.format(root=tmp_path), "test"))
    assert str(error.value).startswith(
        f"runs: {first!r} and {second!r} have the same recipe, seed 1 and fold 4, but each seed counts once; name only one of"
    )


def test_seed_may_repeat_in_another_recipe(trained):
    trained("a", seed=1)
    trained("b", seed=2)
    trained("c", seed=1, soft_iou_weight=0.5)
    assert sorted(map(len, names(group_recipes(read_runs("a, b, c", "test"))).values())) == [1, 2]
    trained("d", seed=1, recipe="theirs")
    trained("e", seed=1, recipe="others")
    assert len(group_recipes(read_runs("d, e", "test"))) == 2


def test_runs_folder_path_may_contain_commas_and_brackets(trained, monkeypatch, tmp_path):
    home = tmp_path / "runs [old], new"
    monkeypatch.setenv("RUNS_DIR", str(home))
    for name, seed in (("a", 1), ("b", 2)):
        trained(name, seed=seed)
    assert [run.name for run in read_runs("a, b", "test")] == ["a", "b"]
    assert [run.name for run in read_runs("all", "test")] == ["a", "b"]
    assert [run.name for run in read_runs(str(home / "a"), "test")] == ["a"]
    assert [run.name for run in read_runs(f"{home / 'a'}, {home / 'b'}", "test")] == ["a", "b"]
    with pytest.raises(ValueError, match="runs: found 'missing'"):
        read_runs("a, missing, b", "test")
