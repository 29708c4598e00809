"""Is a difference between two runs or two recipes real? Three tests that must not be mixed up.

The checkpoint test, `compare_checkpoints`: do these two checkpoints differ on scenes like these? Scenes vary.
The seed test, `compare_seeds`: do the two recipes differ on these very images? Seeds vary.
The recipe test, `compare_recipes`: do the two recipes differ on scenes like these? Seeds and scenes vary.

Images of one scene are alike, so the cases are scenes. Scores are IoU pooled over all images, and the mIoU averages
the classes in the truth, the same for both sides. Differences are b minus a. Fewer than 6 scenes give no verdict:
what speaks of scenes is NaN.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

Array = np.ndarray
CONFIDENCE = 0.95
POWER = 0.8
MIN_SCENES = 6  # all swaps of 5 give no p below 0.06; in the recipe test 3 to 5 with ten seeds reject true nulls in 7 to 13 %
MAX_EXACT_SCENES = 14  # up to here all 2^G swaps are counted
SWAPS = 9_999
MIN_SEEDS_TO_PLAN = 5  # the spread of fewer says too little about how many are needed
ROUNDING = 1e-12  # scores closer than this are equal


@dataclass(frozen=True)
class SceneComparison:
    """What the checkpoint test and the recipe test share. Of a class in fewer than two scenes, interval and p-value are NaN."""

    difference: float  # of the mIoU
    interval: tuple[float, float]  # (low, high), 95 %
    p_value: float  # it alone decides whether the two differ
    class_difference: Array  # (C,) of the IoU; NaN for a class that is not in the truth
    class_interval: Array  # (2, C), each class for itself
    class_p_value: Array  # (C,) after Holm over the classes
    detectable: float  # the smallest difference that would show with 80 % power
    scene_count: int


@dataclass(frozen=True)
class CheckpointComparison(SceneComparison):
    """Result of the checkpoint test."""

    # to show the far end of the interval and the near one, if they were true, with 80 % power; inf where 0 is inside
    scenes_needed: tuple[float, float]


@dataclass(frozen=True)
class RecipeComparison(SceneComparison):
    """Result of the recipe test."""

    degrees_of_freedom: float  # of the crossed t; NaN where nothing varies
    seed_variance: float  # of the difference, due to seeds: half of it with twice the seeds
    scene_variance: float  # of the difference, due to scenes, whatever the number of seeds
    detectable_more_seeds: float  # with twice the seeds
    detectable_more_scenes: float  # with twice the scenes, if runs vary as much on these


@dataclass(frozen=True)
class SeedComparison:
    """Result of the seed test."""

    difference: float  # of the mean scores
    interval: tuple[float, float]  # (low, high), 95 %
    p_value: float
    degrees_of_freedom: float  # of Welch's t; NaN where nothing varies
    seeds_needed: tuple[float, float]  # of each recipe, as `scenes_needed`; NaN unless both have five or more


@dataclass(frozen=True)
class ScoreInterval:
    """mIoU over the classes in the truth, and IoU `(C,)`, with 95 % intervals `(low, high)` and `(2, C)` in 0..1."""

    score: float
    interval: tuple[float, float]
    class_score: Array
    class_interval: Array
    scene_count: int


def compare_checkpoints(
    counts_a: Array, counts_b: Array, scene: Array | None, seed: int = 0
) -> CheckpointComparison:
    """The checkpoint test: do two checkpoints differ on scenes like these? It says nothing about their recipes.

    Intervals are Tukey's jackknife, leaving out scene by scene (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapter 11); p-values say how often exchanging the two in some of the scenes gives as large a
    difference, over all 2^G ways for up to 14 scenes, else over 9,999 drawn with `seed`.

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
    interval, _ = _t_test(difference, error, degrees)
    p_values = np.where(np.isfinite(error), _swap_test(*totals, seed), np.nan)
    detectable = float(_detectable(error[0], degrees[0]))
    return CheckpointComparison(
        **_difference_fields(difference, interval, p_values),
        detectable=detectable,
        scene_count=totals.shape[1],
        scenes_needed=_needed(totals.shape[1] * detectable**2, interval[:, 0], float(MIN_SCENES)),
    )


def compare_seeds(scores_a: Array, scores_b: Array) -> SeedComparison:
    """The seed test: do two recipes differ on these very images? Welch's t test (Biometrika, 1947) over seeds.

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
    variances = np.array([[scores_a.var(ddof=1)], [scores_b.var(ddof=1)]])
    runs = np.array([[len(scores_a)], [len(scores_b)]])
    error, degrees = _crossed_error(
        variances / runs, runs, np.zeros(1), np.ones(1)
    )  # scipy warns of a constant side
    _check_varies("scores", difference[0], error[0])
    (low, high), p_value = _t_test(difference, error, degrees)
    interval, needed = (float(low[0]), float(high[0])), (np.nan, np.nan)
    if runs.min() >= MIN_SEEDS_TO_PLAN:
        needed = _needed(_detectable(np.sqrt(variances.sum()), degrees[0]) ** 2, interval, 2.0)
    return SeedComparison(float(difference[0]), interval, float(p_value[0]), float(degrees[0]), needed)


def compare_recipes(
    counts_a: Array, counts_b: Array, scene: Array | None, paired: bool = False
) -> RecipeComparison:
    """The recipe test: do two recipes differ on scenes like these? Only this one may say that a recipe is better.

    Crossed t, with seeds as readers and scenes as cases (Obuchowski and Rockette, Communications in Statistics,
    1995; degrees of freedom as by Hillis, Statistics in Medicine, 2007): the variance of the difference is that
    over seeds, plus the jackknife covariance over scenes between runs of different seeds.

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
    scores, left_out = [scores_a, scores_b], [left_out_a, left_out_b]
    if paired:
        scores, left_out = [scores_b - scores_a], [left_out_b - left_out_a]
    seeds, scenes = _crossed_variance(scores, left_out)
    runs = np.array([[len(side)] for side in scores])
    error, degrees = _crossed_error(seeds, runs, scenes, scene_degrees)
    _check_varies("counts", difference[0], error[0])
    detectable = _detectable(error, degrees)[0]
    more_seeds = _detectable(*_crossed_error(seeds / 2, 2 * runs, scenes, scene_degrees))[0]
    more_scenes = _detectable(*_crossed_error(seeds, runs, scenes / 2, 2 * scene_degrees + 1))[0]
    return RecipeComparison(
        **_difference_fields(difference, *_t_test(difference, error, degrees)),
        detectable=float(detectable),
        scene_count=left_out_a.shape[1],
        degrees_of_freedom=float(degrees[0]),
        seed_variance=float(seeds.sum(0)[0]),
        scene_variance=float(scenes[0]),
        detectable_more_seeds=float(min(detectable, more_seeds)),
        detectable_more_scenes=float(min(detectable, more_scenes)),
    )


def score_interval(counts: Array, scene: Array | None) -> ScoreInterval:
    """The scores of one run, counts `(N, C, C)`, with intervals as in the checkpoint test."""
    (counts,) = _check_counts("(N, C, C)", counts)
    _, scores, left_out, degrees = _by_scene(counts, scene)
    interval = np.clip(_t_test(scores, _jackknife_error(left_out), degrees)[0], 0, 1)
    return ScoreInterval(
        float(scores[0]), tuple(interval[:, 0].tolist()), scores[1:], interval[:, 1:], len(left_out)
    )


def holm(p_values: Array) -> Array:
    """Holm's correction (Scandinavian Journal of Statistics, 1979) of `(K,)` p-values; NaN stay NaN, uncounted."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def _by_scene(counts: Array, scene: Array | None) -> tuple[Array, Array, Array, Array]:
    """What all tests need of counts `(..., N, C, C)`.

    Pixels of each class in truth, prediction and both by scene `(..., G, 3, C)`, which add up; scores `(..., 1 + C)`;
    scores without each scene `(..., G, 1 + C)`; degrees of freedom over scenes `(1 + C,)`, as many as equally large
    ones have, for a class over the images that have it.
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
    held = membership @ np.column_stack(
        (np.ones(images), truth > 0)
    )  # images by scene, and those with each class
    degrees = (
        held.sum(0) ** 2 / np.maximum((held**2).sum(0), 1) - 1
        if len(names) >= MIN_SCENES
        else np.full(1, np.nan)
    )
    return totals, _scores(pooled)[..., 0, :], _scores(pooled - totals), degrees


def _scores(totals: Array) -> Array:
    """`(..., 1 + C)` from totals `(..., 3, C)`: the mIoU over the classes in the truth, then the IoU of each."""
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


def _crossed_variance(scores: list[Array], left_out: list[Array]) -> tuple[Array, Array]:
    """Variances `(sides, K)` due to seeds and `(K,)` due to scenes, of scores `(S, K)` and `(S, G, K)` without each."""
    seeds = np.stack([side.var(0, ddof=1) / len(side) for side in scores])
    scenes = sum(_covariance(side, side) for side in left_out)
    if len(left_out) == 2:
        scenes = scenes - 2 * _covariance(*left_out)
    return seeds, np.maximum(scenes, 0)


def _covariance(first: Array, second: Array) -> Array:
    """Jackknife covariances `(K,)` of runs i of the first and j of the second `(S, G, K)`, a mean over all i != j."""
    scenes = first.shape[1]
    first, second = first - first.mean(1, keepdims=True), second - second.mean(1, keepdims=True)
    covariance = (scenes - 1) / scenes * np.einsum("igk,jgk->ijk", first, second)
    return covariance[~np.eye(len(first), len(second), dtype=bool)].mean(0)


def _crossed_error(seeds: Array, runs: Array, scenes: Array, scene_degrees: Array) -> tuple[Array, Array]:
    """Standard errors `(K,)` and their degrees of freedom (Satterthwaite) from the parts of the variance."""
    total = seeds.sum(0) + scenes
    squares = (seeds**2 / (runs - 1)).sum(0) + scenes**2 / scene_degrees
    return np.sqrt(total), np.divide(total**2, squares, where=squares != 0, out=np.full_like(total, np.nan))


def _t_test(difference: Array, error: Array, degrees: Array) -> tuple[Array, Array]:
    """Intervals `(2, K)` and p-values `(K,)`; where nothing varies, p is 1 for no difference and NaN for one."""
    constant = error < ROUNDING
    degrees = np.where(constant, 1, degrees)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * error
    p_values = 2 * stats.t.sf(np.abs(difference) / np.where(constant, 1, error), degrees)
    p_values[constant] = np.where(np.abs(difference[constant]) < ROUNDING, 1, np.nan)
    return np.stack((difference - half, difference + half)), p_values


def _swap_test(totals_a: Array, totals_b: Array, seed: int) -> Array:
    """p-values `(1 + C,)` of all scores from the totals of each scene `(G, 3, C)`."""
    scenes = len(totals_a)
    exact = scenes <= MAX_EXACT_SCENES
    if exact:
        swaps = np.arange(2**scenes)[:, None] >> np.arange(scenes) & 1
    else:
        swaps = np.random.default_rng(seed).integers(0, 2, (SWAPS, scenes))
    moved = np.tensordot(swaps.astype(float), totals_b - totals_a, 1)
    swapped = _scores(totals_b.sum(0) - moved) - _scores(totals_a.sum(0) + moved)
    observed = _scores(totals_b.sum(0)) - _scores(totals_a.sum(0))
    extreme = (np.abs(swapped) >= np.abs(observed) - ROUNDING).sum(0)
    return extreme / len(swaps) if exact else (1 + extreme) / (1 + len(swaps))


def _detectable(error: Array, degrees: Array) -> Array:
    return (stats.t.ppf((1 + CONFIDENCE) / 2, degrees) + stats.t.ppf(POWER, degrees)) * error


def _needed(squared: float, interval: tuple[float, float], least: float) -> tuple[float, float]:
    """Cases that show the far and the near end of an interval, where those for a difference d are `squared / d^2`."""
    low, high = interval
    far, near = max(-low, high), max(low, -high, 0)
    return tuple(max(float(squared / end**2), least) if end else np.inf for end in (far, near))


def _difference_fields(difference: Array, interval: Array, p_values: Array) -> dict:
    """The fields of a `SceneComparison` that the mIoU and then the classes have."""
    return {
        "difference": float(difference[0]),
        "interval": tuple(interval[:, 0].tolist()),
        "p_value": float(p_values[0]),
        "class_difference": difference[1:],
        "class_interval": interval[:, 1:],
        "class_p_value": holm(p_values[1:]),
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
            f"{name}: found {runs_a} and {runs_b} runs, expected 2 or more of each recipe; train it with further "
            "seeds, or ask compare_checkpoints about single runs"
        )
    if paired and runs_a != runs_b:
        raise ValueError(
            f"paired: found {runs_a} and {runs_b} runs, expected as many of both; leave out those without partner"
        )


def _check_varies(name: str, difference: float, error: float) -> None:
    if error < ROUNDING <= abs(difference):
        raise ValueError(
            f"{name}: found a difference of {difference:.4g} between runs that do not vary, expected runs of "
            "different seeds; look whether one run is given twice"
        )
