"""Whether a reward model or a judge has shown that it can tell the better answer.

Each word follows from 95 % intervals, never from a mean alone. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhf_trl.stats.intervals import Estimate, estimate_mean, estimate_rate

Average = Callable[[np.ndarray], Estimate]


def length_rule(
    right: np.ndarray, longer: np.ndarray, share: Average = estimate_rate, average: Average = estimate_mean
) -> dict[str, Any]:
    """Compare a scorer with the best rule that knows nothing but length, on the same N pairs.

    Args:
        right: whether the scorer prefers the chosen answer of each pair, a tie as half, (N,).
        longer: whether the chosen answer is the longer one, (N,).
        share, average: estimates of a share and of a paired difference, where the pairs are not independent.

    Returns:
        `takes`: the longer or the shorter answer, whichever is right more often on these pairs; its `accuracy`; and
        `over_rule`, by how much the scorer beats it.
    """
    takes = "longer" if longer.mean() >= 0.5 else "shorter"
    followed = longer if takes == "longer" else 1 - longer
    return {"takes": takes, "accuracy": share(followed).as_dict(), "over_rule": average(right - followed).as_dict()}


def compare_with_length(rule: Mapping[str, Any]) -> str:
    """Say whether a scorer is `above` or `below` its `length_rule`, or `unclear`: by their paired difference."""
    over = rule["over_rule"]
    return "above" if over["low"] > 0 else "below" if over["high"] < 0 else "unclear"


def trust_in(scorer: Mapping[str, Any]) -> str:
    """Say whether a scorer of labelled pairs, with its `accuracy` and `length_rule`, can tell the better answer.

    Returns `informed`; `chance` or `length`, which it is not clear of; `unknown` without a verdict on any pair.
    """
    if scorer["accuracy"]["mean"] is None:
        return "unknown"
    if scorer["accuracy"]["low"] <= 0.5:
        return "chance"
    return "informed" if compare_with_length(scorer["length_rule"]) == "above" else "length"


def weigh_trust(result: Mapping[str, Any]) -> str:
    """Say whether the judge of a `winrate.json` can tell the better answer (`trust_in`); `none`: no human labels."""
    calibration = result["calibration"]
    if calibration is None:
        return "none"
    if result["judge"]["kind"] != "reward":
        return str(calibration["verdict"])
    return "none" if calibration["reward_model"] is None else trust_in(calibration["reward_model"])
