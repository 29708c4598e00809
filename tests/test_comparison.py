import os

import numpy as np
import pandas as pd
import pytest
from conftest import counts
from test_significance import simulate

from lib.classes import CLASS_NAMES
from lib.comparison import (
    class_tables,
    describe_checkpoints,
    describe_published,
    describe_recipes,
    describe_selection,
    evaluated_runs,
    read_published,
    scores_by_recipe,
)
from lib.runs import runs_folder
from lib.significance import paired_bootstrap


def test_all_means_the_runs_of_one_data_set(trained):
    trained("a")
    trained("b", data="/nyu")
    trained("c", evaluated=False)
    trained("d", data="/nyu")
    assert [run.name for run in evaluated_runs("all", "test", "synthetic")] == ["a"]
    assert [run.name for run in evaluated_runs("all", "test", "/nyu")] == ["b", "d"]
    for name, time in (("a", 9), ("b", 1), ("d", 2)):
        os.utime(runs_folder() / name / "evaluation" / "test.json", (time, time))
    assert [run.name for run in evaluated_runs("all", "test")] == ["a"]
    assert [run.name for run in evaluated_runs("d, a", "test")] == ["d", "a"]
    assert evaluated_runs("all", "valid") == []
    with pytest.raises(ValueError, match="part: found 'valdi', expected one of train, valid, test"):
        evaluated_runs("all", "valdi")


def test_all_leaves_out_what_was_set_aside(trained):
    first = trained("a")
    trained("a")
    assert first.exists()
    assert len(list(first.parent.glob("a.2*"))) == 1
    assert [run.name for run in evaluated_runs("all", "test")] == ["a"]


def test_runs_that_cannot_be_compared(trained):
    other_truth = counts()
    other_truth[1, 3, 3] += 1
    trained("a")
    trained("images", names=("a", "c"))
    trained("order", names=("b", "a"))
    trained("labels", matrices=other_truth)
    trained("classes", matrices=np.ones((2, 4, 4), int))
    trained("raw", evaluated=False)
    problems = {
        "images": "'a' and 'images' can't be compared on part 'test': 2 and 2 images, 2 of them in one only, such as b; ",
        "order": "'a' and 'order' can't be compared on part 'test': 2 and 2 images, 0 of them in one only, in another order; ",
        "labels": "'a' and 'labels' can't be compared on part 'test': the labels of 1 of 2 images differ, such as those of b; ",
        "classes": "'a' and 'classes' can't be compared on part 'test': 13 and 4 classes; ",
    }
    for name, problem in problems.items():
        with pytest.raises(ValueError) as error:
            evaluated_runs(f"a, {name}", "test")
        assert str(error.value) == f"runs: {problem}evaluate both on the same data and part"
    with pytest.raises(
        ValueError, match=r"'raw' is not evaluated on part 'test'; run `papermill evaluate.ipynb .* -p run raw"
    ):
        evaluated_runs("a, raw", "test")


def test_recipes_are_runs_that_differ_in_the_seed_alone(trained):
    for name, seed, weight in (("ce0", 0, 0), ("iou0", 0, 0.5), ("ce1", 1, 0), ("iou2", 2, 0.5)):
        trained(name, seed=seed, soft_iou_weight=weight, workers=seed)
    table = scores_by_recipe(evaluated_runs("all", "test"), "iou0")
    assert list(table.columns) == ["iou0", "ce0"]
    assert list(table.index) == [0, 1, 2]
    assert table["ce0"].notna().tolist() == [True, True, False]
    trained("again", seed=1, soft_iou_weight=0.0, soft_iou_pooling="image")
    table = scores_by_recipe(evaluated_runs("all", "test"), "ce0")
    assert list(table.columns) == ["ce0", "iou0"]


def test_published_figures():
    table = read_published("experiments", "exp061, exp060")
    assert table.valid_miou.tolist() == [0.6204, 0.6228]
    by_class = read_published("class_iou", "exp061")
    assert list(by_class.columns) == list(CLASS_NAMES)
    assert by_class.mean(axis=1).iloc[0] == pytest.approx(0.6204, abs=0.001)
    with pytest.raises(ValueError, match="published: found exp099, there are: exp000, "):
        read_published("experiments", "exp061, exp099")
    text = describe_published("exp060, exp061")
    assert text.startswith("exp061 minus exp060: validation mIoU -0.0024, test -0.0029. ")
    assert "it can't be concluded" in text
    assert "it can't be concluded" in describe_published("")


def test_published_figures_stand_beside_nyuv2_only(trained):
    trained("a")
    trained("b", data="/nyu")
    synthetic, nyu = (class_tables(evaluated_runs(name, "test"), "exp061") for name in ("a", "b"))
    assert [list(table.columns) for table in synthetic.values()] == [["a"], ["exp061 (published)"]]
    assert [list(table.columns) for table in nyu.values()] == [["b", "exp061 (published)"]]
    assert "published figures are of NYUv2's validation images" in next(iter(nyu))


def test_one_run_is_told_how_to_make_another(trained):
    trained("a")
    text = describe_selection(evaluated_runs("all", "test"), "test")
    assert "there is only a." in text
    assert "papermill train.ipynb ce.out.ipynb -p run_name ce" in text
    assert "there is none" in describe_selection([], "test")


def test_verdict_about_checkpoints():
    classes = ("w", "x", "y", "z")
    rng = np.random.default_rng(6)
    clear = describe_checkpoints(paired_bootstrap(*simulate(rng, 150, 0.6, 0.7), 2000), "old", "new", 150, classes)
    assert clear.startswith("new against old, on these 150 images: mIoU +0.1")
    assert "The checkpoint new is better on images like these." in clear
    assert "Classes that differ, after Holm's correction: w (+0." in clear
    close = describe_checkpoints(paired_bootstrap(*simulate(rng, 50, 0.7, 0.7), 2000), "old", "new", 50, classes)
    assert "Cannot tell which checkpoint is better: 50 images show a difference of 0.0" in close
    assert "One as small as this would take about" in close
    assert close.endswith("Holm's correction: none.")


def test_verdict_about_recipes():
    scores = pd.DataFrame(
        {"old": [0.50, 0.51, 0.49, 0.50], "new": [0.54, 0.55, 0.54, 0.53], "same": [0.51, 0.50, 0.50, 0.49]}
    )
    new, same = describe_recipes(scores)
    assert new.startswith("new against old as recipes, over 4 paired seeds: mIoU +0.0400 (95 % interval")
    assert new.endswith("The recipe new is better.")
    assert "Cannot tell which recipe is better." in same
    (few,) = describe_recipes(scores.loc[:1, ["old", "new"]])
    assert few.startswith("new against old as recipes, over 2 paired seeds: at least 3 are needed.")
    assert describe_recipes(scores[["old"]]) == []
    assert describe_recipes(pd.DataFrame()) == []


def test_recipes_of_a_sweep_are_named_without_the_seed(trained):
    for weight in (0.0, 0.5):
        for seed in (1, 2):
            trained(f"sweep-weight={weight}-seed={seed}-abc{seed}", soft_iou_weight=weight, seed=seed)
    trained("sweep-weight=0.5-seed=1-def", soft_iou_weight=0.5, seed=1, epochs=3)  # same label, another recipe
    recipes = scores_by_recipe(evaluated_runs("all", "test"), None)
    assert list(recipes) == ["sweep-weight=0.0", "sweep-weight=0.5", "sweep-weight=0.5-seed=1-def"]
    assert recipes.notna().sum().tolist() == [2, 2, 1]
