"""Ranking and length bias of scores on labelled pairs: published figures, closed forms and properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from rlhf_trl.errors.pair_statistics import auc, correlation, difference, length_bias
from rlhf_trl.stats.pairs import share

# Multiples of 1/8: adding a whole number to them is exact.
SCORE = st.integers(-40, 40).map(lambda number: number / 8)
PAIRS = st.lists(st.tuples(SCORE, SCORE, st.integers(1, 60), st.integers(1, 60), st.integers(0, 5)), min_size=1)


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
    found = difference(*(share(np.arange(n) < successes, np.arange(n)) for successes, n in (first, second)))
    assert found.mean == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS, st.integers(-100, 100))
def test_auc_is_the_share_of_all_comparisons_and_a_constant_changes_nothing(pairs, constant):
    table = np.array(pairs, dtype=float)
    scores, lengths, prompts = table[:, :2], table[:, 2:4].astype(int), table[:, 4].astype(int)
    area, wins = auc(scores, prompts), np.sign(scores[:, 0][:, None] - scores[:, 1]) / 2 + 0.5
    assert area.mean == pytest.approx(wins.mean())
    assert area.low - 1e-12 <= area.mean <= area.high + 1e-12
    assert auc(scores[:, ::-1], prompts).mean == pytest.approx(1 - area.mean)
    assert auc(scores + constant, prompts) == area
    found, moved = (length_bias(values, lengths, prompts) for values in (scores, scores + constant))
    correlated, still_correlated = (result.pop("score_and_length")["pearson"] for result in (found, moved))
    assert moved == found
    assert still_correlated == (correlated and pytest.approx(correlated))


def test_the_interval_of_the_auc_is_delongs():
    """For independent sides it agrees with DeLong's variance, S10 / n + S01 / n."""
    scores = np.random.default_rng(1).normal([0.5, 0], size=(400, 2))
    above = (scores[:, :1] > scores[:, 1]).mean(axis=1)
    below = (scores[:, 0] > scores[:, 1:]).mean(axis=1)
    error = math.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 400)
    found = auc(scores, np.arange(400))
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
    assert (found["pearson"], found["spearman"], bool(found["why_not"])) == (None, None, True)


def test_length_bias_of_a_scorer_that_is_the_length():
    lengths = np.array([[10, 5], [3, 8], [20, 1], [4, 4]] * 10)
    found = length_bias(lengths.astype(float), lengths, np.arange(40))
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
    prefers = length_bias(scores, lengths, np.arange(3))["prefers_longer"]
    assert (prefers["model"]["mean"], prefers["humans"]["mean"], prefers["model"]["n"]) == (0.75, 0.5, 2)


def test_near_equal_lengths_differ_by_less_than_a_tenth_of_the_longer_one():
    lengths = np.array([[100, 91], [91, 100], [100, 90], [10, 9]])
    assert length_bias(np.zeros((4, 2)), lengths, np.arange(4))["near_equal"]["n"] == 2


def test_the_logistic_fit_of_two_lengths_has_a_closed_form():
    """Right in 80 % where the chosen answer is longer by 10, in 60 % where it is shorter by 10."""
    lengths = np.array([[20, 10]] * 100 + [[10, 20]] * 100)
    right = np.concatenate([np.arange(100) < 80, np.arange(100) < 60])
    found = length_bias(np.column_stack([right, np.full(200, 0.5)]), lengths, np.arange(200))["logistic"]
    assert found["std"] == 10
    assert found["odds_ratio"]["mean"] == pytest.approx(math.exp((logit(0.8) - logit(0.6)) / 2))
    assert found["at_equal_length"]["mean"] == pytest.approx(expit((logit(0.8) + logit(0.6)) / 2))
    error = math.sqrt(1 / (0.8 * 0.2 * 100) + 1 / (0.6 * 0.4 * 100)) / 2
    assert math.log(found["odds_ratio"]["high"] / found["odds_ratio"]["mean"]) == pytest.approx(1.96 * error, rel=0.01)


@pytest.mark.parametrize("outcome", [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
def test_no_logistic_fit_of_one_outcome(outcome):
    lengths = np.array([[1, 2], [5, 3], [7, 7], [2, 9], [8, 1]])
    found = length_bias(np.array([outcome] * 5), lengths, np.arange(5))["logistic"]
    assert (found["odds_ratio"], found["at_equal_length"], bool(found["why_not"])) == (None, None, True)
