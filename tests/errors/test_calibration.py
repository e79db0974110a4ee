"""Calibration and length bias: published figures, closed forms and properties."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from rlhf_trl.errors.analysis import correlation, difference, length_bias
from rlhf_trl.errors.calibration import (
    bin_of,
    brier,
    confidence,
    ece,
    ece_if_calibrated,
    equal_mass,
    fit_temperature,
    nll,
)  # fmt: skip
from rlhf_trl.stats.pairs import share

MARGINS = st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=1, max_size=60).map(np.array)
TWO, FIVE = np.array([0, 0.5, 1]), np.linspace(0.5, 1, 6)


def test_the_error_is_that_of_torchmetrics():
    """The example of torchmetrics' BinaryCalibrationError, l1 norm."""
    assert ece(np.array([0.25, 0.25, 0.55, 0.75, 0.75]), np.array([0, 0, 1, 1, 1]), TWO) == pytest.approx(0.29)


@settings(deadline=None)
@given(MARGINS.filter(lambda margins: (np.abs(margins) > 1e-6).all()))
def test_confidence_against_accuracy_is_each_pair_in_both_orders(margins):
    """The frame without a draw: bins of sigma(|d|) over 0.5 to 1 are the bins of P(first wins) over 0 to 1, folded."""
    folded = ece(confidence(margins), (margins > 0).astype(float), FIVE)
    both = np.concatenate([expit(margins), expit(-margins)])
    outcome = np.repeat([1.0, 0.0], len(margins))
    edges = np.concatenate([1 - FIVE[:0:-1], FIVE])
    # The lower half has its bins open below where the upper half has them open above: keep clear of the edges.
    assume((np.abs(both[:, None] - edges).min(axis=1) > 1e-12).all())
    assert ece(both, outcome, edges) == pytest.approx(folded)


def test_bins():
    assert bin_of(np.array([0, 0.49, 0.5, 0.99, 1.0]), TWO).tolist() == [0, 0, 1, 1, 1], "an edge is in the bin above"
    predicted = np.random.default_rng(0).permutation(np.linspace(0.5, 0.9, 100))
    assert np.bincount(bin_of(predicted, equal_mass(predicted, 10))).tolist() == [10] * 10
    same = np.full(4, 0.5)
    assert bin_of(same, equal_mass(same, 10)).tolist() == [0] * 4
    assert ece(same, np.array([1, 1, 1, 0]), np.array([0.5, 0.5])) == 0.25


def test_a_calibrated_model_has_the_error_of_chance():
    """One bin of n predictions p: the error is |binomial mean - p|, about sqrt(2 / pi * p (1 - p) / n) on average."""
    right = np.arange(400) < 320
    found = ece_if_calibrated(np.full(400, 0.8), right, np.arange(400), np.array([0, 1]), seed=1)
    assert found.mean == pytest.approx(math.sqrt(2 / math.pi * 0.8 * 0.2 / 400), rel=0.06)
    assert found.high == pytest.approx(2.24 * math.sqrt(0.8 * 0.2 / 400), rel=0.1)  # P(|z| < 2.24) = 0.975
    assert 0 <= found.low < found.mean < found.high
    copies = ece_if_calibrated(np.full(1600, 0.8), np.repeat(right, 4), np.repeat(np.arange(400), 4), TWO, seed=1)
    assert copies.high == pytest.approx(found.high, rel=0.1), "copies of a pair add no certainty"


def test_loss_and_brier_score():
    margins = np.array([0.0, 1000.0, -1000.0])
    assert nll(margins) == pytest.approx([math.log(2), 0, 1000])
    assert brier(margins) == pytest.approx([0.25, 0, 1])
    assert nll(np.array([1.0])) == pytest.approx(-math.log(expit(1.0)))


@pytest.mark.parametrize("right", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("margin", [0.01, 2.0, 300.0])
def test_the_temperature_of_two_margins_has_a_closed_form(right, margin):
    """Margins +a and -a, of which a share q is right: sigma(a / T) = q."""
    n = 200
    margins = np.where(np.arange(n) < right * n, margin, -margin)
    found = fit_temperature(margins, np.arange(n))
    assert found.mean == pytest.approx(margin / logit(right), rel=1e-6)
    spread = math.exp(1.96 / (logit(right) * math.sqrt(n * right * (1 - right))))
    assert (found.low, found.high) == pytest.approx((found.mean / spread, found.mean * spread), rel=1e-5)
    copies = fit_temperature(np.repeat(margins, 4), np.repeat(np.arange(n), 4))
    assert (copies.low, copies.high) == pytest.approx((found.low, found.high), rel=1e-5)


@settings(deadline=None)
@given(MARGINS.filter(lambda m: m.mean() > 0.02 * np.abs(m).max() and m.min() < -0.01), st.floats(0.01, 100))
def test_the_temperature_has_the_least_loss_and_follows_the_scale(margins, scale):
    prompts = np.arange(len(margins))
    found = fit_temperature(margins, prompts).mean
    best = nll(margins / found).mean()
    assert best <= min(nll(margins / (found * factor)).mean() for factor in (0.98, 1.02)) + 1e-12
    assert fit_temperature(margins * scale, prompts).mean == pytest.approx(found * scale, rel=1e-6)


@pytest.mark.parametrize(
    ("margins", "why"),
    [
        ([], "is wrong"),
        ([1.0, 2.0], "is wrong"),
        ([1.0, 0.0], "is wrong"),
        ([1.0, -1.0, -2.0], "not positive"),
        ([0.01, -0.00999], "could be any"),  # its interval would end beyond any float
    ],
)
def test_no_temperature_without_an_error_or_without_information(margins, why):
    with pytest.raises(ValueError, match=why):
        fit_temperature(np.array(margins), np.arange(len(margins)))


# --- lengths ---------------------------------------------------------------------------------------------------------


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
    assert found["mean"] == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-5)


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
