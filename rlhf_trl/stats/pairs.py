"""Accuracy of scores on labelled pairs, and whether a scorer has shown that it can tell the better answer.

Pairs of one prompt are not independent: intervals take the prompt as the unit. A tie counts half. In arrays of two
columns, the first is the chosen answer, the second the rejected one; `prompts` names what each pair belongs to, (N,).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_trl.stats.intervals import FEWEST, Estimate, estimate_ratio, wilson


def correct(margin: np.ndarray) -> np.ndarray:
    """Tell where the first answer has the higher score: 1, for a tie 0.5, else 0. (N,) -> (N,)."""
    return (np.sign(margin) + 1) / 2


def gap(both: np.ndarray) -> np.ndarray:
    """Subtract the rejected answer's value from the chosen one's. (N, 2) -> (N,)."""
    return both[:, 0] - both[:, 1]


def share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate a share with Wilson's interval, widened by the design effect (Kish 1965; Korn and Graubard 1998) where
    pairs of one prompt agree more than by chance."""
    values, sums, counts = _by_prompt(values, prompts)
    n, units = len(values), len(counts)
    mean, effective = float(values.mean()), float(units)
    if 1 < units < n and 0 < mean < 1:
        variance = float(((sums - mean * counts) ** 2).sum()) / n**2 * units / (units - 1)
        effective = mean * (1 - mean) / max(variance, mean * (1 - mean) / n)
    found = wilson(mean * effective, effective)
    return Estimate(mean, min(found.low, mean), max(found.high, mean), n)


def average(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate a mean over pairs as a ratio of sums over prompts, which are the `n`; for a paired comparison, give the
    differences."""
    values, sums, counts = _by_prompt(values, prompts)
    return replace(estimate_ratio(sums, counts), mean=float(values.mean()))


def _by_prompt(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values, their sum over each prompt, and their number there; ValueError without any."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("an estimate needs at least one value")
    names, codes = np.unique(prompts, return_inverse=True)
    return values, np.bincount(codes, values, len(names)), np.bincount(codes, minlength=len(names))


def measure_accuracy(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Measure how often the chosen answer has the higher score, beside how often it is the longer one, (N, 2) each.

    Returns:
        `n`, `ties`, and estimates: `accuracy` (a tie as half), `strict` (a tie as wrong), `length_baseline` (of taking
        the longer answer), `over_baseline` (paired), `mean_margin`. Of no pairs: `accuracy` None with the reason.
    """
    margin = gap(scores)
    if len(margin) == 0:
        return {"n": 0, "accuracy": None, "why_not": "there is no such pair"}
    right, longer = correct(margin), correct(gap(lengths))
    return {
        "n": len(margin),
        "ties": int(np.sum(margin == 0)),
        "accuracy": share(right, prompts).as_dict(),
        "strict": share(margin > 0, prompts).as_dict(),
        "length_baseline": share(longer, prompts).as_dict(),
        "over_baseline": average(right - longer, prompts).as_dict(),
        "mean_margin": average(margin, prompts).as_dict(),
    }


def length_rule(right: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Compare a scorer with the best rule that knows nothing but length, on the same N pairs; `right`, (N,): whether
    the scorer prefers the chosen answer, a tie as half.

    Returns:
        `takes`: the longer or the shorter answer, whichever is right more often on these pairs; its `accuracy`; and
        `over_rule`, by how much the scorer beats it.
    """
    longer = correct(gap(lengths))
    takes = "longer" if longer.mean() >= 0.5 else "shorter"
    followed = longer if takes == "longer" else 1 - longer
    over = average(right - followed, prompts).as_dict()
    return {"takes": takes, "accuracy": share(followed, prompts).as_dict(), "over_rule": over}


def trust_in(scorer: Mapping[str, Any]) -> str:
    """Say whether a scorer of labelled pairs, with its `accuracy` and `length_rule`, can tell the better answer.

    Returns `informed`; `chance` or `length`, which it is not clear of; `unknown` from fewer than `FEWEST` pairs.
    """
    if scorer["accuracy"]["mean"] is None or scorer["accuracy"]["n"] < FEWEST:
        return "unknown"
    if scorer["accuracy"]["low"] <= 0.5:
        return "chance"
    return "informed" if scorer["length_rule"]["over_rule"]["low"] > 0 else "length"


def weigh_trust(result: Mapping[str, Any]) -> str:
    """Say whether the judge of a `winrate.json` can tell the better answer (`trust_in`); `none`: no human labels."""
    calibration = result["calibration"]
    if calibration is None:
        return "none"
    if result["judge"]["kind"] != "reward":
        return str(calibration["verdict"])
    return "none" if calibration["reward_model"] is None else trust_in(calibration["reward_model"])
