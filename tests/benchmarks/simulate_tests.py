"""Simulate how often tests and plans are wrong: Markdown tables of rates for lib/README.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/simulate_tests.py [--draws 3000] [--only several plans tests]

Recipes are simulated on images that are clustered in scenes like NYUv2's, with four classes.
`tests/clustered.py` describes how they vary.

- `several`: several recipes compared with one baseline.
- `plans`: planned and simulated power. (Two minutes, with `several`.)
- `tests`: each of the three tests alone. A false alarm is p < 0.05 without a true difference. Power is the
  rate of p < 0.05 if the second recipe's mIoU is 0.012 higher. (12 minutes.)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from clustered import TRAIN_SIZES, VALID_SIZES, confuse, scenes_of, simulate_rates, true_difference

from lib.metrics import mean_iou
from lib.significance import compare_checkpoints, compare_recipes, compare_seeds, plan, pool_run_sd

SEED = 1313  # for `tests`; fixed before the first run
SEED_OF_SEVERAL = 2611  # for `several` and `plans`; fixed before the first run
GAIN = 0.012
CORRELATION = 0.3
COMPARISONS, SEEDS, PILOTS = (2, 5, 19), (2, 3, 5), (3, 5)
DESIGNS = ((VALID_SIZES, 1), (TRAIN_SIZES, 5))  # scenes of one fold; of all five
COLUMNS = ("false alarms", "any of 4 classes", "coverage", "power at +0.012")


def find_gain():
    """The increase in the recall of each class that raises the mIoU by `GAIN`."""
    return GAIN / (true_difference(0.01) / 0.01)


def print_table(columns, rows):
    print("|", " | ".join(columns), "|")
    print("|", " | ".join(["---"] * len(columns)), "|")
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    print(flush=True)


def rate(happened):
    """A rate with its standard error in brackets."""
    share = np.mean(happened)
    return f"{share:.3f} ({np.sqrt(share * (1 - share) / len(happened)):.3f})"


def pooled_iou(union, hits):
    """mIoU from pixels by class `(..., C)`. Every class is in the ground truth."""
    return (hits / union).mean(-1)


class Draw:
    """mIoU of runs: overall `(R, S)`, without each scene `(R, S, G)` and by fold `(R, S, F)`."""

    def __init__(self, truth, rates, scene, folds):
        hits = np.rint(truth * np.clip(rates, 0, 1))
        missed = truth - hits  # predicted as the next class, as in `confuse`
        union = truth + np.roll(missed, 1, -1)
        first = np.flatnonzero(np.diff(scene, prepend=-1))
        union, hits = (np.add.reduceat(pixels, first, axis=-2) for pixels in (union, hits))
        whole = [pixels.sum(-2, keepdims=True) for pixels in (union, hits)]
        self.scores = pooled_iou(*whole)[..., 0]
        self.left_out = pooled_iou(whole[0] - union, whole[1] - hits)
        fold = np.arange(len(first)) % folds
        self.by_fold = np.stack(
            [
                pooled_iou(*(pixels[..., fold == f, :].sum(-2) for pixels in (union, hits)))
                for f in range(folds)
            ],
            -1,
        )


class Crossed:
    """`compare_recipes` vectorised: the recipe test of all recipes against the first at once."""

    def __init__(self, draw, seeds, scene_degrees):
        scores, left_out = draw.scores[:, :seeds], draw.left_out[:, :seeds]
        scenes = left_out.shape[-1]
        centred = left_out - left_out.mean(-1, keepdims=True)

        def covariance(first, second):  # over pairs of different runs
            pairs = (first.sum(-2) * second.sum(-2)).sum(-1) - (first * second).sum((-2, -1))
            return (scenes - 1) / scenes * pairs / (seeds * (seeds - 1))

        own = covariance(centred, centred)
        self.unclipped = own[0] + own[1:] - 2 * covariance(centred[:1], centred[1:])
        self.difference = scores[1:].mean(1) - scores[0].mean()
        self.scene_variance = np.maximum(self.unclipped, 0)
        by_seed = scores.var(1, ddof=1) / seeds
        variance = by_seed[0] + by_seed[1:] + self.scene_variance
        self.degrees = variance**2 / (
            (by_seed[0] ** 2 + by_seed[1:] ** 2) / (seeds - 1) + self.scene_variance**2 / scene_degrees
        )
        self.error = np.sqrt(variance)
        self.p_value = 2 * stats.t.sf(np.abs(self.difference) / self.error, self.degrees)

    def covers(self, true, comparisons):
        """Whether the intervals of the first `comparisons` comparisons all contain the true differences."""
        half = stats.t.ppf(1 - 0.05 / 2 / comparisons, self.degrees[:comparisons]) * self.error[:comparisons]
        return bool((np.abs(self.difference - true)[:comparisons] <= half).all())


def scene_degrees_of(sizes):
    sizes = np.array(sizes)
    return sizes.sum() ** 2 / (sizes**2).sum() - 1


def draw_recipes(rng, sizes, folds, gains):
    """Runs of equal recipes, and the same runs with the recall of each recipe raised by its gain."""
    scene = scenes_of(sizes)
    truth, rates = simulate_rates(rng, scene, max(SEEDS), CORRELATION, folds=folds, recipes=len(gains))
    return [Draw(truth, shares, scene, folds) for shares in (rates, rates + np.reshape(gains, (-1, 1, 1, 1)))]


def check_against_library(rng, sizes, folds):
    """Assert that the vectorised test equals that of the library."""
    scene = scenes_of(sizes)
    truth, rates = simulate_rates(rng, scene, 3, CORRELATION, folds=folds, recipes=3)
    crossed = Crossed(Draw(truth, rates, scene, folds), 3, scene_degrees_of(sizes))
    counts = confuse(truth, rates)
    for other in (1, 2):
        result = compare_recipes(counts[0], counts[other], scene)
        found = [getattr(crossed, name)[other - 1] for name in ("difference", "p_value", "error", "degrees")]
        expected = [result.difference, result.p_value, result.standard_error, result.degrees_of_freedom]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def simulate_several(draws, seed=SEED_OF_SEVERAL):
    """Rows of family-wise error and simultaneous coverage."""
    rows = []
    gains = np.linspace(-1, 1, max(COMPARISONS) + 1) * 2 * find_gain()
    gains -= gains[0]  # from no difference to four times `GAIN`
    gains[1:] = np.random.default_rng(0).permutation(gains[1:])
    true = np.array([true_difference(gain) for gain in gains[1:]])
    for sizes, folds in DESIGNS:
        rng, degrees = np.random.default_rng([seed, folds]), scene_degrees_of(sizes)
        check_against_library(np.random.default_rng(0), sizes, folds)
        happened = {(count, seeds): [] for count in COMPARISONS for seeds in SEEDS}
        for _ in range(draws):
            equal, better = draw_recipes(rng, sizes, folds, gains)
            for seeds in SEEDS:
                null, shifted = Crossed(equal, seeds, degrees), Crossed(better, seeds, degrees)
                for count in COMPARISONS:
                    alarm = count * null.p_value[:count].min() < 0.05
                    happened[count, seeds].append((alarm, shifted.covers(true, count)))
        for (count, seeds), pairs in happened.items():
            alarms, covered = np.transpose(pairs)
            rows.append((len(sizes), seeds, count, rate(alarms), rate(covered)))
    return rows


def simulate_plans(draws, seed=SEED_OF_SEVERAL):
    """Rows of simulated power and of planned power, from true variances and from those of pilot runs."""
    rows, gain = [], find_gain()
    for sizes, folds in DESIGNS:
        rng, degrees, scenes = np.random.default_rng([seed, 1, folds]), scene_degrees_of(sizes), len(sizes)
        found, pilots, differences, run_variance = {}, {}, [], []
        for _ in range(draws):
            equal, better = draw_recipes(rng, sizes, folds, (0, gain))
            for seeds in SEEDS:
                found.setdefault(seeds, []).append(Crossed(better, seeds, degrees).p_value[0] < 0.05)
            for count in PILOTS:
                cells = equal.by_fold[:, :count].swapaxes(1, 2).reshape(-1, count)
                variance = Crossed(equal, count, degrees).scene_variance[0] * scenes
                pilots.setdefault(count, []).append((pool_run_sd(list(cells))[0], variance))
            differences.append(np.diff(equal.scores.mean(1))[0])
            run_variance.append(equal.by_fold.var(1, ddof=1).mean())
        run_sd = np.sqrt(np.mean(run_variance))
        variance = max(0, np.var(differences) - 2 * run_sd**2 / (folds * max(SEEDS))) * scenes

        def planned(seeds, run_sd, variance, folds=folds, scenes=scenes, degrees=degrees):
            return plan(seeds, folds, scenes, run_sd, variance, scene_degrees=degrees).power(GAIN)

        for seeds in SEEDS:
            columns = [f"{planned(seeds, run_sd, variance):.3f}"]
            for count in PILOTS:
                powers = [planned(seeds, *pilot) for pilot in pilots[count]]
                bias = np.mean(powers) - np.mean(found[seeds])
                columns.append(f"{np.mean(powers):.3f}, {bias:+.3f}, {np.std(powers):.3f}")
            rows.append((scenes, seeds, rate(found[seeds]), *columns))
    return rows


class Rates:
    """The rate of each of `COLUMNS`, by row."""

    def __init__(self):
        self.counts = {}

    def add(self, row, equal, better, true):
        low, high = better.interval
        adjusted = getattr(equal.adjusted(1), "class_p_value", None)
        some = np.nan if adjusted is None else np.nanmin(adjusted) < 0.05
        happened = np.array([equal.p_value < 0.05, some, low <= true <= high, better.p_value < 0.05], float)
        self.counts.setdefault(row, []).append(happened)

    def print(self):
        rows = []
        for row, happened in self.counts.items():
            rates = ("" if np.isnan(share) else f"{share:.3f}" for share in np.mean(happened, axis=0))
            rows.append((*row, *rates))
        print_table(("test", "scenes", "correlation", "recipe by scene", "seeds", *COLUMNS), rows)


def add_checkpoints(rates, rng, scene, correlation, gain, draw):
    truth, found = simulate_rates(rng, scene, 1, correlation, run_sd=0)
    a, b, better = (confuse(truth, rate) for rate in (found[0, 0], found[1, 0], found[1, 0] + gain))
    for test, clusters in (("checkpoint", scene), ("checkpoint, images as scenes", None)):
        results = (compare_checkpoints(a, other, clusters, seed=draw) for other in (b, better))
        rates.add((test, scene.max() + 1, correlation, 0.05, 1), *results, GAIN)


def add_recipes(rates, rng, scene, correlation, recipe_sd, runs, gain, folds=1):
    truth, found = simulate_rates(rng, scene, max(runs), correlation, recipe_sd, folds=folds)
    a, b, better = confuse(truth, found[0]), confuse(truth, found[1]), confuse(truth, found[1] + gain)
    scores = [np.array([mean_iou(run) for run in side]) for side in (a, b, better)]
    pooled = "" if folds == 1 else ", five folds"
    for count in runs:
        row = scene.max() + 1, correlation, recipe_sd, count
        results = (compare_recipes(a[:count], other[:count], scene) for other in (b, better))
        rates.add((f"recipe{pooled}", *row), *results, GAIN)
        results = (compare_seeds(scores[0][:count], other[:count]) for other in scores[1:])
        rates.add((f"seed, read as the recipe test{pooled}", *row), *results, GAIN)


def simulate_tests(draws):
    rates, gain = Rates(), find_gain()
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=3000)
    parser.add_argument("--only", nargs="+", default=["several", "plans", "tests"])
    arguments = parser.parse_args()
    if "several" in arguments.only:
        columns = ("scenes", "seeds", "comparisons", "family-wise error", "simultaneous coverage")
        print_table(columns, simulate_several(arguments.draws))
    if "plans" in arguments.only:
        pilots = (f"pilot of {count} seeds: mean, bias, sd" for count in PILOTS)
        print_table(
            ("scenes", "seeds", "simulated power", "plan, true variances", *pilots),
            simulate_plans(arguments.draws),
        )
    if "tests" in arguments.only:
        simulate_tests(arguments.draws)


if __name__ == "__main__":
    main()
