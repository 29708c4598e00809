import numpy as np
import pytest
from scored_runs import scored_run, some_counts

from figures import SETS, class_names, draw
from lib.classes import NYUV2_13
from lib.metrics import mean_truth_iou, pixel_accuracy
from lib.notebooks.compare import plot_comparison, plot_published, read_published, score_table, show_scores
from lib.notebooks.conclusions import judge
from lib.notebooks.plots import shorten
from lib.runs.results import group_recipes
from lib.significance import score_interval


def test_the_table_has_every_run_with_its_interval():
    counts = {seed: some_counts(0.6, seed) for seed in (0, 1)}
    runs = [scored_run(f"s{seed}", each, seed=seed) for seed, each in counts.items()]
    runs.append(scored_run("alone", some_counts(0.8), learning_rate=1.0))
    table = score_table(group_recipes(runs, "alone"))
    assert list(table.index) == [
        ("alone", "alone"),
        ("learning_rate 0.003", "s0"),
        ("learning_rate 0.003", "s1"),
    ]
    row = table.loc[("learning_rate 0.003", "s1")]
    assert row.seed == 1
    assert row["mIoU"] == pytest.approx(mean_truth_iou(counts[1]))
    assert row["pixel accuracy"] == pixel_accuracy(counts[1])
    scene = np.arange(24) // 3
    assert (row.low, row.high) == score_interval(counts[1], scene).interval
    assert row.low < row["mIoU"] < row.high
    assert len(score_table({})) == 0
    shown = show_scores(table).to_html()
    assert f"{row['mIoU']:.3f}<" in shown
    assert "th {\n  white-space: nowrap;\n}" in shown


def test_published_figures():
    table = read_published("experiments", "exp061, exp060")
    assert table.valid_miou.tolist() == [0.6204, 0.6228]
    by_class = read_published("class_iou", "exp061")
    assert list(by_class.columns) == list(NYUV2_13)
    assert by_class.mean(axis=1).iloc[0] == pytest.approx(0.6204, abs=0.001)
    with pytest.raises(ValueError, match="published: found exp099, there are: exp000, "):
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
    differences = {name: verdict.strongest for name, verdict in judge(recipes).items()}
    texts = draw(plot_comparison(recipes, differences))
    assert "mIoU" in texts
    assert f"{shorten(classes[0], 20)} (24)" in texts
    assert len([text for text in texts if "mean of 2" in text]) == others + 1
    draw(plot_comparison(recipes, dict.fromkeys(differences)))  # where runs allow no test


def test_a_figure_of_what_was_published():
    assert "exp061: mean 0.620" in draw(plot_published(read_published("class_iou", "exp060, exp061").T))
