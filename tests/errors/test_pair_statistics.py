"""Measures on labelled pairs: published figures, closed forms and properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from rlhf_trl.errors.pair_statistics import (
    accuracy,
    auc,
    average,
    correlation,
    difference,
    length_bias,
    share,
)

# Multiples of 1/8: adding a whole number to them is exact.
SCORE = st.integers(-40, 40).map(lambda number: number / 8)
PAIRS = st.lists(st.tuples(SCORE, SCORE, st.integers(1, 60), st.integers(1, 60), st.integers(0, 5)), min_size=1)


def arrays(pairs):
    """Scores, lengths and prompts of drawn pairs."""
    table = np.array(pairs, dtype=float)
    return table[:, :2], table[:, 2:4].astype(int), table[:, 4].astype(int)


def one_each(successes, n):
    return share(np.arange(n) < successes, np.arange(n))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_published_intervals(successes, n, low, high):
    """Newcombe (1998, Statistics in Medicine 17:857), table I, method 3."""
    found = one_each(successes, n)
    assert (found.mean, found.n) == (successes / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_differences_have_the_published_intervals(first, second, low, high):
    """Newcombe (1998, Statistics in Medicine 17:873), table II, method 10."""
    found = difference(one_each(*first), one_each(*second))
    assert found.mean == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_copies_of_a_pair_add_no_certainty():
    """Each prompt four times with the same outcome is worth as much as once."""
    values, prompts = np.arange(300) < 180, np.arange(300)
    once, often = share(values, prompts), share(np.repeat(values, 4), np.repeat(prompts, 4))
    assert often.mean == once.mean
    assert often.n == 1200
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=2e-4)
    scores = np.random.default_rng(0).normal(size=300)
    once, often = average(scores, prompts, 0), average(np.repeat(scores, 4), np.repeat(prompts, 4), 0)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_one_prompt_is_one_unit():
    found = share(np.array([1.0] * 8), np.zeros(8))
    assert (found.low, found.high) == pytest.approx((1 / (1 + 1.96**2), 1), abs=1e-4)


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS)
def test_estimates_lie_within_their_intervals(pairs):
    scores, _, prompts = arrays(pairs)
    for found in (share(scores[:, 0] > 0, prompts), auc(scores, prompts, 0), average(scores[:, 0], prompts, 0)):
        assert found.low - 1e-12 <= found.mean <= found.high + 1e-12


def test_nothing_has_no_share_and_no_mean():
    for measure in (lambda: share(np.array([]), np.array([])), lambda: average(np.array([]), np.array([]), 0)):
        with pytest.raises(ValueError, match="at least one"):
            measure()


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS)
def test_swapping_the_sides_turns_accuracy_around(pairs):
    scores, lengths, prompts = arrays(pairs)
    found, swapped = (accuracy(s, n, prompts, 0) for s, n in ((scores, lengths), (scores[:, ::-1], lengths[:, ::-1])))
    for key in ("accuracy", "length_baseline"):
        assert swapped[key]["mean"] == pytest.approx(1 - found[key]["mean"])
        assert swapped[key]["low"] == pytest.approx(1 - found[key]["high"])
    assert swapped["mean_margin"]["mean"] == -found["mean_margin"]["mean"]
    assert swapped["ties"] == found["ties"]
    assert swapped["strict"]["mean"] + found["strict"]["mean"] == pytest.approx(1 - found["ties"] / len(pairs))
    assert auc(scores[:, ::-1], prompts, 0).mean == pytest.approx(1 - auc(scores, prompts, 0).mean)


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS, st.integers(-100, 100))
def test_adding_a_constant_changes_nothing(pairs, constant):
    scores, lengths, prompts = arrays(pairs)
    assert accuracy(scores + constant, lengths, prompts, 0) == accuracy(scores, lengths, prompts, 0)
    assert auc(scores + constant, prompts, 0) == auc(scores, prompts, 0)
    found, moved = (length_bias(s, lengths, prompts, 0) for s in (scores, scores + constant))
    correlated, still_correlated = (result.pop("score_and_length")["pearson"] for result in (found, moved))
    assert moved == found
    if correlated is None:
        assert still_correlated is None
    else:
        assert still_correlated == pytest.approx(correlated)


def test_ties_count_half():
    scores = np.array([[2.0, 1.0], [0.5, 0.5], [1.0, 2.0], [3.0, 0.0]])
    lengths = np.array([[5, 5], [9, 1], [1, 9], [1, 9]])
    found = accuracy(scores, lengths, np.arange(4), 0)
    assert (found["accuracy"]["mean"], found["strict"]["mean"], found["ties"]) == (0.625, 0.5, 1)
    assert found["length_baseline"]["mean"] == 0.375
    assert found["over_baseline"]["mean"] == 0.25
    assert found["mean_margin"]["mean"] == 0.75


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS)
def test_auc_is_the_share_of_all_comparisons(pairs):
    scores, _, prompts = arrays(pairs)
    wins = np.sign(scores[:, 0][:, None] - scores[:, 1]) / 2 + 0.5
    assert auc(scores, prompts, 0).mean == pytest.approx(wins.mean())


def test_the_interval_of_the_auc_is_delongs():
    """For independent sides it agrees with DeLong's variance, S10 / n + S01 / n."""
    scores = np.random.default_rng(1).normal([0.5, 0], size=(400, 2))
    above = (scores[:, :1] > scores[:, 1]).mean(axis=1)
    below = (scores[:, 0] > scores[:, 1:]).mean(axis=1)
    error = math.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 400)
    found = auc(scores, np.arange(400), 0)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.1)


def test_correlation_has_fishers_interval():
    """r = 0.5 and n = 28: z = 0.5493 +- 1.96 / 5."""
    random = np.random.default_rng(0)
    x, noise = np.linalg.qr(np.column_stack([np.ones(28), random.normal(size=(28, 2))]))[0][:, 1:].T
    found = correlation(x, 0.5 * x + math.sqrt(0.75) * noise, 28)["pearson"]
    expected = [0.5, math.tanh(math.atanh(0.5) - 0.392), math.tanh(math.atanh(0.5) + 0.392)]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected)
    ranks = correlation(x, np.exp(5 * x), 28)
    assert ranks["spearman"]["mean"] == pytest.approx(1)
    assert ranks["pearson"]["mean"] < 0.99


@pytest.mark.parametrize(("values", "units"), [([1.0, 1.0, 1.0, 1.0], 4), ([1.0, 2.0, 3.0, 4.0], 3)])
def test_no_correlation_says_why(values, units):
    found = correlation(np.array(values), np.arange(4), units)
    assert (found["pearson"], found["spearman"]) == (None, None)
    assert found["why_not"]


def test_length_bias_of_a_scorer_that_is_the_length():
    lengths = np.array([[10, 5], [3, 8], [20, 1], [4, 4]] * 10)
    found = length_bias(lengths.astype(float), lengths, np.arange(40), 0)
    assert found["score_and_length"]["pearson"]["mean"] == pytest.approx(1)
    assert found["margin_and_difference"]["spearman"]["mean"] == pytest.approx(1)
    assert found["accuracy"]["chosen_longer"]["accuracy"]["mean"] == 1
    assert found["accuracy"]["chosen_shorter"]["accuracy"]["mean"] == 0
    assert found["accuracy"]["equal"]["ties"] == 10
    assert found["longer_minus_shorter"]["mean"] == 1
    assert found["near_equal"]["n"] == 10
    prefers = found["prefers_longer"]
    assert (prefers["model"]["mean"], prefers["humans"]["mean"]) == (1, pytest.approx(2 / 3))
    assert prefers["difference"]["mean"] == pytest.approx(1 / 3)
    assert "tells right from wrong" in found["logistic"]["why_not"]


def test_the_model_prefers_longer_answers_with_a_tie_as_half():
    scores, lengths = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), np.array([[9, 1], [1, 9], [5, 5]])
    prefers = length_bias(scores, lengths, np.arange(3), 0)["prefers_longer"]
    assert (prefers["model"]["mean"], prefers["humans"]["mean"], prefers["model"]["n"]) == (0.75, 0.5, 2)


def test_near_equal_lengths_differ_by_less_than_a_tenth_of_the_longer_one():
    lengths = np.array([[100, 91], [91, 100], [100, 90], [10, 9]])
    assert length_bias(np.zeros((4, 2)), lengths, np.arange(4), 0)["near_equal"]["n"] == 2


def test_the_logistic_fit_of_two_lengths_has_a_closed_form():
    """Right in 80 % where the chosen answer is longer by 10, in 60 % where it is shorter by 10."""
    lengths = np.array([[20, 10]] * 100 + [[10, 20]] * 100)
    right = np.concatenate([np.arange(100) < 80, np.arange(100) < 60])
    scores = np.column_stack([right, np.full(200, 0.5)])
    found = length_bias(scores, lengths, np.arange(200), 0)["logistic"]
    assert found["std"] == 10
    assert found["odds_ratio"]["mean"] == pytest.approx(math.exp((logit(0.8) - logit(0.6)) / 2))
    assert found["at_equal_length"]["mean"] == pytest.approx(expit((logit(0.8) + logit(0.6)) / 2))
    error = math.sqrt(1 / (0.8 * 0.2 * 100) + 1 / (0.6 * 0.4 * 100)) / 2
    assert math.log(found["odds_ratio"]["high"] / found["odds_ratio"]["mean"]) == pytest.approx(1.96 * error, rel=0.01)


@pytest.mark.parametrize("outcome", [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
def test_no_logistic_fit_of_one_outcome(outcome):
    lengths = np.array([[1, 2], [5, 3], [7, 7], [2, 9], [8, 1]])
    found = length_bias(np.array([outcome] * 5), lengths, np.arange(5), 0)["logistic"]
    assert (found["odds_ratio"], found["at_equal_length"]) == (None, None)
    assert found["why_not"]
