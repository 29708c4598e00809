"""How often the three tests are wrong where the truth is known: a Markdown table of rates, for lib/README.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/simulate_verdicts.py [--draws 3000]     # about 15 minutes

Two recipes over images that are clustered in scenes as NYUv2's are, four classes; `tests/clustered.py` says how they
vary. A false alarm is p < 0.05 where nothing differs, power is that where the second recipe has 0.012 mIoU more.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from clustered import TRAIN_SIZES, VALID_SIZES, confuse, scenes_of, simulate_rates, true_difference

from lib.metrics import mean_truth_iou
from lib.significance import compare_checkpoints, compare_recipes, compare_seeds

SEED = 1313  # fixed before the first run
GAIN = 0.012
COLUMNS = ("false alarms", "any of 4 classes", "coverage", "power at +0.012")


def find_gain():
    """Of the shares found, that makes a difference of `GAIN` in the mIoU."""
    return GAIN / (true_difference(0.01) / 0.01)


class Rates:
    """How often each of `COLUMNS` happened, by row."""

    def __init__(self):
        self.counts = {}

    def add(self, row, equal, better, true):
        low, high = better.interval
        classes = getattr(equal, "class_p_value", None)
        some = np.nan if classes is None else np.nanmin(classes) < 0.05
        happened = np.array([equal.p_value < 0.05, some, low <= true <= high, better.p_value < 0.05], float)
        self.counts.setdefault(row, []).append(happened)

    def print(self):
        print("| test | scenes | correlation | recipe by scene | seeds |", " | ".join(COLUMNS), "|")
        print("|", " | ".join(["---"] * (5 + len(COLUMNS))), "|")
        for row, happened in self.counts.items():
            rates = ("" if np.isnan(rate) else f"{rate:.3f}" for rate in np.mean(happened, axis=0))
            print("|", " | ".join((*map(str, row), *rates)), "|")


def add_checkpoints(rates, rng, scene, correlation, gain, draw):
    truth, found = simulate_rates(rng, scene, 1, correlation, run_sd=0)
    a, b, better = (confuse(truth, rate) for rate in (found[0, 0], found[1, 0], found[1, 0] + gain))
    for test, clusters in (("checkpoint", scene), ("checkpoint, images as scenes", None)):
        results = (compare_checkpoints(a, other, clusters, seed=draw) for other in (b, better))
        rates.add((test, scene.max() + 1, correlation, 0.05, 1), *results, GAIN)


def add_recipes(rates, rng, scene, correlation, recipe_sd, runs, gain, folds=1):
    truth, found = simulate_rates(rng, scene, max(runs), correlation, recipe_sd, folds=folds)
    a, b, better = confuse(truth, found[0]), confuse(truth, found[1]), confuse(truth, found[1] + gain)
    scores = [np.array([mean_truth_iou(run) for run in side]) for side in (a, b, better)]
    for count in runs:
        row = scene.max() + 1, correlation, recipe_sd, count
        results = (compare_recipes(a[:count], other[:count], scene) for other in (b, better))
        pooled = "" if folds == 1 else ", five folds"
        rates.add((f"recipe{pooled}", *row), *results, GAIN)
        results = (compare_seeds(scores[0][:count], other[:count]) for other in scores[1:])
        rates.add((f"seed{pooled}, taken for the recipe test", *row), *results, GAIN)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=3000)
    draws, rates, gain = parser.parse_args().draws, Rates(), find_gain()
    valid, train = scenes_of(VALID_SIZES), scenes_of(TRAIN_SIZES)
    for correlation in (0, 0.3, 0.6):
        rng = np.random.default_rng([SEED, int(10 * correlation)])
        for draw in range(draws):
            add_checkpoints(rates, rng, valid, correlation, gain, draw)
    for correlation, recipe_sd in ((0, 0.05), (0.3, 0.0), (0.3, 0.05), (0.6, 0.05)):
        rng = np.random.default_rng([SEED, 1, int(10 * correlation), int(100 * recipe_sd)])
        for _ in range(draws):
            add_recipes(rates, rng, valid, correlation, recipe_sd, (2, 3, 5, 10), gain)
    for correlation, recipe_sd in ((0.3, 0.0), (0.3, 0.05), (0.6, 0.05)):
        rng = np.random.default_rng([SEED, 2, int(10 * correlation), int(100 * recipe_sd)])
        for _ in range(draws):
            add_recipes(rates, rng, train, correlation, recipe_sd, (2, 3, 5), gain, folds=5)
    rates.print()


if __name__ == "__main__":
    main()
