"""Is a difference between two runs real? Two questions that must not be mixed up.

`paired_bootstrap`: do these two checkpoints differ on images like these? The images vary, the
checkpoints stay. `paired_seeds`: do the two recipes differ? The seeds vary. An interval over images
says nothing about recipes: two runs of one recipe with different seeds can differ "significantly"
on the same images, as those of plain cross-entropy in the README did.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
DETECTABLE = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)  # 2.8 standard errors


@dataclass(frozen=True)
class PairedBootstrap:
    """Two checkpoints on the same images; every difference is b minus a.

    Attributes:
        difference: of the mIoU pooled over all images.
        interval: (low, high), 95 %, percentile bootstrap over images.
        p_value: of a swap test: how often exchanging a and b image by image gives as large a difference.
        class_difference: `(C,)` of the IoU; NaN where either run has none.
        class_interval: `(2, C)`, each class for itself.
        class_p_value: `(C,)`, swap test, Holm-corrected for the number of classes.
        detectable: the smallest difference that this many images show with 80 % power.
        images_needed: about how many images would show the observed difference; inf if it is 0.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    class_difference: np.ndarray
    class_interval: np.ndarray
    class_p_value: np.ndarray
    detectable: float
    images_needed: float


@dataclass(frozen=True)
class PairedSeeds:
    """Two recipes over the same seeds; the difference is b minus a.

    Attributes:
        difference: mean over the seeds.
        interval: (low, high), 95 %, Student's t; (-inf, inf) with fewer than 3 pairs.
        p_value: of the paired t test; NaN with fewer than 3 pairs.
        seed_count: pairs.
        seeds_needed: about how many pairs would show the observed difference; NaN with fewer than 3.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    seed_count: int
    seeds_needed: float


def paired_bootstrap(
    counts_a: np.ndarray, counts_b: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> PairedBootstrap:
    """Compare two checkpoints by their confusion counts on the same images.

    Images are drawn with replacement, the same for both, and scores are pooled over each draw; after
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993. Neighbouring frames of one scene
    count as independent images here, so that on NYUv2 intervals are somewhat too narrow.

    Args:
        counts_a: `(N, C, C)` counts per image of run a, rows = truth.
        counts_b: those of run b, of the same images in the same order.
        resamples: draws, and swaps.
        seed: of the draws.

    Raises:
        ValueError: shapes or truths that differ, fewer than 2 images, nothing labelled.
    """
    if resamples < 1:
        raise ValueError(f"resamples: found {resamples}, expected 1 or more; 10000 give steady intervals")
    totals_a, totals_b = _totals(counts_a), _totals(counts_b)
    _check_pair(counts_a, counts_b, totals_a, totals_b)
    rng, images = np.random.default_rng(seed), len(totals_a)
    observed = _differences(totals_a.sum(0)[None], totals_b.sum(0)[None])[0]

    draws = rng.integers(0, images, (resamples, images)) + images * np.arange(resamples)[:, None]
    weights = np.bincount(draws.ravel(), minlength=resamples * images).reshape(resamples, images).astype(float)
    drawn = _differences(weights @ totals_a, weights @ totals_b)
    tail = 100 * (1 - CONFIDENCE) / 2
    compared = np.isfinite(observed)  # a class that either run never saw has no difference
    low, high = np.full((2, len(observed)), np.nan)
    low[compared], high[compared] = np.nanpercentile(drawn[:, compared], [tail, 100 - tail], axis=0)

    swaps = rng.integers(0, 2, (resamples, images)).astype(float)
    moved = swaps @ (totals_b - totals_a)
    swapped = _differences(totals_a.sum(0) + moved, totals_b.sum(0) - moved)
    extreme = (np.abs(swapped) >= np.abs(observed) - 1e-12).sum(0)
    p_values = np.where(compared, (1 + extreme) / (1 + resamples), np.nan)

    # where a few images decide a rare class, the bootstrap's spread is too small and the swaps' is not
    error = max(drawn[:, 0].std(), swapped[:, 0].std())
    needed = images * (DETECTABLE * error / abs(observed[0])) ** 2 if observed[0] else np.inf
    return PairedBootstrap(
        difference=float(observed[0]),
        interval=(float(low[0]), float(high[0])),
        p_value=float(p_values[0]),
        class_difference=observed[1:],
        class_interval=np.stack((low[1:], high[1:])),
        class_p_value=holm(p_values[1:]),
        detectable=float(DETECTABLE * error),
        images_needed=float(needed),
    )


def _totals(counts: np.ndarray) -> np.ndarray:
    """Truth, prediction and hit totals per image, `(N, 3C)`: all that IoU needs, and they add up."""
    counts = np.asarray(counts)
    if counts.ndim != 3 or counts.shape[1] != counts.shape[2]:
        raise ValueError(f"counts: found shape {counts.shape}, expected (N, C, C), one matrix for each image")
    return np.concatenate((counts.sum(2), counts.sum(1), np.diagonal(counts, axis1=1, axis2=2)), 1).astype(float)


def _check_pair(counts_a: np.ndarray, counts_b: np.ndarray, totals_a: np.ndarray, totals_b: np.ndarray) -> None:
    if totals_a.shape != totals_b.shape or len(totals_a) < 2:
        raise ValueError(
            f"counts: found shapes {np.shape(counts_a)} and {np.shape(counts_b)}, expected the same 2 or more images "
            "and classes in both"
        )
    classes = totals_a.shape[1] // 3
    differs = (totals_a[:, :classes] != totals_b[:, :classes]).any(1)
    if differs.any():
        raise ValueError(
            f"counts: the truth differs in {differs.sum()} of {len(differs)} images, the first is number "
            f"{differs.argmax()}; compare runs on the same images in the same order at the same size"
        )
    if not totals_a[:, :classes].any():
        raise ValueError("counts: all zero; without a labelled pixel there is nothing to compare")


def _differences(pooled_a: np.ndarray, pooled_b: np.ndarray) -> np.ndarray:
    """`(R, 1 + C)`: difference of the mIoU, then of each class's IoU, from pooled totals `(R, 3C)`."""
    ious = []
    for pooled in (pooled_a, pooled_b):
        truth, prediction, hits = np.split(pooled, 3, axis=1)
        union = truth + prediction - hits
        ious.append(np.where(union > 0, hits / np.maximum(union, 1), np.nan))
    mean_a, mean_b = (np.nanmean(iou, axis=1) for iou in ious)
    return np.column_stack((mean_b - mean_a, ious[1] - ious[0]))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's correction (Scandinavian Journal of Statistics, 1979) of `(C,)` p-values; NaN stay NaN."""
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def paired_seeds(scores_a: np.ndarray, scores_b: np.ndarray) -> PairedSeeds:
    """Compare two recipes by one score for each seed, in the same order of seeds.

    Raises:
        ValueError: lengths that differ, or no score.
    """
    scores_a, scores_b = np.asarray(scores_a, float), np.asarray(scores_b, float)
    if scores_a.shape != scores_b.shape or scores_a.ndim != 1 or not len(scores_a):
        raise ValueError(
            f"scores: found shapes {scores_a.shape} and {scores_b.shape}, expected one score for each seed in both"
        )
    differences = scores_b - scores_a
    count, mean = len(differences), float(differences.mean())
    if count < 3:
        return PairedSeeds(mean, (-np.inf, np.inf), np.nan, count, np.nan)
    test = stats.ttest_rel(scores_b, scores_a)
    interval = test.confidence_interval(CONFIDENCE)
    spread = differences.std(ddof=1)
    needed = max(3.0, (DETECTABLE * spread / mean) ** 2 + 2) if mean else np.inf
    return PairedSeeds(mean, (float(interval.low), float(interval.high)), float(test.pvalue), count, float(needed))
