"""Simulated counts of runs on images clustered in scenes.

Used by the unit tests and the simulation of the recipe test, the seed test and the checkpoint test.
"""

import numpy as np

# Images per scene of NYUv2, where a scene is a run of neighbouring ids. VALID_SIZES: the validation images
# (validation blocks, 14.5 effective scenes). TRAIN_SIZES: all training images (69.1 effective scenes).
VALID_SIZES = (2, 25, 11, 27, 7, 19, 13, 3, 8, 4, 4, 5, 5, 6, 9, 5, 8, 1, 7, 7, 11, 2, 3, 5)
TRAIN_SIZES = (
    6, 4, 2, 6, 2, 8, 1, 12, 4, 25, 5, 1, 2, 15, 11, 1, 3, 4, 7, 27, 13, 6, 5, 10, 7, 2, 7, 15, 2, 19, 4, 13, 15, 5,
    13, 2, 30, 1, 4, 3, 9, 3, 7, 7, 8, 4, 3, 11, 5, 4, 4, 4, 3, 2, 4, 2, 2, 6, 3, 5, 2, 8, 14, 12, 5, 6, 9, 3, 4, 6,
    34, 8, 6, 3, 9, 11, 2, 2, 13, 5, 5, 8, 8, 3, 8, 2, 3, 16, 3, 1, 1, 7, 3, 3, 7, 3, 2, 2, 2, 7, 4, 3, 5, 2, 11, 3,
    9, 4, 1, 2, 5, 13, 2, 6, 3, 7, 2, 14, 2, 5, 6, 5, 7,
)  # fmt: skip
PIXELS = 1000
FREQUENCIES = (0.4, 0.3, 0.2, 0.1)  # approximate pixel shares of the four classes
DIFFICULTY_SD = 0.1  # of a class's recall over images, shared by all runs
RECIPE_SD = 0.05  # over images, shared by all runs of a recipe
IMAGE_SD = 0.05  # over images, separate for each run
RUN_SD = 0.006  # over runs, shared by all images and classes: about 0.008 in mIoU


def scenes_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def clustered_normal(rng, scene, leading, correlation):
    """Standard normals `(*leading, N, C)`, correlated between the images of a scene."""
    shape = (*leading, len(scene), len(FREQUENCIES))
    shared = rng.standard_normal((*leading, scene.max() + 1, len(FREQUENCIES)), np.float32)[..., scene, :]
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal(shape, np.float32)


def simulate_rates(rng, scene, runs, correlation, recipe_sd=RECIPE_SD, run_sd=RUN_SD, folds=1, recipes=2):
    """Simulate equal recipes: pixels of each class `(N, C)` and recall `(R, S, N, C)` before clipping.

    With more than one fold, each run is trained once per fold, and the fold of a scene determines which of
    these trainings scores it. Two single checkpoints differ in their training: they are equal only with a
    `run_sd` of 0.
    """
    weights = np.array(FREQUENCIES) * np.exp(clustered_normal(rng, scene, (), correlation))
    truth = np.rint(PIXELS * weights / weights.sum(1, keepdims=True)).astype(np.int64)
    rates = 0.7 + DIFFICULTY_SD * clustered_normal(rng, scene, (1, 1), correlation)
    rates = rates + recipe_sd * clustered_normal(rng, scene, (recipes, 1), correlation)
    rates = rates + IMAGE_SD * clustered_normal(rng, scene, (recipes, runs), correlation)
    return truth, rates + run_sd * rng.standard_normal((recipes, runs, folds, 1))[:, :, scene % folds]


def confuse(truth, rates):
    """Counts `(..., N, C, C)`: missed pixels are confused with the next class."""
    hits = np.rint(truth * np.clip(rates, 0, 1)).astype(np.int64)
    counts = np.zeros((*hits.shape, hits.shape[-1]), np.int64)
    classes = np.arange(hits.shape[-1])
    counts[..., classes, classes] = hits
    counts[..., classes, (classes + 1) % len(classes)] = truth - hits
    return counts


def true_difference(gain):
    """mIoU difference over (nearly) infinitely many scenes if the second recipe's recall is `gain` higher."""
    truth, rates = simulate_rates(np.random.default_rng(0), np.arange(100_000), 1, 0)
    scores = []
    for rate in (rates[0, 0], rates[0, 0] + gain):
        pooled = confuse(truth, rate).sum(0)
        hits = np.diagonal(pooled)
        scores.append((hits / (pooled.sum(0) + pooled.sum(1) - hits)).mean())
    return scores[1] - scores[0]
