"""Several seeds of a method, and two methods: published figures, closed forms, and what the intervals are worth."""

import json
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from rlhf_trl.compare.seeds import (
    ENOUGH,
    compare_as_trained,
    compare_at_equal_kl,
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
    summarise_seeds,
)
from rlhf_trl.stats.estimate import RESAMPLES, bootstrap_mean
from rlhf_trl.stats.frontier import gain_at_kl

# The example of rliable's own tests (metrics_test.py): runs in rows, tasks in columns.
X = np.array([[1, 2], [2, 2], [1, 1], [2, 1]])
Y = np.array([[1, 1], [2, 2], [3, 3]])


def method(seeds, prompts, draw, spread=0.0, mean=0.0):
    """Runs of one method: each has its own level, and each of its gains noise with a standard deviation of 1."""
    generator = np.random.default_rng(draw)
    return [mean + generator.normal(0, spread) + generator.normal(size=prompts) for _ in range(seeds)]


def rising(slope, final_kl, prompts=60, checkpoints=3, seed=0):
    """A run whose gain is slope * sqrt(KL), with noise on the prompts that leaves both means as they are."""
    generator = np.random.default_rng(seed)
    kl = final_kl * (np.arange(checkpoints) + 1) / checkpoints
    noise = generator.normal(size=(2, checkpoints, prompts))
    noise -= noise.mean(axis=2, keepdims=True)
    return kl[:, None] + noise[0] / 20, slope * np.sqrt(kl)[:, None] + noise[1]


# --- seeds of one method ---------------------------------------------------------------------------------------------


def test_the_example_of_rliable():
    assert interquartile_mean(X) == 1.5
    assert interquartile_mean(Y) == 2.0
    assert probability_of_improvement(X, Y) == pytest.approx(1 / 3)
    assert probability_of_improvement(Y, X) == pytest.approx(2 / 3)


def test_probability_of_improvement_is_mann_and_whitneys():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, size=(7, 3)), generator.integers(1, 6, size=(4, 3))
    u = mannwhitneyu(x, y, axis=0, method="asymptotic").statistic
    assert probability_of_improvement(x, y) == pytest.approx((u / 28).mean())
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 9, y) == 1


def test_interquartile_mean_drops_the_ends():
    assert interquartile_mean(np.array([100, 1, 2, 3, -50])) == 2
    assert interquartile_mean(np.array([3.0, 9.0, 0.0])) == 4, "of three scores none is dropped"


def test_runs_are_drawn_within_their_task():
    """Runs that are all the same within a task leave no doubt, however far the tasks are apart."""
    scores = np.tile([0.0, 1.0, 5.0, 100.0], (6, 1))
    found = stratified_interval(scores, 0)
    assert (found.mean, found.low, found.high, found.n) == (3, 3, 3, 6)
    assert stratified_interval(X, 1) == stratified_interval(X, 1)
    assert (stratified_interval(X, 1).low, stratified_interval(X, 1).high) == (1, 2)


def test_interval_of_the_interquartile_mean_covers_it():
    """20 runs of two tasks, symmetric about 1 and 3: the middle half of both together lies around 2."""
    covered = 0
    for draw in range(150):
        scores = np.random.default_rng(draw).normal([1, 3], 0.5, size=(20, 2))
        found = stratified_interval(scores, draw)
        covered += found.low <= 2 <= found.high
    assert 0.9 <= covered / 150 <= 0.99


@pytest.mark.parametrize("scores", [np.zeros((0, 1)), np.array([[1.0, math.nan]])])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(ValueError, match="finite"):
        stratified_interval(scores, 0)
    with pytest.raises(ValueError, match="finite"):
        summarise_seeds({str(i): value for i, value in enumerate(scores.ravel())}, 0)


def test_few_seeds_are_shown_and_not_summed_up():
    one = summarise_seeds({"dpo-seed=1": 0.5}, 0)
    assert one == {
        "points": {"dpo-seed=1": 0.5},
        "n": 1,
        "mean": 0.5,
        "std": None,
        "iqm": None,
        "low": None,
        "high": None,
        "warning": "one seed: nothing is known about the spread between seeds",
    }
    four = summarise_seeds({"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0}, 0)
    assert (four["n"], four["mean"], four["std"]) == (4, 3, pytest.approx(math.sqrt(14 / 3)))
    assert (four["iqm"], four["low"], four["high"]) == (None, None, None)
    assert four["warning"] == "4 seeds cannot carry an interval: the points are shown instead"


def test_enough_seeds_have_an_interval():
    points = dict(zip("abcde", [100.0, 1.0, 2.0, 3.0, -50.0], strict=True))
    found = summarise_seeds(points, 0)
    assert len(points) == ENOUGH
    assert (found["points"], found["iqm"], found["warning"]) == (points, 2, None)
    assert found["low"] < 2 < found["high"]
    assert json.loads(json.dumps(found)) == found


# --- two methods as trained ------------------------------------------------------------------------------------------


def test_one_seed_of_each_is_the_paired_bootstrap_over_prompts():
    (a,), (b,) = method(1, 80, 0), method(1, 80, 1, mean=0.3)
    found, paired = compare_as_trained([a], [b], 5), bootstrap_mean(a - b, 5)
    assert found["difference"] == pytest.approx(paired.as_dict())
    assert found["a"] == pytest.approx(bootstrap_mean(a, 5).as_dict())
    assert found["seeds"] == [1, 1]
    assert found["warning"].startswith("one seed: nothing is known about the spread between seeds")
    assert json.loads(json.dumps(found)) == found


def test_difference_of_runs_without_doubt_over_prompts_is_that_of_seeds():
    """Gains are the same on every prompt: the interval is that of the mean of 5 seeds, sd sqrt(2) / sqrt(5) each."""
    a, b = ([np.full(30, float(level)) for level in levels] for levels in ([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]))
    found = compare_as_trained(a, b, 0)
    assert (found["a"]["mean"], found["b"]["mean"], found["difference"]["mean"]) == pytest.approx((3, 0, 3))
    assert found["b"] == {"mean": 0, "low": 0, "high": 0, "n": 30}
    for end, sign in (("low", -1), ("high", 1)):
        assert found["difference"][end] == pytest.approx(3 + sign * 1.96 * math.sqrt(2 / 5), abs=0.05)
    # No resample is below 0: the normal tail at 3 / sqrt(2 / 5) standard errors.
    assert found["p"] == pytest.approx(math.erfc(3 / math.sqrt(2 / 5) / math.sqrt(2)), rel=0.5)
    assert found["p"] < 2 / (RESAMPLES + 1)
    assert (found["seeds"], found["identical"]) == ([5, 5], False)


def test_the_same_runs_are_identical():
    a = method(4, 50, 2, spread=1.0)
    for b in (a, a[::-1], [run.copy() for run in a]):
        found = compare_as_trained(a, b, 3)
        assert found["difference"] == {"mean": 0, "low": 0, "high": 0, "n": 50}
        assert (found["p"], found["identical"]) == (1, True)
    assert not compare_as_trained(a, a[:3], 3)["identical"]
    assert not compare_as_trained(a, [*a[:3], a[3] + 1e-9], 3)["identical"]
    flat = compare_as_trained([np.zeros(9)], [np.zeros(9)] * 3, 3)
    assert (flat["identical"], flat["p"]) == (True, 1), "runs that gained nothing, whatever their number"


@pytest.mark.parametrize("kl", [False, True])
def test_order_and_side_do_not_matter(kl):
    if kl:
        call, a = compare_at_equal_kl, [rising(1, 4, seed=seed) for seed in range(5)]
        b = [rising(1.1, 6, seed=seed) for seed in range(5, 11)]
    else:
        call, a, b = compare_as_trained, method(5, 60, 0), method(6, 60, 1, mean=0.1)
    found = call(a, b, 0)
    order = np.random.default_rng(2).permutation(60)
    moved = ([tuple(part[:, order] for part in run) if kl else run[order] for run in runs] for runs in (a, b))
    turned = call(b, a, 0)
    for other in (call(*moved, 0), call(a[::-1], b[::-1], 0), call(a, b, 1)):
        for name in ("a", "b", "difference"):
            assert other[name] == pytest.approx(found[name], abs=0.03)
        assert other["p"] == pytest.approx(found["p"], abs=0.05)
    assert turned["difference"]["mean"] == pytest.approx(-found["difference"]["mean"], abs=1e-12)
    assert turned["difference"]["low"] == pytest.approx(-found["difference"]["high"], abs=0.03)
    assert turned["p"] == pytest.approx(found["p"], abs=0.05)
    assert turned["a"] == pytest.approx(found["b"], abs=0.03)


# Bounds around the shares in the docstring of `compare_as_trained`, about 3 standard errors of 300 rounds wide.
@pytest.mark.parametrize(
    ("seeds", "spread", "covered", "found"),
    [
        (1, 10, (0.05, 0.25), (0.75, 0.95)),
        (3, 10, (0.75, 0.88), (0.12, 0.25)),
        (5, 10, (0.82, 0.94), (0.06, 0.18)),
        (10, 10, (0.89, 0.98), (0.02, 0.11)),
        (3, 1, (0.95, 1.0), (0.0, 0.05)),
        (5, 1, (0.96, 1.0), (0.0, 0.04)),
    ],
)
def test_what_an_interval_is_worth(seeds, spread, covered, found):
    """Two equal methods; the spread between seeds is in standard errors of one run's mean over 36 prompts."""
    rounds, inside, false = 300, 0, 0
    for draw in range(rounds):
        a, b = (method(seeds, 36, (draw, side), spread / 6) for side in range(2))
        result = compare_as_trained(a, b, draw)
        inside += result["difference"]["low"] <= 0 <= result["difference"]["high"]
        false += result["p"] < 0.05
    assert covered[0] <= inside / rounds <= covered[1]
    assert found[0] <= false / rounds <= found[1]


def test_few_seeds_get_a_warning():
    runs = method(10, 20, 0)
    assert compare_as_trained(runs, runs[:3], 0)["warning"].startswith("3 seeds say little")
    assert compare_as_trained(runs[:1], runs, 0)["warning"].startswith("one seed")
    assert compare_as_trained(runs[:9], runs, 0)["warning"].startswith("9 seeds")
    assert compare_as_trained(runs, runs, 0)["warning"] is None


def test_what_is_no_comparison_is_refused():
    run = np.zeros(5)
    for a, b in (([run], []), ([], [run]), ([run], [np.zeros(4)]), ([np.zeros(0)], [np.zeros(0)])):
        with pytest.raises(ValueError, match="same prompts"):
            compare_as_trained(a, b, 0)
        with pytest.raises(ValueError, match="same prompts"):
            compare_at_equal_kl([(one[None], one[None]) for one in a], [(one[None], one[None]) for one in b], 0)
    with pytest.raises(ValueError, match="shapes"):
        compare_at_equal_kl([(np.ones((2, 5)), np.ones((3, 5)))], [(np.ones((2, 5)), np.ones((2, 5)))], 0)
    with pytest.raises(ValueError, match="not finite"):
        compare_as_trained([run], [run * math.nan], 0)
    with pytest.raises(ValueError, match="not finite"):
        compare_at_equal_kl([(run[None] + 1, run[None])], [(run[None] + math.inf, run[None])], 0)


# --- two methods at equal KL -----------------------------------------------------------------------------------------


def test_one_seed_of_each_at_equal_kl_is_that_of_the_frontier():
    a, b = rising(1.0, 9, seed=1), rising(2.0, 4, checkpoints=5, seed=2)
    found = compare_at_equal_kl([a], [b], 7)
    assert found["kl"] == pytest.approx(4)
    assert found["a"] == pytest.approx(gain_at_kl(*a, found["kl"], 7).as_dict())
    assert found["b"] == pytest.approx(gain_at_kl(*b, found["kl"], 7).as_dict())
    assert found["difference"]["mean"] == pytest.approx(-2)


def test_the_budget_is_what_every_run_spent():
    a, b = [rising(1, kl) for kl in (9, 6.25, 16)], [rising(1, kl) for kl in (7, 25)]
    found = compare_at_equal_kl(a, b, 0)
    assert found["kl"] == pytest.approx(6.25)
    assert (found["a"]["mean"], found["b"]["mean"]) == pytest.approx((2.5, 2.5), abs=0.01)
    # The largest KL of a run need not be the last.
    kls, gains = rising(1, 5)
    assert compare_at_equal_kl([(kls[::-1], gains[::-1])], b, 0)["kl"] == pytest.approx(5)


def test_a_method_that_only_went_further_is_no_better_at_equal_kl():
    a, b = ([rising(1, kl, seed=first + seed) for seed in range(5)] for kl, first in ((4, 0), (16, 5)))
    matched = compare_at_equal_kl(a, b, 0)
    trained = compare_as_trained([gains[-1] for _, gains in a], [gains[-1] for _, gains in b], 0)
    assert matched["difference"]["mean"] == pytest.approx(0, abs=0.01)
    assert matched["difference"]["low"] < 0 < matched["difference"]["high"]
    assert matched["p"] > 0.5
    assert trained["difference"]["mean"] == pytest.approx(-2)
    assert trained["difference"]["high"] < -1.5
    assert trained["p"] < 0.01


def test_a_better_curve_is_better_at_equal_kl():
    """The other way round: 1.5 sqrt(KL) up to 4 against sqrt(KL) up to 9 end with the same gain."""
    a, b = (
        [rising(slope, kl, seed=first + seed) for seed in range(5)] for slope, kl, first in ((1.5, 4, 0), (1, 9, 5))
    )
    matched = compare_at_equal_kl(a, b, 0)
    trained = compare_as_trained([gains[-1] for _, gains in a], [gains[-1] for _, gains in b], 0)
    assert matched["difference"]["mean"] == pytest.approx(1, abs=0.01)
    assert matched["p"] < 0.01
    assert trained["difference"]["mean"] == pytest.approx(0)
    assert trained["p"] > 0.5


def test_the_same_runs_are_identical_at_equal_kl():
    runs = [rising(1, kl, seed=seed, checkpoints=3 + seed) for seed, kl in enumerate((4, 5, 6))]
    found = compare_at_equal_kl(runs, runs[::-1], 0)
    assert (found["difference"]["low"], found["difference"]["high"]) == (0, 0)
    assert (found["p"], found["identical"]) == (1, True)


def test_a_policy_that_never_moved_cannot_be_compared():
    still = np.zeros((2, 60))
    found = compare_at_equal_kl([rising(1, 4), (still, still)], [rising(1, 4)], 0)
    assert found == {
        "kl": 0,
        "a": None,
        "b": None,
        "difference": None,
        "p": None,
        "identical": None,
        "seeds": [2, 1],
        "warning": "one seed: nothing is known about the spread between seeds; the interval is about these runs alone",
        "why_not": "a policy has not moved from the reference",
    }
