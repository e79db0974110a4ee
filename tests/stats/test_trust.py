"""When a scorer counts as able to tell the better answer."""

import pytest

from rlhf_trl.stats.trust import weigh_trust


@pytest.mark.parametrize(
    ("low", "over", "trust"),
    [(0.66, (0.02, 0.1), "informed"), (0.55, (-0.02, 0.1), "length"), (0.5, (0.3, 0.5), "chance")],
)
def test_a_reward_model_that_judges_is_held_to_chance_and_length(
    low: float, over: tuple[float, float], trust: str
) -> None:
    rule = {"over_rule": {"low": over[0], "high": over[1]}}
    model = {"accuracy": {"mean": 0.7, "low": low, "high": 0.8}, "length_rule": rule}
    result = {"judge": {"kind": "reward"}, "calibration": {"reward_model": model, "verdict": None}}
    assert weigh_trust(result) == trust
    assert weigh_trust({**result, "calibration": {"reward_model": None, "verdict": None}}) == "none"
