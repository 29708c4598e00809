"""Significance tests for differences between runs or recipes, and power analysis for planned runs.

Three tests answer different questions:

- Checkpoint test, `compare_checkpoints`: do two checkpoints differ on new scenes? (random factor: scenes)
- Seed test, `compare_seeds`: do two recipes differ on these images? (random factor: seeds)
- Recipe test, `compare_recipes`: do two recipes differ on new scenes? (random factors: seeds and scenes)

New scenes are scenes of the same kind. Images of one scene are correlated, so the sampling unit is the scene.
IoU is computed from counts pooled over all images. The mIoU averages the classes in the ground truth, which
are the same on both sides. Differences are b minus a. With fewer than 6 scenes, the checkpoint and recipe
tests give no result: p-values and intervals are NaN.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy import optimize, stats

Array = np.ndarray
LEVEL = 0.05
POWER = 0.8
# With 5 scenes, p is at least 0.06 in the permutation test. With 3 to 5 scenes and ten seeds, the recipe test
# has a type I error of 7 to 13 %.
MIN_SCENES = 6
MAX_EXACT_SCENES = 14  # up to this number, all 2^G permutations are enumerated
RANDOM_PERMUTATIONS = 9_999  # random permutations with more scenes
TOLERANCE = 1e-12  # scores that differ by less count as equal


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Power and smallest detectable difference of a t test, planned or completed."""

    standard_error: float  # of the difference
    degrees_of_freedom: float  # of t; NaN with fewer than 6 scenes or if runs do not vary
    comparisons: int | None = None  # number adjusted for (Bonferroni); None: unadjusted

    @property
    def detectable(self) -> float:
        """The smallest true difference detected with 80 % power at the Bonferroni-adjusted level 0.05.

        It is about 0 if nothing varies, infinite with less than one degree of freedom, and NaN if there are
        fewer than 6 scenes.
        """
        if not self.standard_error > TOLERANCE:  # nothing varies, or NaN
            return self.standard_error
        if not self.degrees_of_freedom >= 1:  # scenes differ too much in size to detect anything
            return np.nan if np.isnan(self.degrees_of_freedom) else np.inf
        upper = self.standard_error
        while self.power(upper) < POWER:
            upper *= 2
        return optimize.brentq(lambda difference: self.power(difference) - POWER, 0, upper)

    def power(self, difference: float) -> float:
        """Return the power of the two-sided test for a true difference, from the noncentral t distribution.

        It is NaN if nothing varies, or with fewer than 6 scenes.
        """
        if not self.standard_error > TOLERANCE:
            return np.nan
        noncentrality = abs(difference) / self.standard_error
        critical_value = stats.t.ppf(1 - LEVEL / 2 / (self.comparisons or 1), self.degrees_of_freedom)
        # scipy sometimes returns NaN for probabilities close to 0
        lower_tail = np.nan_to_num(stats.nct.cdf(-critical_value, self.degrees_of_freedom, noncentrality))
        return float(stats.nct.sf(critical_value, self.degrees_of_freedom, noncentrality) + lower_tail)

    def adjusted(self, comparisons: int) -> Self:
        """Return a copy that is Bonferroni-adjusted for a number of comparisons.

        The adjustment applies to power and, in test results, to the p-value and interval of the mIoU. One
        comparison leaves them unchanged. The p-values and intervals of classes are adjusted for the number of
        classes tested, whatever `comparisons` is.

        Raises:
            ValueError: if `comparisons` is less than 1, or the result is already adjusted.
        """
        if comparisons < 1 or self.comparisons is not None:
            raise ValueError(
                f"comparisons: found {comparisons} for a result adjusted for {self.comparisons or 'none'}, "
                "expected 1 or more for an unadjusted result"
            )
        return replace(self, comparisons=comparisons)


class Plan(Sensitivity):
    """Power of a planned recipe test."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Sensitivity):
    """Result fields common to the three tests: the mIoU difference, b minus a."""

    difference: float
    interval: tuple[float, float]  # 95 %, (low, high)
    p_value: float

    def adjusted(self, comparisons: int) -> Self:
        adjusted = super().adjusted(comparisons)
        interval = _interval(self.difference, self.standard_error, self.degrees_of_freedom, comparisons)
        p_value = float(np.minimum(1, comparisons * self.p_value))
        return replace(adjusted, interval=tuple(interval.tolist()), p_value=p_value)


@dataclass(frozen=True, kw_only=True)
class SceneComparison(Comparison):
    """Result fields common to the checkpoint test and the recipe test.

    The interval and p-value of a class are NaN if it occurs in fewer than two scenes.
    """

    class_difference: Array  # (C,) IoU; NaN for a class not in the ground truth
    class_interval: Array  # (2, C), 95 %, low and high
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
    """Result of the checkpoint test: a permutation p-value, which decides, and a jackknife interval."""


@dataclass(frozen=True, kw_only=True)
class RecipeComparison(SceneComparison):
    """Result of the recipe test."""

    seed_variance: float  # of the difference, due to seeds; inversely proportional to their number
    scene_variance: float  # of the difference, due to scenes; unaffected by the number of seeds, at least 0
    scene_degrees_of_freedom: float


class SeedComparison(Comparison):
    """Result of the seed test."""


@dataclass(frozen=True)
class ScoreInterval:
    """mIoU and IoU `(C,)` of a run, with 95 % intervals `(low, high)` and `(2, C)` clipped to 0..1.

    The mIoU averages the classes in the ground truth; the IoU of other classes is NaN.
    """

    score: float
    interval: tuple[float, float]
    class_score: Array
    class_interval: Array
    scene_count: int


def compare_checkpoints(
    counts_a: Array, counts_b: Array, scene: Array | None, seed: int = 0
) -> CheckpointComparison:
    """Perform the checkpoint test: do two checkpoints differ on new scenes?

    The result does not generalise to recipes. Standard errors come from Tukey's jackknife over scenes (Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11). Intervals are based on the t
    distribution with `sum(m)^2 / sum(m^2) - 1` degrees of freedom for scenes of m images. The p-values come
    from a two-sided permutation test that swaps the two checkpoints in some of the scenes. It uses all
    2^G permutations for up to 14 scenes, otherwise 9,999 random ones.

    Args:
        counts_a: `(N, C, C)` confusion matrix of each image, rows = ground truth.
        counts_b: confusion matrices of checkpoint b for the same images in the same order.
        scene: `(N,)` scene of each image; if None, images are treated as independent.
        seed: random seed of the permutations.

    Raises:
        ValueError: if shapes or ground truths do not match, there is no image, or no pixel is labelled.
    """
    counts_a, counts_b = _check_counts("(N, C, C)", counts_a, counts_b)
    totals, scores, left_out, degrees = _by_scene(np.stack((counts_a, counts_b)), scene)
    difference, error = scores[1] - scores[0], _jackknife_error(left_out[1] - left_out[0])
    p_values = np.where(np.isfinite(error), _permutation_test(*totals, difference, seed), np.nan)
    fields = _difference_fields(difference, error, degrees, p_values)
    return CheckpointComparison(**fields, scene_count=totals.shape[1])


def compare_seeds(scores_a: Array, scores_b: Array) -> SeedComparison:
    """Perform the seed test, Welch's t test over seeds: do two recipes differ on these images?

    See Welch (Biometrika, 1947).

    Args:
        scores_a: `(S,)` score of each run of recipe a.
        scores_b: scores of recipe b; the number of runs may differ.

    Raises:
        ValueError: if a recipe has fewer than two runs, scores are not finite, or the recipes differ although
            neither varies over its runs.
    """
    scores_a, scores_b = np.asarray(scores_a, float), np.asarray(scores_b, float)
    for name, scores in (("scores_a", scores_a), ("scores_b", scores_b)):
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise ValueError(f"{name}: found {scores.tolist()}, expected (S,) numbers, the score of each run")
    _check_runs("scores", len(scores_a), len(scores_b))
    difference = scores_b.mean(keepdims=True) - scores_a.mean(keepdims=True)
    runs = np.array([[len(scores_a)], [len(scores_b)]])
    variances = np.array([[scores_a.var(ddof=1)], [scores_b.var(ddof=1)]]) / runs
    # not scipy.stats.ttest_ind, which warns if one side is constant
    error, degrees = _satterthwaite(variances, runs, np.zeros(1), np.ones(1))
    _check_varies("scores", difference[0], error[0])
    return SeedComparison(**_shared_fields(difference, error, degrees, _p_values(difference, error, degrees)))


def compare_recipes(
    counts_a: Array, counts_b: Array, scene: Array | None, paired: bool = False
) -> RecipeComparison:
    """Perform the recipe test: do two recipes differ on new scenes?

    Only this test supports the conclusion that one recipe is better. It is a t test with crossed random
    effects, in which seeds are the readers and scenes are the cases (Obuchowski and Rockette, Communications
    in Statistics, 1995; degrees of freedom after Hillis, Statistics in Medicine, 2007). The variance of the
    difference is

        V = s_a^2 / S_a + s_b^2 / S_b + K,    K = max(0, cov(a, a') + cov(b, b') - 2 cov(a, b))

    where s^2 is the variance over S seeds, and cov is the mean jackknife covariance over scenes between runs
    i != j. If `paired`, V = s_D^2 / S + max(0, cov(D, D')) for the differences D within pairs.

    Args:
        counts_a: `(S, N, C, C)` confusion matrix of each run and image, rows = ground truth.
        counts_b: confusion matrices of recipe b for the same images in the same order; S may differ unless
            `paired`.
        scene: `(N,)` scene of each image; if None, images are treated as independent.
        paired: whether run i of a and run i of b form a pair, for example because they share a seed.

    Raises:
        ValueError: if shapes or ground truths do not match, there is no image, or no pixel is labelled; if a
            recipe has fewer than two runs, or paired recipes have different numbers of runs; if the recipes
            differ although nothing varies over seeds or scenes.
    """
    counts_a, counts_b = _check_counts("(S, N, C, C)", counts_a, counts_b)
    _check_runs("counts", len(counts_a), len(counts_b), paired)
    _, scores_a, left_out_a, scene_degrees = _by_scene(counts_a, scene)
    _, scores_b, left_out_b, _ = _by_scene(counts_b, scene)
    difference = scores_b.mean(0) - scores_a.mean(0)
    sides = [(scores_a, left_out_a), (scores_b, left_out_b)]
    if paired:
        sides = [(scores_b - scores_a, left_out_b - left_out_a)]
    seed_variances = np.stack([scores.var(0, ddof=1) / len(scores) for scores, _ in sides])
    scene_variances = _scene_variance([left_out for _, left_out in sides])
    runs = np.array([[len(scores)] for scores, _ in sides])
    error, degrees = _satterthwaite(seed_variances, runs, scene_variances, scene_degrees)
    _check_varies("counts", difference[0], error[0])
    return RecipeComparison(
        **_difference_fields(difference, error, degrees, _p_values(difference, error, degrees)),
        scene_count=left_out_a.shape[1],
        seed_variance=float(seed_variances.sum(0)[0]),
        scene_variance=float(scene_variances[0]),
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
    """Plan a recipe test: return its power for a number of runs, folds and scenes.

    The variance of the difference is `2 run_sd^2 / (folds runs) + variance_per_scene / scenes`.

    Args:
        runs: number of runs per recipe; the harmonic mean if the recipes have different numbers.
        folds: number of folds that each run is trained and scored on; 1 without cross-validation.
        scenes: total number of scenes in all folds.
        run_sd: standard deviation over seeds of the mIoU on one fold; if `paired`, that of the difference
            within pairs divided by the square root of 2.
        variance_per_scene: `scene_variance` of an earlier recipe test times its number of scenes.
        paired: whether runs of both recipes with the same seed form pairs.
        scene_degrees: degrees of freedom over scenes, lower if scenes differ in size; if None, `scenes - 1`.

    Raises:
        ValueError: if there are fewer than 2 runs, 1 fold or 6 scenes; if `run_sd` or `variance_per_scene` is
            negative or NaN, or both are 0.
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
    seed_variances = 2 / len(sides) * run_sd**2 / (folds * runs) * sides
    scene_degrees = np.array([scenes - 1.0 if scene_degrees is None else scene_degrees])
    (error,), (degrees,) = _satterthwaite(
        seed_variances, runs * sides, np.array([variance_per_scene / scenes]), scene_degrees
    )
    return Plan(standard_error=float(error), degrees_of_freedom=float(degrees))


def pool_run_sd(scores: list[Array]) -> tuple[float, tuple[float, float]]:
    """Pool the standard deviation over seeds and return it with its 95 % chi-square interval.

    Args:
        scores: one `(S,)` array per recipe and fold, with the scores of its runs; S may differ.
    """
    sum_of_squares = sum(((np.asarray(cell) - np.mean(cell)) ** 2).sum() for cell in scores)
    degrees = sum(len(cell) - 1 for cell in scores)
    low, high = np.sqrt(sum_of_squares / stats.chi2.ppf([1 - LEVEL / 2, LEVEL / 2], degrees))
    return float(np.sqrt(sum_of_squares / degrees)), (float(low), float(high))


def score_interval(counts: Array, scene: Array | None) -> ScoreInterval:
    """Return the scores of one run from its counts `(N, C, C)`, with intervals as in the checkpoint test."""
    (counts,) = _check_counts("(N, C, C)", counts)
    _, scores, left_out, degrees = _by_scene(counts, scene)
    interval = np.clip(_interval(scores, _jackknife_error(left_out), degrees), 0, 1)
    return ScoreInterval(
        float(scores[0]), tuple(interval[:, 0].tolist()), scores[1:], interval[:, 1:], len(left_out)
    )


def _by_scene(counts: Array, scene: Array | None) -> tuple[Array, Array, Array, Array]:
    """Aggregate counts `(..., N, C, C)` by scene and compute leave-one-scene-out scores.

    Scenes without a labelled pixel are left out.

    Returns:
        totals: `(..., G, 3, C)` pixels of each class in ground truth, prediction and both, summed by scene.
        scores: `(..., 1 + C)` mIoU, then the IoU of each class.
        left_out: `(..., G, 1 + C)` scores without each scene.
        degrees: `(1 + C,)` degrees of freedom over scenes: the effective number of scenes minus 1, where only
            the images that contain a class count for it. With fewer than 6 scenes, `(1,)` NaN.
    """
    images, classes = counts.shape[-3:-1]
    scene = np.arange(images) if scene is None else np.asarray(scene)
    if scene.shape != (images,):
        raise ValueError(
            f"scene: found shape {scene.shape}, expected ({images},), the scene of each image, or None"
        )
    names, index = np.unique(scene, return_inverse=True)
    membership = (index == np.arange(len(names))[:, None]).astype(float)
    membership = membership[membership @ counts.reshape(-1, images, classes**2).any((0, 2)) > 0]
    totals = np.stack((counts.sum(-1), counts.sum(-2), np.diagonal(counts, axis1=-2, axis2=-1)), -2)
    totals = np.moveaxis(np.tensordot(membership, totals, (1, -3)), 0, -3)
    pooled = totals.sum(-3, keepdims=True)
    truth = counts.sum(-1).reshape(-1, images, classes)[0]
    # images per scene: all, then those that contain each class
    images_per_scene = membership @ np.column_stack((np.ones(images), truth > 0))
    degrees = _effective_sample_size(images_per_scene) - 1
    if len(membership) < MIN_SCENES:
        degrees = np.full(1, np.nan)
    return totals, _scores(pooled)[..., 0, :], _scores(pooled - totals), degrees


def _effective_sample_size(sizes: Array) -> Array:
    """Return the effective number `(K,)` of groups of sizes n `(G, K)`: (sum n)^2 / sum n^2 (Kish)."""
    return sizes.sum(0) ** 2 / np.maximum((sizes**2).sum(0), 1)


def _scores(totals: Array) -> Array:
    """Compute `(..., 1 + C)` mIoU and class IoUs from `(..., 3, C)` totals.

    The mIoU averages the classes in the ground truth. Scores without ground truth are NaN.
    """
    truth, prediction, intersection = np.moveaxis(totals, -2, 0)
    present = truth > 0
    iou = np.where(present, intersection / np.maximum(truth + prediction - intersection, 1), np.nan)
    with np.errstate(invalid="ignore"):  # the mIoU is NaN without a labelled pixel
        mean = np.where(present, iou, 0).sum(-1) / present.sum(-1)
    return np.concatenate((mean[..., None], iou), -1)


def _jackknife_error(left_out: Array) -> Array:
    """Return standard errors `(K,)` from leave-one-scene-out statistics `(G, K)`; NaN below 6 scenes."""
    scenes = len(left_out) if len(left_out) >= MIN_SCENES else np.nan
    return np.sqrt((scenes - 1) / scenes * ((left_out - left_out.mean(0)) ** 2).sum(0))


def _scene_variance(left_out: list[Array]) -> Array:
    """Return the variance `(K,)` due to scenes, clipped at 0.

    Args:
        left_out: one `(S, G, K)` array of leave-one-scene-out scores per side, or a single one of the paired
            differences.
    """
    variance = sum(_covariance(side, side) for side in left_out)
    if len(left_out) == 2:
        variance = variance - 2 * _covariance(*left_out)
    return np.maximum(variance, 0)


def _covariance(first: Array, second: Array) -> Array:
    """Return the mean jackknife covariance `(K,)` over all pairs of runs i != j of two sides `(S, G, K)`."""
    scenes = first.shape[1]
    first, second = first - first.mean(1, keepdims=True), second - second.mean(1, keepdims=True)
    covariance = (scenes - 1) / scenes * np.einsum("igk,jgk->ijk", first, second)
    return covariance[~np.eye(len(first), len(second), dtype=bool)].mean(0)


def _satterthwaite(
    seed_variances: Array, runs: Array, scene_variances: Array, scene_degrees: Array
) -> tuple[Array, Array]:
    """Return standard errors `(K,)` and Satterthwaite degrees of freedom `(K,)` from variance components.

    The degrees of freedom are NaN if nothing varies. Both are NaN with fewer than 6 scenes.

    Args:
        seed_variances: `(sides, K)` variance due to seeds of each side's mean; one side if paired.
        runs: `(sides, 1)` number of runs.
        scene_variances: `(K,)` variance due to scenes.
        scene_degrees: `(K,)` or `(1,)` degrees of freedom over scenes.
    """
    total = seed_variances.sum(0) + scene_variances
    denominator = (seed_variances**2 / (runs - 1)).sum(0) + scene_variances**2 / scene_degrees
    error = np.where(np.isnan(scene_degrees), np.nan, np.sqrt(total))
    return error, np.divide(total**2, denominator, where=denominator != 0, out=np.full_like(total, np.nan))


def _interval(
    estimate: Array | float, error: Array | float, degrees: Array | float, comparisons: int = 1
) -> Array:
    """Return 95 % t intervals `(2, ...)`, Bonferroni-adjusted for the number of comparisons."""
    margin = stats.t.ppf(1 - LEVEL / 2 / comparisons, np.where(error < TOLERANCE, 1, degrees)) * error
    return np.stack((estimate - margin, estimate + margin))


def _p_values(difference: Array, error: Array, degrees: Array) -> Array:
    """Return two-sided p-values `(K,)` of t tests; if nothing varies, 1 for no difference, else NaN."""
    constant = error < TOLERANCE
    degrees = np.where(constant, 1, degrees)
    p_values = 2 * stats.t.sf(np.abs(difference) / np.where(constant, 1, error), degrees)
    p_values[constant] = np.where(np.abs(difference[constant]) < TOLERANCE, 1, np.nan)
    return p_values


def _permutation_test(totals_a: Array, totals_b: Array, observed: Array, seed: int) -> Array:
    """Return permutation p-values `(1 + C,)` of the observed differences, given scene totals `(G, 3, C)`.

    p is k / n over all n permutations, or (1 + k) / (1 + n) over n random ones, where k permutations give at
    least as large an absolute difference as observed.
    """
    scenes = len(totals_a)
    exact = scenes <= MAX_EXACT_SCENES
    if exact:
        permutations = np.indices((2,) * scenes).reshape(scenes, -1).T  # one per row; 1 swaps a scene
    else:
        permutations = np.random.default_rng(seed).integers(0, 2, (RANDOM_PERMUTATIONS, scenes))
    shift = np.tensordot(permutations.astype(float), totals_b - totals_a, 1)
    permuted = _scores(totals_b.sum(0) - shift) - _scores(totals_a.sum(0) + shift)
    extreme = (np.abs(permuted) >= np.abs(observed) - TOLERANCE).sum(0)
    return extreme / len(permutations) if exact else (1 + extreme) / (1 + len(permutations))


def _shared_fields(difference: Array, error: Array, degrees: Array, p_values: Array) -> dict:
    """Return the fields of a `Comparison` from `(K,)` arrays in which the mIoU comes first."""
    return {
        "difference": float(difference[0]),
        "interval": tuple(_interval(difference, error, degrees)[:, 0].tolist()),
        "p_value": float(p_values[0]),
        "standard_error": float(error[0]),
        "degrees_of_freedom": float(degrees[0]),
    }


def _difference_fields(difference: Array, error: Array, degrees: Array, p_values: Array) -> dict:
    """Return the fields of a `SceneComparison` from `(1 + C,)` arrays of the mIoU and then the classes."""
    return _shared_fields(difference, error, degrees, p_values) | {
        "class_difference": difference[1:],
        "class_interval": _interval(difference, error, degrees)[:, 1:],
        "class_p_value": p_values[1:],
        "class_standard_error": error[1:],
        "class_degrees_of_freedom": np.broadcast_to(degrees, error.shape)[1:],
    }


def _check_counts(axes: str, *sides: Array) -> list[Array]:
    sides = [np.asarray(counts) for counts in sides]
    message = f"counts: found shapes {' and '.join(str(counts.shape) for counts in sides)}, expected"
    if any(counts.ndim != axes.count(",") + 1 or counts.shape[-1] != counts.shape[-2] for counts in sides):
        raise ValueError(f"{message} {axes}, one matrix for each image")
    if len({counts.shape[-3:] for counts in sides}) > 1 or not sides[0].shape[-3]:
        raise ValueError(
            f"{message} the same images, one or more, and classes in both; evaluate both on the same split"
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
    if error < TOLERANCE <= abs(difference):
        raise ValueError(
            f"{name}: found a difference of {difference:.4g} between runs that do not vary, expected runs of "
            "different seeds; check whether one run was given twice"
        )
