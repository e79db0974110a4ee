"""Calibration: published figures, closed forms and properties."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from rlhf_trl.errors.calibration import (
    bin_of,
    brier,
    calibration_errors,
    confidence,
    ece_if_calibrated,
    equal_mass,
    fit_temperature,
    nll,
)  # fmt: skip

MARGINS = st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=1, max_size=60).map(np.array)
TWO, FIVE = np.array([0, 0.5, 1]), np.linspace(0.5, 1, 6)


def test_errors_are_those_of_torchmetrics():
    """The example of torchmetrics' BinaryCalibrationError: l1, l2 and max norm."""
    found = calibration_errors(np.array([0.25, 0.25, 0.55, 0.75, 0.75]), np.array([0, 0, 1, 1, 1]), TWO)
    assert found == pytest.approx({"ece": 0.2900, "rmsce": 0.2918, "mce": 0.3167}, abs=5e-5)


@settings(deadline=None)
@given(MARGINS, st.integers(1, 12))
def test_errors_are_those_of_a_plain_loop(margins, bins):
    predicted, outcome = expit(margins), (np.arange(len(margins)) % 3 == 0).astype(float)
    gaps, sizes = [], []
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [row for row, p in enumerate(predicted) if low <= p < high or (number == bins - 1 and p == 1)]
        if inside:
            gaps.append(abs(sum(predicted[row] - outcome[row] for row in inside)) / len(inside))
            sizes.append(len(inside) / len(margins))
    mean, square = (sum(s * g**power for s, g in zip(sizes, gaps, strict=True)) for power in (1, 2))
    found = calibration_errors(predicted, outcome, np.arange(bins + 1) / bins)
    assert found == pytest.approx({"ece": mean, "rmsce": math.sqrt(square), "mce": max(gaps)})


@settings(deadline=None)
@given(MARGINS.filter(lambda margins: (np.abs(margins) > 1e-6).all()))
def test_confidence_against_accuracy_is_each_pair_in_both_orders(margins):
    """The frame without a draw: bins of sigma(|d|) over 0.5 to 1 are the bins of P(first wins) over 0 to 1, folded."""
    folded = calibration_errors(confidence(margins), (margins > 0).astype(float), FIVE)
    both = np.concatenate([expit(margins), expit(-margins)])
    outcome = np.repeat([1.0, 0.0], len(margins))
    edges = np.concatenate([1 - FIVE[:0:-1], FIVE])
    # The lower half has its bins open below where the upper half has them open above: keep clear of the edges.
    assume((np.abs(both[:, None] - edges).min(axis=1) > 1e-12).all())
    assert calibration_errors(both, outcome, edges) == pytest.approx(folded)


def test_with_the_chosen_answer_first_the_error_says_nothing():
    """A calibrated model with an error of 0.3: why the order is drawn, or both are counted."""
    margins = np.array([logit(0.7)] * 7 + [-logit(0.7)] * 3)
    chosen_first = calibration_errors(expit(margins), np.ones(10), np.array([0, 1]))
    assert chosen_first["ece"] == pytest.approx(1 - expit(margins).mean())
    honest = calibration_errors(confidence(margins), (margins > 0).astype(float), np.linspace(0.5, 1, 11))
    assert honest["ece"] == pytest.approx(0)


def test_bins():
    assert bin_of(np.array([0, 0.49, 0.5, 0.99, 1.0]), TWO).tolist() == [0, 0, 1, 1, 1], "an edge is in the bin above"
    predicted = np.random.default_rng(0).permutation(np.linspace(0.5, 0.9, 100))
    assert np.bincount(bin_of(predicted, equal_mass(predicted, 10))).tolist() == [10] * 10
    same = np.full(4, 0.5)
    assert bin_of(same, equal_mass(same, 10)).tolist() == [0] * 4
    assert calibration_errors(same, np.array([1, 1, 1, 0]), np.array([0.5, 0.5]))["ece"] == 0.25
    with pytest.raises(ValueError, match="at least one"):
        calibration_errors(np.array([]), np.array([]), TWO)


def test_a_calibrated_model_has_the_error_of_chance():
    """One bin of n predictions p: the error is |binomial mean - p|, about sqrt(2 / pi * p (1 - p) / n) on average."""
    found = ece_if_calibrated(np.full(400, 0.8), np.array([0, 1]), seed=1)
    assert found.mean == pytest.approx(math.sqrt(2 / math.pi * 0.8 * 0.2 / 400), rel=0.06)
    assert found.high == pytest.approx(2.24 * math.sqrt(0.8 * 0.2 / 400), rel=0.1)  # P(|z| < 2.24) = 0.975
    assert 0 <= found.low < found.mean < found.high


def test_calibrated_outcomes_lie_within_the_range_of_chance():
    random = np.random.default_rng(3)
    inside = 0
    for seed in range(40):
        predicted = random.uniform(0.5, 1, 300)
        edges = equal_mass(predicted, 10)
        error = calibration_errors(predicted, (random.random(300) < predicted).astype(float), edges)["ece"]
        found = ece_if_calibrated(predicted, edges, seed)
        inside += found.low <= error <= found.high
    assert 35 <= inside <= 40  # 38 expected
    assert calibration_errors(predicted, (random.random(300) < 0.5).astype(float), edges)["ece"] > found.high


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
    found = fit_temperature(np.where(np.arange(n) < right * n, margin, -margin))
    assert found.mean == pytest.approx(margin / logit(right), rel=1e-6)
    spread = math.exp(1.96 / (logit(right) * math.sqrt(n * right * (1 - right))))
    assert (found.low, found.high) == pytest.approx((found.mean / spread, found.mean * spread), rel=1e-5)


@settings(deadline=None)
@given(MARGINS.filter(lambda m: m.mean() > 0.01 and m.min() < -0.01), st.floats(0.01, 100))
def test_the_temperature_has_the_least_loss_and_follows_the_scale(margins, scale):
    found = fit_temperature(margins).mean
    best = nll(margins / found).mean()
    assert best <= min(nll(margins / (found * factor)).mean() for factor in (0.98, 1.02)) + 1e-12
    assert fit_temperature(margins * scale).mean == pytest.approx(found * scale, rel=1e-6)


@pytest.mark.parametrize(
    ("margins", "why"),
    [([], "is wrong"), ([1.0, 2.0], "is wrong"), ([1.0, 0.0], "is wrong"), ([1.0, -1.0, -2.0], "not positive")],
)
def test_no_temperature_without_an_error_or_without_information(margins, why):
    with pytest.raises(ValueError, match=why):
        fit_temperature(np.array(margins))
