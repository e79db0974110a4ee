"""Ranking, length bias and logistic fits of scores on labelled pairs, from arrays alone.

Column 0 is the chosen answer, column 1 the rejected one; `prompts` names what each pair belongs to, shape (N,).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from rlhf_trl.stats.intervals import Estimate
from rlhf_trl.stats.pairs import average, correct, gap, measure_accuracy, share

# Lengths that differ by less than this share of the longer one count as nearly equal.
NEAR = 0.1


def relative_gap(lengths: np.ndarray) -> np.ndarray:
    """Give the difference of the lengths as a share of the longer one, -1 to 1. (N, 2) -> (N,)."""
    return gap(lengths) / np.maximum(lengths.max(axis=1), 1)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Subtract two independent shares, with the interval of Newcombe (1998, method 10)."""
    mean = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Estimate(mean, mean - below, mean + above, first.n + second.n)


def correlation(x: np.ndarray, y: np.ndarray, units: int) -> dict[str, Any]:
    """Correlate by value (Pearson, interval of Fisher's z) and by rank (Spearman, that of Bonett and Wright 2000).

    Returns:
        `pearson` and `spearman` of x and y, (N,), of which `units` are independent; both None, with the reason, where
        they are not defined.
    """
    if units < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        why = "fewer than 4 prompts" if units < 4 else "one of the two is the same everywhere"
        return {"pearson": None, "spearman": None, "why_not": why}
    result = {}
    for name, found in (("pearson", stats.pearsonr(x, y)), ("spearman", stats.spearmanr(x, y))):
        mean = float(np.clip(found.statistic, -1, 1))
        half = 1.96 * math.sqrt((1 + (mean**2 / 2 if name == "spearman" else 0)) / (units - 3))
        z = math.atanh(min(max(mean, -1 + 1e-12), 1 - 1e-12))
        result[name] = Estimate(mean, min(math.tanh(z - half), mean), max(math.tanh(z + half), mean), len(x)).as_dict()
    return result


def auc(scores: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate the chance that a chosen answer has a higher score than a rejected one of any pair, ties half.

    A pair's part in it is the sum of the placements of its two answers (DeLong, DeLong and Clarke-Pearson 1988;
    Obuchowski 1997 for clusters); these are what is resampled, by prompt.
    """
    n, (chosen, rejected) = len(scores), scores.T
    ranks = stats.rankdata(np.concatenate([chosen, rejected]))
    above = (ranks[:n] - stats.rankdata(chosen)) / n
    below = 1 - (ranks[n:] - stats.rankdata(rejected)) / n
    area = float(above.mean())
    interval = average(above + below - area, prompts)
    return Estimate(area, max(interval.low, 0.0), min(interval.high, 1.0), n)


def length_bias(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Measure what the lengths of the answers, (N, 2) in one unit, have to do with their scores, (N, 2).

    Returns:
        `score_and_length` (over all answers) and `margin_and_difference` (within the pairs): correlations; `accuracy`
        where the chosen answer is longer, shorter, or neither, with the difference of the first two
        (`longer_minus_shorter`); `near_equal`: accuracy where the lengths differ by less than 10 %;
        `prefers_longer`: how often the longer answer is preferred by the model and by the humans, with the paired
        difference; `logistic`. What cannot be computed is None.
    """
    units, margin, apart = len(np.unique(prompts)), gap(scores), gap(lengths)
    right, longer, shorter, differs = correct(margin), apart > 0, apart < 0, apart != 0

    def measure(part: np.ndarray) -> dict[str, Any]:
        return measure_accuracy(scores[part], lengths[part], prompts[part])

    split = prefers = None
    if longer.any() and shorter.any():
        sides = (share(right[part], prompts[part]) for part in (longer, shorter))
        split = difference(*sides).as_dict()
    if differs.any():
        humans, names = correct(apart[differs]), prompts[differs]
        model = np.where(humans == 1, right[differs], 1 - right[differs])
        prefers = {"model": share(model, names).as_dict(), "humans": share(humans, names).as_dict(),
                   "difference": average(model - humans, names).as_dict()}  # fmt: skip
    return {
        "score_and_length": correlation(scores.ravel(), lengths.ravel(), units),
        "margin_and_difference": correlation(margin, apart, units),
        "accuracy": {
            "chosen_longer": measure(longer), "chosen_shorter": measure(shorter), "equal": measure(~differs),
        },
        "longer_minus_shorter": split,
        "near_equal": measure(np.abs(relative_gap(lengths)) < NEAR),
        "prefers_longer": prefers,
        "logistic": logistic(right, apart, prompts),
    }  # fmt: skip


def logistic(right: np.ndarray, apart: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Fit P(correct) = sigma(a + b x), where x is the length difference in its standard deviations.

    Maximum likelihood, with standard errors that allow for prompts that several pairs share.

    Returns:
        `at_equal_length` = sigma(a), `odds_ratio` = exp(b) for one standard deviation, and that deviation, `std`. The
        first two are None, with the reason, where no finite slope fits best.
    """
    import statsmodels.api as sm

    def missing(why: str) -> dict[str, Any]:
        return {"at_equal_length": None, "odds_ratio": None, "why_not": why}

    units, codes = np.unique(prompts, return_inverse=True)
    if len(units) < 4 or np.ptp(apart) == 0 or np.ptp(right) == 0:
        return missing("fewer than 4 prompts, or the length difference or the outcome never changes")
    some_right, some_wrong = apart[right > 0], apart[right < 1]
    if some_right.min() >= some_wrong.max() or some_right.max() <= some_wrong.min():
        return missing("the length difference alone tells right from wrong: no finite slope fits best")
    spread = float(apart.std())
    exog = np.column_stack([np.ones(len(apart)), apart / spread])
    with np.errstate(all="ignore"):  # a slope that runs away is looked for below
        fit = sm.GLM(right, exog, sm.families.Binomial()).fit(cov_type="cluster", cov_kwds={"groups": codes})
    limits = np.column_stack([fit.params, fit.conf_int()])  # (2, 3): intercept and slope; mean, low, high
    if not (np.abs(limits) < 50).all():  # also where a limit is not a number
        return missing("too few pairs break the rule for a stable slope")

    def estimate(limits: np.ndarray) -> dict[str, float]:
        mean, low, high = limits.tolist()
        return Estimate(mean, low, high, len(right)).as_dict()

    return {
        "at_equal_length": estimate(expit(limits[0])), "odds_ratio": estimate(np.exp(limits[1])), "std": spread,
    }  # fmt: skip
