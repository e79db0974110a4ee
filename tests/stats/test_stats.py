"""Intervals against scipy and against their promise."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_ind

from rlhf_trl.stats.intervals import (
    Estimate,
    compare_runs,
    estimate_mean,
    estimate_rate,
    estimate_ratio,
    holm,
    p_of_mean,
    wilson,
)


@pytest.mark.parametrize("n", [1, 2, 7, 30, 38, 77, 200, 8552])
def test_wilson_is_scipys(n):
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        truth = binomtest(successes, n).proportion_ci(method="wilson")
        found = wilson(successes, n)
        assert (found.mean, found.n) == (successes / n, n) and 0 <= found.low <= found.high <= 1
        assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (float("nan"), 5), (0, -1)])
def test_wilson_refuses_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        wilson(successes, n)


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")], np.array([])])
def test_what_has_no_mean_is_refused(values):
    for call in (estimate_mean, estimate_rate, p_of_mean, lambda of: compare_runs(np.array(of), np.array(of))):
        with pytest.raises(ValueError, match="finite"):
            call(values)


def test_without_skewness_an_interval_is_students():
    values = np.array([-3.0, -1, 0, 1, 3]) + 0.5
    truth = ttest_1samp(values, 0)
    low, high = truth.confidence_interval()
    found = estimate_mean(values)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.5, low, high, 5))
    assert p_of_mean(values) == pytest.approx(truth.pvalue)


def test_of_skewed_values_the_interval_reaches_further_into_the_tail():
    found = estimate_mean(np.random.default_rng(1).gamma(0.7, size=50))
    assert found.high - found.mean > 1.2 * (found.mean - found.low)


def test_interval_and_p_value_agree():
    for seed in range(200):
        values = np.random.default_rng(seed).gamma(0.7, size=25) - 0.7 + 0.02 * (seed % 20)
        found = estimate_mean(values)
        assert (found.low <= 0 <= found.high) == (p_of_mean(values) >= 0.05)


def test_equal_values_have_no_width_and_are_as_unlikely_as_coins():
    assert estimate_mean([2.5] * 10) == Estimate(2.5, 2.5, 2.5, 10)
    assert (p_of_mean([2.5] * 10), p_of_mean([0.0] * 10)) == (2 * 0.5**10, 1)
    assert p_of_mean(np.full(20, 0.1) + 1e-17) == 2 * 0.5**20
    assert estimate_mean([2.5]) == Estimate(2.5, 2.5, 2.5, 1)
    for scale in (1e-200, 1e200):  # of Brier scores of sure pairs, and of estimates of the KL that have run away
        found = estimate_mean([scale, 2 * scale, 3 * scale])
        assert found.high / scale == pytest.approx(estimate_mean([1.0, 2.0, 3.0]).high)


def test_a_rate_of_plain_wins_is_wilsons_and_ties_make_it_narrower():
    wins = np.repeat([0.0, 1.0], [60, 140])
    plain, truth = estimate_rate(wins), wilson(140, 200)
    assert (plain.low, plain.high) == pytest.approx((truth.low, truth.high), abs=2e-3)
    tied = estimate_rate(np.repeat([0.0, 0.5, 1.0], [20, 80, 100]))
    assert tied.mean == 0.7 and tied.high - tied.low < plain.high - plain.low
    one = estimate_rate([0.5] * 119 + [1.0])  # of 120 equal answers but for one, as of none
    assert one.high - one.low > 0.9 * np.ptp([getattr(estimate_rate([0.5] * 120), end) for end in ("low", "high")])
    same = estimate_rate([1.0] * 20)
    assert (same.low, same.high) == (pytest.approx(0.025 ** (1 / 20)), 1)


def test_a_ratio_is_that_of_the_sums():
    generator = np.random.default_rng(0)
    bottom = generator.integers(5, 20, size=100).astype(float)
    assert estimate_ratio((2 * bottom).tolist(), bottom.tolist()).as_dict() == pytest.approx(
        {"mean": 2, "low": 2, "high": 2, "n": 100}
    )
    found = estimate_ratio((2 * bottom + generator.normal(size=100)).tolist(), bottom.tolist())
    assert found.high - found.low == pytest.approx(2 * 2.1 / 10 / bottom.mean(), rel=0.2)
    with pytest.raises(ValueError, match="ratio"):
        estimate_ratio([1.0], [0.0])


# --- methods over seeds ----------------------------------------------------------------------------------------------


def test_without_noise_of_prompts_the_difference_of_seeds_is_welchs():
    a, b = ([[float(level)] * 30 for level in levels] for levels in ([1, 2, 3, 4, 5], [0, 0, 1, 0, 1]))
    found, p = compare_runs(np.array(a), np.array(b))
    truth = ttest_ind(range(1, 6), [0, 0, 1, 0, 1], equal_var=False)
    assert p == pytest.approx(truth.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval()))


def test_without_spread_between_seeds_the_prompts_own_error_counts():
    """Both seeds of a method gave the same answers: the paired test over prompts."""
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert compare_runs(np.stack([a, a]), np.stack([b, b]))[1] == pytest.approx(ttest_1samp(a - b, 0).pvalue)


def test_one_seed_is_about_these_runs():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert compare_runs(a, b) == (estimate_mean(a - b), p_of_mean(a - b))
    assert compare_runs(np.stack([a, a]), b) == compare_runs(a, b)


def test_order_and_side_do_not_matter():
    generator = np.random.default_rng(5)
    a, b = generator.normal(size=(3, 40)), generator.normal(0.2, size=(4, 40))
    (found, p), order = compare_runs(a, b), generator.permutation(40)
    for other, other_p in (compare_runs(a[::-1], b), compare_runs(a[:, order], b[:, order])):
        assert (other.low, other.high, other_p) == pytest.approx((found.low, found.high, p))
    turned, turned_p = compare_runs(b, a)
    assert (turned.low, turned_p) == pytest.approx((-found.high, p))
    with pytest.raises(ValueError, match="same prompts"):
        compare_runs(np.zeros((2, 5)), np.zeros((2, 4)))


def test_holm_corrects_what_was_tested():
    """By hand: 3 x .01, 2 x .02, and at least that. None is no test, and does not count."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([None, 0.03, 0.01, None, 0.02]) == [None, pytest.approx(0.04), 0.03, None, pytest.approx(0.04)]
    assert (holm([0.9, 0.8]), holm([None]), holm([])) == ([1, 1], [None], [])
