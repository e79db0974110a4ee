"""Intervals against scipy and against their promise."""

import numpy as np
import pytest
from scipy.stats import binomtest

from rlhf_trl.stats import Estimate, bootstrap_mean, wilson


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
