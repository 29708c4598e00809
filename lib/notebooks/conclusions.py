"""Results of a comparison: a table, its details, what single runs allow, a conclusion; plans of new runs."""

import ast
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
import pandas as pd
import papermill
import yaml
from pandas.io.formats.style import Styler

from lib.data.validation import FOLDS
from lib.notebooks.plots import percent
from lib.runs.results import (
    NO_RECIPE,
    NOTEBOOKS,
    RUNS_FILE,
    ScoredRun,
    group_recipes,
    read_own,
    read_results,
    recipe,
)
from lib.significance import (
    LEVEL,
    MIN_SCENES,
    POWER,
    ROUNDING,
    CheckpointComparison,
    Comparison,
    Plan,
    RecipeComparison,
    SceneComparison,
    SeedComparison,
    compare_checkpoints,
    compare_recipes,
    compare_seeds,
    plan,
    pool_run_sd,
)

STUDIES = NOTEBOOKS / "studies"
NEW_SEEDS = 5  # of each recipe, where single runs ask for more
MOST_SEEDS = 100  # that a plan looks for
CHOSEN_BY_SWEEP = NO_RECIPE - {"fold"}
SIZE = ("image_height", "image_width")
COLUMNS = (
    "recipe",
    "against",
    "difference",
    "low",
    "high",
    "p",
    "comparisons",
    "scenes",
    "seeds",
    "conclusion",
)
UNTESTED = Comparison(  # where the runs allow no test
    difference=np.nan,
    interval=(np.nan, np.nan),
    p_value=np.nan,
    standard_error=np.nan,
    degrees_of_freedom=np.nan,
    comparisons=1,
)
TABLE_STYLES = [
    {
        "selector": "td, th",
        "props": "text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; "
        "min-width: 4em; max-width: 22em",
    },
    {"selector": "th", "props": "overflow-wrap: normal"},
    {"selector": "caption", "props": "caption-side: bottom; text-align: left"},
]


@dataclass(frozen=True)
class Spread:
    """How runs varied: what a plan of new runs needs.

    Attributes:
        run_sd: standard deviation over seeds of the mIoU on one fold, and its 95 % chi-square range.
        variance_per_scene: the largest of all comparisons; 0 where no variance over scenes was found.
        scenes, scene_degrees: that it was found on, and their degrees of freedom.
        folds: 5 where these are pooled, else 1.
        paired: whether runs of one seed belong together.
    """

    run_sd: tuple[float, float, float]
    variance_per_scene: float
    scenes: int
    scene_degrees: float
    folds: int
    paired: bool = False

    def plan(self, runs: float, which: int = 0) -> Plan:
        """The recipe test with so many runs of each recipe on as many scenes; `run_sd` itself by default."""
        return plan(
            runs,
            self.folds,
            self.scenes,
            self.run_sd[which],
            self.variance_per_scene,
            self.paired,
            self.scene_degrees,
        )

    def say_detectable(self, runs: float, comparisons: int) -> str:
        """The smallest detectable difference with its range, as `0.017 (0.014 to 0.023)`, in a clause."""
        found = [self.plan(runs, which).adjusted(comparisons).detectable for which in range(3)]
        numbers = "{:.3f} ({:.3f} to {:.3f}".format(*found)
        if not self.variance_per_scene:
            numbers += "; at least, as the difference did not vary detectably over scenes"
        return f"a true difference of {numbers}) would be found with 80 % power"

    def count_seeds(self, difference: float, comparisons: int, which: int = 0) -> int | None:
        """How many of each recipe find a true difference with 80 % power; None if more than 100."""
        for runs in range(2, MOST_SEEDS + 1):
            if self.plan(runs, which).adjusted(comparisons).power(difference) >= POWER:
                return runs
        return None

    def say_seeds(self, difference: float, comparisons: int) -> str:
        """The same with its range, as `about 17 seeds of each recipe (9 to 59)`."""
        found = [self.count_seeds(difference, comparisons, which) for which in range(3)]
        if found[0] is None:
            return f"more scenes, because {MOST_SEEDS} seeds are too few"
        middle, low, high = (f"more than {MOST_SEEDS}" if runs is None else runs for runs in found)
        return f"about {middle} seeds of each recipe ({low} to {high})"


@dataclass(frozen=True)
class Result:
    """One recipe compared with the baseline; tests are None where the runs don't allow them.

    Attributes:
        recipe, against: names.
        runs: numbers of runs, of the baseline and of the recipe.
        used_seeds: of all runs of both.
        pair: one run of each, of the same seed where there is one, for the checkpoint test.
        recipe_test, seed_test, checkpoint_test: each adjusted for the comparisons of its kind.
        spread: of the runs that the recipe test compares.
    """

    recipe: str
    against: str
    runs: tuple[int, int]
    pair: tuple[ScoredRun, ScoredRun]
    recipe_test: RecipeComparison | None = None
    seed_test: SeedComparison | None = None
    checkpoint_test: CheckpointComparison | None = None
    spread: Spread | None = None
    used_seeds: frozenset[int] = frozenset()

    @property
    def scene_count(self) -> int:
        """Where scenes are unknown, every image is taken as its own."""
        first = self.pair[0]
        return len(np.unique(first.names if first.scene is None else first.scene))

    @property
    def conclusion(self) -> str:
        """Of the recipe test."""
        test = self.recipe_test
        if min(self.runs) < 2:
            _, single = min(zip(self.runs, (self.against, self.recipe), strict=True))
            return (
                f"One run of {'each' if max(self.runs) == 1 else single}: "
                "nothing can be said about the recipes"
            )
        if self.scene_count < MIN_SCENES:
            return f"no result: {self.scene_count} scenes, at least {MIN_SCENES} are needed"
        if test is None:
            return "no result: a paired test needs two or more seeds that both recipes have"
        if test.p_value < LEVEL:
            return f"{self.recipe} is {'better' if test.difference > 0 else 'worse'}"
        if self.spread is None:
            return "inconclusive: no difference in any run on any scene"
        found = self.spread.say_detectable(harmonic_mean(self.runs), test.comparisons)
        within = " within each fold" if self.spread.folds > 1 else ""  # better known than that of a few means
        return f"inconclusive: if runs vary as these did{within}, {found}"


def run_tests(recipes: dict[str, list[ScoredRun]], paired: bool = False) -> dict[str, Result]:
    """Every recipe against the first; if `paired`, runs of one seed belong together, others are left out."""
    results = [_test(recipes, name, paired) for name in list(recipes)[1:]]
    for kind in ("recipe_test", "seed_test", "checkpoint_test"):
        tests = [getattr(result, kind) for result in results]
        tested = sum(test is not None for test in tests)
        results = [
            replace(result, **{kind: test and test.adjusted(tested)})
            for result, test in zip(results, tests, strict=True)
        ]
    return {result.recipe: result for result in results}


def _test(recipes: dict[str, list[ScoredRun]], name: str, paired: bool) -> Result:
    """The tests of a recipe against the first that the runs allow, not yet adjusted."""
    against, baseline = next(iter(recipes.items()))
    members = recipes[name]
    shared = match_seeds(baseline, members)
    first, other = shared[0] if shared else (baseline[0], members[0])
    sides = list(map(list, zip(*shared, strict=True))) if paired else [baseline, members]
    result = Result(name, against, (len(baseline), len(members)), (first, other))
    tests = {"used_seeds": frozenset(run.parameters["seed"] for run in (*baseline, *members))}
    if min(result.runs) >= 2:
        tests["seed_test"] = compare_seeds(*([run.score for run in side] for side in (baseline, members)))
    if result.scene_count >= MIN_SCENES and not first.is_pooled:
        tests["checkpoint_test"] = compare_checkpoints(first.counts, other.counts, first.scene)
    if result.scene_count >= MIN_SCENES and sides and min(map(len, sides)) >= 2:
        tests["runs"] = tuple(map(len, sides))
        tests["recipe_test"] = _compare_recipes(*sides, paired)
        tests["spread"] = measure_spread(dict(zip((against, name), sides, strict=True)), paired)
    return replace(result, **tests)


def match_seeds(baseline: list[ScoredRun], members: list[ScoredRun]) -> list[tuple[ScoredRun, ScoredRun]]:
    """Runs of both sides by seed, for the seeds that both have, in their order."""
    by_seed = [{run.parameters["seed"]: run for run in side} for side in (baseline, members)]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]


def _compare_recipes(
    baseline: list[ScoredRun], members: list[ScoredRun], paired: bool = False
) -> RecipeComparison:
    counts = (np.stack([run.counts for run in side]) for side in (baseline, members))
    return compare_recipes(*counts, baseline[0].scene, paired)


def measure_spread(recipes: dict[str, list[ScoredRun]], paired: bool = False) -> Spread | None:
    """How runs of these recipes varied; None where no recipe has two runs, or nothing varied over six scenes.

    If `paired`, of two recipes, whose runs belong together in their order.
    """
    sides = [runs for runs in recipes.values() if len(runs) > 1]
    tests = [_compare_recipes(*pair, paired) for pair in itertools.combinations(sides, 2)]
    if not tests or not max(test.standard_error for test in tests) > ROUNDING:
        return None
    scores = [_fold_scores(runs) for runs in sides]
    if paired:
        scores = [(scores[1] - scores[0]) / np.sqrt(2)]
    run_sd, limits = pool_run_sd([cell for folds in scores for cell in folds])
    return Spread(
        run_sd=(run_sd, *limits),
        variance_per_scene=max(test.scene_variance for test in tests) * tests[0].scene_count,
        scenes=tests[0].scene_count,
        scene_degrees=tests[0].scene_degrees_of_freedom,
        folds=len(scores[0]),
        paired=paired,
    )


def _fold_scores(runs: list[ScoredRun]) -> np.ndarray:
    """mIoU `(F, S)` on the images of each fold, or of the only one."""
    fold = runs[0].image_fold if runs[0].is_pooled else np.zeros(len(runs[0].names))
    return np.array([[run.select(fold == each).score for run in runs] for each in np.unique(fold)])


def result_table(results: dict[str, Result]) -> pd.DataFrame:
    """One row per comparison with the baseline, by the recipe test; NaN where the runs allow none.

    Columns: recipe, against, difference (recipe minus against, mIoU), low and high (95 %), p, comparisons
    (that these three are adjusted for), scenes, seeds, conclusion.
    """
    rows = []
    for result in results.values():
        test = result.recipe_test or UNTESTED
        found = (test.difference, *test.interval, test.p_value, test.comparisons, result.scene_count)
        rows.append((result.recipe, result.against, *found, _say_runs(result.runs), result.conclusion))
    return pd.DataFrame(rows, columns=COLUMNS)


def show_results(table: pd.DataFrame) -> Styler:
    """The table of `result_table` for a notebook; significant results are bold."""
    limits = {"difference": _say_number, "low": _say_number, "high": _say_number, "p": _say_p}
    bold = table.p.lt(LEVEL).map({True: "font-weight: bold", False: ""})
    caption = "The recipe test was not possible."
    if table.p.notna().any():
        adjusted = _say_adjusted(" Interval and p are ", table.comparisons.max())
        caption = (
            f"Recipe test. difference: mIoU of recipe minus against; low, high: its 95 % interval.{adjusted}"
        )
    return (
        table.style.format(limits, na_rep="")
        .hide(axis="index")
        .apply(lambda column: bold, subset=["conclusion"])
        .set_caption(caption)
        .set_table_styles(TABLE_STYLES)
    )


def describe_single_runs(results: dict[str, Result]) -> str:
    """What single runs allow: the checkpoint test, how much seeds alone change, a sweep that would answer."""
    texts = []
    for result in results.values():
        if min(result.runs) < 2:
            texts += [
                f"**{result.conclusion}.** Only checkpoints can be compared:",
                "",
                f"- {_say_checkpoints(result)}",
                *(f"- {text}" for text in _say_seed_pairs(*result.pair)),
                f"- {_say_sweep(result, NEW_SEEDS)}",
                "",
            ]
    return "\n".join(texts)


def describe_details(results: dict[str, Result]) -> str:
    """Below the table: classes, the seed test, the sources of variance, the checkpoint test, caveats."""
    texts = []
    for result in results.values():
        test = result.recipe_test
        if test:
            texts += [
                f"**{result.recipe}** against **{result.against}**:",
                "",
                f"- {_say_classes(test, result.pair[0].classes)}",
                f"- Seed test, on these very images: {_say_test(result.seed_test)}. {_say_variance(test)}",
                *([f"- {_say_checkpoints(result)}"] if result.checkpoint_test else []),
                "",
            ]
    if results and not texts:
        texts = ["No recipe test was possible.", ""]
    return "\n".join(texts + _caveats(results))


def conclude(results: dict[str, Result]) -> str:
    """For each recipe: what was found, what follows from it, what to do next."""
    lines = []
    for result in results.values():
        run = result.pair[0]
        each = " of each" if result.runs[0] == result.runs[1] else ""
        evidence = (
            f"{_say_runs(result.runs)} seeds{each}, {result.scene_count} scenes of {Path(run.data).name}, "
            f"split {run.split}"
        )
        test = result.recipe_test
        found, _, explained = result.conclusion.partition(": if ")
        lines += [
            f"- {result.recipe} against {result.against}: **{found}**.",
            *([f"  - Recipe test, {evidence}: {_say_test(test)}."] if test else []),
            *([f"  - If {explained}."] if explained else []),
            f"  - {_say_consequence(result)}",
        ]
    return "\n".join(lines) or "Only one recipe found: there is nothing to compare."


def describe_plan(runs: dict[str, dict], split: str, paired: bool = False) -> str:
    """What a sweep, parameters by run name, can find if runs vary like earlier ones on this data and size."""
    parameters = list(runs.values())
    seeds = len({each["seed"] for each in parameters})
    comparisons = len({recipe(each) for each in parameters}) - 1
    folds = FOLDS if {each["fold"] for each in parameters} >= set(range(FOLDS)) else 1
    for source, earlier in find_earlier(parameters[0], split).items():
        spread = _expect_spread(earlier, folds, paired)
        if spread and spread.scenes >= MIN_SCENES and seeds >= 2 and comparisons >= 1:
            return (
                f"{seeds} seeds of each recipe, {spread.scenes} scenes{_say_adjusted(', ', comparisons)}: if "
                f"runs vary as those in {source} did, {spread.say_detectable(seeds, comparisons)}."
            )
    return (
        "No plan: a plan needs two recipes, two seeds, and earlier runs with several seeds on this data "
        f"at this image size, scored on {MIN_SCENES} scenes or more."
    )


def _expect_spread(earlier: list[ScoredRun], folds: int, paired: bool) -> Spread | None:
    """That of earlier runs, on the scenes of so many folds; None where they can't be compared."""
    try:
        spread = measure_spread(group_recipes(earlier))
    except ValueError:  # such as a seed twice, or single runs of several folds
        return None
    if spread is None:
        return None
    share = folds / spread.folds
    return replace(
        spread,
        folds=folds,
        scenes=round(share * spread.scenes),
        scene_degrees=share * spread.scene_degrees,
        paired=paired,
    )


def find_earlier(parameters: dict, split: str) -> dict[str, list[ScoredRun]]:
    """Scored runs on the same data at the same image size, by where they are: studies, then own runs."""
    studies = sorted(STUDIES.glob(f"*/{RUNS_FILE}"))
    sources = {f"studies/{path.parent.name}": read_results(path.parent) for path in studies}
    sources["earlier runs"] = read_own(split, parameters["data"])
    wanted = _setting(parameters, split, parameters["data"])
    return {
        source: [run for run in runs if _setting(run.parameters, run.split, run.data) == wanted]
        for source, runs in sources.items()
    }


def _setting(parameters: dict, split: str, data: str) -> tuple:
    """What runs must share for one to say how the other may vary."""
    return (split, Path(data).name, *(parameters.get(name) for name in SIZE))


def name_run(run: ScoredRun, recipe_name: str) -> str:
    """What differs and the seed, such as `learning_rate 0.003, seed 10`."""
    return f"{recipe_name}, {run.name}" if run.is_pooled else f"{recipe_name}, seed {run.parameters['seed']}"


def _say_seed_pairs(first: ScoredRun, run: ScoredRun) -> list[str]:
    """How often runs of one recipe differ by as much as these two; nothing where there are no such runs."""
    cells = {}
    for each in itertools.chain(*find_earlier(run.parameters, run.split).values()):
        cell = recipe(each.parameters), each.parameters.get("fold")
        cells.setdefault(cell, {})[each.name] = each  # once, also where a study has it too
    pairs = [pair for cell in cells.values() for pair in itertools.combinations(cell.values(), 2)]
    others = [pair for pair in pairs if {each.name for each in pair} != {first.name, run.name}]
    if not others:
        return []
    difference = run.score - first.score
    larger = sum(abs(a.score - b.score) >= abs(difference) for a, b in others)
    count = sum(len(cell) for cell in cells.values() if len(cell) > 1)
    size = " x ".join(str(run.parameters[name]) for name in SIZE)
    return [
        f"Seeds alone: of {len(others)} other pairs of runs of one recipe and fold that differ only in the "
        f"seed, {larger} {'differs' if larger == 1 else 'differ'} by at least as much as these two "
        f"({_say_number(difference)} mIoU; {count} runs on {Path(run.data).name}, {size} pixels, split "
        f"{run.split}). This is no p-value: the pairs share runs, and these recipes may vary more."
    ]


def read_defaults() -> dict[str, object]:
    """The parameters of `train.ipynb`."""
    declared = papermill.inspect_notebook(str(NOTEBOOKS / "train.ipynb"))
    return {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}


def _say_sweep(result: Result, count: int) -> str:
    """The sweep that trains new seeds of both recipes; two where a grid would make other recipes, too."""
    first, other = result.pair
    sides = [run.parameters for run in result.pair]
    if recipe(sides[0]) == recipe(sides[1]):
        return "Both runs have the same parameters but the seed: they are one recipe, not two to compare."
    if any("recipe" in parameters for parameters in sides):
        return "To compare the recipes, score predictions of two or more seeds of each with `evaluate.ipynb`."
    defaults = {name: value for name, value in read_defaults().items() if name not in CHOSEN_BY_SWEEP}
    sides = [{name: side.get(name, value) for name, value in defaults.items()} for side in sides]
    grid = {name: [side[name] for side in sides] for name in defaults if sides[0][name] != sides[1][name]}
    fixed = {name: value for name, value in sides[0].items() if name not in grid and value != defaults[name]}
    folds = {"fold": list(range(FOLDS))} if first.is_pooled else {}
    sweeps = [{"fixed": fixed, "grid": grid | folds}]
    after = "It first says what difference these runs can find; its last cell has the conclusion."
    if len(grid) > 1:
        sweeps = [{"fixed": fixed | {name: side[name] for name in grid}, "grid": folds} for side in sides]
        after = "Then compare the new runs with `compare.ipynb`."
    used = result.used_seeds
    shared = {"seeds": sorted(set(range(1, count + len(used) + 1)) - used)[:count], "split": first.split}
    texts = [
        yaml.safe_dump(sweep | shared, default_flow_style=True, width=10**6, sort_keys=False).strip()
        for sweep in sweeps
    ]
    commands = " and ".join(f'`papermill sweep.ipynb sweep.out.ipynb -y "{text}"`' for text in texts)
    runs = 2 * count * (FOLDS if first.is_pooled else 1)
    seconds = [run.history.seconds.sum() for run in (first, other) if run.history is not None]
    time = f", about {runs * np.mean(seconds) / 60:.0f} minutes if run in sequence" if seconds else ""
    return f"To compare the recipes, train {count} new seeds of each, {runs} runs{time}: {commands}. {after}"


def _say_consequence(result: Result) -> str:
    """What follows from the recipe test, or what would make one."""
    test = result.recipe_test
    if test is None:
        return "\n  - ".join([*_say_seed_pairs(*result.pair), _say_sweep(result, NEW_SEEDS)])
    if test.p_value < LEVEL:
        better = result.recipe if test.difference > 0 else result.against
        return (
            f"By mIoU, prefer {better}.{_say_confounded(result)} This holds for new seeds and scenes like "
            "these, with networks trained on the same images; not for other data, image sizes or settings, "
            "such as more epochs."
        )
    if result.spread is None:
        return "Every run has the same confusion matrices: check whether one run is listed twice."
    low, high = map(_say_number, test.interval)
    scenes = (
        ""
        if test.scene_variance
        else " The difference did not vary detectably over scenes, so this interval may be too narrow for "
        "new scenes."
    )
    return (
        f"Inconclusive does not mean equal: true differences from {low} to {high} are compatible with these "
        f"runs.{scenes}\n  - {_say_more_seeds(result)}"
    )


def _say_confounded(result: Result) -> str:
    """Nothing where one parameter differs; parameters that only one recipe has don't count."""
    sides = [dict(recipe(run.parameters)) for run in result.pair]
    differing = [name for name in sides[0] if name in sides[1] and sides[0][name] != sides[1][name]]
    if len(differing) < 2:
        return ""
    changes = " and ".join(f"{name} ({sides[1][name]} against {sides[0][name]})" for name in differing)
    return f" The recipes differ in {changes}; the difference may be due to any of these."


def _say_more_seeds(result: Result) -> str:
    """What would find half of the difference that these runs can find."""
    test, spread = result.recipe_test, result.spread
    aim = spread.plan(harmonic_mean(result.runs)).adjusted(test.comparisons).detectable / 2
    count = spread.count_seeds(aim, test.comparisons)
    sweep = f" {_say_sweep(result, count)}" if count else ""
    return (
        f"To find a true difference of {aim:.3f} (half of what these runs can find) with 80 % power takes "
        f"{spread.say_seeds(aim, test.comparisons)}; ranges are in brackets, because few seeds show only "
        f"roughly how much runs vary.{sweep} Fix the number before the first run: adding seeds until "
        "p < 0.05 can find differences that do not exist."
    )


def _say_classes(test: SceneComparison, classes: tuple[str, ...]) -> str:
    differences = zip(classes, test.class_difference, test.class_p_value, strict=True)
    significant = [f"{name} {_say_number(difference)}" for name, difference, p in differences if p < LEVEL]
    tested = np.isfinite(test.class_p_value).sum()
    listed = f"{', '.join(significant)}; the others are inconclusive" if significant else "none"
    return f"Significant classes (difference in IoU, Bonferroni-adjusted for {tested}): {listed}."


def _say_variance(test: RecipeComparison) -> str:
    if not test.scene_variance:
        return (
            "The recipe test equals it, because the difference did not vary detectably over scenes; it may "
            "still vary."
        )
    share = test.seed_variance / (test.seed_variance + test.scene_variance)
    return (
        f"With these numbers of seeds and scenes, {percent(share)} of the variance of the difference is "
        "due to seeds, the rest to scenes."
    )


def _say_checkpoints(result: Result) -> str:
    test = result.checkpoint_test
    if test is None:
        return f"No checkpoint test: it needs {MIN_SCENES} scenes or more, and runs of one fold."
    against, recipe_run = map(name_run, result.pair, (result.against, result.recipe))
    differ = (
        "these two networks differ on scenes like these. Two seeds of one recipe may, too, so this is no "
        "evidence about the recipes"
        if test.p_value < LEVEL
        else "inconclusive"
    )
    return (
        f"Checkpoint test, not about recipes ({recipe_run}, against {against}; {test.scene_count} scenes): "
        f"{_say_test(test)}: {differ}."
    )


def _say_test(test: Comparison) -> str:
    low, high = map(_say_number, test.interval)
    p_value = _say_p(test.p_value)
    p_value = p_value if p_value[0] in "<≥" else f"= {p_value}"
    adjusted = _say_adjusted("; ", test.comparisons)
    return f"{_say_number(test.difference)} mIoU (95 % interval {low} to {high}, p {p_value}{adjusted})"


def _say_adjusted(before: str, comparisons: int) -> str:
    return f"{before}Bonferroni-adjusted for {comparisons} comparisons" if comparisons > 1 else ""


def _say_number(value: float) -> str:
    """Three decimals, or one digit of what is smaller."""
    return f"{value + 0.0:+.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:+.1g}"


def _say_p(p_value: float) -> str:
    """Three decimals; next to the level, the side of it."""
    if p_value < 0.001:
        return "< 0.001"
    if round(p_value, 3) == LEVEL:
        return "< 0.05" if p_value < LEVEL else "≥ 0.05"
    return f"{p_value:.3f}"


def _say_runs(runs: tuple[int, int]) -> str:
    return str(runs[0]) if runs[0] == runs[1] else f"{runs[1]} and {runs[0]}"


def _caveats(results: dict[str, Result]) -> list[str]:
    runs = [run for result in results.values() for run in result.pair]
    few_seeds = [each for each in results.values() if each.recipe_test and min(each.runs) == 2]
    caveats = [
        (
            any(run.scene is None for run in runs),
            "The scenes of these images are unknown, so images were treated as independent. If several "
            "images show the same scene, every interval is too narrow.",
        ),
        (
            any(run.validation == "random" for run in runs),
            "Validation is `random`: the results hold only for rooms that the networks were trained on.",
        ),
        (
            any(run.is_pooled for run in runs),
            "Pooled over five folds: the results hold for networks trained on four fifths of these scenes.",
        ),
        (
            len(few_seeds) > 2,
            "Two seeds are too few for this many comparisons: in simulations, up to 10 % of such studies "
            "found a nonexistent difference, instead of 5 %. Use three or more seeds.",
        ),
    ]
    return [caveat for applies, caveat in caveats if applies]
