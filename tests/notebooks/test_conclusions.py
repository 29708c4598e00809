import re
import subprocess
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats
from scored_runs import CLASSES, SCENES, scored_folder, scored_run, some_counts

from lib.notebooks.conclusions import (
    Result,
    Spread,
    conclude,
    describe_details,
    describe_plan,
    describe_single_runs,
    match_seeds,
    measure_spread,
    name_run,
    result_table,
    run_tests,
    show_results,
)
from lib.notebooks.sweep import plan_runs
from lib.runs.results import group_recipes, recipe, write_results
from lib.significance import (
    CheckpointComparison,
    RecipeComparison,
    compare_checkpoints,
    compare_recipes,
    compare_seeds,
    plan,
)

SCENE = np.arange(3 * SCENES) // 3
SPREAD = Spread((0.01, 0.008, 0.014), 0.001, 24, 13.5, 1)


def runs_of(name, rate, seeds, draw=0, sd=0.02, **facts):
    """Runs whose recall is about `rate` and varies a little between scenes."""
    return [
        scored_run(
            f"{name}{seed}", some_counts(rate, 100 * draw + seed, sd=sd), seed=seed, scene=SCENE, **facts
        )
        for seed in seeds
    ]


def pooled(runs, folds=5):
    """The same runs as if pooled over folds, with the scenes assigned to the folds in turn."""
    return [
        replace(run, image_fold=SCENE % folds, name=f"five folds, seed {run.parameters['seed']}")
        for run in runs
    ]


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A temporary folder for runs and studies, with no study yet."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr("lib.notebooks.conclusions.STUDIES", tmp_path / "studies")
    return tmp_path


def test_single_runs_allow_only_the_checkpoint_test():
    one, other = runs_of("a", 0.7, [0]), runs_of("b", 0.75, [1])
    result = run_tests({"one": one, "other": other})["other"]
    expected = compare_checkpoints(one[0].counts, other[0].counts, SCENE)
    assert result.checkpoint_test.interval == pytest.approx(expected.interval)
    assert result.checkpoint_test.p_value == expected.p_value
    assert result.seed_test is result.recipe_test is None
    (row,) = result_table({"other": result}).to_dict("records")
    assert np.isnan([row[name] for name in ("difference", "low", "high", "p")]).all()
    assert row["conclusion"] == "One run of each: nothing can be said about the recipes"


@pytest.mark.parametrize(("counts", "single"), [((1, 3), "one"), ((3, 1), "other")])
def test_single_run_on_one_side_rules_out_recipe_and_seed_tests(counts, single):
    result = run_tests(
        {"one": runs_of("a", 0.7, range(counts[0])), "other": runs_of("b", 0.75, range(counts[1]))}
    )["other"]
    assert result.recipe_test is result.seed_test is None
    assert result.conclusion == f"One run of {single}: nothing can be said about the recipes"


def test_several_seeds_allow_all_tests():
    one, other = runs_of("a", 0.7, [0, 1]), runs_of("b", 0.75, [1, 3, 4])
    result = run_tests({"one": one, "other": other})["other"]
    stacked = [np.stack([run.counts for run in side]) for side in (one, other)]
    expected = compare_recipes(*stacked, SCENE)
    assert result.recipe_test.interval == pytest.approx(expected.interval, rel=1e-12)
    assert result.recipe_test.p_value == expected.p_value
    expected = compare_seeds([run.score for run in one], [run.score for run in other])
    assert result.seed_test.p_value == expected.p_value
    assert result.pair == (one[1], other[0])  # both of seed 1
    (row,) = result_table({"other": result}).to_dict("records")
    assert (row["recipe"], row["against"], row["comparisons"]) == ("other", "one", 1)
    assert (row["scenes"], row["seeds"]) == (SCENES, "3 and 2")
    assert row["difference"] == pytest.approx(
        np.mean([run.score for run in other]) - np.mean([run.score for run in one])
    )


def test_bonferroni_counts_only_recipes_that_can_be_tested():
    recipes = {"base": runs_of("a", 0.7, range(3))}
    for number in range(4):
        recipes[f"r{number}"] = runs_of(f"r{number}-", 0.7 + 0.01 * number, range(3), draw=1 + number)
    recipes["one run"] = runs_of("one", 0.9, [7])
    table = result_table(run_tests(recipes)).set_index("recipe")
    base = np.stack([run.counts for run in recipes["base"]])
    for number in range(4):
        alone = compare_recipes(base, np.stack([run.counts for run in recipes[f"r{number}"]]), SCENE)
        row = table.loc[f"r{number}"]
        assert row.comparisons == 4  # a single run can't be tested and doesn't count
        assert row.p == min(1, 4 * alone.p_value)
        half = stats.t.ppf(1 - 0.05 / 8, alone.degrees_of_freedom) * alone.standard_error
        assert (row.low, row.high) == pytest.approx((alone.difference - half, alone.difference + half))
    assert "Bonferroni-adjusted for 4 comparisons" in show_results(table.reset_index()).to_html()


def test_paired_test_uses_only_seeds_that_both_recipes_have():
    one, other = runs_of("a", 0.7, [3, 1, 2, 7]), runs_of("b", 0.71, [1, 5, 3, 2])
    result = run_tests({"one": one, "other": other}, paired=True)["other"]
    sides = [
        np.stack([next(run.counts for run in side if run.parameters["seed"] == seed) for seed in (1, 2, 3)])
        for side in (one, other)
    ]
    expected = compare_recipes(*sides, SCENE, paired=True)
    assert result.recipe_test.interval == pytest.approx(expected.interval)
    assert result.runs == (3, 3)
    assert result.spread.plan(3).standard_error == pytest.approx(expected.standard_error)
    few = run_tests({"one": runs_of("a", 0.7, [1, 2]), "other": runs_of("b", 0.7, [2, 3])}, paired=True)[
        "other"
    ]
    assert few.recipe_test is None
    assert few.conclusion == "no result: a paired test needs two or more seeds that both recipes have"


def test_fewer_than_six_scenes_give_no_result():
    scene = np.arange(24) % 5
    recipes = {name: [replace(run, scene=scene) for run in runs_of(name, 0.7, (1, 2))] for name in "xy"}
    result = run_tests(recipes)["y"]
    assert result.recipe_test is result.checkpoint_test is None
    assert result.conclusion == "no result: 5 scenes, at least 6 are needed"
    assert "x against" not in describe_details({"y": result})


def test_fewer_than_two_recipes_give_no_comparison():
    for recipes in ({}, {"one": runs_of("a", 0.7, [0, 1])}):
        results = run_tests(recipes)
        assert results == {}
        assert len(result_table(results)) == 0
        show_results(result_table(results)).to_html()
        assert conclude(results) == "Only one recipe found: there is nothing to compare."
        assert describe_details(results) == describe_single_runs(results) == ""


def made_test(difference, error, degrees, class_differences):
    """A recipe test with these values. A class with NaN is not tested."""
    differences, errors = np.array(class_differences), np.full(len(class_differences), error)
    values = np.array([difference, *differences])
    half = stats.t.ppf(0.975, degrees) * error
    p_values = 2 * stats.t.sf(np.abs(values) / error, degrees)
    return RecipeComparison(
        difference=difference, interval=(difference - half, difference + half), p_value=float(p_values[0]),
        standard_error=error, degrees_of_freedom=degrees, class_difference=differences,
        class_interval=np.stack((differences - half, differences + half)), class_p_value=p_values[1:],
        class_standard_error=errors, class_degrees_of_freedom=np.full(len(errors), degrees), scene_count=SCENES,
        seed_variance=error**2, scene_variance=error**2 / 2, scene_degrees_of_freedom=7.0,
    )  # fmt: skip


PAIR = (scored_run("a", scene=SCENE), scored_run("b", scene=SCENE))
numbers = some.floats(-0.3, 0.3) | some.sampled_from([0.0, 1e-5, -1e-5])
tests = some.tuples(
    numbers,
    some.floats(1e-4, 0.1),
    some.floats(1.5, 200),
    some.lists(numbers | some.just(np.nan), min_size=3, max_size=3),
    some.sampled_from([None, "below", "at", "above"]),
)


def checkpoint_of(test):
    """A checkpoint test with these values but a larger p, which sometimes contradicts its interval."""
    names = [field.name for field in fields(CheckpointComparison) if field.name != "p_value"]
    return CheckpointComparison(
        **{name: getattr(test, name) for name in names}, p_value=min(1, 1.5 * test.p_value)
    )


def results_of(drawn):
    """Results like those of `run_tests`. Some adjusted p are just below, exactly at or just above 0.05."""
    results = {}
    for number, (difference, error, degrees, classes, edge) in enumerate(drawn):
        test = made_test(difference, error, degrees, classes)
        factor = {"below": 1 - 1e-7, "at": 1, "above": 1 + 1e-7, None: None}[edge]
        if factor is not None and difference:
            wanted = stats.t.isf(0.025 / len(drawn) * factor, degrees) * error
            test = made_test(np.sign(difference) * wanted, error, degrees, classes)
            test = replace(test, p_value=0.05 / len(drawn) * factor)
        seeds = compare_seeds([0.5, 0.51, 0.52], [0.5, 0.53, 0.57]).adjusted(len(drawn))
        name = f"recipe {number}"
        results[name] = Result(
            name, "base", (3, 3), PAIR, test.adjusted(len(drawn)), seeds,
            checkpoint_of(test).adjusted(len(drawn)), SPREAD,
        )  # fmt: skip
    return results


@settings(max_examples=30, deadline=None)
@given(some.lists(tests, min_size=1, max_size=20))
def test_every_conclusion_agrees_with_its_row(drawn):
    """Sign and significance match the interval and p, also in the details, the bold cells and the summary."""
    results = results_of(drawn)
    table = result_table(results)
    html, summary, details = show_results(table).to_html(), conclude(results), describe_details(results)
    assert len(table) == len(drawn)
    for row in table.itertuples():
        significant = row.p < 0.05
        words = f"{row.recipe} is {'better' if row.difference > 0 else 'worse'}"
        assert (row.conclusion == words) == significant
        assert row.conclusion.startswith("inconclusive: ") != significant
        if abs(row.p - 0.05) > 1e-9:
            assert significant == (row.low > 0 or row.high < 0)
        found, _, explained = row.conclusion.partition(": if ")
        assert f"- {row.recipe} against base: **{found}**.\n" in summary
        assert f"  - If {explained}." in summary or not explained
        assert row.comparisons == len(drawn)
    bold = re.findall(r"\{\s*font-weight: bold;", html)
    assert bool(bold) == (table.p < 0.05).any()
    assert summary.count(f"Bonferroni-adjusted for {len(drawn)} comparisons") == (
        len(drawn) if len(drawn) > 1 else 0
    )
    assert summary.count("prefer base") == ((table.p < 0.05) & (table.difference < 0)).sum()
    for result, part in zip(results.values(), details.split("**recipe ")[1:], strict=True):
        test = result.recipe_test
        named = re.search(r"adjusted for (\d)\d*\): ([^;\n]*)", part)
        expected = [name for name, p in zip(CLASSES, test.class_p_value, strict=True) if p < 0.05]
        assert re.findall("[a-z]+", named[2]) == (expected or ["none"])
        assert int(named[1]) == np.isfinite(test.class_difference).sum()
        differ = "these two networks differ" in part
        assert differ == (result.checkpoint_test.p_value < 0.05)


@settings(max_examples=100, deadline=None)
@given(tests)
def test_rounding_changes_neither_significance_nor_sign(drawn):
    """A p next to 0.05 is never shown as 0.05."""
    result = next(iter(results_of([drawn]).values()))
    table = result_table({"b": result})
    cells = re.findall(r"<td[^>]*>(.*?)</td>", show_results(table).to_html())
    difference, low, high, p = cells[2:6]
    below = p.startswith("<") or (p[0] == "0" and float(p) < 0.05)
    assert below == (result.recipe_test.p_value < 0.05)
    assert p not in ("0.05", "0.050")
    for shown, value in ((difference, table.difference[0]), (low, table.low[0]), (high, table.high[0])):
        assert np.sign(float(shown)) == np.sign(value)
        assert not re.fullmatch(r"-0\.0+", shown)


def test_smallest_detectable_difference_is_given_with_its_range():
    found = [plan(3, 1, 24, sd, 0.001, scene_degrees=13.5).adjusted(2).detectable for sd in SPREAD.run_sd]
    clause = "a true difference of {:.3f} ({:.3f} to {:.3f}) would be found with 80 % power".format(*found)
    assert SPREAD.describe_detectable(3, 2) == clause
    clipped = replace(SPREAD, variance_per_scene=0.0).describe_detectable(3, 2)
    assert re.search(
        r" \(0\.\d{3} to 0\.\d{3}; at least, as the difference did not vary detectably over scenes\) would be found",
        clipped,
    )


def test_seed_count_and_its_range_reach_80_percent_power():
    needed = SPREAD.required_seeds(0.025, 1)
    assert SPREAD.describe_seeds(0.025, 1).startswith(f"about {needed} seeds of each recipe (")
    assert SPREAD.plan(needed).power(0.025) >= 0.8 > SPREAD.plan(needed - 1).power(0.025)
    assert SPREAD.describe_seeds(0.001, 1) == "more scenes, because 100 seeds are too few"
    low, high = re.search(
        r"seeds of each recipe \((\d+) to (\d+)\)", SPREAD.describe_seeds(0.025, 1)
    ).groups()
    for which, runs in ((1, int(low)), (2, int(high))):
        assert SPREAD.plan(runs, which).power(0.025) >= 0.8 > SPREAD.plan(runs - 1, which).power(0.025)
    narrow = replace(SPREAD, variance_per_scene=1e-7)
    assert re.search(r" \(\d+ to more than 100\)$", narrow.describe_seeds(0.0045, 1))


def suited(runs, lift):
    """The same runs, better in some scenes and worse in others."""
    found = []
    for run in runs:
        moved = np.rint(run.counts.sum(2) * np.linspace(-lift, lift, SCENES)[SCENE, None]).astype(np.int64)
        counts = run.counts.copy()
        counts[:, range(3), range(3)] += moved
        counts[:, range(3), [1, 2, 0]] -= moved
        found.append(replace(run, counts=counts))
    return found


def test_run_sd_pools_variances_within_recipes_and_folds():
    lifts = {"x": 0.0, "y": 0.1, "z": 0.15}
    recipes = {
        name: pooled(suited(runs_of(name, 0.7, range(3), draw), lift))
        for draw, (name, lift) in enumerate(lifts.items())
    }
    spread = measure_spread(recipes)
    variances = [
        np.var([run.select(run.image_fold == fold).score for run in runs], ddof=1)
        for runs in recipes.values()
        for fold in range(5)
    ]
    assert spread.run_sd[0] == pytest.approx(np.sqrt(np.mean(variances)))
    assert spread.run_sd[1] / spread.run_sd[0] == pytest.approx(np.sqrt(30 / stats.chi2.ppf(0.975, 30)))
    counts = {name: np.stack([run.counts for run in runs]) for name, runs in recipes.items()}
    largest = max(
        compare_recipes(counts[a], counts[b], SCENE).scene_variance for a, b in combinations("xyz", 2)
    )
    assert spread.variance_per_scene == pytest.approx(8 * largest)
    assert spread.variance_per_scene > 0
    assert (spread.folds, spread.scenes) == (5, 8)
    assert measure_spread({"x": recipes["x"]}) is None
    assert measure_spread({"x": recipes["x"][:1], "y": recipes["y"]}) is None


def test_runs_are_matched_by_seed_in_natural_order():
    one, other = runs_of("a", 0.7, [10, 9, 1]), runs_of("b", 0.7, [9, 10])
    assert [pair[0].parameters["seed"] for pair in match_seeds(one, other)] == [9, 10]
    assert match_seeds(one, runs_of("c", 0.7, [3])) == []
    assert name_run(one[0], "learning_rate 0.003") == "learning_rate 0.003, seed 10"
    assert name_run(pooled(one)[0], "x") == "x, five folds, seed 10"


def single_runs(**other):
    first = scored_run(
        "ce", some_counts(0.7, 1), seed=1, scene=SCENE, image_height=48, image_width=64, soft_iou_weight=0
    )
    settings = {"image_height": 48, "image_width": 64, "soft_iou_weight": 0.5} | other
    other = scored_run("soft", some_counts(0.72, 2), seed=1, scene=SCENE, **settings)
    return [
        replace(run, history=pd.DataFrame({"seconds": [60.0, 90.0, minutes]}))
        for run, minutes in ((first, 30), (other, 0))
    ]


def commands(text):
    """The parameters in the printed sweep commands, as a shell and papermill read them."""
    found = re.findall(r"` ?(papermill sweep\.ipynb .*?)(?: ``|`(?: and|\. ))", text)
    printed = [command.replace("papermill sweep.ipynb sweep.out.ipynb -y", "printf %s") for command in found]
    return [yaml.safe_load(subprocess.check_output(["bash", "-c", command])) for command in printed]


def test_single_runs_get_a_caveat_and_a_sweep_command(home):
    first, other = single_runs()
    results = run_tests({"ce": [first], "soft": [other]})
    text = describe_single_runs(results)
    assert text.startswith("**One run of each: nothing can be said about the recipes.**")
    assert "Checkpoint test, not about recipes (soft, seed 1, against ce, seed 1; 8 scenes)" in text
    assert "Seeds alone" not in text  # there are no earlier pairs of runs
    (given,) = commands(text)
    assert given["grid"] == {"soft_iou_weight": [0, 0.5]}
    assert given["seeds"] == [2, 3, 4, 5, 6]  # seed 1 is used already
    assert given["split"] == "valid"
    # 5 runs take 3 minutes each and 5 take 2.5
    assert "train 5 new seeds of each, 10 runs, about 28 minutes if run in sequence: " in text
    assert commands(conclude(results)) == [given]


@pytest.mark.parametrize("name", ["données", "$HOME", "a`b", "it's", 'a"b', "50 % & more"])
def test_suggested_sweep_survives_the_shell(home, name):
    runs = [
        replace(run, parameters=run.parameters | {"encoder_weights": f"/disk/{name}"})
        for run in single_runs()
    ]
    (given,) = commands(conclude(run_tests({"ce": runs[:1], "soft": runs[1:]})))
    assert given["fixed"]["encoder_weights"] == f"/disk/{name}"


def test_suggested_sweep_is_paired_like_the_comparison(home):
    """Also if there are too few pairs for a test, but not if the test is unpaired."""
    for seeds in ([1, 2, 3], [3, 4, 5]):
        recipes = {
            "ce": runs_of("ce", 0.7, [1, 2, 3]),
            "soft": runs_of("soft", 0.7, seeds, 1, learning_rate=0.02),
        }
        for paired in (True, False):
            (given,) = commands(conclude(run_tests(recipes, paired)))
            assert given.get("paired", False) == paired
    first, other = single_runs(learning_rate=0.01, epochs=5)
    text = conclude(run_tests({"ce": [first], "soft": [other]}, paired=True))
    assert "compare the new runs with `compare.ipynb`, with `-p paired True`." in text
    assert not any("paired" in given for given in commands(text))


def test_number_of_seeds_is_for_the_printed_sweep_of_two_recipes(home):
    """A sweep of two recipes is one comparison, however many are on the page."""
    recipes = {
        name: runs_of(name, 0.7, [1, 2, 3], draw, learning_rate=0.003 + 0.01 * draw)
        for draw, name in enumerate(["base", "x", "y", "z"])
    }
    results = run_tests(recipes)
    text = conclude(results)
    spread = results["x"].spread
    target = spread.plan(3).adjusted(1).detectable / 2
    needed = spread.required_seeds(target, 1)
    assert needed != spread.required_seeds(target, 3)
    assert (
        f"To find a true difference of {target:.3f} (half of what these runs can find in a comparison of these "
        f"two recipes alone) with 80 % power takes {spread.describe_seeds(target, 1)}; "
    ) in text
    assert len(commands(text)[0]["seeds"]) == needed
    alone = conclude(run_tests({name: recipes[name] for name in ("base", "x")}))
    assert "(half of what these runs can find) with 80 % power takes" in alone


def unbalanced_recipes():
    """Two recipes whose difference varies over scenes, one of which has 17 of 24 images."""
    scene = np.array([0] * 17 + list(range(1, 8)))
    return {
        name: [
            replace(run, scene=scene)
            for run in suited(runs_of(name, 0.7, [1, 2, 3], draw, learning_rate=0.003 + draw), lift)
        ]
        for draw, (name, lift) in enumerate({"base": 0.0, "x": 0.2}.items())
    }


def test_one_scene_with_most_of_the_images_gives_no_result(home):
    results = run_tests(unbalanced_recipes())
    test = results["x"].recipe_test
    assert test.detectable == np.inf
    assert test.interval[1] > 1
    assert results["x"].conclusion == "no result: one scene has most of the images"
    text = conclude(results)
    assert "more seeds will not help" in text
    assert "inf" not in text
    assert "(95 % interval -1.000 to +1.000, " in text
    assert result_table(results)[["low", "high"]].to_numpy().tolist() == [[-1.0, 1.0]]
    runs = [
        replace(run, parameters=run.parameters | {"image_height": 48, "image_width": 64})
        for side in unbalanced_recipes().values()
        for run in side
    ]
    write_results(home / "studies" / "earlier", runs)
    planned = plan_runs(
        None, {"data": "/disk/nyu", "image_height": 48, "image_width": 64}, {"epochs": [3, 4]}, [1, 2]
    )
    assert describe_plan(planned, "valid").startswith("No plan: ")


def test_suggested_sweep_trains_the_recipes_of_both_runs(home):
    """One sweep if a single parameter differs, otherwise one sweep per recipe."""
    for change, count in (({}, 1), ({"learning_rate": 0.01, "epochs": 5}, 2)):
        first, other = single_runs(**change)
        found = commands(conclude(run_tests({"ce": [first], "soft": [other]})))
        assert len(found) == count
        planned = [
            runs
            for given in found
            for runs in plan_runs(None, given["fixed"], given["grid"], given["seeds"]).values()
        ]
        assert len({recipe(parameters) for parameters in planned}) == 2
        for run in (first, other):
            same = [
                each
                for each in planned
                if all(
                    each[name] == run.parameters[name]
                    for name in ("soft_iou_weight", "learning_rate", "epochs", "image_height")
                )
            ]
            assert [each["seed"] for each in same] == [2, 3, 4, 5, 6]


def test_suggested_sweep_of_pooled_runs_trains_all_folds(home):
    """Also if each recipe needs its own sweep."""
    for change, count in (({}, 1), ({"learning_rate": 0.01}, 2)):
        sides = {run.name: pooled([run]) for run in single_runs(**change)}
        text = conclude(run_tests(sides))
        assert "train 5 new seeds of each, 50 runs" in text
        found = commands(text)
        assert len(found) == count
        assert ("compare the new runs with `compare.ipynb`" in text) == (count == 2)
        for one in found:
            assert one["grid"]["fold"] == [0, 1, 2, 3, 4]


def test_inconclusive_result_suggests_a_sweep_with_enough_seeds(home):
    recipes = {
        "ce": runs_of("ce", 0.7, [1, 2, 4], 0),
        "soft": runs_of("soft", 0.7, [1, 2, 3], 1, learning_rate=0.02),
    }
    results = run_tests(recipes)
    assert results["soft"].recipe_test.p_value > 0.05
    text = conclude(results)
    (given,) = commands(text)
    needed = int(re.search(r"takes about (\d+) seeds of each recipe", text)[1])
    assert len(given["seeds"]) == needed
    assert not {1, 2, 3, 4} & set(given["seeds"])
    assert f"train {needed} new seeds of each, {2 * needed} runs" in text


def test_significant_result_warns_if_several_parameters_differ():
    """A test of two recipes can't attribute the difference to one of several changed parameters."""
    for change, said in (({}, False), ({"epochs": 5}, True)):
        recipes = {
            "a": runs_of("a", 0.6, range(3)),
            "b": runs_of("b", 0.8, range(3), 1, learning_rate=0.02, **change),
        }
        text = conclude(run_tests(recipes))
        assert "**b is better**" in text
        assert (
            "differ in epochs (5.0 against 3.0) and learning_rate (0.02 against 0.003); the" in text
        ) == said


def test_external_predictions_suggest_scoring_more_seeds(home):
    external = {"recipe": "external", "seed": 1, "predictions": "/masks", "data": "/disk/nyu", "fold": 4}
    other = scored_run("masks", some_counts(0.72, 2), scene=SCENE, external=external)
    text = describe_single_runs(run_tests({"ce": [single_runs()[0]], "external": [other]}))
    assert "score predictions of two or more seeds of each with `evaluate.ipynb`" in text


def earlier_runs(seeds=range(2, 6)):
    """Runs of one recipe at 48x64 in two arms, and two runs at another size."""
    size = {"image_height": 48, "image_width": 64, "scene": SCENE}
    arms = [
        scored_run(f"e{seed}", some_counts(0.6, seed, sd=0.3), seed=seed, group=f"arm {seed % 2}", **size)
        for seed in seeds
    ]
    return [*arms, *runs_of("large", 0.9, [1, 2], image_height=96, image_width=128)]


def test_difference_of_single_runs_is_compared_with_pairs_of_seeds(home):
    """Pairs share a recipe but not necessarily an arm. Other sizes, data and splits don't count."""
    write_results(home / "studies" / "earlier", earlier_runs())
    for name, changes in (("other data", {"data": "/disk/sun"}), ("other split", {"split": "test"})):
        others = [replace(run, name=f"{run.name}, {name}", **changes) for run in earlier_runs()]
        write_results(home / "studies" / name, others)
    first, other = single_runs()
    text = describe_single_runs(run_tests({"ce": [first], "soft": [other]}))
    scores = [run.score for run in earlier_runs()[:4]]
    larger = sum(abs(a - b) >= abs(other.score - first.score) for a, b in combinations(scores, 2))
    assert 1 <= larger <= 5
    assert larger != sum(abs(a - b) >= 2 * abs(other.score - first.score) for a, b in combinations(scores, 2))
    assert (
        f"of 6 other pairs of runs of one recipe and fold that differ only in the seed, {larger} differ"
        in text
    )
    assert (
        f"as these two ({other.score - first.score:+.3f} mIoU; 4 runs on nyu, 48 x 64 pixels, split valid)"
        in text
    )
    (line,) = [line for line in text.splitlines() if "Seeds alone" in line]
    assert f"  {line}" in conclude(run_tests({"ce": [first], "soft": [other]}))


def test_run_with_two_names_counts_once_among_the_pairs(home):
    runs = [replace(run, name=f"copy of {run.name}") for run in earlier_runs()]
    write_results(home / "studies" / "copies", runs)
    write_results(home / "studies" / "earlier", earlier_runs())
    first, other = single_runs()
    assert "of 6 other pairs of runs" in describe_single_runs(run_tests({"ce": [first], "soft": [other]}))
    first, other = earlier_runs()[:2]
    assert "of 5 other pairs of runs" in describe_single_runs(run_tests({"a": [first], "b": [other]}))


def test_pooled_runs_are_not_compared_with_pairs_of_single_folds(home):
    write_results(home / "studies" / "earlier", earlier_runs())
    sides = {run.name: pooled([run]) for run in single_runs()}
    assert "Seeds alone" not in describe_single_runs(run_tests(sides))


def test_external_predictions_are_compared_with_pairs_of_seeds(home):
    """Their image size is unknown, so none is shown."""
    masks = [
        scored_run(
            f"masks{seed}",
            some_counts(0.7, seed),
            external={"recipe": "mine", "seed": seed, "data": "/disk/nyu", "fold": 4},
        )
        for seed in (1, 2, 3)
    ]
    write_results(home / "studies" / "masks", masks)
    text = describe_single_runs(run_tests({"ce": [single_runs()[0]], "mine": masks[:1]}))
    assert "of 3 other pairs of runs" in text
    assert "3 runs on nyu, split valid)" in text


def test_two_runs_of_one_recipe_are_reported_and_get_no_sweep(home):
    """An A/A pair, the one with the largest difference in its study, is not counted among the others."""
    for study in ("earlier", "again"):  # a run that is in two studies counts once
        write_results(home / "studies" / study, earlier_runs())
    runs = earlier_runs()[:4]
    first, other = max(combinations(runs, 2), key=lambda pair: abs(pair[0].score - pair[1].score))
    text = describe_single_runs(run_tests({"a": [first], "b": [other]}))
    assert "of 5 other pairs of runs" in text
    assert "the seed, 0 differ by at least as much as these two (" in text
    assert "Both runs have the same parameters but the seed: they are one recipe, not two to compare." in text
    assert "papermill" not in text


def test_plan_uses_the_variation_in_a_committed_study(home):
    write_results(home / "studies" / "earlier", earlier_runs())
    runs = plan_runs(
        None,
        {"data": "/disk/nyu", "image_height": 48, "image_width": 64},
        {"soft_iou_weight": [0, 0.5, 1]},
        [1, 2, 3],
    )
    spread = measure_spread(group_recipes(earlier_runs()[:4]))
    text = describe_plan(runs, "valid")
    assert text == (
        "3 seeds of each recipe, 8 scenes, Bonferroni-adjusted for 2 comparisons: if runs vary as those in studies/earlier "
        f"did, {spread.describe_detectable(3, 2)}."
    )
    over_folds = plan_runs(
        None,
        {"data": "/disk/nyu", "image_height": 48, "image_width": 64},
        {"soft_iou_weight": [0, 0.5], "fold": [0, 1, 2, 3, 4]},
        [1, 2, 3],
    )
    assert describe_plan(over_folds, "valid").startswith("3 seeds of each recipe, 40 scenes: ")
    assert describe_plan(runs, "test").startswith("No plan: ")
    for seeds, grid in (([1], {"soft_iou_weight": [0, 0.5]}), ([1, 2], {})):
        few = plan_runs(None, {"data": "/disk/nyu", "image_height": 48, "image_width": 64}, grid, seeds)
        assert describe_plan(few, "valid").startswith("No plan: ")


def test_no_plan_from_unsuitable_earlier_runs(home):
    """With too few scenes or a repeated seed, a sweep continues without a plan."""
    runs = plan_runs(
        None,
        {"data": "/disk/nyu", "image_height": 48, "image_width": 64},
        {"soft_iou_weight": [0, 0.5]},
        [1, 2],
    )
    four = [replace(run, scene=SCENE % 4) for run in earlier_runs()]
    twice = [replace(run, group=None, parameters=run.parameters | {"seed": 1}) for run in earlier_runs()]
    for earlier in (four, twice):
        write_results(home / "studies" / "earlier", earlier)
        assert describe_plan(runs, "valid").startswith("No plan: ")
    write_results(home / "studies" / "earlier", earlier_runs())
    assert not describe_plan(runs, "valid").startswith("No plan: ")


def test_plan_uses_the_variation_in_own_runs(home):
    for seed in (1, 2):
        for weight in (0, 0.5):
            settings = {"soft_iou_weight": weight, "image_height": 48, "image_width": 64}
            scored_folder(
                home / "runs",
                f"w{weight}s{seed}",
                some_counts(0.7 + weight / 10, seed),
                seed=seed,
                **settings,
            )
    runs = plan_runs(
        None,
        {"data": "/disk/nyu", "image_height": 48, "image_width": 64},
        {"soft_iou_weight": [0, 0.5]},
        [1, 2, 3],
    )
    assert "if runs vary as those in earlier runs did" in describe_plan(runs, "valid")


def test_details_explain_variance_from_seeds_and_scenes():
    sides = [
        [
            scored_run(f"{name}{seed}", some_counts(rate, 1, sd=0.0), seed=seed, scene=SCENE)
            for seed, rate in enumerate(rates)
        ]
        for name, rates in (("a", (0.65, 0.70, 0.75)), ("b", (0.66, 0.71, 0.77)))
    ]
    results = run_tests({"base": sides[0], "other": sides[1]})
    test = results["other"].recipe_test
    for p_value, inconclusive in ((0.06, True), (0.04, False)):
        clipped = replace(test, p_value=p_value, scene_variance=0.0)
        results["other"] = replace(results["other"], recipe_test=clipped)
        assert (
            "The recipe test equals it, because the difference did not vary detectably over scenes"
            in describe_details(results)
        )
        assert ("may be too narrow for new scenes" in conclude(results)) == inconclusive
    paired = describe_details({"other": replace(results["other"], paired=True)})
    assert "). The difference did not vary detectably over scenes; it may still vary." in paired
    results["other"] = replace(
        results["other"], recipe_test=replace(test, seed_variance=3.0, scene_variance=1.0)
    )
    assert (
        "With these numbers of seeds and scenes, 75 % of the variance of the difference is due to seeds"
        in describe_details(results)
    )


@pytest.mark.parametrize(
    ("facts", "caveat"),
    [
        ({"scene": None}, "The scenes of these images are unknown, so images were treated as independent"),
        ({"validation": "random"}, "Validation is `random`"),
        ({"image_fold": SCENE % 5}, "Pooled over five folds"),
    ],
)
def test_details_state_caveats_of_scenes_and_validation(facts, caveat):
    recipes = {
        name: [replace(run, **facts) for run in runs_of(name, 0.7, range(2), draw)]
        for draw, name in enumerate("xy")
    }
    text = describe_details(run_tests(recipes))
    assert caveat in text
    assert caveat not in describe_details(run_tests({name: runs_of(name, 0.7, range(2)) for name in "xy"}))


def test_details_warn_of_two_seeds_for_many_comparisons():
    for others, seeds, warned in ((2, 2, False), (3, 2, True), (3, 3, False)):
        recipes = {
            f"r{number}": runs_of(f"r{number}", 0.7, range(seeds), number) for number in range(others + 1)
        }
        assert ("Two seeds are too few" in describe_details(run_tests(recipes))) == warned


def test_identical_runs_are_inconclusive():
    recipes = {
        name: [scored_run(f"{name}{seed}", some_counts(), seed=seed, scene=SCENE) for seed in (1, 2)]
        for name in "xy"
    }
    results = run_tests(recipes)
    assert results["y"].conclusion == "inconclusive: no difference in any run on any scene"
    assert "check whether one run is listed twice" in conclude(results)


def test_constructed_effect_is_found_in_both_directions():
    low, high = runs_of("a", 0.70, range(5)), runs_of("b", 0.76, range(5), draw=1)
    assert run_tests({"low": low, "high": high})["high"].conclusion == "high is better"
    assert run_tests({"high": high, "low": low})["low"].conclusion == "low is worse"


@pytest.mark.parametrize("count", [2, 6, 20])
@pytest.mark.parametrize("length", [5, 50])
def test_result_table_has_one_row_per_compared_recipe(count, length):
    recipes = {
        f"{number:0{length}d}": runs_of(f"r{number}", 0.7, range(2), number) for number in range(count)
    }
    html = show_results(result_table(run_tests(recipes))).to_html()
    assert html.count("<tr>") == count  # a header and one row per recipe except the baseline
    assert all(html.count(f">{name}<") == 1 for name in list(recipes)[1:])
