from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scored_runs import scored_folder, scored_run, some_counts

from figures import SETS, class_names, draw
from lib.metrics import DISTANCE, iou, mean_iou, pixel_accuracy
from lib.notebooks.compare import (
    compare_strata,
    introduce_runs,
    plot_comparison,
    plot_strata_differences,
    score_table,
    show_scores,
)
from lib.notebooks.conclusions import run_tests
from lib.notebooks.plots import run_colours, shorten
from lib.runs.results import group_recipes, read_runs, write_results
from lib.significance import score_interval


def test_score_table_has_every_run_with_its_interval():
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
    assert row["mIoU"] == pytest.approx(mean_iou(counts[1]))
    assert row["pixel accuracy"] == pixel_accuracy(counts[1])
    scene = np.arange(24) // 3
    assert (row.low, row.high) == score_interval(counts[1], scene).interval
    assert row.low < row["mIoU"] < row.high
    assert len(score_table({})) == 0
    shown = show_scores(table).to_html()
    assert f"{row['mIoU']:.3f}<" in shown
    assert "th {\n  white-space: nowrap;\n}" in shown


def example():
    """Two arms of one recipe, as in the committed example."""
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


RATES = (("a", 0.1), ("b", 0.2))


def test_own_run_on_the_same_images_is_added_to_the_example(home):
    scored_folder(home, "mine", some_counts(0.8, 9), split="test", learning_rate=1.0)
    found = read_runs("all", "test")
    assert [run.name for run in found] == [*(run.name for run in example()), "mine"]
    text = introduce_runs(found, {}, "test")
    assert text.startswith("5 runs were scored on split test of ")
    assert "an A/A pair: a significant difference would be a false alarm" in text
    assert "is not shown" not in text


def test_own_run_on_other_images_is_reported_as_not_shown(home):
    scored_folder(home, "mine", some_counts(0.8)[:21], split="test")
    found = read_runs("all", "test")
    assert [run.name for run in found] == [run.name for run in example()]
    assert "Your run mine was scored on other images, so it is not shown here." in introduce_runs(
        found, {}, "test"
    )


def test_introduction_of_own_runs_is_one_line(home):
    runs = [scored_run(name) for name in "ab"]
    assert introduce_runs(runs, {"a": runs}, "valid") == "2 runs were scored on split valid of /disk/nyu."
    assert introduce_runs(runs, {}, "valid", "seed == 0").startswith("2 runs match and were scored")
    assert introduce_runs([], {}, "valid") == "0 runs were scored on split valid of no data."


def test_introduction_lists_differences_that_recipe_names_omit():
    runs = [
        scored_run(f"{name}{seed}", seed=seed, learning_rate=rate) for seed in (1, 2) for name, rate in RATES
    ]
    first = "4 runs were scored on split valid of /disk/nyu."
    assert introduce_runs(runs, group_recipes(runs), "valid") == first
    named = [replace(run, group=run.name[0]) for run in runs]
    text = introduce_runs(named, group_recipes(named), "valid")
    assert text == f"{first}\n\n- a: learning_rate 0.1\n- b: learning_rate 0.2"
    text = introduce_runs(runs, {"a": runs[:2]}, "valid")
    assert text == f"{first} The five folds of each recipe and seed count as one run: 2 are shown."


@pytest.mark.parametrize("count", SETS)
@pytest.mark.parametrize("others", [0, 1, 11])
def test_comparison_figure_fits_few_and_many_recipes(count, others):
    """Legends and labels lie inside the figure, also for long names. Recipes from the ninth on are grey."""
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
    figure = plot_comparison(recipes, tests, colours)
    texts = draw(figure)
    means = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    is_grey = [to_rgb(line.get_color()) == (0.6, 0.6, 0.6) for line in means]
    assert is_grey == [number >= 8 for number in range(others + 1)]
    coloured = [to_rgb(line.get_color()) for line in means[:8]]
    assert min(max(colour) - min(colour) for colour in coloured) > 0.2  # none looks grey
    assert "mIoU" in texts
    assert f"{shorten(classes[0], 20)} (24)" in texts
    assert len([text for text in texts if "mean of 2 runs (small dots)" in text]) == others + 1
    assert any("by the recipe test" in text for text in texts) == (others > 0)
    draw(
        plot_comparison(
            recipes,
            {name: replace(test, recipe_test=None, checkpoint_test=None) for name, test in tests.items()},
            colours,
        )
    )


def test_comparison_figure_states_which_test_its_intervals_use():
    """A recipe with a single run has only the checkpoint test, and its marks are never filled."""
    recipes = {
        name: [scored_run(f"{name}{seed}", some_counts(rate, seed), seed=seed) for seed in range(count)]
        for name, rate, count in (("a", 0.7, 3), ("b", 0.8, 3), ("c", 0.9, 1))
    }
    colours = run_colours(recipes)
    for names, of_recipes, of_single in (("ab", True, False), ("ac", False, True), ("abc", True, True)):
        some = {name: recipes[name] for name in names}
        tests = run_tests(some)
        figure = plot_comparison(some, tests, colours)
        text = "\n".join(draw(figure))
        assert ("filled: p < 0.05 by the recipe test" in text) == of_recipes
        assert ("one run: checkpoint test, not recipes" in text) == of_single
        if of_single:
            assert tests["c"].checkpoint_test.p_value < 0.05
            assert not any(marks(figure)[to_rgb(colours["c"])])


def marks(figure):
    """Whether each mark of a difference is filled, from top to bottom, by colour."""
    lines = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    found = {}
    for line in lines:
        for height in line.get_ydata():
            found.setdefault(to_rgb(line.get_color()), {})[height] = line.get_markerfacecolor() != "white"
    return {colour: [filled for _, filled in sorted(rows.items())] for colour, rows in found.items()}


def test_marks_are_filled_if_the_adjusted_test_is_significant():
    """Each recipe keeps its colour, whichever other recipes are shown."""
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


def test_difference_interval_is_cut_where_iou_would_be_negative():
    """Class 2 has an IoU near 0 in the baseline. The cut is marked, and the axis label explains the mark."""
    sides = [[some_counts(0.7, seed) for seed in seeds] for seeds in ((1, 2), (3, 4))]
    rng = np.random.default_rng(0)
    for counts in (*sides[0], *sides[1]):
        kept = (counts[:, 2, 2] * 0.02 * rng.random(24) * (rng.random(24) < 0.2)).astype(int)
        counts[:, 2, 0] += counts[:, 2, 2] - kept
        counts[:, 2, 2] = kept
    recipes = {
        name: [scored_run(f"{name}{seed}", each, seed=seed) for seed, each in enumerate(side)]
        for name, side in zip("ab", sides, strict=True)
    }
    tests = run_tests(recipes)
    lowest = -np.mean([iou(run.counts)[2] for run in recipes["a"]])
    assert tests["b"].recipe_test.class_interval[0, 2] < lowest
    figure = plot_comparison(recipes, tests, run_colours(recipes))
    (cut,) = [line for line in figure.axes[1].lines if line.get_marker() == "<" and len(line.get_xdata())]
    assert cut.get_xdata() == pytest.approx([lowest])
    assert "triangle: cut at IoU 0 or 1" in figure.axes[1].get_xlabel()
    (strokes,) = figure.axes[1].collections
    ends = np.array([segment[:, 0] for segment in strokes.get_segments()])
    assert ends.min() >= -1
    assert ends[3, 0] == pytest.approx(lowest)


def test_class_without_ground_truth_is_not_drawn():
    """A class that is only predicted has no IoU, so no dot and no interval."""
    recipes = {}
    for name, seeds in (("a", (1, 2)), ("b", (3, 4))):
        sides = [some_counts(0.7, seed) for seed in seeds]
        for counts in sides:
            counts[:, 2] = 0
        recipes[name] = [
            scored_run(f"{name}{seed}", counts, seed=seed) for seed, counts in zip(seeds, sides, strict=True)
        ]
    figure = plot_comparison(recipes, run_tests(recipes), run_colours(recipes))
    (left, _) = figure.axes
    drawn = [line.get_xdata()[3] for line in left.lines if len(line.get_xdata()) == 4]
    assert len(drawn) == 6  # two dots and a mean per recipe
    assert np.isnan(drawn).all()


@pytest.mark.parametrize(("count", "text"), [(2, "not predicted by either"), (3, "not predicted by any")])
def test_class_that_no_run_predicts_is_marked(count, text):
    runs = []
    for number in range(2 * count):
        counts = some_counts(0.7, number)
        counts[:, :, 0] += counts[:, :, 2]
        counts[:, :, 2] = 0
        runs.append(counts)
    recipes = {
        str(number): [scored_run(f"{number}{seed}", runs[2 * number + seed], seed=seed) for seed in (0, 1)]
        for number in range(count)
    }
    texts = draw(plot_comparison(recipes, run_tests(recipes), run_colours(recipes)))
    assert [found.strip() for found in texts].count(text) == 1


def with_strata(run, better):
    """Add counts of 8 scenes, 2 classes and 2 distance bins; the second has `better` more correct pixels."""
    counts = np.zeros((8, 6, 2, 2), np.uint32)
    wobble = np.random.default_rng(run.parameters["seed"]).integers(0, 5, (8, 2))
    for at, more in ((0, 0), (2, better)):
        right = 60 + wobble + more
        counts[:, at, 0] = np.stack((right[:, 0], 100 - right[:, 0]), 1)
        counts[:, at, 1] = np.stack((100 - right[:, 1], right[:, 1]), 1)
    return replace(run, strata={DISTANCE: counts})


def test_stratum_differences_use_only_pixels_of_the_bin():
    sides = [
        [
            with_strata(scored_run(f"{better}{seed}", seed=seed), better)
            for seed in (shift, shift + 1, shift + 2)
        ]
        for better, shift in ((0, 1), (20, 11))
    ]
    table = compare_strata(*sides, farthest_m=10.0)
    assert table.stratum.tolist() == [DISTANCE] * 2
    assert table.bin.tolist() == ["0-1", "2-4"]
    assert table.pixels.tolist() == [0.5, 0.5]
    for at, row in zip((0, 2), table.itertuples(), strict=True):
        scores = [[mean_iou(run.strata[DISTANCE][:, at].astype(int)) for run in side] for side in sides]
        assert row.difference == pytest.approx(np.mean(scores[1]) - np.mean(scores[0]))
        assert row[4] == pytest.approx(np.mean(scores[0]))
    assert table.p[0] > 0.05 > table.p[1]
    assert table.low[1] > 0 > table.low[0]
    texts = draw(plot_strata_differences(table, "with depth minus without"))
    assert {"0-1", "2-4", "with depth minus without"} <= set(texts)
