"""Accuracy of scores on labelled pairs, from arrays alone.

Pairs of one prompt are not independent: intervals take the prompt as the unit. A tie counts half. In arrays of two
columns, the first is the chosen answer, the second the rejected one; `prompts` names what each pair belongs to, (N,).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from rlhf_trl.stats.intervals import Estimate, estimate_ratio, wilson
from rlhf_trl.stats.trust import length_rule


def correct(margin: np.ndarray) -> np.ndarray:
    """Tell where the first answer has the higher score: 1, for a tie 0.5, else 0. (N,) -> (N,)."""
    return (np.sign(margin) + 1) / 2


def gap(both: np.ndarray) -> np.ndarray:
    """Subtract the rejected answer's value from the chosen one's. (N, 2) -> (N,)."""
    return both[:, 0] - both[:, 1]


def share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate a share with Wilson's interval, widened where pairs of one prompt agree more than by chance.

    The effective sample size is that of the design effect (Kish 1965; Korn and Graubard 1998).

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=float)
    sums, counts = _by_prompt(values, prompts)
    n, units = len(values), len(counts)
    if n == 0:
        raise ValueError("a share needs at least one value")
    mean, effective = float(values.mean()), float(units)
    if 1 < units < n and 0 < mean < 1:
        variance = float(((sums - mean * counts) ** 2).sum()) / n**2 * units / (units - 1)
        effective = mean * (1 - mean) / max(variance, mean * (1 - mean) / n)
    found = wilson(mean * effective, effective)
    return Estimate(mean, min(found.low, mean), max(found.high, mean), n)


def average(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate a mean over pairs as a ratio of sums over prompts; for a paired comparison, give the differences.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("a mean needs at least one value")
    interval = estimate_ratio(*map(np.ndarray.tolist, _by_prompt(values, prompts)))
    return Estimate(float(values.mean()), interval.low, interval.high, len(values))


def _by_prompt(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values of each prompt, and their number."""
    names, codes = np.unique(prompts, return_inverse=True)
    return np.bincount(codes, values, len(names)), np.bincount(codes, minlength=len(names))


def measure_accuracy(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Measure how often the chosen answer has the higher score, beside how often it is the longer one.

    Args:
        scores, lengths: shape (N, 2).

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


def compare_with_rule(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Compare scores with the best rule that knows nothing but length (`trust.length_rule`)."""
    return length_rule(correct(gap(scores)), correct(gap(lengths)), partial(share, prompts=prompts),
                       partial(average, prompts=prompts))  # fmt: skip
