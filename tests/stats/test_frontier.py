"""Pareto front, hypervolume, best-of-n and the curve of over-optimisation: published figures and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_trl.stats.frontier import (
    best_of_n,
    best_of_n_kl,
    describe_front,
    fit_over_optimisation,
    hypervolume,
    non_dominated,
    read_path,
)

# moocore's example, with the reward turned up: (reward, KL).
POINTS = np.array([(0, 0), (0.8, 2), (1.2, 5), (1.1, 9), (1.5, 20), (1.4, 30)])
# Few different values, so that ties and duplicates are common.
COARSE = arrays(np.float64, st.tuples(st.integers(1, 8), st.just(2)), elements=st.integers(-3, 6).map(float))


def brute_front(points):
    """Marked: not beaten in one and matched in the other, and the first of its kind."""
    marks = []
    for i, (gain, kl) in enumerate(points):
        beaten = any(g >= gain and k <= kl and (g, k) != (gain, kl) for g, k in points)
        marks.append(not beaten and (gain, kl) not in [tuple(point) for point in points[:i]])
    return marks


def test_published_front_and_hypervolume():
    gain, kl = POINTS.T
    assert non_dominated(gain, kl).tolist() == [True, True, True, False, True, False]
    assert hypervolume(gain, kl, worst_gain=-0.5, worst_kl=40) == pytest.approx(70.4, abs=1e-12)
    outside = np.array([1.0, 5.0, -2.0]), np.array([1.0, 10.0, 0.0])
    assert hypervolume(*outside, 0, 10) == 9.0  # points outside the box add nothing


@given(points=COARSE)
def test_front_is_brute_forces(points):
    assert non_dominated(*points.T).tolist() == brute_front([tuple(point) for point in points])


@given(points=COARSE, order=st.randoms(use_true_random=False))
def test_hypervolume_counts_the_cells_that_are_dominated(points, order):
    """On whole numbers the area is a number of unit cells. The order of the points does not matter, dominated ones and
    copies add nothing."""
    cells = sum(
        any(gain >= top and kl <= left for gain, kl in points)
        for top, left in itertools.product(range(7), range(-3, 5))
    )
    found = hypervolume(*points.T, worst_gain=-1, worst_kl=5)
    assert found == pytest.approx(cells, abs=1e-9)
    shuffled = [tuple(point) for point in points]
    order.shuffle(shuffled)
    assert hypervolume(*np.array(shuffled).T, worst_gain=-1, worst_kl=5) == pytest.approx(found)
    front = points[non_dominated(*points.T)]
    assert hypervolume(*front.T, worst_gain=-1, worst_kl=5) == pytest.approx(found)


@pytest.mark.parametrize("values", [([1.0], [1.0, 2.0]), ([], []), ([1.0, math.nan], [1.0, 1.0]), ([1.0], [math.inf])])
def test_what_is_no_point_is_refused(values):
    first, second = (np.array(side) for side in values)
    for call in (lambda: non_dominated(first, second), lambda: describe_front({"a": first}, {"a": second}, 0, 1, 0)):
        with pytest.raises(ValueError, match="point"):
            call()


def noisy(means, prompts, seed, spread=1.0):
    """(K,) -> (K, P): normal values around each mean, moved so that the mean of the sample is exact."""
    values = np.random.default_rng(seed).normal(0, spread, size=(len(means), prompts))
    return values - values.mean(axis=1, keepdims=True) + np.array(means)[:, None]


def test_every_point_and_the_area_are_described():
    """`even` has the gain of `mid` at more KL."""
    names = ["reference", "mid", "even", "worse", "far"]
    gains = dict(zip(names, noisy([0.0, 1.0, 1.0 - 1e-9, 0.2, 3.0], 300, 1), strict=True))
    kls = dict(zip(names, noisy([0.0, 2.0, 4.0, 6.0, 9.0], 300, 2), strict=True))
    points, area = describe_front(gains, kls, -1.0, 10.0, seed=3)
    assert [(name, of["on_front"]) for name, of in points.items()] == [
        ("reference", True), ("mid", True), ("even", False), ("worse", False), ("far", True)
    ]  # fmt: skip
    assert (points["far"]["gain"]["mean"], points["far"]["kl"]["mean"]) == pytest.approx((3, 9))
    # 2 x 1 + 7 x 2 + 1 x 4
    assert (area["mean"], area["n"]) == (pytest.approx(20.0), 300)
    assert area["low"] < 20 < area["high"]
    assert describe_front(gains, kls, -1.0, 10.0, seed=3) == (points, area)


def test_hypervolume_interval_covers_the_truth():
    """One point (gain 1, KL 4) in the box (0, 10): 6, which the delta method gives the standard error of."""
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        gain, kl = generator.normal(1, 0.5, size=80), generator.normal(4, 1, size=80)
        _, area = describe_front({"a": gain}, {"a": kl}, 0, 10, seed)
        covered += area["low"] <= 6 <= area["high"]
    assert 0.90 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0), (2, 0.193147), (4, 0.636294), (8, 1.204442), (16, 1.835089), (64, 3.174508), (256, 4.549084)]
)
def test_kl_of_best_of_n(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-7)


def brute_best_of_n(proxy, scores, n):
    """Mean over all subsets of the score of the subset's best answer; of tied best ones, their mean."""
    results = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        results.append(np.mean([scores[i] for i in subset if proxy[i] == best]))
    return np.mean(results)


@given(
    proxy=arrays(np.float64, (2, 6), elements=st.integers(0, 3).map(float)),
    scores=arrays(np.float64, (2, 6), elements=st.floats(-5, 5)),
    n=st.integers(1, 6),
    order=st.permutations(range(6)),
)
@settings(max_examples=60)
def test_best_of_n_is_the_mean_over_all_subsets(proxy, scores, n, order):
    found = best_of_n(proxy, scores, n)
    assert found == pytest.approx([brute_best_of_n(*row, n) for row in zip(proxy, scores, strict=True)], abs=1e-9)
    assert best_of_n(proxy[:, order], scores[:, order], n) == pytest.approx(found, abs=1e-9)


def test_best_of_n_of_many_answers():
    # C(2000, 1000) is beyond a float; the best of 1000 uniform numbers is 1000 / 1001 on average.
    many = np.linspace(0, 1, 2001)[None, 1:]
    assert best_of_n(many, many, 1000) == pytest.approx([1000 / 1001], abs=1e-3)
    for n in (0, 2001):
        with pytest.raises(ValueError, match="from 2000 answers"):
            best_of_n(many, many, n)


def constant(values, prompts=50):
    return np.repeat(np.array(values, dtype=float)[:, None], prompts, axis=1)


def read(kls, gains, budget):
    found = read_path(constant(kls), constant(gains), budget)
    return None if found is None else found.mean()


def test_a_path_is_read_off_lines_over_sqrt_kl():
    """Points at sqrt(KL) 2, 2.5, 3, 4; the third has lost what the second had, and the path goes through both."""
    kls, gains = [4, 6.25, 9, 16], [1, 3, 2, 4]
    for root, gain in [(2, 1), (2.25, 2), (2.5, 3), (2.75, 2.5), (3, 2), (3.5, 3), (4, 4)]:
        assert read(kls, gains, root * root) == pytest.approx(gain)
    assert read(kls, gains, 16.5) == 4, "within five percent it is the same KL"
    assert read([0, 1], [0, 1], 0.81) == pytest.approx(0.9), "a checkpoint that has not moved"


@pytest.mark.parametrize(("kls", "budget"), [([1, 4], 5), ([1, 4], 0.9), ([4], 1), ([1, 16], 4), ([0], 1)])
def test_nothing_is_extrapolated_or_read_off_a_long_line(kls, budget):
    assert read(kls, [1.0] * len(kls), budget) is None


@pytest.mark.parametrize(
    ("kls", "gains", "budget", "gain"),
    [
        ([1, 2, 5, 10], [0.3, 0.6, 0.0, -1.0], 10, -1),  # after a peak the loss counts
        ([1, 9, 1, 9], [0, 2, 10, 20], 6.25, 10 + 10 * (2.5 - 1) / 2),  # of several crossings the last one
        *(([best_of_n_kl(n) for n in (2, 4, 8, 16)], [2, 4, 8, 16], best_of_n_kl(n), n) for n in (2, 4, 8, 16)),
    ],
)
def test_a_path_is_read_where_it_crosses_last(kls, gains, budget, gain):
    assert read(kls, gains, budget) == pytest.approx(gain)


def test_the_spread_of_a_reading_holds_the_noise_of_the_kls():
    """Against the spread of readings of many samples."""

    def sample(seed):
        generator = np.random.default_rng(seed)
        kls = np.array([[2.0], [8.0]]) * generator.gamma(4, 0.25, size=(2, 100))
        return read_path(kls, 3 * np.sqrt([[2.0], [8.0]]) + generator.normal(size=(2, 100)), 6.5)

    samples = [sample(seed) for seed in range(400)]
    spread = np.std([found.mean() for found in samples])
    assert np.mean([found.std() / 10 for found in samples]) == pytest.approx(spread, rel=0.1)


D = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 5.0])
CURVES = {"bon": lambda d, alpha, beta: d * (alpha - beta * d),
          "rl": lambda d, alpha, beta: d * (alpha - beta * np.log(np.maximum(d, 1e-9)))}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "alpha", "beta", "peak"),
    [
        ("bon", 1.2, 0.2, 1.2 / 0.4),
        ("rl", 1.2, 0.6, math.exp(1.0)),
        ("bon", 1.0, -0.2, None),
        ("rl", 1.0, -0.2, None),
        ("bon", -1.0, 1.0, None),  # falling from the start
        ("rl", 1.0, 1e-3, None),  # a peak that is beyond any number
        ("rl", -2.0, 0.5, None),  # a peak before the first point, where nothing was measured
    ],
)
def test_fit_recovers_the_curve_and_its_peak(form, alpha, beta, peak):
    fit = fit_over_optimisation(D**2, CURVES[form](D, alpha, beta), form)
    assert (fit["alpha"], fit["beta"]) == pytest.approx((alpha, beta), abs=1e-9)
    assert fit["peak_kl"] == (peak and pytest.approx(peak**2))
    if peak:  # the highest point of the curve, found by looking
        grid = np.linspace(0.01, 10, 100_000)
        assert grid[CURVES[form](grid, alpha, beta).argmax()] == pytest.approx(peak, abs=1e-3)


def test_fit_is_least_squares():
    d = np.linspace(0.3, 4, 12)
    gain = CURVES["rl"](d, 1, 0.3) + np.random.default_rng(0).normal(0, 0.2, size=12)
    fit = fit_over_optimisation(d**2, gain, "rl")

    def error(a, b):
        return ((gain - CURVES["rl"](d, fit["alpha"] + a, fit["beta"] + b)) ** 2).sum()

    assert all(error(a, b) > error(0, 0) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01) if a or b)


def test_fit_needs_three_different_points():
    assert fit_over_optimisation(np.array([0.0, 1.0, 4.0, 4.0]), np.array([0.0, 1.0, 2.0, 3.0]), "rl") is None
