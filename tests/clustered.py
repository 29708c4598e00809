"""Counts of runs on images that are clustered in scenes, for the tests and the simulation of the three tests."""

import numpy as np

# images of each scene, as runs of neighbouring ids: of NYUv2's validation images (validation blocks, 14.5 effective),
# and of all of its training images (69.1 effective)
VALID_SIZES = (2, 25, 11, 27, 7, 19, 13, 3, 8, 4, 4, 5, 5, 6, 9, 5, 8, 1, 7, 7, 11, 2, 3, 5)
TRAIN_SIZES = (
    6, 4, 2, 6, 2, 8, 1, 12, 4, 25, 5, 1, 2, 15, 11, 1, 3, 4, 7, 27, 13, 6, 5, 10, 7, 2, 7, 15, 2, 19, 4, 13, 15, 5,
    13, 2, 30, 1, 4, 3, 9, 3, 7, 7, 8, 4, 3, 11, 5, 4, 4, 4, 3, 2, 4, 2, 2, 6, 3, 5, 2, 8, 14, 12, 5, 6, 9, 3, 4, 6,
    34, 8, 6, 3, 9, 11, 2, 2, 13, 5, 5, 8, 8, 3, 8, 2, 3, 16, 3, 1, 1, 7, 3, 3, 7, 3, 2, 2, 2, 7, 4, 3, 5, 2, 11, 3,
    9, 4, 1, 2, 5, 13, 2, 6, 3, 7, 2, 14, 2, 5, 6, 5, 7,
)  # fmt: skip
PIXELS = 1000
FREQUENCIES = (0.4, 0.3, 0.2, 0.1)  # of four classes, roughly
DIFFICULTY_SD = 0.1  # of the share of a class's pixels that is found, over images, for all runs alike
RECIPE_SD = 0.05  # over images, for all runs of a recipe alike
IMAGE_SD = 0.05  # over images, for each run
RUN_SD = 0.006  # over runs, for all images and classes alike: about 0.008 of the mIoU


def scenes_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def clustered_normal(rng, scene, leading, correlation):
    """`(*leading, N, C)` standard normals that are correlated within a scene, over images."""
    shape = (*leading, len(scene), len(FREQUENCIES))
    shared = rng.standard_normal((*leading, scene.max() + 1, len(FREQUENCIES)), np.float32)[..., scene, :]
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal(shape, np.float32)


def simulate_rates(rng, scene, runs, correlation, recipe_sd=RECIPE_SD, run_sd=RUN_SD, folds=1):
    """Pixels of each class `(N, C)` and, for two equal recipes, the shares found `(2, S, N, C)`, before clipping.

    With more than one fold each run was trained once for each, and the fold of a scene says by which it is scored.
    Two single checkpoints differ by what their training was: they are equal only with a `run_sd` of 0.
    """
    weights = np.array(FREQUENCIES) * np.exp(clustered_normal(rng, scene, (), correlation))
    truth = np.rint(PIXELS * weights / weights.sum(1, keepdims=True)).astype(np.int64)
    rates = 0.7 + DIFFICULTY_SD * clustered_normal(rng, scene, (1, 1), correlation)
    rates = rates + recipe_sd * clustered_normal(rng, scene, (2, 1), correlation)
    rates = rates + IMAGE_SD * clustered_normal(rng, scene, (2, runs), correlation)
    return truth, rates + run_sd * rng.standard_normal((2, runs, folds, 1))[:, :, scene % folds]


def confuse(truth, rates):
    """Counts `(..., N, C, C)`: missed pixels are confused with the next class."""
    hits = np.rint(truth * np.clip(rates, 0, 1)).astype(np.int64)
    counts = np.zeros((*hits.shape, hits.shape[-1]), np.int64)
    classes = np.arange(hits.shape[-1])
    counts[..., classes, classes] = hits
    counts[..., classes, (classes + 1) % len(classes)] = truth - hits
    return counts


def true_difference(gain):
    """Of the mIoU over infinitely many scenes, where the second recipe finds so much more of each class."""
    truth, rates = simulate_rates(np.random.default_rng(0), np.arange(100_000), 1, 0)
    scores = []
    for rate in (rates[0, 0], rates[0, 0] + gain):
        pooled = confuse(truth, rate).sum(0)
        hits = np.diagonal(pooled)
        scores.append((hits / (pooled.sum(0) + pooled.sum(1) - hits)).mean())
    return scores[1] - scores[0]
