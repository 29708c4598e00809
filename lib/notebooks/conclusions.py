"""Compare recipes with a baseline, describe the results in tables and Markdown, and plan new runs."""

import ast
import itertools
import shlex
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
    NON_RECIPE_PARAMETERS,
    NOTEBOOKS,
    RUNS_FILE,
    ScoredRun,
    group_recipes,
    read_own_runs,
    read_results,
    recipe,
)
from lib.significance import (
    LEVEL,
    MIN_SCENES,
    POWER,
    TOLERANCE,
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
NEW_SEEDS = 5  # per recipe, suggested if no recipe test is possible
MAX_SEEDS = 100  # upper limit in the search for a number of seeds
SET_BY_SWEEP = NON_RECIPE_PARAMETERS - {"fold"}
SIZE_PARAMETERS = ("image_height", "image_width")
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
UNTESTED = Comparison(  # placeholder if the runs do not allow a test
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
    """Variation between runs, from which new runs are planned.

    Attributes:
        run_sd: standard deviation over seeds of the mIoU on one fold, then the lower and upper end of its
            95 % chi-square interval; if `paired`, those of the difference divided by the square root of 2.
        variance_per_scene: the largest over all pairs of recipes; 0 if no variance over scenes was detected.
        scenes: number of scenes.
        scene_degrees: degrees of freedom over scenes.
        folds: 5 if folds are pooled, else 1.
        paired: whether runs of both recipes with the same seed form pairs.
    """

    run_sd: tuple[float, float, float]
    variance_per_scene: float
    scenes: int
    scene_degrees: float
    folds: int
    paired: bool = False

    def plan(self, runs: float, bound: int = 0) -> Plan:
        """Plan the recipe test for this number of runs per recipe on the same number of scenes.

        `bound` is the index into `run_sd`: 0 is the estimate, 1 and 2 are the ends of its interval.
        """
        return plan(
            runs,
            self.folds,
            self.scenes,
            self.run_sd[bound],
            self.variance_per_scene,
            self.paired,
            self.scene_degrees,
        )

    def detectable(self, runs: float, comparisons: int) -> list[float]:
        """Return the smallest detectable difference and the ends of its range.

        They can be infinite if one scene has most of the images.
        """
        return [self.plan(runs, index).adjusted(comparisons).detectable for index in range(3)]

    def describe_detectable(self, runs: float, comparisons: int) -> str:
        """Describe the smallest detectable difference and its range, such as `0.017 (0.014 to 0.023)`."""
        numbers = "{:.3f} ({:.3f} to {:.3f}".format(*self.detectable(runs, comparisons))
        if not self.variance_per_scene:
            numbers += "; at least, as the difference did not vary detectably over scenes"
        return f"a true difference of {numbers}) would be found with 80 % power"

    def required_seeds(self, difference: float, comparisons: int, bound: int = 0) -> int | None:
        """Return the number of seeds per recipe that gives 80 % power; None if it is more than 100."""
        for runs in range(2, MAX_SEEDS + 1):
            if self.plan(runs, bound).adjusted(comparisons).power(difference) >= POWER:
                return runs
        return None

    def describe_seeds(self, difference: float, comparisons: int) -> str:
        """Describe the number from `required_seeds`, such as `about 17 seeds of each recipe (9 to 59)`."""
        seed_counts = [self.required_seeds(difference, comparisons, index) for index in range(3)]
        if seed_counts[0] is None:
            return f"more scenes, because {MAX_SEEDS} seeds are too few"
        estimate, low, high = (f"more than {MAX_SEEDS}" if runs is None else runs for runs in seed_counts)
        return f"about {estimate} seeds of each recipe ({low} to {high})"


@dataclass(frozen=True)
class Result:
    """Comparison of one recipe with the baseline. A test is None if the runs do not allow it.

    Attributes:
        recipe: name of the recipe.
        against: name of the baseline.
        runs: number of runs of the baseline and of the recipe; those in the recipe test, if there is one.
        pair: one run of the baseline and one of the recipe, with the same seed if possible, for the
            checkpoint test.
        recipe_test, seed_test, checkpoint_test: test results, each adjusted for the number of comparisons of
            its kind.
        spread: variation between the runs in the recipe test; None without this test or if nothing varies.
        used_seeds: seeds of all runs of both.
        paired: whether runs with the same seed form pairs in the recipe test.
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
    paired: bool = False

    @property
    def scene_count(self) -> int:
        """Number of scenes; if scenes are unknown, the number of images."""
        first = self.pair[0]
        return len(np.unique(first.names if first.scene is None else first.scene))

    @property
    def is_unbalanced(self) -> bool:
        """Whether no difference is detectable, because one scene has most of the images."""
        return np.isinf(self.spread.detectable(harmonic_mean(self.runs), self.recipe_test.comparisons)).any()

    @property
    def conclusion(self) -> str:
        """Conclusion of the recipe test, or the reason why there is none."""
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
        if self.is_unbalanced:
            return "no result: one scene has most of the images"
        detectable = self.spread.describe_detectable(harmonic_mean(self.runs), test.comparisons)
        # the spread within folds is estimated more precisely than that of a few means over folds
        within = " within each fold" if self.spread.folds > 1 else ""
        return f"inconclusive: if runs vary as these did{within}, {detectable}"


def run_tests(recipes: dict[str, list[ScoredRun]], paired: bool = False) -> dict[str, Result]:
    """Test every recipe against the first one and return the adjusted results by recipe.

    If `paired`, runs with the same seed form pairs in the recipe test, and runs without a partner are left
    out of it.
    """
    results = [_test_recipe(recipes, name, paired) for name in list(recipes)[1:]]
    for kind in ("recipe_test", "seed_test", "checkpoint_test"):
        tests = [getattr(result, kind) for result in results]
        test_count = sum(test is not None for test in tests)
        results = [
            replace(result, **{kind: test and test.adjusted(test_count)})
            for result, test in zip(results, tests, strict=True)
        ]
    return {result.recipe: result for result in results}


def _test_recipe(recipes: dict[str, list[ScoredRun]], name: str, paired: bool) -> Result:
    """Perform the tests of a recipe against the first one that the runs allow, without adjustment."""
    against, baseline = next(iter(recipes.items()))
    members = recipes[name]
    pairs = match_seeds(baseline, members)
    first, other = pairs[0] if pairs else (baseline[0], members[0])
    sides = list(map(list, zip(*pairs, strict=True))) if paired else [baseline, members]
    result = Result(name, against, (len(baseline), len(members)), (first, other), paired=paired)
    fields = {"used_seeds": frozenset(run.parameters["seed"] for run in (*baseline, *members))}
    if min(result.runs) >= 2:
        fields["seed_test"] = compare_seeds(*([run.score for run in side] for side in (baseline, members)))
    if result.scene_count >= MIN_SCENES and not first.is_pooled:
        fields["checkpoint_test"] = compare_checkpoints(first.counts, other.counts, first.scene)
    if result.scene_count >= MIN_SCENES and sides and min(map(len, sides)) >= 2:
        fields["runs"] = tuple(map(len, sides))
        fields["recipe_test"] = _compare_recipes(*sides, paired)
        fields["spread"] = measure_spread(dict(zip((against, name), sides, strict=True)), paired)
    return replace(result, **fields)


def match_seeds(baseline: list[ScoredRun], members: list[ScoredRun]) -> list[tuple[ScoredRun, ScoredRun]]:
    """Return the pairs of a baseline run and another run with the same seed, sorted by seed."""
    by_seed = [{run.parameters["seed"]: run for run in side} for side in (baseline, members)]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]


def _compare_recipes(
    baseline: list[ScoredRun], members: list[ScoredRun], paired: bool = False
) -> RecipeComparison:
    counts = (np.stack([run.counts for run in side]) for side in (baseline, members))
    return compare_recipes(*counts, baseline[0].scene, paired)


def measure_spread(recipes: dict[str, list[ScoredRun]], paired: bool = False) -> Spread | None:
    """Measure the variation between the runs of each recipe that has at least two runs.

    If `paired`, there are two recipes, and their runs form pairs in the given order.

    Returns:
        The spread; None if fewer than two recipes have two runs, there are fewer than 6 scenes, or nothing
        varies.
    """
    sides = [runs for runs in recipes.values() if len(runs) > 1]
    tests = [_compare_recipes(*pair, paired) for pair in itertools.combinations(sides, 2)]
    if not tests or not max(test.standard_error for test in tests) > TOLERANCE:
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
    """Return the `(F, S)` mIoU of each run on the images of each fold; F is 1 if folds are not pooled."""
    folds = runs[0].image_fold if runs[0].is_pooled else np.zeros(len(runs[0].names))
    return np.array([[run.select(folds == fold).score for run in runs] for fold in np.unique(folds)])


def result_table(results: dict[str, Result]) -> pd.DataFrame:
    """Return the results of the recipe test, one row per comparison; NaN if the runs do not allow the test.

    Columns: recipe, against, difference (mIoU of recipe minus against), low and high (95 % interval), p,
    comparisons (number for which low, high and p are adjusted), scenes, seeds, conclusion.
    """
    rows = []
    for result in results.values():
        test = result.recipe_test or UNTESTED
        numbers = (test.difference, *_clip(test.interval), test.p_value, test.comparisons, result.scene_count)
        rows.append((result.recipe, result.against, *numbers, _format_runs(result.runs), result.conclusion))
    return pd.DataFrame(rows, columns=COLUMNS)


def show_results(table: pd.DataFrame) -> Styler:
    """Format the table from `result_table` for a notebook, with significant conclusions in bold."""
    formats = {"difference": _format_number, "low": _format_number, "high": _format_number, "p": _format_p}
    bold = table.p.lt(LEVEL).map({True: "font-weight: bold", False: ""})
    caption = "The recipe test was not possible."
    if table.p.notna().any():
        adjustment = _describe_adjustment(" Interval and p are ", table.comparisons.max())
        caption = (
            "Recipe test. difference: mIoU of recipe minus against; low, high: its 95 % interval."
            f"{adjustment}"
        )
    return (
        table.style.format(formats, na_rep="")
        .hide(axis="index")
        .apply(lambda column: bold, subset=["conclusion"])
        .set_caption(caption)
        .set_table_styles(TABLE_STYLES)
    )


def describe_single_runs(results: dict[str, Result]) -> str:
    """Describe comparisons of single runs: checkpoint test, effect of seeds alone, and a suggested sweep."""
    texts = []
    for result in results.values():
        if min(result.runs) < 2:
            texts += [
                f"**{result.conclusion}.** Only checkpoints can be compared:",
                "",
                f"- {_describe_checkpoints(result)}",
                *(f"- {text}" for text in _describe_seed_pairs(*result.pair)),
                f"- {_describe_sweep(result, NEW_SEEDS)}",
                "",
            ]
    return "\n".join(texts)


def describe_details(results: dict[str, Result]) -> str:
    """Describe the details of each recipe test: classes, seed test, variance, checkpoint test, caveats."""
    texts = []
    for result in results.values():
        test = result.recipe_test
        if test:
            texts += [
                f"**{result.recipe}** against **{result.against}**:",
                "",
                f"- {_describe_classes(test, result.pair[0].classes)}",
                f"- Seed test, on these very images: {_describe_test(result.seed_test)}. "
                f"{_describe_variance(test, result.paired)}",
                *([f"- {_describe_checkpoints(result)}"] if result.checkpoint_test else []),
                "",
            ]
    if results and not texts:
        texts = ["No recipe test was possible.", ""]
    return "\n".join(texts + _list_caveats(results))


def conclude(results: dict[str, Result]) -> str:
    """Summarise each comparison: the result, its consequence and the next step."""
    lines = []
    for result in results.values():
        run = result.pair[0]
        of_each = " of each" if result.runs[0] == result.runs[1] else ""
        evidence = (
            f"{_format_runs(result.runs)} seeds{of_each}, {result.scene_count} scenes of "
            f"{Path(run.data).name}, split {run.split}"
        )
        test = result.recipe_test
        verdict, _, explanation = result.conclusion.partition(": if ")
        lines += [
            f"- {result.recipe} against {result.against}: **{verdict}**.",
            *([f"  - Recipe test, {evidence}: {_describe_test(test)}."] if test else []),
            *([f"  - If {explanation}."] if explanation else []),
            f"  - {_describe_consequence(result)}",
        ]
    return "\n".join(lines) or "Only one recipe found: there is nothing to compare."


def describe_plan(runs: dict[str, dict], split: str, paired: bool = False) -> str:
    """Describe the smallest difference that a planned sweep can detect.

    Runs are assumed to vary like earlier runs on the same data at the same image size.

    Args:
        runs: parameters of the planned runs by run name.
        split: split on which they will be scored.
        paired: whether runs of both recipes with the same seed form pairs.
    """
    parameters = list(runs.values())
    seeds = len({run["seed"] for run in parameters})
    comparisons = len({recipe(run) for run in parameters}) - 1
    folds = FOLDS if {run["fold"] for run in parameters} >= set(range(FOLDS)) else 1
    for source, earlier_runs in find_earlier(parameters[0], split).items():
        spread = _rescale_spread(earlier_runs, folds, paired)
        if not spread or spread.scenes < MIN_SCENES or seeds < 2 or comparisons < 1:
            continue
        if np.isfinite(spread.detectable(seeds, comparisons)).all():
            return (
                f"{seeds} seeds of each recipe, {spread.scenes} scenes"
                f"{_describe_adjustment(', ', comparisons)}: if runs vary as those in {source} did, "
                f"{spread.describe_detectable(seeds, comparisons)}."
            )
    return (
        "No plan: a plan needs two recipes, two seeds, and earlier runs with several seeds on this data "
        f"at this image size, scored on {MIN_SCENES} scenes or more, none of which has most of the images."
    )


def _rescale_spread(earlier_runs: list[ScoredRun], folds: int, paired: bool) -> Spread | None:
    """Return the spread of earlier runs, scaled to this number of folds; None if it can't be measured."""
    try:
        spread = measure_spread(group_recipes(earlier_runs))
    except ValueError:  # for example a repeated seed, or single runs of several folds
        return None
    if spread is None:
        return None
    factor = folds / spread.folds
    return replace(
        spread,
        folds=folds,
        scenes=round(factor * spread.scenes),
        scene_degrees=factor * spread.scene_degrees,
        paired=paired,
    )


def find_earlier(parameters: dict, split: str) -> dict[str, list[ScoredRun]]:
    """Find scored runs on the same split, data and image size, by source: studies, then your own runs."""
    studies = sorted(STUDIES.glob(f"*/{RUNS_FILE}"))
    sources = {f"studies/{path.parent.name}": read_results(path.parent) for path in studies}
    sources["earlier runs"] = read_own_runs(split, parameters["data"])
    key = _data_key(parameters, split, parameters["data"])
    return {
        source: [run for run in runs if _data_key(run.parameters, run.split, run.data) == key]
        for source, runs in sources.items()
    }


def _data_key(parameters: dict, split: str, data: str) -> tuple:
    """Return the settings that runs must share to predict each other's variation."""
    return (split, Path(data).name, *(parameters.get(name) for name in SIZE_PARAMETERS))


def name_run(run: ScoredRun, recipe_name: str) -> str:
    """Return the recipe and seed of a run, such as `learning_rate 0.003, seed 10`."""
    return f"{recipe_name}, {run.name}" if run.is_pooled else f"{recipe_name}, seed {run.parameters['seed']}"


def _describe_seed_pairs(first: ScoredRun, second: ScoredRun) -> list[str]:
    """Describe how often runs of one recipe differ at least as much as these two; empty without such runs.

    It is also empty for runs pooled over folds, because single folds vary more.
    """
    if first.is_pooled:
        return []
    cells = {}
    for run in itertools.chain(*find_earlier(second.parameters, second.split).values()):
        cell, seed = _cell_and_seed(run)
        cells.setdefault(cell, {})[seed] = run  # counted once, even if it has two names or is in a study too
    pairs = [pair for runs in cells.values() for pair in itertools.combinations(runs.values(), 2)]
    these = {_cell_and_seed(first), _cell_and_seed(second)}
    others = [pair for pair in pairs if set(map(_cell_and_seed, pair)) != these]
    if not others:
        return []
    difference = second.score - first.score
    larger = sum(abs(a.score - b.score) >= abs(difference) for a, b in others)
    run_count = sum(len(runs) for runs in cells.values() if len(runs) > 1)
    sizes = [str(second.parameters[name]) for name in SIZE_PARAMETERS if second.parameters.get(name)]
    size = f", {' x '.join(sizes)} pixels" if sizes else ""  # unknown for external predictions
    return [
        f"Seeds alone: of {len(others)} other pairs of runs of one recipe and fold that differ only in the "
        f"seed, {larger} {'differs' if larger == 1 else 'differ'} by at least as much as these two "
        f"({_format_number(difference)} mIoU; {run_count} runs on {Path(second.data).name}{size}, "
        f"split {second.split}). This is no p-value: the pairs share runs, and these recipes may vary more."
    ]


def _cell_and_seed(run: ScoredRun) -> tuple:
    """Return the recipe and fold of a run, and its seed."""
    return (recipe(run.parameters), run.parameters.get("fold")), run.parameters["seed"]


def read_defaults() -> dict[str, object]:
    """Return the default parameters of `train.ipynb`."""
    declared = papermill.inspect_notebook(str(NOTEBOOKS / "train.ipynb"))
    return {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()}


def _describe_sweep(result: Result, count: int) -> str:
    """Describe a sweep that trains `count` new seeds of both recipes.

    If the recipes differ in several parameters, two sweeps are described, because the grid of a single sweep
    would contain further recipes.
    """
    first, other = result.pair
    sides = [run.parameters for run in result.pair]
    if recipe(sides[0]) == recipe(sides[1]):
        return "Both runs have the same parameters but the seed: they are one recipe, not two to compare."
    if any("recipe" in parameters for parameters in sides):
        return "To compare the recipes, score predictions of two or more seeds of each with `evaluate.ipynb`."
    defaults = {name: value for name, value in read_defaults().items() if name not in SET_BY_SWEEP}
    sides = [{name: side.get(name, value) for name, value in defaults.items()} for side in sides]
    grid = {name: [side[name] for side in sides] for name in defaults if sides[0][name] != sides[1][name]}
    fixed = {name: value for name, value in sides[0].items() if name not in grid and value != defaults[name]}
    folds = {"fold": list(range(FOLDS))} if first.is_pooled else {}
    sweeps = [{"fixed": fixed, "grid": grid | folds} | ({"paired": True} if result.paired else {})]
    note = "It first says what difference these runs can find; its last cell has the conclusion."
    if len(grid) > 1:
        sweeps = [{"fixed": fixed | {name: side[name] for name in grid}, "grid": folds} for side in sides]
        paired = ", with `-p paired True`" if result.paired else ""
        note = f"Then compare the new runs with `compare.ipynb`{paired}."
    used = result.used_seeds
    shared = {"seeds": sorted(set(range(1, count + len(used) + 1)) - used)[:count], "split": first.split}
    texts = [
        yaml.safe_dump(
            sweep | shared, allow_unicode=True, default_flow_style=True, width=10**6, sort_keys=False
        ).strip()
        for sweep in sweeps
    ]
    lines = [f"papermill sweep.ipynb sweep.out.ipynb -y {shlex.quote(text)}" for text in texts]
    commands = " and ".join(f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines)
    runs = 2 * count * (FOLDS if first.is_pooled else 1)
    seconds = [run.history.seconds.sum() for run in (first, other) if run.history is not None]
    time = f", about {runs * np.mean(seconds) / 60:.0f} minutes if run in sequence" if seconds else ""
    return f"To compare the recipes, train {count} new seeds of each, {runs} runs{time}: {commands}. {note}"


def _describe_consequence(result: Result) -> str:
    """Describe what follows from the recipe test or, without one, the sweep that would allow it."""
    test = result.recipe_test
    if test is None:
        return "\n  - ".join([*_describe_seed_pairs(*result.pair), _describe_sweep(result, NEW_SEEDS)])
    if test.p_value < LEVEL:
        better = result.recipe if test.difference > 0 else result.against
        return (
            f"By mIoU, prefer {better}.{_describe_confounding(result)} This holds for new seeds and scenes "
            "like these, with networks trained on the same images; not for other data, image sizes or "
            "settings, such as more epochs."
        )
    if result.spread is None:
        return "Every run has the same confusion matrices: check whether one run is listed twice."
    if result.is_unbalanced:
        return (
            "Nothing can be said about new scenes, and more seeds will not help: score both recipes on data "
            "in which no scene has most of the images."
        )
    low, high = map(_format_number, _clip(test.interval))
    caveat = (
        ""
        if test.scene_variance
        else " The difference did not vary detectably over scenes, so this interval may be too narrow for "
        "new scenes."
    )
    return (
        f"Inconclusive does not mean equal: true differences from {low} to {high} are compatible with these "
        f"runs.{caveat}\n  - {_describe_more_seeds(result)}"
    )


def _describe_confounding(result: Result) -> str:
    """Return a warning if the recipes differ in several parameters, else an empty string.

    Parameters that only one recipe has are ignored.
    """
    sides = [dict(recipe(run.parameters)) for run in result.pair]
    differing = [name for name in sides[0] if name in sides[1] and sides[0][name] != sides[1][name]]
    if len(differing) < 2:
        return ""
    changes = " and ".join(f"{name} ({sides[1][name]} against {sides[0][name]})" for name in differing)
    return f" The recipes differ in {changes}; the difference may be due to any of these."


def _describe_more_seeds(result: Result) -> str:
    """Describe how many seeds would detect half the difference that these runs can detect.

    The new runs are of two recipes, which is a single comparison.
    """
    spread = result.spread
    target = spread.detectable(harmonic_mean(result.runs), 1)[0] / 2
    count = spread.required_seeds(target, 1)
    alone = " in a comparison of these two recipes alone" if result.recipe_test.comparisons > 1 else ""
    sweep = f" {_describe_sweep(result, count)}" if count else ""
    return (
        f"To find a true difference of {target:.3f} (half of what these runs can find{alone}) with 80 % "
        f"power takes {spread.describe_seeds(target, 1)}; ranges are in brackets, because few seeds show "
        f"only roughly how much runs vary.{sweep} Fix the number before the first run: adding seeds until "
        "p < 0.05 can find differences that do not exist."
    )


def _describe_classes(test: SceneComparison, classes: tuple[str, ...]) -> str:
    differences = zip(classes, test.class_difference, test.class_p_value, strict=True)
    significant = [f"{name} {_format_number(difference)}" for name, difference, p in differences if p < LEVEL]
    test_count = np.isfinite(test.class_p_value).sum()
    listed = f"{', '.join(significant)}; the others are inconclusive" if significant else "none"
    return f"Significant classes (difference in IoU, Bonferroni-adjusted for {test_count}): {listed}."


def _describe_variance(test: RecipeComparison, paired: bool) -> str:
    if not test.scene_variance:
        start = "The" if paired else "The recipe test equals it, because the"
        return f"{start} difference did not vary detectably over scenes; it may still vary."
    share = test.seed_variance / (test.seed_variance + test.scene_variance)
    return (
        f"With these numbers of seeds and scenes, {percent(share)} of the variance of the difference is "
        "due to seeds, the rest to scenes."
    )


def _describe_checkpoints(result: Result) -> str:
    test = result.checkpoint_test
    if test is None:
        return f"No checkpoint test: it needs {MIN_SCENES} scenes or more, and runs of one fold."
    against, recipe_run = map(name_run, result.pair, (result.against, result.recipe))
    verdict = (
        "these two networks differ on scenes like these. Two seeds of one recipe may, too, so this is no "
        "evidence about the recipes"
        if test.p_value < LEVEL
        else "inconclusive"
    )
    return (
        f"Checkpoint test, not about recipes ({recipe_run}, against {against}; {test.scene_count} scenes): "
        f"{_describe_test(test)}: {verdict}."
    )


def _describe_test(test: Comparison) -> str:
    low, high = map(_format_number, _clip(test.interval))
    p_value = _format_p(test.p_value)
    p_value = p_value if p_value[0] in "<≥" else f"= {p_value}"
    adjustment = _describe_adjustment("; ", test.comparisons)
    return f"{_format_number(test.difference)} mIoU (95 % interval {low} to {high}, p {p_value}{adjustment})"


def _clip(interval: tuple[float, float]) -> tuple[float, float]:
    """Clip the interval of a difference to -1..1, the possible values."""
    return tuple(np.clip(interval, -1, 1).tolist())


def _describe_adjustment(prefix: str, comparisons: int) -> str:
    return f"{prefix}Bonferroni-adjusted for {comparisons} comparisons" if comparisons > 1 else ""


def _format_number(value: float) -> str:
    """Format with sign and three decimals, or with one significant digit below 0.0005."""
    return f"{value + 0.0:+.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:+.1g}"


def _format_p(p_value: float) -> str:
    """Format with three decimals, or as an inequality if p is below 0.001 or rounds to 0.05."""
    if p_value < 0.001:
        return "< 0.001"
    if round(p_value, 3) == LEVEL:
        return "< 0.05" if p_value < LEVEL else "≥ 0.05"
    return f"{p_value:.3f}"


def _format_runs(runs: tuple[int, int]) -> str:
    return str(runs[0]) if runs[0] == runs[1] else f"{runs[1]} and {runs[0]}"


def _list_caveats(results: dict[str, Result]) -> list[str]:
    runs = [run for result in results.values() for run in result.pair]
    few_seeds = [result for result in results.values() if result.recipe_test and min(result.runs) == 2]
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
