"""Several seeds of a method: published figures and closed forms."""

import json
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from rlhf_trl.compare.seeds import ENOUGH, interquartile_mean, probability_of_improvement, summarise_seeds

# The example of rliable's own tests (metrics_test.py): runs in rows, tasks in columns.
X = np.array([[1, 2], [2, 2], [1, 1], [2, 1]])
Y = np.array([[1, 1], [2, 2], [3, 3]])


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


def test_a_few_seeds_have_a_spread_and_one_has_none():
    one = summarise_seeds({"dpo-seed=1": 0.5})
    assert one == {"points": {"dpo-seed=1": 0.5}, "n": 1, "mean": 0.5, "std": None, "iqm": None}
    four = summarise_seeds({"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0})
    assert (four["mean"], four["std"], four["iqm"]) == (3, pytest.approx(math.sqrt(14 / 3)), None)


def test_enough_seeds_have_an_interquartile_mean():
    points = dict(zip("abcde", [100.0, 1.0, 2.0, 3.0, -50.0], strict=True))
    found = summarise_seeds(points)
    assert len(points) == ENOUGH
    assert found["iqm"] == 2
    assert json.loads(json.dumps(found)) == found
