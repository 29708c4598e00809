import itertools

import numpy as np
import pytest
from benchmarks.simulate_tests import simulate_plans, simulate_several
from clustered import VALID_SIZES, confuse, scenes_of, simulate_rates, true_difference
from scipy import stats

from lib import significance
from lib.metrics import iou, mean_iou
from lib.significance import (
    compare_checkpoints,
    compare_recipes,
    compare_seeds,
    plan,
    pool_run_sd,
    score_interval,
)

DRAWS = 400
SEED = 13  # fixed before the first run


def make_runs(seed, scene, runs=1, gain=0.03, correlation=0.3):
    truth, rates = simulate_rates(np.random.default_rng(seed), scene, runs, correlation)
    return confuse(truth, rates + np.array([0, gain])[:, None, None, None])


@pytest.fixture(scope="module")
def scene():
    return scenes_of(VALID_SIZES)


@pytest.fixture(scope="module")
def pair(scene):
    return make_runs(0, scene)[:, 0]


@pytest.fixture(scope="module")
def recipes(scene):
    return make_runs(1, scene, runs=4)


def two_classes(hits, pixels=10):
    """Counts `(N, 2, 2)`: each class has `pixels` per image; `hits` of class 0 and all of 1 are correct."""
    counts = np.zeros((len(hits), 2, 2), np.int64)
    counts[:, 0, 0], counts[:, 0, 1] = hits, pixels - np.array(hits)
    counts[:, 1, 1] = pixels
    return counts


def noncentral_power(effect, degrees, level=0.05):
    """Power of a two-sided t test: the normal integrated over the distribution of the standard error."""
    ratio = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, degrees) / degrees)
    least = stats.t.ppf(1 - level / 2, degrees) * ratio
    return (stats.norm.sf(least - effect) + stats.norm.cdf(-least - effect)).mean()


def test_checkpoint_test_equals_a_hand_calculation():
    """Six scenes of one image. b finds one pixel more in five of them and two fewer in the last."""
    a, b = two_classes([5] * 6), two_classes([6, 6, 6, 6, 6, 3])

    def score(hits, total):
        return (hits / total + total / (total + total - hits)) / 2

    difference = score(33, 60) - score(30, 60)
    left_out = np.array(
        [score(27, 50), score(27, 50), score(27, 50), score(27, 50), score(27, 50), score(30, 50)]
    )
    left_out -= score(25, 50)
    error = np.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    result = compare_checkpoints(a, b, None)
    assert result.difference == pytest.approx(difference)
    np.testing.assert_allclose(
        result.interval, difference + error * np.array([-1, 1]) * stats.t.ppf(0.975, 5)
    )
    assert noncentral_power(result.detectable / error, 5) == pytest.approx(0.8, abs=1e-4)
    assert result.scene_count == 6


def test_degrees_of_freedom_account_for_unequal_scenes(pair, scene):
    result = compare_checkpoints(*pair, scene)
    sizes = np.array(VALID_SIZES)
    degrees = sizes.sum() ** 2 / (sizes**2).sum() - 1
    assert degrees == pytest.approx(13.497, abs=1e-3)
    assert result.degrees_of_freedom == pytest.approx(degrees)
    assert np.diff(result.interval) / 2 == pytest.approx(stats.t.ppf(0.975, degrees) * result.standard_error)


@pytest.mark.parametrize("scenes", [6, 9])
def test_permutation_p_values_equal_brute_force(scenes):
    scene = np.arange(2 * scenes) // 2
    a, b = make_runs(2, scene, gain=0.01)[:, 0]
    observed = np.append(mean_iou(b) - mean_iou(a), iou(b) - iou(a))
    extreme = np.zeros(5)
    for swaps in itertools.product([False, True], repeat=scenes):
        swapped = np.array(swaps)[scene, None, None]
        first, second = np.where(swapped, b, a), np.where(swapped, a, b)
        difference = np.append(mean_iou(second) - mean_iou(first), iou(second) - iou(first))
        extreme += np.abs(difference) >= np.abs(observed) - 1e-12
    result = compare_checkpoints(a, b, scene)
    assert result.p_value == extreme[0] / 2**scenes
    np.testing.assert_allclose(result.class_p_value, extreme[1:] / 2**scenes)


def test_sampled_permutations_agree_with_enumeration(monkeypatch):
    scene = np.arange(28) // 2
    a, b = make_runs(3, scene, gain=0.02)[:, 0]
    exact = compare_checkpoints(a, b, scene)
    monkeypatch.setattr(significance, "MAX_EXACT_SCENES", 0)
    drawn = compare_checkpoints(a, b, scene)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)
    assert drawn.p_value * 10_000 == pytest.approx(round(drawn.p_value * 10_000))  # (1 + k) / (1 + 9,999)
    assert compare_checkpoints(a, b, scene, seed=1).p_value != drawn.p_value


def test_constant_gain_gives_minimal_p_and_zero_width_interval(scene):
    a = two_classes([5] * 197)
    result = compare_checkpoints(a, two_classes([6] * 197), scene)
    assert result.p_value == 1e-4
    np.testing.assert_allclose(result.interval, result.difference)
    same = compare_checkpoints(a, a, scene)
    assert (same.difference, same.interval, same.p_value, same.detectable) == (0, (0, 0), 1, 0)


def test_differences_agree_with_lib_metrics(pair, recipes, scene):
    result = compare_checkpoints(*pair, scene)
    assert result.difference == pytest.approx(mean_iou(pair[1]) - mean_iou(pair[0]))
    np.testing.assert_allclose(result.class_difference, iou(pair[1]) - iou(pair[0]))
    means = [np.mean([mean_iou(run) for run in side]) for side in recipes]
    assert compare_recipes(*recipes, scene).difference == pytest.approx(means[1] - means[0])


def test_miou_averages_only_classes_in_the_ground_truth():
    a = np.zeros((8, 3, 3), np.int64)
    a[:, :2, :2] = two_classes([5] * 8)
    b = a.copy()
    b[0, 0] = [5, 0, 5]  # b predicts a class that is not in the ground truth
    result = compare_checkpoints(a, b, None)
    assert result.difference == pytest.approx(np.mean(iou(b)[:2]) - np.mean(iou(a)[:2]))
    for field in (result.class_difference, result.class_interval[0], result.class_p_value):
        np.testing.assert_array_equal(np.isnan(field), [False, False, True])


def test_class_in_only_one_scene_has_no_result(scene):
    counts = np.zeros((2, 2, 197, 5, 5), np.int64)
    counts[..., :4, :4] = make_runs(4, scene, runs=2)
    counts[..., scene == 3, 4, 4] = 9
    checkpoints, recipes = compare_checkpoints(*counts[:, 0], scene), compare_recipes(*counts, scene)
    for result in (checkpoints, recipes):
        assert result.class_difference[4] == 0
        assert np.isnan(result.class_interval[:, 4]).all()
        assert np.isnan(result.class_p_value[4])
        assert np.isfinite(result.class_p_value[:4]).all()
        assert np.isfinite((result.p_value, *result.interval)).all()
    without = np.delete(counts[:, 0], 4, axis=-1)[..., :4, :]
    np.testing.assert_array_equal(
        checkpoints.class_p_value[:4], compare_checkpoints(*without, scene).class_p_value
    )


def test_class_degrees_of_freedom_count_scenes_with_the_class():
    """Three of twelve one-image scenes have class 0, so little is known about it."""
    a, b = two_classes([5] * 12), two_classes([6, 7, 9] + [5] * 9)
    for counts in (a, b):
        counts[3:, 0] = 0
    result = compare_checkpoints(a, b, None)
    left_out = np.array([16 / 20, 15 / 20, 13 / 20])  # IoU of b without each of the three; a's is always 5/10
    values = np.append(left_out - 0.5, np.full(9, 22 / 30 - 0.5))
    error = np.sqrt(11 / 12 * ((values - values.mean()) ** 2).sum())
    low, high = result.class_interval[:, 0]
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert (np.diff(result.interval) / 2 / stats.t.ppf(0.975, 11)).item() < error


def test_fewer_than_six_scenes_give_no_result(pair, recipes):
    scene = np.arange(197) % 5
    constant = np.stack([pair[0], pair[0]])  # its runs don't vary at all
    tests = [compare_recipes(*recipes, scene), compare_recipes(constant, constant, scene)]
    for result in (compare_checkpoints(*pair, scene), *tests):
        assert np.isfinite(result.difference)
        assert np.isnan((result.p_value, *result.interval, result.detectable)).all()
        assert np.isnan(result.class_p_value).all()
        assert result.scene_count == 5
    assert np.isnan(score_interval(pair[0], scene).interval).all()


def test_scenes_without_labels_are_left_out(pair, recipes, scene):
    empty = np.zeros((5, *pair[0].shape[1:]), pair[0].dtype)
    longer = np.concatenate((scene, np.arange(100, 105)))  # five more scenes, in which nothing is labelled
    sides = [np.concatenate((counts, empty)) for counts in pair]
    assert_same(compare_checkpoints(*pair, scene), compare_checkpoints(*sides, longer))
    runs = [np.concatenate((side, np.stack([empty] * len(side))), 1) for side in recipes]
    assert_same(compare_recipes(*recipes, scene), compare_recipes(*runs, longer))
    few = compare_checkpoints(*sides, np.where(longer < 100, longer % 4, longer))
    assert few.scene_count == 4
    assert np.isnan(few.p_value)


def assert_same(first, second, sign=1, p_values=True):
    """Two comparisons agree or, with sign -1, are mirror images."""
    assert first.difference == pytest.approx(sign * second.difference)
    np.testing.assert_allclose(first.class_difference, sign * second.class_difference)
    np.testing.assert_allclose(first.interval, np.sort(sign * np.array(second.interval)))
    np.testing.assert_allclose(first.class_interval, np.sort(sign * second.class_interval, axis=0))
    if p_values:
        assert first.p_value == pytest.approx(second.p_value)
        np.testing.assert_allclose(first.class_p_value, second.class_p_value)


@pytest.mark.parametrize("paired", [False, True])
def test_results_ignore_order_and_names_and_mirror_swapped_sides(pair, recipes, scene, paired):
    rng = np.random.default_rng(5)
    order = rng.permutation(197)
    names = np.array([f"room {name}" for name in rng.permutation(24)])[scene]
    checkpoints, crossed = compare_checkpoints(*pair, scene), compare_recipes(*recipes, scene, paired)
    assert_same(compare_checkpoints(*pair[:, order], scene[order]), checkpoints)
    assert_same(compare_recipes(*recipes[:, :, order], scene[order], paired), crossed)
    assert_same(compare_checkpoints(*pair, names), checkpoints, p_values=False)  # other random draws
    assert_same(compare_recipes(*recipes, names, paired), crossed)
    assert_same(compare_checkpoints(*pair[::-1], scene), checkpoints, sign=-1)
    assert_same(compare_recipes(*recipes[::-1], scene, paired), crossed, sign=-1)
    assert_same(compare_recipes(*recipes[:, ::-1], scene, paired), crossed)


def test_without_scenes_each_image_is_a_scene(pair, recipes):
    assert_same(compare_checkpoints(*pair, None), compare_checkpoints(*pair, np.arange(197)))
    assert_same(compare_recipes(*recipes, None), compare_recipes(*recipes, np.arange(197)))


def reference_crossed_t(values_a, values_b, sizes):
    """(D, V, df) of scores `(S, G)` that are plain means over scenes: the jackknife becomes a covariance."""
    S, G = len(values_a), values_a.shape[1]
    joint = np.cov(np.concatenate((values_a, values_b))) / G
    off = ~np.eye(S, dtype=bool)
    K = max(0, joint[:S, :S][off].mean() + joint[S:, S:][off].mean() - 2 * joint[:S, S:][off].mean())
    means_a, means_b = values_a.mean(1), values_b.mean(1)
    seeds = np.var(means_a, ddof=1) / S, np.var(means_b, ddof=1) / S
    V = sum(seeds) + K
    df = V**2 / (sum(term**2 for term in seeds) / (S - 1) + K**2 / (sum(sizes) ** 2 / sum(sizes**2) - 1))
    return means_b.mean() - means_a.mean(), V, df


def test_recipe_test_equals_a_reference_on_a_linear_score():
    """The ground truth is all class 0 and misses become class 1, so the IoU is a share of the pixels."""
    rng = np.random.default_rng(6)
    shares = (
        500
        + 40 * rng.normal(size=(1, 1, 30))
        + 40 * rng.normal(size=(2, 1, 30))
        + 40 * rng.normal(size=(2, 4, 30))
    )
    shares = np.rint(shares + 30 * rng.normal(size=(2, 4, 1))).astype(np.int64)
    sizes = np.array([1, 2, 5] * 10)
    counts = np.zeros((2, 4, sizes.sum(), 2, 2), np.int64)
    first = np.cumsum(sizes) - sizes  # all pixels of a scene are in its first image
    counts[:, :, first, 0, 0], counts[:, :, first, 0, 1] = shares, 1000 - shares
    result = compare_recipes(*counts, scenes_of(sizes))
    D, V, df = reference_crossed_t(*(shares / 1000), sizes)
    assert result.scene_variance > 0
    assert result.difference == pytest.approx(D)
    assert result.seed_variance + result.scene_variance == pytest.approx(V)
    assert result.degrees_of_freedom == pytest.approx(df)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(D) / np.sqrt(V), df))
    np.testing.assert_allclose(result.interval, D + np.sqrt(V) * stats.t.ppf([0.025, 0.975], df))
    assert noncentral_power(result.detectable / np.sqrt(V), df) == pytest.approx(0.8, abs=1e-4)


def test_paired_recipe_test_uses_per_seed_differences(recipes, scene):
    result = compare_recipes(*recipes, scene, paired=True)
    differences = np.array([mean_iou(b) - mean_iou(a) for a, b in zip(*recipes, strict=True)])
    left_out = np.array([
        [mean_iou(b[scene != out]) - mean_iou(a[scene != out]) for out in range(24)]
        for a, b in zip(*recipes, strict=True)
    ])  # fmt: skip
    products = 23**2 / 24 * np.cov(left_out)
    K = max(0, products[~np.eye(4, dtype=bool)].mean())
    assert result.scene_variance == pytest.approx(K)
    assert result.seed_variance == pytest.approx(differences.var(ddof=1) / 4)
    seeds, sizes = result.seed_variance, np.array(VALID_SIZES)
    df = (seeds + K) ** 2 / (seeds**2 / 3 + K**2 / (sizes.sum() ** 2 / (sizes**2).sum() - 1))
    assert result.degrees_of_freedom == pytest.approx(df)


def test_recipe_test_without_scene_variance_is_welchs_t(scene):
    """Runs differ by the same pixels in every image, so only the seeds contribute variance."""
    a = np.stack([two_classes([hits] * 197) for hits in (4, 5, 7)])
    b = np.stack([two_classes([hits] * 197) for hits in (6, 8, 9, 7)])
    scores = [[mean_iou(run) for run in side] for side in (a, b)]
    crossed, welch = compare_recipes(a, b, scene), compare_seeds(*scores)
    assert crossed.scene_variance == pytest.approx(0, abs=1e-20)
    assert crossed.p_value == pytest.approx(welch.p_value)
    assert crossed.degrees_of_freedom == pytest.approx(welch.degrees_of_freedom)
    np.testing.assert_allclose(crossed.interval, welch.interval)


def test_recipe_test_refuses_runs_that_do_not_vary_unless_equal(scene):
    a, b = two_classes([5] * 197), two_classes([6] * 197)
    same = compare_recipes(np.stack([a, a]), np.stack([a, a]), scene)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)
    assert np.isnan(same.power(0.01))
    with pytest.raises(
        ValueError, match="counts: found a difference of 0.07381 between runs that do not vary"
    ):
        compare_recipes(np.stack([a, a]), np.stack([b, b]), scene)


@pytest.mark.parametrize("a", [[0.50, 0.52, 0.49, 0.51], [0.5, 0.5, 0.5, 0.5]])
@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, if one recipe's scores are all equal
def test_seed_test_equals_scipy_welch(a):
    b = [0.53, 0.54, 0.53]
    result, test = compare_seeds(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert result.difference == pytest.approx(np.mean(b) - np.mean(a))
    np.testing.assert_allclose(result.interval, test.confidence_interval())
    assert (result.p_value, result.degrees_of_freedom) == (pytest.approx(test.pvalue), pytest.approx(test.df))
    back = compare_seeds(b, a)
    assert (back.difference, back.p_value) == (-result.difference, pytest.approx(result.p_value))


def test_score_interval_equals_the_jackknife(pair, scene):
    result = score_interval(pair[0], scene)
    left_out = np.array(
        [[mean_iou(kept), *iou(kept)] for kept in (pair[0][scene != out] for out in range(24))]
    )
    half = stats.t.ppf(0.975, 13.4972) * np.sqrt(23 / 24 * ((left_out - left_out.mean(0)) ** 2).sum(0))
    assert result.score == pytest.approx(mean_iou(pair[0]))
    np.testing.assert_allclose(result.interval, result.score + half[0] * np.array([-1, 1]), rtol=1e-5)
    np.testing.assert_allclose(result.class_score, iou(pair[0]))
    np.testing.assert_allclose(
        result.class_interval, np.stack((iou(pair[0]) - half[1:], iou(pair[0]) + half[1:])), rtol=1e-5
    )
    assert score_interval(two_classes([10, 10, 10, 10, 10, 9]), None).interval[1] == 1


def test_adjusting_for_one_comparison_changes_nothing(pair, recipes, scene):
    results = [
        compare_checkpoints(*pair, scene),
        compare_recipes(*recipes, scene),
        compare_seeds([0.5, 0.52], [0.53, 0.6]),
    ]
    for result in results:
        same = result.adjusted(1)
        assert (same.difference, same.p_value, same.detectable) == (
            result.difference,
            result.p_value,
            result.detectable,
        )
        np.testing.assert_allclose(same.interval, result.interval, rtol=1e-12)


@pytest.mark.parametrize("comparisons", [2, 5, 19])
def test_adjusted_results_follow_bonferroni(pair, recipes, scene, comparisons):
    results = [
        compare_checkpoints(*pair, scene),
        compare_recipes(*recipes, scene),
        compare_seeds([0.5, 0.52], [0.53, 0.6]),
    ]
    for result in results:
        adjusted = result.adjusted(comparisons)
        assert adjusted.p_value == min(1, comparisons * result.p_value)
        half = stats.t.ppf(1 - 0.05 / (2 * comparisons), result.degrees_of_freedom) * result.standard_error
        np.testing.assert_allclose(adjusted.interval, result.difference + half * np.array([-1, 1]))
        effect = adjusted.detectable / result.standard_error
        assert noncentral_power(effect, result.degrees_of_freedom, 0.05 / comparisons) == pytest.approx(
            0.8, abs=1e-3
        )
        assert adjusted.comparisons == comparisons


def test_classes_are_adjusted_for_the_number_of_tested_classes(scene):
    """One of five classes is in only one scene, so four are tested. Each keeps its own degrees of freedom."""
    counts = np.zeros((2, 3, 197, 5, 5), np.int64)
    counts[..., :4, :4] = make_runs(4, scene, runs=3)
    counts[..., scene == 3, 4, 4] = 9
    for result in (compare_checkpoints(*counts[:, 0], scene), compare_recipes(*counts, scene)):
        adjusted = result.adjusted(7)
        np.testing.assert_allclose(adjusted.class_p_value, np.minimum(1, 4 * result.class_p_value))
        wider = stats.t.ppf(1 - 0.05 / 8, result.class_degrees_of_freedom) / stats.t.ppf(
            0.975, result.class_degrees_of_freedom
        )
        np.testing.assert_allclose(
            np.diff(adjusted.class_interval, axis=0), wider * np.diff(result.class_interval, axis=0)
        )
        assert np.isnan(adjusted.class_p_value[4])
    assert not hasattr(compare_seeds([0.5, 0.52], [0.53, 0.6]).adjusted(2), "class_p_value")


def test_adjusted_interval_agrees_with_adjusted_p_value(scene):
    seen = {True: 0, False: 0}
    for draw in range(60):
        result = compare_recipes(*make_runs(100 + draw, scene, runs=3, gain=0.02 * (draw % 4)), scene)
        for comparisons in range(1, 21):
            adjusted = result.adjusted(comparisons)
            low, high = adjusted.interval
            assert (adjusted.p_value < 0.05) == (low > 0 or high < 0)
            seen[adjusted.p_value < 0.05] += 1
    assert min(seen.values()) > 100


def test_adjusting_twice_or_for_zero_comparisons_is_refused():
    result = compare_seeds([0.5, 0.52], [0.53, 0.6])
    with pytest.raises(
        ValueError,
        match="comparisons: found 2 for a result adjusted for 3, expected 1 or more for an unadjusted",
    ):
        result.adjusted(3).adjusted(2)
    with pytest.raises(ValueError, match="comparisons: found 0 for a result adjusted for none"):
        result.adjusted(0)


def test_plan_equals_a_hand_calculation():
    """Two recipes, three seeds, five folds and 123 scenes: variances by the formula in the documentation."""
    made = plan(3, 5, 123, run_sd=0.012, variance_per_scene=0.0015)
    seeds, scenes = 0.012**2 / (5 * 3), 0.0015 / 123
    variance = 2 * seeds + scenes
    degrees = variance**2 / (2 * seeds**2 / 2 + scenes**2 / 122)
    assert (made.standard_error, made.degrees_of_freedom) == pytest.approx((np.sqrt(variance), degrees))
    assert made.power(0.012) == pytest.approx(noncentral_power(0.012 / np.sqrt(variance), degrees), abs=1e-5)
    assert made.power(-0.012) == made.power(0.012)
    assert made.power(0) == pytest.approx(0.05)
    assert made.power(made.detectable) == pytest.approx(0.8)
    several = made.adjusted(5)
    assert several.power(several.detectable) == pytest.approx(0.8)
    assert several.power(0) == pytest.approx(0.01)


def test_plan_with_measured_variances_equals_the_test(recipes, scene):
    """Given a test's degrees of freedom and variances, the same on both sides, the plan is that test."""
    result = compare_recipes(*recipes, scene, paired=True)
    run_sd = np.sqrt(4 * result.seed_variance / 2)
    variance = result.scene_variance * 24
    made = plan(4, 1, 24, run_sd, variance, paired=True, scene_degrees=result.scene_degrees_of_freedom)
    assert made.standard_error == pytest.approx(result.standard_error)
    assert made.degrees_of_freedom == pytest.approx(result.degrees_of_freedom)
    assert made.detectable == pytest.approx(result.detectable)
    assert made.power(0.02) == pytest.approx(result.power(0.02))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [2, 3, 5, 50])
@pytest.mark.parametrize("comparisons", [1, 5, 19])
def test_power_rises_to_one(seeds, comparisons):
    """Also in the far tail, where scipy's noncentral t gives NaN."""
    made = plan(seeds, 1, 24, 0.01, 0.0).adjusted(comparisons)
    powers = [made.power(difference) for difference in np.linspace(0, 4 * made.detectable, 60)]
    assert np.all(np.diff(powers) > -1e-9)
    assert powers[0] == pytest.approx(0.05 / comparisons)
    assert 0.99 < powers[-1] <= 1


def test_plan_refuses_invalid_inputs():
    with pytest.raises(
        ValueError,
        match="run_sd, variance_per_scene: found 0.0 and 0.0, expected numbers from 0 on, one of them above 0",
    ):
        plan(3, 5, 123, 0.0, 0.0)
    for run_sd, variance in ((-0.1, 0.1), (np.nan, 0.1), (0.1, np.nan)):
        with pytest.raises(ValueError, match="run_sd, variance_per_scene: found"):
            plan(3, 5, 123, run_sd, variance)
    for design in ((1, 5, 123), (3, 0, 123), (3, 5, 5)):
        with pytest.raises(ValueError, match="runs, folds, scenes: found"):
            plan(*design, 0.01, 0.001)


def test_run_sd_is_pooled_within_cells():
    """Two cells with different means: 2 + 1 degrees of freedom."""
    run_sd, (low, high) = pool_run_sd([[0.5, 0.51, 0.52], [0.7, 0.74]])
    squares = 2 * 0.01**2 + 2 * 0.02**2
    assert run_sd == pytest.approx(np.sqrt(squares / 3))
    assert (low, high) == pytest.approx(np.sqrt(squares / stats.chi2.ppf([0.975, 0.025], 3)))
    _, (low, high) = pool_run_sd([np.array([0.0, 1, 2])] * 10)  # five folds, two recipes, three seeds
    assert (low, high) == pytest.approx((0.765, 1.444), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, b: (a, b[:50]),
            r"counts: found shapes \(197, 4, 4\) and \(50, 4, 4\), expected the same images",
        ),
        (
            lambda a, b: (a, b[::-1]),
            "counts: the truth differs in 196 of 197 images, the first is number 0; compare",
        ),
        (
            lambda a, b: (a.sum(0), b.sum(0)),
            r"counts: found shapes \(4, 4\) and \(4, 4\), expected \(N, C, C\)",
        ),
        (lambda a, b: (a[:0], b[:0]), r"counts: found shapes \(0, 4, 4\) and \(0, 4, 4\), .* one or more"),
        (
            lambda a, b: (a[..., :3], b[..., :3]),
            r"counts: found shapes \(197, 4, 3\) .* expected \(N, C, C\)",
        ),
        (lambda a, b: (0 * a, 0 * b), "counts: all zero; without a labelled pixel there is no score"),
    ],
)
def test_checkpoint_test_refuses_invalid_counts(pair, change, message):
    with pytest.raises(ValueError, match=message):
        compare_checkpoints(*change(*pair), None)


def test_recipe_and_seed_tests_refuse_invalid_input(recipes, scene):
    a, b = recipes
    with pytest.raises(
        ValueError, match=r"counts: found 4 and 1 runs, expected 2 or more of each recipe; train"
    ):
        compare_recipes(a, b[:1], scene)
    with pytest.raises(ValueError, match=r"paired: found 4 and 3 runs, expected equally many of both"):
        compare_recipes(a, b[:3], scene, paired=True)
    with pytest.raises(ValueError, match=r"counts: the truth differs in 196 of 197 images"):
        compare_recipes(a, b[:, ::-1], scene)
    with pytest.raises(
        ValueError, match=r"scene: found shape \(4,\), expected \(197,\), the scene of each image"
    ):
        compare_recipes(a, b, scene[:4])
    with pytest.raises(ValueError, match=r"scores: found 1 and 2 runs, expected 2 or more"):
        compare_seeds([0.5], [0.6, 0.7])
    with pytest.raises(ValueError, match=r"scores_b: found \[0.6, nan\], expected \(S,\) numbers"):
        compare_seeds([0.5, 0.6], [0.6, np.nan])
    with pytest.raises(ValueError, match=r"scores: found a difference of 0.1 between runs that do not vary"):
        compare_seeds([0.5, 0.5], [0.6, 0.6])


@pytest.mark.parametrize("correlation", [0, 0.3, 0.6])
def test_checkpoint_test_is_near_nominal_coverage_and_error_rate(scene, correlation, monkeypatch):
    """In 400 draws, 95 % intervals cover at least 90 % and the test rejects a true null in at most 9 %."""
    monkeypatch.setattr(
        significance, "RANDOM_PERMUTATIONS", 999
    )  # still a test at level 0.05, but ten times as fast
    rng, true = np.random.default_rng([SEED, int(10 * correlation)]), true_difference(0.02)
    covered = rejected = 0
    for draw in range(DRAWS):
        truth, rates = simulate_rates(rng, scene, 1, correlation, run_sd=0)
        a, same, better = (confuse(truth, rate) for rate in (rates[0, 0], rates[1, 0], rates[1, 0] + 0.02))
        low, high = compare_checkpoints(a, better, scene, seed=draw).interval
        covered += low <= true <= high
        rejected += compare_checkpoints(a, same, scene, seed=draw).p_value < 0.05
    assert covered >= 0.90 * DRAWS
    assert rejected <= 0.09 * DRAWS


@pytest.mark.parametrize("correlation", [0, 0.3, 0.6])
def test_recipe_test_rejects_at_most_10_percent_of_true_nulls(scene, correlation):
    """The 400 draws compare equal recipes, each of which suits some scenes better."""
    rng = np.random.default_rng([SEED, 1, int(10 * correlation)])
    rejected = dict.fromkeys((3, 5, 10), 0)
    for _ in range(DRAWS):
        counts = confuse(*simulate_rates(rng, scene, 10, correlation))
        for runs in rejected:
            rejected[runs] += compare_recipes(*counts[:, :runs], scene).p_value < 0.05
    assert max(rejected.values()) <= 0.10 * DRAWS, rejected


def rate_of(text):
    return float(text.split()[0])


def test_simulation_confirms_adjusted_error_rates_and_planned_power():
    """A short version of the simulation in lib/README.md: 100 draws, so standard errors of 0.02 to 0.05."""
    for scenes, seeds, comparisons, alarms, covered in simulate_several(100, SEED):
        if seeds > 2:
            assert rate_of(alarms) <= 0.13, (scenes, seeds, comparisons)
            assert rate_of(covered) >= 0.87, (scenes, seeds, comparisons)
    for scenes, seeds, simulated, planned, *_ in simulate_plans(100, SEED):
        assert rate_of(simulated) == pytest.approx(float(planned), abs=0.18), (scenes, seeds)
