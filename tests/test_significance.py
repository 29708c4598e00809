import numpy as np
import pytest
from scipy import stats

from lib.metrics import iou, mean_iou
from lib.significance import holm, paired_bootstrap, paired_seeds


def simulate(rng, images, hit_a, hit_b, classes=4, pixels=200):
    """Counts of two models on the same images, whose images differ in difficulty for both."""
    counts = np.zeros((2, images, classes, classes), np.int64)
    truth = rng.multinomial(pixels, rng.dirichlet(np.ones(classes), images))
    difficulty = rng.normal(0, 0.08, images)
    for model, hit in enumerate((hit_a, hit_b)):
        own = difficulty + rng.normal(0, 0.05, images)
        for true in range(classes):
            hits = rng.binomial(truth[:, true], np.clip(hit + own, 0.02, 0.98))
            missed = truth[:, true] - hits
            counts[model, np.arange(images), true, true] = hits
            counts[model, np.arange(images), true, (true + 1) % classes] = missed
    return counts


@pytest.fixture(scope="module")
def pair():
    return simulate(np.random.default_rng(0), 120, 0.70, 0.73)


def test_differences_are_those_of_the_metrics(pair):
    result = paired_bootstrap(*pair, resamples=200)
    assert result.difference == pytest.approx(mean_iou(pair[1]) - mean_iou(pair[0]))
    np.testing.assert_allclose(result.class_difference, iou(pair[1]) - iou(pair[0]))
    assert result.interval[0] < result.difference < result.interval[1]


def test_intervals_equal_those_of_scipy(pair):
    def statistic(index):
        return mean_iou(pair[1][index]) - mean_iou(pair[0][index])

    indices = (np.arange(120),)
    scipys = stats.bootstrap(indices, statistic, n_resamples=4000, method="percentile", vectorized=False, rng=1)
    ours = paired_bootstrap(*pair, resamples=10_000)
    monte_carlo = 0.06 * (ours.interval[1] - ours.interval[0])
    np.testing.assert_allclose(ours.interval, scipys.confidence_interval, atol=monte_carlo)
    by_class = stats.bootstrap(
        indices, lambda index: iou(pair[1][index])[2] - iou(pair[0][index])[2],
        n_resamples=4000, method="percentile", vectorized=False, rng=2,
    )  # fmt: skip
    width = np.ptp(ours.class_interval[:, 2])
    np.testing.assert_allclose(ours.class_interval[:, 2], by_class.confidence_interval, atol=0.06 * width)


def test_coverage_and_false_rejection():
    """Of 400 experiments, about 95 % of the intervals hold the true difference, and 5 % reject a true null."""
    rng = np.random.default_rng(1)
    population = simulate(rng, 40_000, 0.70, 0.72)
    true = mean_iou(population[1]) - mean_iou(population[0])
    covered = rejected = 0
    for trial in range(400):
        result = paired_bootstrap(*simulate(rng, 100, 0.70, 0.72), resamples=500, seed=trial)
        covered += result.interval[0] <= true <= result.interval[1]
        rejected += paired_bootstrap(*simulate(rng, 100, 0.7, 0.7), resamples=500, seed=trial).p_value < 0.05
    assert 0.92 <= covered / 400 <= 0.98
    assert 0.03 <= rejected / 400 <= 0.08


def test_a_real_difference_is_found_and_its_size_is_told():
    result = paired_bootstrap(*simulate(np.random.default_rng(2), 150, 0.6, 0.7), resamples=2000)
    assert result.interval[0] > 0
    assert result.p_value < 0.01
    assert (result.class_p_value < 0.05).all()
    assert result.detectable < result.difference
    assert result.images_needed < 150


def test_no_difference_is_not_found():
    rng = np.random.default_rng(3)
    counts = simulate(rng, 100, 0.7, 0.7)
    result = paired_bootstrap(*counts, resamples=2000)
    assert result.interval[0] < 0 < result.interval[1]
    assert result.images_needed > 100
    same = paired_bootstrap(counts[0], counts[0], resamples=100)
    assert (same.difference, same.p_value, same.images_needed) == (0, 1, np.inf)


def test_exchanging_the_runs_changes_the_sign_only(pair):
    forth, back = paired_bootstrap(*pair, resamples=500), paired_bootstrap(*pair[::-1], resamples=500)
    assert forth.difference == pytest.approx(-back.difference)
    np.testing.assert_allclose(forth.interval, -np.array(back.interval)[::-1])


def test_absent_classes_are_left_out(pair):
    wider = np.zeros((2, 120, 6, 6), np.int64)
    wider[..., :4, :4] = pair
    with np.errstate(all="raise"):
        result = paired_bootstrap(*wider, resamples=300)
    assert np.isnan(result.class_difference[4:]).all()
    assert np.isnan(result.class_p_value[4:]).all()
    assert result.difference == pytest.approx(paired_bootstrap(*pair, resamples=300).difference)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, np.nan])), [0.03, 0.06, 0.06, np.nan])
    assert holm(np.array([0.9, 0.8])).max() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, b: (a, b[:50]),
            r"counts: found shapes \(120, 4, 4\) and \(50, 4, 4\), expected the same 2 or more images",
        ),
        (
            lambda a, b: (a, b[::-1]),
            "counts: the truth differs in 120 of 120 images, the first is number 0; compare runs on",
        ),
        (lambda a, b: (a.sum(0), b.sum(0)), r"counts: found shape \(4, 4\), expected \(N, C, C\)"),
        (lambda a, b: (0 * a, 0 * b), "counts: all zero; without a labelled pixel there is nothing to compare"),
    ],
)
def test_what_cannot_be_compared(pair, change, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*change(*pair))


def test_seeds_equal_a_t_test():
    a, b = np.array([0.50, 0.52, 0.49, 0.51]), np.array([0.53, 0.54, 0.53, 0.52])
    result = paired_seeds(a, b)
    assert result.difference == pytest.approx(0.025)
    half = stats.t.ppf(0.975, 3) * np.std(b - a, ddof=1) / 2
    np.testing.assert_allclose(result.interval, (0.025 - half, 0.025 + half))
    assert result.p_value == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue)
    assert result.seed_count == 4


def test_one_seed_cannot_answer():
    result = paired_seeds([0.5], [0.6])
    assert result.interval == (-np.inf, np.inf)
    assert np.isnan(result.p_value)
    with pytest.raises(ValueError, match=r"scores: found shapes \(1,\) and \(2,\), expected one score for each seed"):
        paired_seeds([0.5], [0.6, 0.7])


def test_images_alone_do_not_answer_for_recipes():
    """Two seeds of one recipe: over images it looks like a difference far more often than 5 %."""
    rng = np.random.default_rng(5)
    rejected = 0
    for trial in range(100):
        hits = 0.7 + rng.normal(0, 0.015, 2)  # what the seed does to a whole run
        rejected += paired_bootstrap(*simulate(rng, 100, *hits), resamples=300, seed=trial).p_value < 0.05
    assert rejected > 25
