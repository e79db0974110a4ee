"""Stability, spikes, jumps, divergence and convergence: closed forms, false alarms on noise, and a real PPO run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trl.compare.dynamics import (
    area_until,
    describe_convergence,
    describe_stability,
    find_jumps,
    find_spikes,
    is_diverging,
    smooth,
)

# Mean reward and KL (nats per answer) of PPO in a run of the demo, 32 updates.
REWARDS = """
0.839 0.862 1.247 1.177 1.621 1.505 1.874 1.473 1.508 1.885 1.968 2.093 1.985 2.127 2.31 2.262
2.151 2.145 2.373 2.291 2.222 2.32 2.365 2.384 2.354 2.446 2.538 2.631 2.617 2.5 2.618 2.447
"""
KLS = """
0.0 0.243 0.822 0.725 1.133 1.539 1.873 2.333 1.789 2.175 4.054 4.424 4.021 4.562 4.888 5.235
5.181 4.715 5.541 5.095 4.37 6.504 5.778 5.199 6.171 5.05 6.072 5.562 5.656 6.061 5.656 5.579
"""
REWARDS, KLS = ([float(word) for word in text.split()] for text in (REWARDS, KLS))
CURVES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def noise(rows, seed):
    return np.random.default_rng(seed).normal(size=rows)


def share(found):
    found = [bool(one) for one in found]
    return sum(found) / len(found)


# --- smooth ----------------------------------------------------------------------------------------------------------


def test_smooth_takes_narrower_windows_at_the_ends():
    assert smooth([9, 1, 5, 2, 8, 3, 7]).tolist() == [9, 5, 5, 3, 5, 7, 7]
    assert smooth([4, 9, 1, 2]).tolist() == [4, 4, 2, 2]
    assert smooth([5, 1, 2]).tolist() == [5, 2, 2]
    assert smooth([5, 1]).tolist() == [5, 1]
    assert smooth([5]).tolist() == [5]


def test_smooth_keeps_what_rises_and_takes_out_what_stands_alone():
    rising = np.array([1, 2, 4, 8, 16, 32, 64.0])
    assert smooth(rising).tolist() == rising.tolist()
    spiked = rising.copy()
    spiked[3] = 1000
    assert smooth(spiked)[3] == 16
    assert spiked[3] == 1000, "the curve itself is not changed"


@pytest.mark.parametrize("values", [[], [1, math.nan], [math.inf]])
def test_what_is_no_curve_is_refused(values):
    steps = list(range(1, len(values) + 1))
    for call in (
        lambda: smooth(values),
        lambda: describe_stability(values, "higher"),
        lambda: find_spikes(steps, values),
        lambda: find_jumps(steps, values),
        lambda: is_diverging(values, "higher"),
        lambda: area_until(steps, values, 0, 1),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()


# --- stability -------------------------------------------------------------------------------------------------------


def test_stability_of_a_curve_by_hand():
    found = describe_stability([0, 2, 4, 1, 5, 1, -3, 0], "higher")
    assert found["variance"] == pytest.approx(np.var([0, 2, 4, 1, 5, 1, -3, 0], ddof=1))
    assert smooth([0, 2, 4, 1, 5, 1, -3, 0]).tolist() == [0, 2, 2, 2, 1, 1, 0, 0]
    assert found["noise_variance"] == pytest.approx(np.var([0, 2, -1, 4, 0, -3], ddof=1))
    assert found["end_std"] == pytest.approx(np.std([1, -3, 0], ddof=1))
    # Of the six inner rows all but the second and the sixth (a fall goes on) turn.
    assert found["oscillation"] == pytest.approx(4 / 6)
    assert (found["drawdown"], found["final_minus_best"]) == (2, -2)
    assert json.loads(json.dumps(found)) == found


def test_stability_of_a_loss_is_that_of_its_mirror_image():
    values = noise(40, 0)
    assert describe_stability(values, "lower") == pytest.approx(describe_stability(-values, "higher"))
    better = describe_stability([5, 4, 3, 2, 1], "lower")
    assert (better["drawdown"], better["final_minus_best"]) == (0, 0)
    worse = describe_stability([1, 2, 3, 4, 5], "lower")
    assert (worse["drawdown"], worse["final_minus_best"]) == (4, -4)


def test_short_runs_have_none_where_nothing_is_defined():
    one, two, three, four = (describe_stability(values, "higher") for values in ([2], [2, 1], [2, 1, 3], [2, 1, 3, 5]))
    names = ["variance", "noise_variance", "end_std", "oscillation"]
    assert [one[name] for name in names] == [None] * 4
    assert (one["drawdown"], one["final_minus_best"]) == (0, 0)
    assert [two[name] for name in names] == [0.5, None, None, None]
    assert (two["drawdown"], two["final_minus_best"]) == (1, -1)
    assert [three[name] for name in names] == [1, None, 1, 1]
    assert four["noise_variance"] == pytest.approx(np.var([-1, 0], ddof=1))
    assert four["end_std"] == pytest.approx(2)


def test_the_end_is_the_last_fifth():
    assert describe_stability([9] * 16 + [1, 3, 1, 3], "higher")["end_std"] == pytest.approx(math.sqrt(4 / 3))
    assert describe_stability([9] * 17 + [1, 1, 1, 1], "higher")["end_std"] == pytest.approx(math.sqrt(64 / 5))


def test_oscillation_of_monotone_zigzag_flat_and_random():
    def oscillation(values):
        return describe_stability(values, "higher")["oscillation"]

    assert oscillation([1, 2, 3, 7]) == oscillation([3, 2, 2, 1]) == oscillation([4, 4, 4]) == 0
    assert oscillation([0, 1, 0, 1, 0]) == 1
    assert oscillation([0, 1, 1, 0]) == 0, "a tie is no turn"
    # Of three independent values, the middle one is an extreme in 4 of 6 orders (Bienayme, 1874).
    assert oscillation(noise(20_000, 1)) == pytest.approx(2 / 3, abs=0.01)


def test_noise_variance_does_not_see_the_trend():
    """1 + v - 2 / 5 with v = 0.2868, the variance of the median of 5 normal numbers (Teichroew, 1956)."""
    flat = noise(20_000, 2)
    trend = np.linspace(0, 500, 20_000)
    for values in (flat, flat + trend):
        assert describe_stability(values, "higher")["noise_variance"] == pytest.approx(0.887, abs=0.02)
    assert describe_stability(flat + trend, "higher")["variance"] > 20_000


@given(values=CURVES)
def test_stability_keeps_its_signs(values):
    for better in ("higher", "lower"):
        found = describe_stability(values, better)
        assert found["drawdown"] >= -found["final_minus_best"] >= 0
        assert not any(value is not None and math.isnan(value) for value in found.values())


# --- spikes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [50, 150, 500])
def test_noise_has_no_spikes_and_a_spike_is_found(rows):
    steps = list(range(10, 10 + rows))
    assert share(find_spikes(steps, noise(rows, seed)) for seed in range(1000)) < 0.01
    found = {8: [], 10: []}
    for seed in range(300):
        at = int(np.random.default_rng(seed).integers(2, rows - 2))
        for size, hits in found.items():
            values = noise(rows, seed)
            values[at] += size * (-1) ** seed
            hits.append(10 + at in find_spikes(steps, values))
    assert share(found[8]) > 0.92
    assert share(found[10]) > 0.98


def test_spikes_are_named_by_their_steps():
    values = noise(60, 3)
    values[[7, 30, 31]] += 12
    values[50] -= 12
    assert find_spikes(range(0, 600, 10), values) == [70, 300, 310, 500]


def test_a_new_level_is_no_spike():
    values = noise(60, 4) / 10
    values[30:] += 8
    values[-1] += 3
    assert find_spikes(range(60), values) == []


def test_smooth_and_constant_curves_have_no_spikes():
    steps, time = range(1, 41), np.linspace(0, 4, 40)
    for values in (np.zeros(40), np.full(40, 0.3), np.exp(-time), np.sin(time), time**3):
        assert find_spikes(steps, values) == []
    # The last digit of equal numbers, and a ripple that nobody sees beside the fall.
    digit, ripple = np.full(40, 0.3), np.where(time < 1, 1 - time, 0)
    digit[20], ripple[20] = np.nextafter(0.3, 1), 0.01
    assert find_spikes(steps, digit) == find_spikes(steps, ripple) == []
    ripple[20] = 0.5
    assert find_spikes(steps, ripple) == [21]


@given(values=st.lists(st.floats(-9, 9), min_size=1, max_size=4))
def test_short_runs_have_no_spikes(values):
    assert find_spikes(list(range(len(values))), values) in ([], [1], [2], [1, 2])
    assert find_spikes([0, 1, 2], [0, 9, 0]) == []


def test_a_real_run_has_no_events():
    steps = range(1, 33)
    assert find_spikes(steps, REWARDS) == find_spikes(steps, KLS) == find_jumps(steps, KLS) == []
    assert not is_diverging(REWARDS, "higher")
    assert is_diverging(REWARDS, "lower")
    broken = [*REWARDS[:20], *(2.2 - 0.3 * row for row in range(12))]
    assert is_diverging(broken, "higher")
    assert find_jumps(steps, [*KLS[:20], *(kl + 9 for kl in KLS[20:])]) == [21]


# --- jumps -----------------------------------------------------------------------------------------------------------


def test_a_jump_is_five_times_the_median_change():
    """Every change is 1, up or down, but one."""
    rising = np.arange(20.0)
    for size, expected in ((4.9, []), (5.1, [12]), (-5.1, [12])):
        values = rising.copy()
        values[12:] += size - 1
        assert find_jumps(range(20), values) == expected


def test_small_changes_are_no_jumps():
    assert find_jumps([1], [3.0]) == find_jumps([1, 2], [0.0, 3.0]) == []
    assert find_jumps(range(20), np.zeros(20)) == find_jumps(range(20), np.full(20, 0.1)) == []
    level = np.full(20, 2.0)
    level[10:] = 2.09
    assert find_jumps(range(20), level) == []
    level[10:] = 2.2
    assert find_jumps(range(20), level) == [10]
    assert find_jumps(range(20), -level) == [10], "an estimate of the KL may be negative"


def test_steps_and_values_have_one_length():
    for call in (find_spikes, find_jumps):
        with pytest.raises(ValueError, match="zip"):
            call([1, 2], [1.0, 2.0, 3.0])


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [6, 9, 20, 100])
def test_noise_and_improving_runs_do_not_diverge(rows):
    time = np.linspace(0, 1, rows)
    assert share(is_diverging(noise(rows, seed), "higher") for seed in range(3000)) < 0.01
    for curve in (time / 2, 3 * time, 3 * (1 - np.exp(-5 * time)), 3 * np.sin(2 * time)):
        assert share(is_diverging(curve + noise(rows, seed), "higher") for seed in range(500)) < 0.01
        assert share(is_diverging(noise(rows, seed) - curve, "lower") for seed in range(500)) < 0.01


def test_a_run_that_breaks_diverges():
    time = np.linspace(0, 1, 30)
    rise_and_fall = np.where(time < 0.7, 14 * time, -1)
    for curve in (np.where(time < 0.7, 0, -9), -10 * time, rise_and_fall, -np.exp(9 * time) / 50):
        assert share(is_diverging(curve + noise(30, seed), "higher") for seed in range(200)) > 0.9
    assert is_diverging([0.7, 0.65, 0.66, 0.6, 2, 9, 80, 1e3, 1e5], "lower")


def test_what_ends_above_its_start_has_not_diverged():
    time = np.linspace(0, 1, 30)
    fallen = np.where(time < 0.7, 20 * time, 5) + noise(30, 0)
    assert describe_stability(fallen, "higher")["drawdown"] > 7
    assert not is_diverging(fallen, "higher")


def test_too_few_rows_do_not_diverge():
    assert not is_diverging([9, 9, 9, 0, 0], "higher")
    assert is_diverging([9, 9, 9, 0, 0, 0], "higher")
    assert not is_diverging([0.3] * 5 + [np.nextafter(0.3, 0)] * 4, "higher"), "the last digit of equal numbers"


# --- convergence -----------------------------------------------------------------------------------------------------


def converge(values, threshold, hold=2, tokens=(100, 200, 300, 400, 500, 600)):
    costs = {"steps": [10, 20, 30, 40, 50, 60], "seconds": [1.5, 3.0, 4.5, 6.0, 7.5, 9.0], "tokens": tokens}
    return describe_convergence(costs, values, threshold, hold)


def test_a_run_that_converges():
    found = converge([1, 2, 3, 4, 5, 6], 3)
    assert found == {"threshold": 3, "hold": 2, "reached": True, "steps": 30, "seconds": 4.5, "tokens": 300,
                     "censored_at": None, "final": 6, "best": 6}  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("threshold", "hold", "step"), [(3, 1, 20), (3, 2, None), (2, 5, 20), (2, 6, None), (2, 7, None)]
)
def test_a_threshold_must_be_held(threshold, hold, step):
    """Smoothed: 0, 4, 2, 2, 2, 2, so that the threshold of 3 is reached twice."""
    values = [0, 4, 5, 1, 2, 2]
    assert smooth(values).tolist() == [0, 4, 2, 2, 2, 2]
    assert (found := converge(values, threshold, hold))["steps"] == step
    assert found["reached"] == (step is not None)


def test_a_threshold_reached_too_late_is_censored():
    found = converge([0, 0, 0, 1, 1, 2], 2)
    assert (found["reached"], found["steps"], found["seconds"], found["tokens"]) == (False, None, None, None)
    assert found["censored_at"] == {"steps": 50, "seconds": 7.5, "tokens": 500}  # from the last row on, who knows
    assert (found["final"], found["best"]) == (2, 2)
    assert converge([0, 0, 0, 1, 1, 2], 2, hold=1)["steps"] == 60


def test_a_method_without_tokens_has_none():
    assert converge([1, 2, 3, 4, 5, 6], 3, tokens=None)["tokens"] is None
    assert converge([1, 2, 3, 4, 5, 6], 9, tokens=None)["censored_at"] == {"steps": 50, "seconds": 7.5, "tokens": None}
    assert converge([1, 2, 3, 4, 5, 6], 3, hold=7)["censored_at"] == {"steps": 0, "seconds": 0, "tokens": 0}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_short_runs_converge_too(rows):
    costs = {"steps": [5, 10, 15][:rows], "tokens": None}
    found = describe_convergence(costs, [4.0] * rows, 4.0, rows)
    assert (found["steps"], found["final"]) == (5, 4)
    assert not describe_convergence(costs, [4.0] * rows, 4.0, rows + 1)["reached"]


def test_a_real_run_converges():
    assert describe_convergence({"steps": range(1, 33)}, REWARDS, 2.0, 3)["steps"] == 13
    trapezoids = 0.4 + smooth(REWARDS)[:-1].sum() + smooth(REWARDS)[-1] / 2
    assert area_until(range(1, 33), REWARDS, 0.8, 32) == pytest.approx(trapezoids / 32 - 0.8)


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match="held for 0"):
        converge([1, 2, 3, 4, 5, 6], 3, hold=0)
    with pytest.raises(ValueError, match="5 values"):
        converge([1, 2, 3, 4, 5], 3)


def test_area_until_a_budget():
    """From (0, 1) over (10, 3) and (20, 3): the first half of a run is its rise."""
    assert area_until([10, 20], [3, 3], 1, 10) == pytest.approx(1)
    assert area_until([10, 20], [3, 3], 1, 20) == pytest.approx(1.5)
    assert area_until([10, 20], [3, 3], 1, 5) == pytest.approx(0.5)
    assert area_until([10, 20], [3, 3], 1, 20.5) is None
    assert area_until([10], [1], 1, 10) == 0
    assert area_until([0, 10], [1, 0], 1, 10) == pytest.approx(-0.5), "a row at step 0"
    assert area_until([2.5, 2.5, 5], [2, 2, 2], 0, 5) == pytest.approx(1.5), "rows in the same second"


@given(values=CURVES, start=st.floats(-1e3, 1e3), part=st.floats(0.05, 1))
def test_area_is_that_of_fine_steps(values, start, part):
    steps = list(range(1, len(values) + 1))
    grid = (np.arange(20_000) + 0.5) / 20_000 * part * len(values)
    curve = np.interp(grid, [0, *steps], [start, *smooth(values)])
    scale = max(1, max(map(abs, values)))
    assert area_until(steps, values, start, part * len(values)) == pytest.approx(
        curve.mean() - start, abs=1e-3 * scale
    )


@pytest.mark.parametrize(
    ("steps", "budget"), [([1, 2, 3], 2), ([2, 1], 2), ([-1, 2], 2), ([1, 2], 0), ([1, 2], -1), ([1, 2], math.nan)]
)
def test_what_is_no_axis_is_refused(steps, budget):
    with pytest.raises(ValueError, match="rising steps"):
        area_until(steps, [1.0, 2.0], 0, budget)
