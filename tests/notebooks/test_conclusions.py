import re
from dataclasses import replace

import numpy as np
import pytest
from scored_runs import SCENES, scored_run, some_counts

from lib.notebooks import conclusions as verdicts
from lib.notebooks.conclusions import describe_verdicts, judge, summarise_verdicts
from lib.significance import compare_checkpoints, compare_recipes, compare_seeds, holm

SCENE = np.arange(3 * SCENES) // 3


def scored(name, counts, seed=0, scene=SCENE, validation="blocks", image_fold=None):
    """A run on images of three classes."""
    run = scored_run(name, counts, seed=seed, scene=scene, chosen_validation=validation)
    return replace(run, image_fold=image_fold)


def recipe(name, rate, seeds, draw=0, sd=0.02, **facts):
    """Runs that find this share of the pixels, each scene a bit more or less."""
    return [
        scored(f"{name}{seed}", some_counts(rate, 100 * draw + seed, sd=sd), seed, **facts) for seed in seeds
    ]


def say(recipes, paired=False):
    """What is said by recipe and test; what is said of all stands under None."""
    text = describe_verdicts(recipes, judge(recipes, paired))
    told, name = {}, None
    for line in text.splitlines():
        if found := re.fullmatch(r"\*\*(.+)\*\* against \*\*(.+)\*\*, in mIoU:", line):
            name = found[1]
        elif found := re.fullmatch(r"- (\w+) test: (.*)", line):
            told[name, found[1]] = found[2]
        elif line:
            told.setdefault(None, []).append(line)
    return told


def test_single_runs_allow_the_checkpoint_test_alone():
    one, other = recipe("a", 0.7, [0]), recipe("b", 0.75, [1])
    verdict = judge({"one": one, "other": other})["other"]
    expected = compare_checkpoints(one[0].counts, other[0].counts, SCENE)
    assert verdict.checkpoints.interval == expected.interval
    assert verdict.checkpoints.p_value == expected.p_value
    assert verdict.seeds is verdict.recipes is None
    assert np.isnan(verdict.recipe_p_value)
    assert verdict.compared == 0


@pytest.mark.parametrize("counts", [(1, 3), (3, 1)])
def test_one_run_on_either_side_is_one_run(counts):
    one, other = recipe("a", 0.7, range(counts[0])), recipe("b", 0.75, range(counts[1]))
    verdict = judge({"one": one, "other": other})["other"]
    assert verdict.seeds is verdict.recipes is None
    assert verdict.checkpoints is not None


def test_two_seeds_allow_all_tests():
    one, other = recipe("a", 0.7, [0, 1]), recipe("b", 0.75, [2, 3, 4])
    verdict = judge({"one": one, "other": other})["other"]
    assert verdict.checkpoints.difference == pytest.approx(other[0].score - one[0].score)
    expected = compare_seeds([run.score for run in one], [run.score for run in other])
    assert verdict.seeds.interval == expected.interval
    stacked = [np.stack([run.counts for run in side]) for side in (one, other)]
    expected = compare_recipes(*stacked, SCENE)
    assert verdict.recipes.interval == expected.interval
    assert verdict.recipe_p_value == verdict.recipes.p_value == expected.p_value
    assert verdict.compared == 1


def test_several_recipes_are_corrected_by_holm():
    recipes = {"base": recipe("a", 0.7, range(3))}
    for number in range(4):
        recipes[f"r{number}"] = recipe(f"r{number}-", 0.7 + 0.01 * number, range(3), draw=1 + number)
    recipes["one run"] = recipe("one", 0.9, [7])
    verdicts = judge(recipes)
    tested = [verdict for name, verdict in verdicts.items() if name != "one run"]
    raw = np.array([verdict.recipes.p_value for verdict in tested])
    np.testing.assert_array_equal([verdict.recipe_p_value for verdict in tested], holm(raw))
    assert (holm(raw) > raw).sum() >= 3
    assert {verdict.compared for verdict in verdicts.values()} == {4}  # what can't be tested costs nothing
    told = say(recipes)
    assert "; after Holm over 4 recipes p " in told["r0", "recipe"]
    assert "Holm over" not in say({name: recipes[name] for name in ("base", "r0", "one run")})["r0", "recipe"]


def test_holm_can_take_a_verdict_back():
    """Alone it is better, among twenty it is not: p lies between 0.05 and a twentieth of it."""
    base = recipe("a", 0.7, range(3))
    new = next(
        runs
        for runs in (recipe("b", 0.7 + step, range(3), draw=3) for step in np.arange(0.005, 0.1, 0.001))
        if 0.0025 < judge({"base": base, "new": runs})["new"].recipe_p_value < 0.04
    )
    others = {f"same{number}": recipe("c", 0.7, range(3), draw=10 + number) for number in range(19)}
    assert "**The recipe new is better.**" in say({"base": base, "new": new})["new", "recipe"]
    told = say({"base": base, "new": new} | others)
    assert "Inconclusive" in told["new", "recipe"]
    assert not any("is better" in test for test in told.values())


def test_pairs_are_made_of_seeds():
    one, other = recipe("a", 0.7, [3, 1, 2, 7]), recipe("b", 0.71, [1, 5, 3, 2])
    verdict = judge({"one": one, "other": other}, paired=True)["other"]
    sides = [np.stack([next(run.counts for run in side if run.parameters["seed"] == seed) for seed in (1, 2, 3)])
             for side in (one, other)]  # fmt: skip
    expected = compare_recipes(*sides, SCENE, paired=True)
    assert verdict.recipes.interval == expected.interval
    assert verdict.recipes.interval != judge({"one": one, "other": other})["other"].recipes.interval


def test_pairs_that_are_none():
    recipes = {"one": recipe("a", 0.7, [1, 2]), "other": recipe("b", 0.71, [2, 3])}
    verdict = judge(recipes, paired=True)["other"]
    assert verdict.recipes is None
    assert verdict.seeds is not None
    assert say(recipes, paired=True)["other", "recipe"].endswith(
        "needs two seeds or more that both have, when paired."
    )


def test_nothing_to_judge():
    assert judge({}) == judge({"one": recipe("a", 0.7, [0, 1])}) == {}
    assert describe_verdicts({}, {}) == "One recipe is no comparison: name runs of another one."


def test_an_effect_by_construction_is_found_by_all_tests():
    """More is found of every class, in every scene; scenes and seeds vary on top."""
    told = say({"low": recipe("a", 0.70, range(5)), "high": recipe("b", 0.76, range(5), draw=1)})
    assert told["high", "checkpoint"].startswith("the checkpoints b0 and a0, on scenes like these: +0.0")
    assert "They differ: b0 scores higher." in told["high", "checkpoint"]
    assert told["high", "seed"].endswith("They differ here, whatever the seed.")
    assert (
        "**The recipe high is better.** Classes that differ, after Holm: floor +0.0" in told["high", "recipe"]
    )
    told = say({"high": recipe("b", 0.76, range(5), draw=1), "low": recipe("a", 0.70, range(5))})
    assert "on scenes like these: -0.0" in told["low", "recipe"]
    assert "**The recipe high is better.**" in told["low", "recipe"]
    assert "They differ: b0 scores higher." in told["low", "checkpoint"]


def test_no_effect_is_not_found():
    """Equal recipes whose scenes vary alike for all seeds of one: of ten draws, at most two look different."""
    seen = {"checkpoint": 0, "seed": 0, "recipe": 0}
    for draw in range(10):
        told = say(
            {name: recipe(name, 0.7, range(3), draw=2 * draw + side) for side, name in enumerate("xy")}
        )
        seen["checkpoint"] += "They differ" in told["y", "checkpoint"]
        seen["seed"] += "They differ" in told["y", "seed"]
        seen["recipe"] += "is better" in told["y", "recipe"]
    assert max(seen["seed"], seen["recipe"]) <= 2
    assert seen["checkpoint"] <= 3  # checkpoints of one recipe may differ truly


def test_a_difference_on_these_images_need_not_hold_on_others():
    """One recipe is better in a few scenes and worse in others, whatever the seed: the seed test sees it, the recipe test does not say so."""
    lift = np.repeat(np.random.default_rng(8).permutation(np.linspace(-0.10, 0.17, SCENES)), 3)[:, None]

    def lifted(counts):
        truth = counts.sum(2)
        moved = np.rint(truth * lift).astype(np.int64)
        changed = counts.copy()
        changed[:, range(3), range(3)] += moved
        changed[:, range(3), [1, 2, 0]] -= moved
        return changed

    base = recipe("a", 0.7, range(5), sd=0.001)
    other = [
        scored(f"b{run.parameters['seed']}", lifted(run.counts), run.parameters["seed"] + 10)
        for run in recipe("b", 0.7, range(5), 1, 0.001)
    ]
    told = say({"base": base, "other": other})
    assert "They differ here, whatever the seed." in told["other", "seed"]
    assert "Inconclusive" in told["other", "recipe"]
    pooled = [[replace(run, image_fold=SCENE % 5) for run in side] for side in (base, other)]
    assert (
        ". More scenes help most: twice as many"
        in say({"base": pooled[0], "other": pooled[1]})["other", "recipe"]
    )
    assert (
        "More scenes help most, such as those of all five folds: twice as many would show 0.0"
        in told["other", "recipe"]
    )


def test_where_seeds_vary_most_more_seeds_are_advised():
    sides = [[scored(f"{name}{seed}", some_counts(rate, seed, sd=0.001), seed) for seed, rate in enumerate(rates)]
             for name, rates in (("a", (0.65, 0.70, 0.75)), ("b", (0.66, 0.71, 0.77)))]  # fmt: skip
    told = say({"base": sides[0], "other": sides[1]})
    assert re.search(
        r"Inconclusive: these runs would show a difference of 0\.\d+ or more\. More seeds help most: twice as many would show",
        told["other", "recipe"],
    )


def every_text():
    """What is said of many pairs: clear and unclear, few and many seeds, few scenes, unknown scenes."""
    for rate in (0.70, 0.71, 0.80):
        for runs in (1, 2, 3, 5):
            for facts in ({}, {"scene": None}, {"scene": SCENE // 2}, {"validation": "random"}):
                recipes = {
                    "one": recipe("a", 0.7, range(runs), **facts),
                    "other": recipe("b", rate, range(runs), 1, **facts),
                }
                yield runs, say(recipes)


def test_only_the_recipe_test_says_better_and_none_says_worse():
    better = 0
    for runs, told in every_text():
        for (name, test), text in ((key, text) for key, text in told.items() if key):
            assert name == "other"
            assert "worse" not in text
            if test != "recipe" or runs == 1:
                assert "better" not in text
            better += "better" in text
        if runs == 1:
            assert told["other", "seed"].endswith(
                "one run of a recipe cannot tell. Train both with further seeds under names of their own (`-p seed 1 -p run_name ..._1`)."
            )
            assert (
                told["other", "recipe"]
                == "the recipes, on scenes like these: needs two runs or more of each."
            )
    assert better >= 6


def test_how_many_seeds_is_a_bound_and_needs_five():
    found = []
    for spread in np.arange(0.005, 0.06, 0.005):
        rates = [0.7 + spread * step for step in (-1, -0.5, 0, 0.5, 1)]
        for runs in (3, 5):
            sides = [[scored(f"{name}{seed}", some_counts(rate + shift, seed, sd=0.001), seed)
                      for seed, rate in enumerate(rates[:runs])] for name, shift in (("a", 0), ("b", 0.01))]  # fmt: skip
            text = say({"one": sides[0], "other": sides[1]})["other", "seed"]
            if runs < 5:
                assert "seeds" not in text
            elif "Inconclusive" in text:
                found.append(
                    re.search(r"Inconclusive(?:: that takes (\d+) or more seeds of each)?\.$", text)[1]
                )
    told = [int(number) for number in found if number]
    assert told
    assert None in found  # fewer than there are would be no advice
    assert min(told) > 5


def test_too_few_scenes_give_no_verdict():
    few = np.arange(24) // 5  # five scenes
    told = say(
        {"one": recipe("a", 0.7, range(3), scene=few), "other": recipe("b", 0.8, range(3), 1, scene=few)}
    )
    for test in ("checkpoint", "recipe"):
        assert re.search(
            r"on scenes like these: \+0\.\d+, but no verdict: 5 scenes, at least 6 are needed\.$",
            told["other", test],
        )
    assert "They differ here" in told["other", "seed"]  # which asks for no other scenes


def test_equal_checkpoints_are_said_to_be():
    runs = [scored(name, some_counts()) for name in "ab"]
    assert say({"one": runs[:1], "other": runs[1:]})["other", "checkpoint"].endswith(
        "on scenes like these: no difference on any scene."
    )


def test_unknown_scenes_and_validation_random_are_said():
    def said(**facts):
        return say({"one": recipe("a", 0.7, [0], **facts), "other": recipe("b", 0.7, [1], **facts)}).get(
            None, []
        )

    assert said() == []
    (text,) = said(scene=None)
    assert text.startswith("The scenes of these images are unknown, so images were taken as independent")
    (text,) = said(validation="random")
    assert text == "Validation is `random`: all of this speaks of rooms that the networks were trained on."
    assert len(said(scene=None, validation="random")) == 2


def test_pooled_folds_allow_no_checkpoint_test():
    recipes = {
        "one": recipe("a", 0.7, range(2), image_fold=SCENE % 5),
        "other": recipe("b", 0.76, range(2), 1, image_fold=SCENE % 5),
    }
    verdict = judge(recipes)["other"]
    assert verdict.checkpoints is None
    assert verdict.seeds is not None
    told = say(recipes)
    assert (
        told["other", "checkpoint"]
        == "the checkpoints: not asked where folds are pooled, because each run is five of them."
    )
    assert "; cross-validated over five folds. **The recipe other is better.**" in told["other", "recipe"]
    assert told[None] == ["Cross-validated: this speaks of recipes trained on four fifths of these data."]


def test_numbers_of_scenes_are_rounded_to_two_digits():
    assert [verdicts._rounded(count) for count in (6, 12.3, 123.4, 12_345, 2e6, np.inf)] == [
        "6", "13", "120", "12,000", "a million", "a million",
    ]  # fmt: skip


def test_how_many_scenes_are_said_as_a_range():
    found = set()
    for step in np.arange(0, 0.02, 0.001):
        text = say({"one": recipe("a", 0.7, [0]), "other": recipe("b", 0.7 + step, [1])})[
            "other", "checkpoint"
        ]
        if "They differ" not in text:
            found.add(re.search(r"or more\. (.*?)\. Classes", text)[1])
    patterns = (
        r"To tell takes about \d+ to [\d,]+ scenes",
        r"To tell takes \d+ scenes or more",
        "How many it takes to tell can't be said yet",
    )
    assert found
    assert all(any(re.fullmatch(pattern, text) for pattern in patterns) for text in found)


def test_the_summary_says_what_the_strongest_test_says():
    base, better = recipe("a", 0.6, [0, 1, 2]), recipe("b", 0.8, [0, 1, 2])

    def summary(**others):
        recipes = {"base": base} | others
        return summarise_verdicts(recipes, judge(recipes)).splitlines()

    first, second = summary(other=better, same=base)
    assert re.fullmatch(
        r"- \*\*other\*\* is better than \*\*base\*\*: other minus base is \+0.\d+ mIoU "
        r"\(95 % interval \+.* to \+.*, p < 0.001 after Holm\)\.",
        first,
    )
    assert second.startswith(
        "- **same** and **base** are inconclusive: same minus base is +0.000 mIoU (95 % interval -0."
    )
    (alone,) = summary(one=better[:1])
    assert alone.startswith(
        "- This run of **one** scores higher than this one of **base**; further seeds would say more: "
    )
    few = [replace(run, scene=np.arange(len(run.names)) // 12) for run in (base[0], better[0])]
    (none,) = summarise_verdicts(
        {"a": few[:1], "b": few[1:]}, judge({"a": few[:1], "b": few[1:]})
    ).splitlines()
    assert none == "- No verdict on **b** and **a** yet."
    assert summarise_verdicts({"base": base}, {}) == "One recipe is no comparison."
