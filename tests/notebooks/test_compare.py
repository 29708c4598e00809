import os

import numpy as np
import pytest
from slim_runs import names_of, slim_run, some_counts
from test_plots import SETS, draw
from test_plots import names_of as class_names

from lib.classes import NYUV2_13
from lib.metrics import mean_truth_iou, pixel_accuracy
from lib.notebooks.compare import plot_comparison, plot_published, read_published, score_table, show_scores
from lib.notebooks.conclusions import judge
from lib.notebooks.plots import shorten
from lib.runs.results import group_recipes, read_runs
from lib.significance import score_interval


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The folder of runs; there is no committed example."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr("lib.runs.results.EXAMPLE", tmp_path / "example")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def found(runs, part="valid", data=None):
    return [run.name for run in read_runs(runs, part, data)]


def grouped(runs="all", baseline=None):
    recipes = group_recipes(read_runs(runs, "valid"), baseline)
    return {name: [run.name for run in members] for name, members in recipes.items()}


def refused(runs, baseline=None):
    with pytest.raises(ValueError) as error:
        grouped(runs, baseline)
    return str(error.value)


def test_runs_by_name_by_path_and_by_folder(home, tmp_path, monkeypatch):
    for name in ("b", "a"):
        slim_run(home, name)
    for name in ("d", "c"):
        slim_run(tmp_path / "elsewhere", name)
    assert found("b, a") == found("b,a,") == ["b", "a"]
    assert found(str(home / "a")) == ["a"]
    assert found(f"a, {tmp_path / 'elsewhere'}") == ["a", "c", "d"]
    assert found(f"{tmp_path / 'elsewhere' / 'd'},b") == ["d", "b"]
    monkeypatch.chdir(tmp_path)
    assert found("elsewhere/c") == ["c"]
    assert found("elsewhere") == ["c", "d"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/elsewhere/c") == ["c"]
    with pytest.raises(ValueError, match=f"runs: found 'e', which is no run; in {home} there are: a, b"):
        found("a, e")
    with pytest.raises(ValueError, match="part: found 'valdi', expected one of train, valid, test"):
        found("all", "valdi")


def test_what_is_read_of_a_run_without_weights(home):
    counts = some_counts(0.6)
    run = slim_run(home, "a", counts, seed=3)
    assert not (run / "best.pt").exists()
    (read,) = read_runs("a", "valid")
    np.testing.assert_array_equal(read.counts, counts)
    assert list(read.names) == names_of(24)
    assert list(read.scene[:4]) == ["room 0"] * 3 + ["room 1"]
    assert (read.classes, read.data, read.split, read.folds) == (("floor", "wall", "chair"), "/nyu", "blocks", 1)
    assert read.parameters["seed"] == 3
    assert list(read.history.epoch) == [1, 2, 3]
    assert read.score == mean_truth_iou(counts)


def test_all_means_what_is_scored_on_one_data_set(home):
    slim_run(home, "a")
    slim_run(home, "b", data="/other")
    slim_run(home, "c", part="test")
    slim_run(home, "d", data="/other")
    slim_run(home / "older", "e")
    for number, name in enumerate("abd"):
        os.utime(home / name / "evaluation" / "valid.json", (number, number))
    assert found("all") == ["b", "d"]  # as the latest is
    assert found("all", data="/nyu") == ["a"]
    os.utime(home / "a" / "evaluation" / "valid.json", (9, 9))
    assert found("all") == ["a"]
    assert found("all", "test") == ["c"]
    assert found("all", "train") == []


def test_where_there_are_no_two_runs_the_committed_example_is_shown(home, tmp_path):
    for folder, name in (("one", "x"), ("one", "y"), ("other", "x")):
        slim_run(tmp_path / "example" / folder, name)
    slim_run(home, "mine", part="test")
    assert found("all") == ["x", "y", "x"]
    assert found("all", "test") == ["mine"]
    slim_run(home, "mine too")
    assert found("all") == ["x", "y", "x"]
    assert found("all", data="/nyu") == ["mine too"]
    slim_run(home, "one more")
    assert found("all") == ["mine too", "one more"]


def test_runs_of_two_folders_are_two_recipes(home, tmp_path):
    for folder in ("before", "after"):
        for seed in (1, 2):
            slim_run(tmp_path / folder, f"run {seed}", seed=seed)
    names = {"before": ["run 1", "run 2"], "after": ["run 1", "run 2"]}
    assert grouped(f"{tmp_path / 'before'}, {tmp_path / 'after'}") == names


def test_recipes_of_one_folder_are_named_after_what_differs(home, tmp_path, monkeypatch):
    """As a sweep leaves them in `results`; and some of them, by a pattern."""
    for weight in (0, 0.5, 1.5):
        for seed in (1, 2):
            slim_run(tmp_path / "swept", f"weight={weight}-seed={seed}", seed=seed, soft_iou_weight=weight)
    names = ["soft_iou_weight 0", "soft_iou_weight 0.5", "soft_iou_weight 1.5"]
    assert list(grouped(str(tmp_path / "swept"))) == names
    monkeypatch.chdir(tmp_path)
    assert list(grouped("swept/*weight=0-*, swept/*weight=1.5-*")) == [names[0], names[2]]
    with pytest.raises(ValueError, match=r"runs: found 'swept/\*weight=7-\*', which is no run"):
        grouped("swept/*weight=7-*")


def test_a_run_that_is_not_scored_says_how(home):
    slim_run(home, "a", part="test")
    slim_run(home, "b")
    command = "run `papermill evaluate.ipynb evaluate.out.ipynb -p run a -p part valid`"
    assert refused("a") == f"runs: 'a' is not evaluated on part 'valid'; {command}"
    (home / "b" / "evaluation" / "valid.json").unlink()  # as while it is scored again
    assert refused("b").startswith("runs: 'b' is not evaluated on part 'valid'; run `papermill")
    assert found("all") == []


def test_recipes_are_runs_that_differ_in_the_seed_alone(home):
    for name, seed, weight in (("ce0", 0, 0), ("iou0", 0, 0.5), ("ce1", 1, 0), ("iou2", 2, 0.5)):
        slim_run(home, name, seed=seed, soft_iou_weight=weight, workers=seed, data=f"/disk{seed}/nyu")
    recipes = group_recipes([run for name in ("ce0", "iou0", "ce1", "iou2") for run in read_runs(name, "valid")])
    assert {name: [run.name for run in members] for name, members in recipes.items()} == {
        "soft_iou_weight 0": ["ce0", "ce1"],
        "soft_iou_weight 0.5": ["iou0", "iou2"],
    }


def test_a_single_run_keeps_its_name_and_one_recipe_that_of_its_first_run(home):
    slim_run(home, "alone", learning_rate=0.1)
    assert grouped("alone") == {"alone": ["alone"]}
    slim_run(home, "s0")
    slim_run(home, "s1", seed=1)
    assert grouped("s0, s1") == {"s0": ["s0", "s1"]}
    assert grouped("alone, s0, s1") == {"alone": ["alone"], "learning_rate 0.003": ["s0", "s1"]}


def test_what_does_not_matter_names_no_recipe(home):
    """The form of soft IoU where it weighs nothing; parameters that older runs did not have yet."""
    slim_run(home, "a0", soft_iou_weight=0, soft_iou_pooling="image")
    slim_run(home, "a1", soft_iou_weight=0.0, seed=1, keep="best", ema_decay=0.0)
    slim_run(home, "b0", keep="best")
    slim_run(home, "b1", seed=1)
    assert grouped() == {"soft_iou_weight 0": ["a0", "a1"], "soft_iou_weight 0.5": ["b0", "b1"]}
    for seed in (0, 1):
        slim_run(home, f"c{seed}", keep="last", seed=seed)
    assert list(grouped("b0, b1, c0, c1")) == ["keep best", "keep last"]
    assert list(grouped("b1, b0, c0, c1")) == ["keep best", "keep last"]  # the first does not say so itself


def test_recipes_of_one_name_are_told_apart(home):
    for digest in "ab":
        for seed in (0, 1):
            weights = {"encoder_weights": "/w/encoder.pth", "encoder_weights_digest": 64 * digest}
            slim_run(home, f"{digest}{seed}", seed=seed, **weights)
    assert list(grouped()) == ["encoder_weights encoder.pth", "encoder_weights encoder.pth (b0)"]


def test_weights_are_the_same_wherever_they_lie(home):
    for seed, folder in enumerate(("/here", "/there")):
        weights = {"encoder_weights": f"{folder}/encoder.pth", "encoder_weights_digest": 64 * "a"}
        slim_run(home, f"a{seed}", seed=seed, **weights)
        slim_run(home, f"none{seed}", seed=seed)
    assert grouped() == {"encoder_weights encoder.pth": ["a0", "a1"], "encoder_weights None": ["none0", "none1"]}


def foreign(seed, recipe="theirs"):
    return {"recipe": recipe, "seed": seed, "predictions": f"/masks/{seed}", "data": "/nyu", "split": "blocks",
            "limit": None, "classes": None, "fold": 4}  # fmt: skip


def test_foreign_predictions_are_grouped_by_their_recipe(home):
    for seed in (0, 1):
        slim_run(home, f"masks {seed}", foreign=foreign(seed))
        slim_run(home, f"ours {seed}", seed=seed)
    slim_run(home, "others", foreign=foreign(0, "another"))
    assert grouped("ours 0, ours 1, masks 0, masks 1, others") == {
        "ours 0": ["ours 0", "ours 1"], "theirs": ["masks 0", "masks 1"], "another": ["others"],
    }  # fmt: skip
    slim_run(home, "ours fast", learning_rate=0.1)
    slim_run(home, "ours fast 1", learning_rate=0.1, seed=1)
    names = list(grouped("ours 0, ours 1, ours fast, ours fast 1, masks 0, masks 1"))
    assert names == ["learning_rate 0.003", "learning_rate 0.1", "theirs"]


def test_the_baseline_comes_first(home):
    for weight in (0, 0.5):
        for seed in (0, 1):
            slim_run(home, f"w{weight} s{seed}", soft_iou_weight=weight, seed=seed)
    slim_run(home, "zero", soft_iou_weight=7.0)
    first = {
        None: "soft_iou_weight 0", "soft_iou_weight 0.5": "soft_iou_weight 0.5", "w0.5 s1": "soft_iou_weight 0.5",
        "zero": "zero", "w0 s1": "soft_iou_weight 0",
    }  # fmt: skip
    for baseline, name in first.items():
        names = list(grouped("all", baseline))
        assert names[0] == name
        assert len(names) == 3
    assert refused("all", "none") == "baseline: found 'none', there are: soft_iou_weight 0, soft_iou_weight 0.5, zero"


def test_runs_that_cannot_be_compared(home):
    other_truth = some_counts()
    other_truth[4, 1, 1] += 1
    slim_run(home, "a")
    slim_run(home, "images", names=[*names_of(23), "other"], scene=None)
    slim_run(home, "fewer", some_counts()[:20])
    slim_run(home, "order", names=names_of()[::-1], scene=None)
    slim_run(home, "labels", other_truth)
    slim_run(home, "names", classes=("floor", "wall", "table"))
    slim_run(home, "13", np.ones((24, 13, 13), int), classes=NYUV2_13)
    remedy = "; evaluate both on the same data, part and fold"
    pair = "runs: 'a' and '{}' can't be compared: "
    problems = {
        "images": "24 and 24 images, 2 of them in one only, such as 000023",
        "fewer": "24 and 20 images, 4 of them in one only, such as 000020",
        "order": "24 and 24 images, 0 of them in one only, in another order",
        "labels": "the labels of 1 of 24 images differ, such as those of 000004",
    }
    for name, problem in problems.items():
        assert refused(f"a, {name}") == pair.format(name) + problem + remedy
    assert refused("a, names").startswith(
        "classes: the run 'a' has 'chair' as class 2, the run 'names' has 'table' as class 2; "
    )
    assert refused("a, 13").startswith("classes: the run 'a' has 3 (the last is 'chair'), the run '13' has 13 (the")


def five_folds(home, recipe, seed=0, folds=range(5), **parameters):
    """Runs of which each is scored on a fifth of the scenes, as `blocks` deals them."""
    names = np.array(names_of(45))
    counts = some_counts(0.7, seed, scenes=15)
    for fold in folds:
        of_fold = np.arange(45) // 3 % 5 == fold
        slim_run(home, f"{recipe} s{seed} f{fold}", counts[of_fold], names=names[of_fold].tolist(), seed=seed,
                 fold=fold, **parameters)  # fmt: skip
    return counts


def test_five_folds_of_a_seed_are_one_run_over_all_images(home):
    counts = {
        (rate, seed): five_folds(home, f"r{rate}", seed, learning_rate=rate) for rate in (1, 2) for seed in (0, 1)
    }
    recipes = group_recipes(read_runs("all", "valid"))
    assert list(recipes) == ["learning_rate 1", "learning_rate 2"]
    for rate, members in zip((1, 2), recipes.values(), strict=True):
        assert [run.parameters["seed"] for run in members] == [0, 1]
        for seed, run in enumerate(members):
            assert list(run.names) == names_of(45)
            np.testing.assert_array_equal(run.counts, counts[rate, seed])
            assert list(run.scene) == [f"room {number // 3}" for number in range(45)]
            assert (run.folds, run.history) == (5, None)


def test_a_seed_without_all_folds_is_left_out(home):
    five_folds(home, "a", 0)
    five_folds(home, "a", 1, folds=(0, 1, 2, 4))
    (members,) = group_recipes(read_runs("all", "valid")).values()
    assert [run.parameters["seed"] for run in members] == [0]


def test_folds_that_can_be_joined_by_no_seed_are_refused(home):
    five_folds(home, "a", 0, folds=(0, 1, 2))
    five_folds(home, "a", 1, folds=(3, 4))
    message = refused("all")
    assert message == (
        "runs: found folds seed 0: [0, 1, 2]; seed 1: [3, 4]; expected one fold, or all of 0 to 4 of a seed; name "
        "other runs"
    )


def test_folds_that_were_scored_on_the_same_images_are_not_joined(home):
    """On part test, for example: nothing would be gained by counting every image five times."""
    for fold in range(5):
        slim_run(home, f"f{fold}", fold=fold)
    assert refused("all").startswith("runs: the five folds of 'f4' are scored on the same images, such as 000000; ")


def test_runs_from_before_there_were_folds_are_of_the_last(home):
    for fold in range(4):
        slim_run(home, f"f{fold}", names=names_of(24, 24 * fold), fold=fold)
    older = slim_run(home, "f4", names=names_of(24, 24 * 4))
    text = (older / "parameters.json").read_text().replace('  "fold": 4,\n', "")
    assert "fold" not in text
    (older / "parameters.json").write_text(text)
    ((joined,),) = group_recipes(read_runs("all", "valid")).values()
    assert len(joined.names) == 5 * 24
    assert joined.name == f"five folds, seed {joined.parameters['seed']}"  # not the name of its last fold


def test_unknown_scenes_stay_unknown_when_joined(home):
    five_folds(home, "a", 0, folds=range(4))
    names = np.array(names_of(45))[np.arange(45) // 3 % 5 == 4].tolist()
    slim_run(home, "last", some_counts(scenes=3), names=names, scene=None, fold=4, chosen_split="random")
    ((joined,),) = group_recipes(read_runs("all", "valid")).values()
    assert joined.scene is None


def test_older_counts_get_their_scenes_from_their_names(home):
    names = names_of(3) + names_of(3, first=10) + names_of(18, first=20)
    slim_run(home, "older", names=names, scene=None)
    (read,) = read_runs("older", "valid")
    assert list(read.scene) == ["000000"] * 3 + ["000010"] * 3 + ["000020"] * 18
    slim_run(home, "drawn", names=names, scene=None, chosen_split="random")  # of which names are no runs
    (read,) = read_runs("drawn", "valid")
    assert read.scene is None


def test_the_table_has_every_run_with_its_interval(home):
    counts = {seed: some_counts(0.6, seed) for seed in (0, 1)}
    for seed, each in counts.items():
        slim_run(home, f"s{seed}", each, seed=seed)
    slim_run(home, "alone", some_counts(0.8), learning_rate=1.0)
    table = score_table(group_recipes(read_runs("all", "valid"), "alone"))
    assert list(table.index) == [("alone", "alone"), ("learning_rate 0.003", "s0"), ("learning_rate 0.003", "s1")]
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
def test_comparison_of_few_and_many(home, count, others):
    """Every legend and label lies inside the figure, for long names too; of many recipes the first are coloured."""
    rng, classes, right = np.random.default_rng(0), class_names(count), np.eye(count, dtype=int)
    long = "a name as it is made of many parameters soft_iou_weight=0.5-class_weights=median-learning_rate=0.0001-"
    for recipe in range(others + 1):
        for seed in (1, 2):
            wrong = rng.integers(0, 30, (24, count, 1))
            counts = right * (100 - wrong) + np.roll(right, 1, 1) * wrong
            slim_run(home, f"{long}{recipe}-{seed}", counts, classes=classes, seed=seed, learning_rate=0.1 + recipe)
    recipes = group_recipes(read_runs("all", "valid"))
    differences = {name: verdict.strongest for name, verdict in judge(recipes).items()}
    texts = draw(plot_comparison(recipes, differences))
    assert "mIoU" in texts
    assert f"{shorten(classes[0], 20)} (24)" in texts
    assert len([text for text in texts if "mean of 2" in text]) == others + 1
    draw(plot_comparison(recipes, dict.fromkeys(differences)))  # where runs allow no claim


def test_a_figure_of_what_was_published():
    assert "exp061: mean 0.620" in draw(plot_published(read_published("class_iou", "exp060, exp061").T))
