"""Whether a reward model or a judge has shown that it can tell the better answer.

Each word follows from 95 % intervals, never from a mean alone. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def judge_reward_model(result: Mapping[str, Any]) -> str:
    """Compare the accuracy with what length alone can do: prefer the longer answer, or prefer the shorter one.

    Returns:
        `above` or `below` where the interval is clear of both rules' intervals, else `unclear`.
    """
    accuracy, longer = result["accuracy"], result["length_baseline"]
    if accuracy["low"] > max(longer["high"], 1 - longer["low"]):
        return "above"
    return "below" if accuracy["high"] < min(longer["low"], 1 - longer["high"]) else "unclear"


def weigh_trust(result: Mapping[str, Any]) -> str:
    """Say whether the judge of a `winrate.json` has shown that it can tell the better answer.

    Returns:
        `informed`; `chance` or `length`, which it is not clear of; `unknown` without a verdict on a labelled pair;
        `none` where it was not compared with human labels. A reward model is held to its accuracy on held-out pairs.
    """
    calibration = result["calibration"]
    if calibration is None:
        return "none"
    if result["judge"]["kind"] != "reward":
        return str(calibration["verdict"])
    model = calibration["reward_model"]
    if model is None:
        return "none"
    if model["accuracy"]["low"] <= 0.5:
        return "chance"
    return "informed" if judge_reward_model(model) == "above" else "length"
