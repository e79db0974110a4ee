"""Intervals against scipy and against their promise."""

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_trl.stats.estimate import RESAMPLES, Estimate, bootstrap_mean, holm, resample, resampled_means, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 30, 200, 8552])
def test_wilson_is_scipys(n):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        truth = binomtest(successes, n).proportion_ci(method="wilson")
        found = wilson(successes, n)
        assert (found.mean, found.n) == (successes / n, n)
        assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_wilson_takes_a_tie_as_half_a_success():
    low, half, high = wilson(5, 10), wilson(5.5, 10), wilson(6, 10)
    assert half.mean == 0.55 and low.low < half.low < high.low and low.high < half.high < high.high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (float("nan"), 5), (0, -1)])
def test_wilson_refuses_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        wilson(successes, n)


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")], np.array([])])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_bootstrap_is_the_same_for_the_same_seed():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values, 1) == bootstrap_mean(list(values), 1)
    assert bootstrap_mean(values, 1) != bootstrap_mean(values, 2)
    assert bootstrap_mean(values, 1).mean == bootstrap_mean(values, 2).mean == pytest.approx(values.mean())


def test_bootstrap_of_equal_values_and_of_one_has_no_width():
    assert bootstrap_mean([2.5] * 10) == Estimate(2.5, 2.5, 2.5, 10)
    assert bootstrap_mean([2.5]) == Estimate(2.5, 2.5, 2.5, 1)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [(lambda rng: rng.normal(1.0, 2.0, size=100), 1.0), (lambda rng: rng.exponential(size=200), 1.0)],
    ids=["normal", "skewed"],
)
def test_bootstrap_covers_the_truth_as_often_as_promised(draw, truth):
    rng, rounds = np.random.default_rng(11), 600
    intervals = [bootstrap_mean(draw(rng), seed) for seed in range(rounds)]
    covered = sum(found.low <= truth <= found.high for found in intervals) / rounds
    assert 0.93 <= covered <= 0.97


def test_an_estimate_is_plain_numbers():
    assert wilson(3, 4).as_dict() == {"mean": 0.75, "low": wilson(3, 4).low, "high": wilson(3, 4).high, "n": 4}
    assert {type(value) for value in bootstrap_mean(np.array([1.0, 2.0])).as_dict().values()} == {float, int}


def test_holm_corrects_what_was_tested():
    """By hand: 3 x .01, 2 x .02, and at least that. None is no test, and does not count."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([None, 0.03, 0.01, None, 0.02]) == [None, pytest.approx(0.04), 0.03, None, pytest.approx(0.04)]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([None]) == [None]
    assert holm([]) == []


def test_resamples_are_draws_with_replacement():
    """Each unit is drawn n times in n draws on average, with a binomial variance, and the weights give the mean."""
    weights = np.concatenate([*resample(20, 3)])
    assert weights.shape == (RESAMPLES, 20)
    assert weights.sum(axis=1) == pytest.approx(np.ones(RESAMPLES))
    assert weights.mean(axis=0) == pytest.approx(np.full(20, 1 / 20), abs=0.005)
    assert (20 * weights).var() == pytest.approx(0.95, abs=0.03)
    values = np.random.default_rng(4).normal(size=(2, 20))
    means = resampled_means(weights, values)
    assert means == pytest.approx(weights @ values.T)
    assert np.quantile(means[:, 0], [0.025, 0.975]) == pytest.approx(
        [bootstrap_mean(values[0], 3).low, bootstrap_mean(values[0], 3).high]
    )
