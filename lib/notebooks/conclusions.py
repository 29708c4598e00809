"""The verdicts: which claims runs allow, and what they come to in words."""

from dataclasses import dataclass

import numpy as np

from lib import significance
from lib.runs.results import ScoredRun
from lib.significance import CheckpointComparison, RecipeComparison, SceneComparison, SeedComparison


@dataclass(frozen=True)
class Verdict:
    """What can be said of a recipe (b) against the baseline (a); None where the runs do not allow a claim.

    Attributes:
        checkpoints: the checkpoint test, of the first run of each.
        seeds: the seed test.
        recipes: the recipe test.
        recipe_p_value: of the recipe test, after Holm over all recipes that are held against the baseline.
        compared: how many of these the runs allow to be tested.
    """

    checkpoints: CheckpointComparison | None
    seeds: SeedComparison | None
    recipes: RecipeComparison | None
    recipe_p_value: float
    compared: int

    @property
    def strongest(self) -> SceneComparison | None:
        """The claim over scenes that says most: the recipe test where there is one, else the checkpoint test."""
        return self.recipes or self.checkpoints


def judge(recipes: dict[str, list[ScoredRun]], paired: bool = False) -> dict[str, Verdict]:
    """Every recipe held against the first; if `paired`, runs of one seed belong together and others are left out."""
    (_, baseline), *others = recipes.items() if recipes else [(None, [])]
    crossed = {name: _crossed(baseline, members, paired) for name, members in others}
    p_values = significance.holm(
        [np.nan if result is None else result.p_value for result in crossed.values()]
    )
    verdicts = {}
    for (name, members), p_value in zip(others, p_values, strict=True):
        first, other, checkpoints, seeds = baseline[0], members[0], None, None
        if not first.is_pooled:
            checkpoints = significance.compare_checkpoints(first.counts, other.counts, first.scene)
        if min(len(baseline), len(members)) >= 2:
            seeds = significance.compare_seeds(*([run.score for run in side] for side in (baseline, members)))
        verdicts[name] = Verdict(
            checkpoints=checkpoints,
            seeds=seeds,
            recipes=crossed[name],
            recipe_p_value=float(p_value),
            compared=int(np.isfinite(p_values).sum()),
        )
    return verdicts


def _crossed(baseline: list[ScoredRun], members: list[ScoredRun], paired: bool) -> RecipeComparison | None:
    sides = baseline, members
    if paired:
        by_seed = [{run.parameters["seed"]: run for run in side} for side in sides]
        shared = sorted(by_seed[0].keys() & by_seed[1].keys())
        sides = [[side[seed] for seed in shared] for side in by_seed]
    if min(map(len, sides)) < 2:
        return None
    counts = (np.stack([run.counts for run in side]) for side in sides)
    return significance.compare_recipes(*counts, baseline[0].scene, paired)


def describe_verdicts(recipes: dict[str, list[ScoredRun]], verdicts: dict[str, Verdict]) -> str:
    """The three claims of every recipe against the first, each under its own name, with what to do next."""
    if not verdicts:
        return "One recipe is no comparison: name runs of another one."
    baseline, members = next(iter(recipes.items()))
    texts = [
        "\n".join((
            f"**{name}** against **{baseline}**, in mIoU:",
            "",
            f"- checkpoint test: {_say_checkpoints(verdict.checkpoints, members[0], recipes[name][0])}",
            f"- seed test: {_say_seeds(verdict.seeds, max(len(members), len(recipes[name])))}",
            f"- recipe test: {_say_recipes(verdict, name, baseline, members[0])}",
        ))
        for name, verdict in verdicts.items()
    ]  # fmt: skip
    return "\n\n".join((*texts, *_caveats(members[0])))


def summarise_verdicts(recipes: dict[str, list[ScoredRun]], verdicts: dict[str, Verdict]) -> str:
    """A sentence for each recipe: the result of the claim that says most."""
    lines = []
    for name, verdict in verdicts.items():
        result, baseline = verdict.strongest, next(iter(recipes))
        p_value = np.nan if result is None else verdict.recipe_p_value if verdict.recipes else result.p_value
        better, worse = (name, baseline) if result is not None and result.difference > 0 else (baseline, name)
        if np.isnan(p_value):
            text = f"No verdict on **{name}** and **{baseline}** yet"
        elif not _differs(p_value):
            text = f"**{name}** and **{baseline}** are inconclusive"
        elif verdict.recipes:
            text = f"**{better}** is better than **{worse}**"
        else:
            text = f"This run of **{better}** scores higher than this one of **{worse}**; further seeds would say more"
        if result is not None and not np.isnan(result.interval[0]):
            found = "95 % interval {:+.3f} to {:+.3f}, ".format(*result.interval) + _say_p(p_value)
            found += " after Holm" * (verdict.recipes is not None and verdict.compared > 1)
            text += f": {name} minus {baseline} is {result.difference:+.3f} mIoU ({found})"
        lines.append(f"- {text}.")
    return "\n".join(lines) or "One recipe is no comparison."


def _caveats(run: ScoredRun) -> list[str]:
    caveats = []
    if run.scene is None:
        caveats.append("The scenes of these images are unknown, so images were taken as independent; if several show "
                       "one scene, every interval above is too narrow.")  # fmt: skip
    if run.validation == "random":
        caveats.append(
            "Validation is `random`: all of this speaks of rooms that the networks were trained on."
        )
    if run.is_pooled:
        caveats.append("Cross-validated: this speaks of recipes trained on four fifths of these data.")
    return caveats


def _say(result: SceneComparison | SeedComparison) -> str:
    low, high = result.interval
    return f"{result.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, {_say_p(result.p_value)})"


def _say_p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _differs(p_value: float) -> bool:
    return p_value < 1 - significance.CONFIDENCE


def _say_checkpoints(result: CheckpointComparison | None, first: ScoredRun, other: ScoredRun) -> str:
    claim = f"the checkpoints {other.name} and {first.name}, on scenes like these: "
    if result is None:
        return "the checkpoints: not asked where folds are pooled, because each run is five of them."
    if nothing := _say_nothing(result):
        return claim + nothing
    text = f"{claim}{_say(result)}. "
    if _differs(result.p_value):
        text += f"They differ: {(other if result.difference > 0 else first).name} scores higher."
    else:
        shows = f"{result.scene_count} scenes would show a difference of {result.detectable:.3f} or more"
        text += f"Inconclusive: {shows}. {_say_needed(result)}"
    return text + _say_classes(result, first.classes)


def _say_nothing(result: SceneComparison) -> str:
    """Why there is nothing to tell over scenes, if so."""
    if np.isnan(result.p_value):
        found = f"{result.scene_count} scene{'s' * (result.scene_count != 1)}"
        return f"{result.difference:+.3f}, but no verdict: {found}, at least {significance.MIN_SCENES} are needed."
    return "no difference on any scene." if result.difference == result.detectable == 0 else ""


def _say_needed(result: CheckpointComparison) -> str:
    least, most = result.scenes_needed
    if np.isfinite(most):
        return f"To tell takes about {_rounded(least)} to {_rounded(most)} scenes."
    if least > result.scene_count:
        return f"To tell takes {_rounded(least)} scenes or more."
    return "How many it takes to tell can't be said yet."


def _say_classes(result: SceneComparison, classes: tuple[str, ...]) -> str:
    clear = [
        f"{name} {difference:+.3f}"
        for name, difference, p_value in zip(
            classes, result.class_difference, result.class_p_value, strict=True
        )
        if _differs(p_value)
    ]
    return f" Classes that differ, after Holm: {', '.join(clear) or 'none'}."


def _say_seeds(result: SeedComparison | None, runs: int) -> str:
    claim = "the recipes, on these very images: "
    if result is None:
        further = "Train both with further seeds under names of their own (`-p seed 1 -p run_name ..._1`)"
        return f"{claim}one run of a recipe cannot tell. {further}."
    text = f"{claim}{_say(result)}. "
    if _differs(result.p_value):
        return text + "They differ here, whatever the seed."
    least, _ = result.seeds_needed  # the interval holds 0, so there is no upper end
    takes = f": that takes {_rounded(least)} or more seeds of each" if least > runs else ""
    return f"{text}Inconclusive{takes}."


def _say_recipes(verdict: Verdict, name: str, baseline: str, first: ScoredRun) -> str:
    result, claim = verdict.recipes, "the recipes, on scenes like these: "
    if result is None:
        few = (
            "two runs or more of each"
            if verdict.seeds is None
            else "two seeds or more that both have, when paired"
        )
        return f"{claim}needs {few}."
    if nothing := _say_nothing(result):
        return claim + nothing
    text = f"{claim}{_say(result)}"
    if verdict.compared > 1:
        text += f"; after Holm over {verdict.compared} recipes {_say_p(verdict.recipe_p_value)}"
    text += "; cross-validated over five folds. " if first.is_pooled else ". "
    if _differs(verdict.recipe_p_value):
        text += f"**The recipe {name if result.difference > 0 else baseline} is better.**"
    else:
        shows = f"these runs would show a difference of {result.detectable:.3f} or more"
        text += f"Inconclusive: {shows}. {_say_next(result, first.is_pooled)}"
    return text + _say_classes(result, first.classes)


def _say_next(result: RecipeComparison, pooled: bool) -> str:
    """Whether seeds or scenes are the better buy."""
    if result.detectable_more_seeds <= result.detectable_more_scenes:
        return f"More seeds help most: twice as many would show {result.detectable_more_seeds:.3f}."
    source = "" if pooled else ", such as those of all five folds"
    return f"More scenes help most{source}: twice as many would show {result.detectable_more_scenes:.3f}."


def _rounded(count: float) -> str:
    """Two digits: more would pretend to know."""
    return f"{int(float(f'{np.ceil(count):.2g}')):,}" if count < 1e6 else "a million"
