from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scored_runs import scored_folder, scored_run, some_counts

from figures import SETS, class_names, draw
from lib.classes import NYUV2_13
from lib.metrics import iou, mean_truth_iou, pixel_accuracy
from lib.notebooks.compare import (
    introduce_runs,
    plot_comparison,
    read_published,
    score_table,
    show_scores,
)
from lib.notebooks.conclusions import run_tests
from lib.notebooks.plots import run_colours, shorten
from lib.runs.results import group_recipes, read_runs, write_results
from lib.significance import score_interval


def test_the_table_has_every_run_with_its_interval():
    counts = {seed: some_counts(0.6, seed) for seed in (0, 1)}
    runs = [scored_run(f"s{seed}", each, seed=seed) for seed, each in counts.items()]
    runs.append(scored_run("alone", some_counts(0.8), learning_rate=1.0))
    table = score_table(group_recipes(runs, "alone"))
    assert list(table.index) == [
        ("alone", "alone, seed 0"),
        ("learning_rate 0.003", "seed 0"),
        ("learning_rate 0.003", "seed 1"),
    ]
    row = table.loc[("learning_rate 0.003", "seed 1")]
    assert row["mIoU"] == pytest.approx(mean_truth_iou(counts[1]))
    assert row["pixel accuracy"] == pixel_accuracy(counts[1])
    scene = np.arange(24) // 3
    assert (row.low, row.high) == score_interval(counts[1], scene).interval
    assert row.low < row["mIoU"] < row.high
    assert len(score_table({})) == 0
    shown = show_scores(table).to_html()
    assert f"{row['mIoU']:.3f}<" in shown
    assert "th {\n  white-space: nowrap;\n}" in shown


def example():
    """Of the committed example, two arms that are one recipe."""
    arms = {"baseline": (1, 2), "baseline_again": (3, 4)}
    return [
        scored_run(f"{arm}{seed}", some_counts(0.6, seed), seed=seed, group=arm, split="test")
        for arm, seeds in arms.items()
        for seed in seeds
    ]


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr("lib.runs.results.EXAMPLE", tmp_path / "example")
    write_results(tmp_path / "example", example())
    return tmp_path / "runs"


def test_a_run_of_ones_own_is_compared_with_the_example_where_it_can_be(home):
    scored_folder(home, "mine", some_counts(0.8, 9), split="test", learning_rate=1.0)
    found = read_runs("all", "test")
    assert [run.name for run in found] == [*(run.name for run in example()), "mine"]
    text = introduce_runs(found, "test")
    assert text.startswith("5 runs, scored on split test of ")
    assert "an A/A pair: a correct test finds no significant difference" in text
    assert "is not shown" not in text


def test_a_run_on_other_images_is_said_to_be_missing(home):
    scored_folder(home, "mine", some_counts(0.8)[:21], split="test")
    found = read_runs("all", "test")
    assert [run.name for run in found] == [run.name for run in example()]
    assert "Your run mine was scored on other images, so it is not shown here." in introduce_runs(
        found, "test"
    )


def test_runs_of_ones_own_are_introduced_in_one_line(home):
    runs = [scored_run(name) for name in "ab"]
    assert introduce_runs(runs, "valid") == "2 runs, scored on split valid of /disk/nyu."
    assert introduce_runs(runs, "valid", "seed == 0").startswith("2 runs match, scored")
    assert introduce_runs([], "valid") == "0 runs, scored on split valid of no data."


def test_published_figures():
    table = read_published("experiments", "exp061, exp060")
    assert table.valid_miou.tolist() == [0.6204, 0.6228]
    by_class = read_published("class_iou", "exp061")
    assert list(by_class.columns) == list(NYUV2_13)
    assert by_class.mean(axis=1).iloc[0] == pytest.approx(0.6204, abs=0.001)
    with pytest.raises(ValueError, match="published: found 'exp099', expected one of exp000, "):
        read_published("experiments", "exp061, exp099")
    assert len(read_published("experiments", "")) == 0


@pytest.mark.parametrize("count", SETS)
@pytest.mark.parametrize("others", [0, 1, 11])
def test_comparison_of_few_and_many(count, others):
    """Every legend and label lies inside the figure, for long names too; of many recipes the first are coloured."""
    rng, classes, correct = np.random.default_rng(0), class_names(count), np.eye(count, dtype=int)
    long = "a name as it is made of many parameters soft_iou_weight=0.5-class_weights=median-learning_rate=0.0001-"
    runs = []
    for recipe in range(others + 1):
        for seed in (1, 2):
            wrong = rng.integers(0, 30, (24, count, 1))
            counts = correct * (100 - wrong) + np.roll(correct, 1, 1) * wrong
            name, rate = f"{long}{recipe}-{seed}", 0.1 + recipe
            runs.append(scored_run(name, counts, classes=classes, seed=seed, learning_rate=rate))
    recipes = group_recipes(runs)
    tests = run_tests(recipes)
    colours = run_colours(recipes)
    texts = draw(plot_comparison(recipes, tests, colours))
    assert "mIoU" in texts
    assert f"{shorten(classes[0], 20)} (24)" in texts
    assert len([text for text in texts if "mean of 2" in text]) == others + 1
    draw(
        plot_comparison(
            recipes,
            {name: replace(test, recipe_test=None, checkpoint_test=None) for name, test in tests.items()},
            colours,
        )
    )


def marks(figure):
    """By colour of the marks of differences: whether they are filled, from the top down."""
    lines = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    found = {}
    for line in lines:
        for height in line.get_ydata():
            found.setdefault(to_rgb(line.get_color()), {})[height] = line.get_markerfacecolor() != "white"
    return {colour: [filled for _, filled in sorted(rows.items())] for colour, rows in found.items()}


def test_marks_are_filled_where_the_adjusted_test_is_significant():
    """In the colour of their recipe, whichever other recipes there are."""
    recipes = {
        name: [
            scored_run(f"{name}{seed}", some_counts(rate, 10 * draw + seed), seed=seed) for seed in range(3)
        ]
        for draw, (name, rate) in enumerate([("a", 0.7), ("b", 0.72), ("c", 0.78), ("d", 0.71)])
    }
    colours = run_colours(recipes)
    for names in ("abcd", "acb", "ad"):
        some = {name: recipes[name] for name in names}
        tests = run_tests(some)
        found = marks(plot_comparison(some, tests, colours))
        order = np.argsort(-np.mean([iou(run.counts) for run in recipes["a"]], axis=0))
        for name, result in tests.items():
            test = result.recipe_test
            expected = [test.p_value < 0.05, *(test.class_p_value[order] < 0.05)]
            assert found[to_rgb(colours[name])] == expected
