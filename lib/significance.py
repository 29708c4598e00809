"""Is a difference between two runs or recipes real? Three tests of different questions, a plan for new runs.

The checkpoint test, `compare_checkpoints`: do these two checkpoints differ on scenes like these? Scenes vary.
The seed test, `compare_seeds`: do the two recipes differ on these very images? Seeds vary.
The recipe test, `compare_recipes`: do the two recipes differ on scenes like these? Seeds and scenes vary.

Images of one scene are alike, so the cases are scenes. Scores are IoU pooled over all images, and the mIoU
averages the classes in the truth, the same for both sides. Differences are b minus a. With fewer than 6
scenes there is no result: what depends on scenes is NaN.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy import optimize, stats

Array = np.ndarray
LEVEL = 0.05
POWER = 0.8
# all swaps of 5 give no p below 0.06; in the recipe test 3 to 5 with ten seeds reject true nulls in 7 to 13 %
MIN_SCENES = 6
MAX_EXACT_SCENES = 14  # up to here all 2^G swaps are counted
SWAPS = 9_999
ROUNDING = 1e-12  # scores closer than this are equal


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a t test of a difference can find, before its runs are made or after."""

    standard_error: float  # of the difference
    degrees_of_freedom: float  # of t; NaN where nothing varies
    comparisons: int | None = None  # that it is adjusted for; None: not adjusted

    @property
    def detectable(self) -> float:
        """The true difference found with 80 % power at the level 0.05 over the number of comparisons."""
        if not self.standard_error > ROUNDING:  # nothing varies, or NaN
            return self.standard_error
        if not self.degrees_of_freedom >= 1:  # below, scenes are so unequal that nothing is found
            return np.nan if np.isnan(self.degrees_of_freedom) else np.inf
        highest = self.standard_error
        while self.power(highest) < POWER:
            highest *= 2
        return optimize.brentq(lambda difference: self.power(difference) - POWER, 0, highest)

    def power(self, difference: float) -> float:
        """The probability that the two-sided test finds a true difference, by the noncentral t.

        NaN where nothing varies.
        """
        if not self.standard_error > ROUNDING:
            return np.nan
        effect = abs(difference) / self.standard_error
        least = stats.t.ppf(1 - LEVEL / 2 / (self.comparisons or 1), self.degrees_of_freedom)
        # NaN now and then where it is next to 0
        other_side = np.nan_to_num(stats.nct.cdf(-least, self.degrees_of_freedom, effect))
        return float(stats.nct.sf(least, self.degrees_of_freedom, effect) + other_side)

    def adjusted(self, comparisons: int) -> Self:
        """The same as one of so many comparisons, by Bonferroni; 1 changes no number.

        Of a result this adjusts p-value and interval; p-values and intervals of classes are adjusted for the
        number of classes that are tested.

        Raises:
            ValueError: fewer than one comparison, or a result that is adjusted already.
        """
        if comparisons < 1 or self.comparisons is not None:
            raise ValueError(
                f"comparisons: found {comparisons} for a result adjusted for {self.comparisons or 'none'}, "
                "expected 1 or more for an unadjusted result"
            )
        return replace(self, comparisons=comparisons)


class Plan(Sensitivity):
    """What a recipe test can find before its runs are made."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Sensitivity):
    """What the three tests share: the difference of the mIoU, b minus a."""

    difference: float
    interval: tuple[float, float]  # (low, high), 95 %
    p_value: float

    def adjusted(self, comparisons: int) -> Self:
        adjusted = super().adjusted(comparisons)
        interval = _interval(self.difference, self.standard_error, self.degrees_of_freedom, comparisons)
        p_value = float(np.minimum(1, comparisons * self.p_value))
        return replace(adjusted, interval=tuple(interval.tolist()), p_value=p_value)


@dataclass(frozen=True, kw_only=True)
class SceneComparison(Comparison):
    """What the checkpoint test and the recipe test share.

    Of a class in fewer than two scenes, interval and p-value are NaN.
    """

    class_difference: Array  # (C,) of the IoU; NaN for a class that is not in the truth
    class_interval: Array  # (2, C)
    class_p_value: Array  # (C,)
    class_standard_error: Array  # (C,)
    class_degrees_of_freedom: Array  # (C,)
    scene_count: int

    def adjusted(self, comparisons: int) -> Self:
        tested = max(1, int(np.isfinite(self.class_p_value).sum()))
        errors = self.class_standard_error, self.class_degrees_of_freedom
        return replace(
            super().adjusted(comparisons),
            class_interval=_interval(self.class_difference, *errors, tested),
            class_p_value=np.minimum(1, tested * self.class_p_value),
        )


class CheckpointComparison(SceneComparison):
    """Result of the checkpoint test. Its p-value, by swaps, decides; its interval is a jackknife."""


@dataclass(frozen=True, kw_only=True)
class RecipeComparison(SceneComparison):
    """Result of the recipe test."""

    seed_variance: float  # of the difference, due to seeds: half of it with twice the seeds
    scene_variance: float  # of the difference, due to scenes, whatever the number of seeds; at least 0
    scene_degrees_of_freedom: float


class SeedComparison(Comparison):
    """Result of the seed test."""


@dataclass(frozen=True)
class ScoreInterval:
    """mIoU over classes in the truth and IoU `(C,)`; 95 % intervals `(low, high)` and `(2, C)` in 0..1."""

    score: float
    interval: tuple[float, float]
    class_score: Array
    class_interval: Array
    scene_count: int


def compare_checkpoints(
    counts_a: Array, counts_b: Array, scene: Array | None, seed: int = 0
) -> CheckpointComparison:
    """The checkpoint test: do two checkpoints differ on scenes like these? It says nothing about recipes.

    Intervals are Tukey's jackknife, leaving out scene by scene (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapter 11); p-values say how often exchanging the two in some of the scenes gives as
    large a difference, over all 2^G ways for up to 14 scenes, else over 9,999 drawn with `seed`.

    Args:
        counts_a: `(N, C, C)` counts per image, rows = truth.
        counts_b: the same of checkpoint b, of the same images in the same order.
        scene: `(N,)` the scene of each image; None takes every image as its own.
        seed: of the drawn swaps.

    Raises:
        ValueError: shapes or truths that differ, no image, nothing labelled.
    """
    counts_a, counts_b = _check_counts("(N, C, C)", counts_a, counts_b)
    totals, scores, left_out, degrees = _by_scene(np.stack((counts_a, counts_b)), scene)
    difference, error = scores[1] - scores[0], _jackknife_error(left_out[1] - left_out[0])
    p_values = np.where(np.isfinite(error), _swap_test(*totals, difference, seed), np.nan)
    fields = _difference_fields(difference, error, degrees, p_values)
    return CheckpointComparison(**fields, scene_count=totals.shape[1])


def compare_seeds(scores_a: Array, scores_b: Array) -> SeedComparison:
    """The seed test: do two recipes differ on these very images? Welch's t (Biometrika, 1947) over seeds.

    Args:
        scores_a: `(S,)` the score of each run of recipe a.
        scores_b: those of recipe b; they may be more or fewer.

    Raises:
        ValueError: a side with one run; values that are no numbers; runs that do not vary and yet differ.
    """
    scores_a, scores_b = np.asarray(scores_a, float), np.asarray(scores_b, float)
    for name, scores in (("scores_a", scores_a), ("scores_b", scores_b)):
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise ValueError(f"{name}: found {scores.tolist()}, expected (S,) numbers, the score of each run")
    _check_runs("scores", len(scores_a), len(scores_b))
    difference = scores_b.mean(keepdims=True) - scores_a.mean(keepdims=True)
    runs = np.array([[len(scores_a)], [len(scores_b)]])
    variances = np.array([[scores_a.var(ddof=1)], [scores_b.var(ddof=1)]]) / runs
    error, degrees = _crossed_error(
        variances, runs, np.zeros(1), np.ones(1)
    )  # scipy warns of a constant side
    _check_varies("scores", difference[0], error[0])
    return SeedComparison(**_shared_fields(difference, error, degrees, _p_values(difference, error, degrees)))


def compare_recipes(
    counts_a: Array, counts_b: Array, scene: Array | None, paired: bool = False
) -> RecipeComparison:
    """The recipe test: do two recipes differ on scenes like these? Only it may say that a recipe is better.

    Crossed t, with seeds as readers and scenes as cases (Obuchowski and Rockette, Communications in
    Statistics, 1995; degrees of freedom as by Hillis, Statistics in Medicine, 2007): the variance of the
    difference is that over seeds, plus the jackknife covariance over scenes between runs of different seeds.

    Args:
        counts_a: `(S, N, C, C)` counts per run and image, rows = truth.
        counts_b: the same of recipe b, of the same images in the same order; S may differ unless `paired`.
        scene: `(N,)` the scene of each image; None takes every image as its own.
        paired: whether run i of a and run i of b belong together, such as by their seed.

    Raises:
        ValueError: shapes or truths that differ, no image, nothing labelled; a side with one run;
            runs that vary neither over seeds nor over scenes and yet differ.
    """
    counts_a, counts_b = _check_counts("(S, N, C, C)", counts_a, counts_b)
    _check_runs("counts", len(counts_a), len(counts_b), paired)
    _, scores_a, left_out_a, scene_degrees = _by_scene(counts_a, scene)
    _, scores_b, left_out_b, _ = _by_scene(counts_b, scene)
    difference = scores_b.mean(0) - scores_a.mean(0)
    sides = [(scores_a, left_out_a), (scores_b, left_out_b)]
    if paired:
        sides = [(scores_b - scores_a, left_out_b - left_out_a)]
    seeds = np.stack([scores.var(0, ddof=1) / len(scores) for scores, _ in sides])
    scenes = _scene_variance([left_out for _, left_out in sides])
    runs = np.array([[len(scores)] for scores, _ in sides])
    error, degrees = _crossed_error(seeds, runs, scenes, scene_degrees)
    _check_varies("counts", difference[0], error[0])
    return RecipeComparison(
        **_difference_fields(difference, error, degrees, _p_values(difference, error, degrees)),
        scene_count=left_out_a.shape[1],
        seed_variance=float(seeds.sum(0)[0]),
        scene_variance=float(scenes[0]),
        scene_degrees_of_freedom=float(scene_degrees[0]),
    )


def plan(
    runs: float,
    folds: int,
    scenes: int,
    run_sd: float,
    variance_per_scene: float,
    paired: bool = False,
    scene_degrees: float | None = None,
) -> Plan:
    """What the recipe test can find with so many runs a side, each cross-validated over so many folds.

    Args:
        runs: of each recipe (their harmonic mean where they differ).
        folds: that each run is trained and scored on, 1 without cross-validation.
        scenes: in all folds together.
        run_sd: standard deviation over seeds of the mIoU on one fold; if `paired`, that of the difference
            within pairs over the square root of 2.
        variance_per_scene: `scene_variance` of an earlier recipe test times its number of scenes.
        paired: whether runs of one seed belong together.
        scene_degrees: degrees of freedom over scenes, fewer if these differ in size; None takes scenes - 1.

    Raises:
        ValueError: fewer than 2 runs or 6 scenes; variances that are negative, no numbers, or all 0.
    """
    if runs < 2 or folds < 1 or scenes < MIN_SCENES:
        raise ValueError(
            f"runs, folds, scenes: found {runs}, {folds} and {scenes}, expected at least 2, 1 and "
            f"{MIN_SCENES}, as the recipe test needs them"
        )
    if not (run_sd >= 0 and variance_per_scene >= 0 and run_sd + variance_per_scene > 0):
        raise ValueError(
            f"run_sd, variance_per_scene: found {run_sd} and {variance_per_scene}, expected numbers from 0 "
            "on, one of them above 0; take them from runs of several seeds"
        )
    sides = np.full((1 if paired else 2, 1), 1.0)
    seeds = 2 / len(sides) * run_sd**2 / (folds * runs) * sides
    scene_degrees = np.array([scenes - 1.0 if scene_degrees is None else scene_degrees])
    (error,), (degrees,) = _crossed_error(
        seeds, runs * sides, np.array([variance_per_scene / scenes]), scene_degrees
    )
    return Plan(standard_error=float(error), degrees_of_freedom=float(degrees))


def pool_run_sd(scores: list[Array]) -> tuple[float, tuple[float, float]]:
    """The standard deviation over seeds, pooled over cells of recipe and fold, and its 95 % chi-square range.

    Args:
        scores: of each cell those of its runs, `(S,)` each.
    """
    squares = sum(((np.asarray(cell) - np.mean(cell)) ** 2).sum() for cell in scores)
    degrees = sum(len(cell) - 1 for cell in scores)
    low, high = np.sqrt(squares / stats.chi2.ppf([1 - LEVEL / 2, LEVEL / 2], degrees))
    return float(np.sqrt(squares / degrees)), (float(low), float(high))


def score_interval(counts: Array, scene: Array | None) -> ScoreInterval:
    """The scores of one run, counts `(N, C, C)`, with intervals as in the checkpoint test."""
    (counts,) = _check_counts("(N, C, C)", counts)
    _, scores, left_out, degrees = _by_scene(counts, scene)
    interval = np.clip(_interval(scores, _jackknife_error(left_out), degrees), 0, 1)
    return ScoreInterval(
        float(scores[0]), tuple(interval[:, 0].tolist()), scores[1:], interval[:, 1:], len(left_out)
    )


def _by_scene(counts: Array, scene: Array | None) -> tuple[Array, Array, Array, Array]:
    """What all tests need of counts `(..., N, C, C)`.

    Pixels of each class in truth, prediction and both by scene `(..., G, 3, C)`, which add up; scores
    `(..., 1 + C)`; scores without each scene `(..., G, 1 + C)`; degrees of freedom over scenes `(1 + C,)`, as
    many as equally large ones have, for a class over the images that have it.
    """
    images, classes = counts.shape[-3:-1]
    scene = np.arange(images) if scene is None else np.asarray(scene)
    if scene.shape != (images,):
        raise ValueError(
            f"scene: found shape {scene.shape}, expected ({images},), the scene of each image, or None"
        )
    names, index = np.unique(scene, return_inverse=True)
    membership = (index == np.arange(len(names))[:, None]).astype(float)
    totals = np.stack((counts.sum(-1), counts.sum(-2), np.diagonal(counts, axis1=-2, axis2=-1)), -2)
    totals = np.moveaxis(np.tensordot(membership, totals, (1, -3)), 0, -3)
    pooled = totals.sum(-3, keepdims=True)
    truth = counts.sum(-1).reshape(-1, images, classes)[0]
    images_of_scene = membership @ np.column_stack((np.ones(images), truth > 0))  # all, and with each class
    degrees = _effective_count(images_of_scene) - 1
    if len(names) < MIN_SCENES:
        degrees = np.full(1, np.nan)
    return totals, _scores(pooled)[..., 0, :], _scores(pooled - totals), degrees


def _effective_count(sizes: Array) -> Array:
    """How many equally large groups vary as much as groups of sizes `(G, K)`: (sum n)^2 / sum n^2, `(K,)`."""
    return sizes.sum(0) ** 2 / np.maximum((sizes**2).sum(0), 1)


def _scores(totals: Array) -> Array:
    """`(..., 1 + C)` from totals `(..., 3, C)`: the mIoU over classes in the truth, then the IoU of each."""
    truth, prediction, hits = np.moveaxis(totals, -2, 0)
    present = truth > 0
    iou = np.where(present, hits / np.maximum(truth + prediction - hits, 1), np.nan)
    with np.errstate(invalid="ignore"):  # the mIoU of nothing is NaN
        mean = np.where(present, iou, 0).sum(-1) / present.sum(-1)
    return np.concatenate((mean[..., None], iou), -1)


def _jackknife_error(left_out: Array) -> Array:
    """Standard errors `(K,)` of statistics that are `(G, K)` without each scene; NaN with too few scenes."""
    scenes = len(left_out) if len(left_out) >= MIN_SCENES else np.nan
    return np.sqrt((scenes - 1) / scenes * ((left_out - left_out.mean(0)) ** 2).sum(0))


def _scene_variance(left_out: list[Array]) -> Array:
    """Variance `(K,)` due to scenes, of the scores `(S, G, K)` of each side without each scene."""
    variance = sum(_covariance(side, side) for side in left_out)
    if len(left_out) == 2:
        variance = variance - 2 * _covariance(*left_out)
    return np.maximum(variance, 0)


def _covariance(first: Array, second: Array) -> Array:
    """Mean jackknife covariance `(K,)` over i != j of runs i of the first and j of the second `(S, G, K)`."""
    scenes = first.shape[1]
    first, second = first - first.mean(1, keepdims=True), second - second.mean(1, keepdims=True)
    covariance = (scenes - 1) / scenes * np.einsum("igk,jgk->ijk", first, second)
    return covariance[~np.eye(len(first), len(second), dtype=bool)].mean(0)


def _crossed_error(seeds: Array, runs: Array, scenes: Array, scene_degrees: Array) -> tuple[Array, Array]:
    """Standard errors `(K,)` and their degrees of freedom (Satterthwaite) from the parts of the variance."""
    total = seeds.sum(0) + scenes
    squares = (seeds**2 / (runs - 1)).sum(0) + scenes**2 / scene_degrees
    return np.sqrt(total), np.divide(total**2, squares, where=squares != 0, out=np.full_like(total, np.nan))


def _interval(
    middle: Array | float, error: Array | float, degrees: Array | float, comparisons: int = 1
) -> Array:
    """`(2, ...)` of each, simultaneous for so many comparisons by Bonferroni."""
    half = stats.t.ppf(1 - LEVEL / 2 / comparisons, np.where(error < ROUNDING, 1, degrees)) * error
    return np.stack((middle - half, middle + half))


def _p_values(difference: Array, error: Array, degrees: Array) -> Array:
    """`(K,)` by t; where nothing varies, 1 for no difference and NaN for one."""
    constant = error < ROUNDING
    degrees = np.where(constant, 1, degrees)
    p_values = 2 * stats.t.sf(np.abs(difference) / np.where(constant, 1, error), degrees)
    p_values[constant] = np.where(np.abs(difference[constant]) < ROUNDING, 1, np.nan)
    return p_values


def _swap_test(totals_a: Array, totals_b: Array, observed: Array, seed: int) -> Array:
    """p-values of the observed differences of all scores `(1 + C,)` from the totals of scenes `(G, 3, C)`."""
    scenes = len(totals_a)
    exact = scenes <= MAX_EXACT_SCENES
    if exact:
        swaps = np.indices((2,) * scenes).reshape(scenes, -1).T  # each row one choice of 0 or 1 by scene
    else:
        swaps = np.random.default_rng(seed).integers(0, 2, (SWAPS, scenes))
    moved = np.tensordot(swaps.astype(float), totals_b - totals_a, 1)
    swapped = _scores(totals_b.sum(0) - moved) - _scores(totals_a.sum(0) + moved)
    extreme = (np.abs(swapped) >= np.abs(observed) - ROUNDING).sum(0)
    return extreme / len(swaps) if exact else (1 + extreme) / (1 + len(swaps))


def _shared_fields(difference: Array, error: Array, degrees: Array, p_values: Array) -> dict:
    """The fields of a `Comparison`."""
    return {
        "difference": float(difference[0]),
        "interval": tuple(_interval(difference, error, degrees)[:, 0].tolist()),
        "p_value": float(p_values[0]),
        "standard_error": float(error[0]),
        "degrees_of_freedom": float(degrees[0]),
    }


def _difference_fields(difference: Array, error: Array, degrees: Array, p_values: Array) -> dict:
    """The fields of a `SceneComparison` that the mIoU and then the classes have."""
    return _shared_fields(difference, error, degrees, p_values) | {
        "class_difference": difference[1:],
        "class_interval": _interval(difference, error, degrees)[:, 1:],
        "class_p_value": p_values[1:],
        "class_standard_error": error[1:],
        "class_degrees_of_freedom": np.broadcast_to(degrees, error.shape)[1:],
    }


def _check_counts(axes: str, *sides: Array) -> list[Array]:
    sides = [np.asarray(counts) for counts in sides]
    found = f"counts: found shapes {' and '.join(str(counts.shape) for counts in sides)}, expected"
    if any(counts.ndim != axes.count(",") + 1 or counts.shape[-1] != counts.shape[-2] for counts in sides):
        raise ValueError(f"{found} {axes}, one matrix for each image")
    if len({counts.shape[-3:] for counts in sides}) > 1 or not sides[0].shape[-3]:
        raise ValueError(
            f"{found} the same images, one or more, and classes in both; evaluate both on the same split"
        )
    truth = np.concatenate([counts.sum(-1).reshape(-1, *counts.shape[-3:-1]) for counts in sides])
    if not truth.any():
        raise ValueError(
            "counts: all zero; without a labelled pixel there is no score, use a split with labels"
        )
    differs = (truth != truth[0]).any((0, 2))
    if differs.any():
        raise ValueError(
            f"counts: the truth differs in {differs.sum()} of {len(differs)} images, the first is number "
            f"{differs.argmax()}; compare runs on the same images in the same order at the same size"
        )
    return sides


def _check_runs(name: str, runs_a: int, runs_b: int, paired: bool = False) -> None:
    if min(runs_a, runs_b) < 2:
        raise ValueError(
            f"{name}: found {runs_a} and {runs_b} runs, expected 2 or more of each recipe; train more "
            "seeds, or use compare_checkpoints for single runs"
        )
    if paired and runs_a != runs_b:
        raise ValueError(
            f"paired: found {runs_a} and {runs_b} runs, expected equally many of both; leave out runs "
            "without a partner"
        )


def _check_varies(name: str, difference: float, error: float) -> None:
    if error < ROUNDING <= abs(difference):
        raise ValueError(
            f"{name}: found a difference of {difference:.4g} between runs that do not vary, expected runs of "
            "different seeds; check whether one run was given twice"
        )
