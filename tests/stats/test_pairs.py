"""Accuracy on labelled pairs with the prompt as the unit: published intervals, properties and ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_trl.stats.pairs import average, length_rule, measure_accuracy, share, weigh_trust

# Multiples of 1/8: adding a whole number to them is exact.
SCORE = st.integers(-40, 40).map(lambda number: number / 8)
PAIRS = st.lists(st.tuples(SCORE, SCORE, st.integers(1, 60), st.integers(1, 60), st.integers(0, 5)), min_size=1)


def arrays(pairs):
    """Scores, lengths and prompts of drawn pairs."""
    table = np.array(pairs, dtype=float)
    return table[:, :2], table[:, 2:4].astype(int), table[:, 4].astype(int)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_the_published_intervals(successes, n, low, high):
    """Newcombe (1998, Statistics in Medicine 17:857), table I, method 3."""
    found = share(np.arange(n) < successes, np.arange(n))
    assert (found.mean, found.n) == (successes / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_copies_of_a_pair_add_no_certainty():
    """Each prompt four times with the same outcome is worth as much as once."""
    prompts, scores = np.arange(300), np.random.default_rng(0).normal(size=300)
    for measure, values, apart, n in ((share, prompts < 180, 2e-4, 1200), (average, scores, 1e-12, 300)):
        once, often = measure(values, prompts), measure(np.repeat(values, 4), np.repeat(prompts, 4))
        assert (often.mean, often.n) == (pytest.approx(once.mean), n)
        assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=apart)


def test_one_prompt_is_one_unit():
    found = share(np.array([1.0] * 8), np.zeros(8))
    assert (found.low, found.high) == pytest.approx((1 / (1 + 1.96**2), 1), abs=1e-4)


@settings(deadline=None)  # the first call imports scipy
@given(PAIRS)
def test_estimates_lie_within_their_intervals_and_swapping_the_sides_turns_accuracy_around(pairs):
    scores, lengths, prompts = arrays(pairs)
    for estimate in (share(scores[:, 0] > 0, prompts), average(scores[:, 0], prompts)):
        assert estimate.low - 1e-12 <= estimate.mean <= estimate.high + 1e-12
    found, swapped = (
        measure_accuracy(s, n, prompts) for s, n in ((scores, lengths), (scores[:, ::-1], lengths[:, ::-1]))
    )
    for key in ("accuracy", "length_baseline"):
        assert swapped[key]["mean"] == pytest.approx(1 - found[key]["mean"])
        assert swapped[key]["low"] == pytest.approx(1 - found[key]["high"])
    assert swapped["mean_margin"]["mean"] == -found["mean_margin"]["mean"]
    assert swapped["ties"] == found["ties"]
    assert swapped["strict"]["mean"] + found["strict"]["mean"] == pytest.approx(1 - found["ties"] / len(pairs))
    assert measure_accuracy(scores + 16, lengths, prompts) == found


def test_nothing_has_no_share_and_no_mean():
    for measure in (share, average):
        with pytest.raises(ValueError, match="at least one"):
            measure(np.array([]), np.array([]))


def test_ties_count_half():
    scores = np.array([[2.0, 1.0], [0.5, 0.5], [1.0, 2.0], [3.0, 0.0]])
    lengths = np.array([[5, 5], [9, 1], [1, 9], [1, 9]])
    found = measure_accuracy(scores, lengths, np.arange(4))
    means = {
        key: found[key]["mean"] for key in ("accuracy", "strict", "length_baseline", "over_baseline", "mean_margin")
    }
    assert list(means.values()) == [0.625, 0.5, 0.375, 0.25, 0.75]
    assert found["ties"] == 1
    rule = length_rule(np.array([1, 0.5, 0, 1]), lengths, np.arange(4))
    assert (rule["takes"], rule["accuracy"]["mean"], rule["over_rule"]["mean"]) == ("shorter", 0.625, 0)


def test_the_length_rule_takes_the_better_side_and_is_compared_on_the_same_pairs():
    """Right on all pairs, of which the rule gets seven in ten; the difference is paired."""
    right, longer, prompts = np.ones(50), np.repeat([0.0, 1.0], [35, 15]), np.arange(50)
    lengths = np.column_stack([longer, 1 - longer])
    found = length_rule(right, lengths, prompts)
    assert (found["takes"], found["accuracy"]["mean"]) == ("shorter", 0.7)
    assert found["over_rule"]["mean"] == pytest.approx(0.3)
    assert length_rule(right, lengths[:, ::-1], prompts)["takes"] == "longer"


@pytest.mark.parametrize(
    ("low", "over", "n", "trust"),
    [
        (0.66, (0.02, 0.1), 20, "informed"),
        (0.55, (-0.02, 0.1), 90, "length"),
        (0.5, (0.3, 0.5), 90, "chance"),
        (0.51, (0.5, 0.5), 4, "unknown"),  # four of four
    ],
)
def test_a_reward_model_that_judges_is_held_to_chance_and_length(low, over, n, trust):
    rule = {"over_rule": {"low": over[0], "high": over[1]}}
    model = {"accuracy": {"mean": 0.7, "low": low, "high": 0.8, "n": n}, "length_rule": rule}
    result = {"judge": {"kind": "reward"}, "calibration": {"reward_model": model, "verdict": None}}
    assert weigh_trust(result) == trust
    assert weigh_trust({**result, "calibration": {"reward_model": None, "verdict": None}}) == "none"
