"""Accuracy, ranking and length bias of scores on labelled pairs, from arrays alone.

Pairs of one prompt are not independent: intervals take the prompt as the unit. A tie counts half. Reads and writes
nothing. Throughout, column 0 is the chosen answer, column 1 the rejected one, and `prompts` names what each pair
belongs to, shape (N,).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from rlhf_trl.stats.intervals import Estimate, estimate_ratio

# Lengths that differ by less than this share of the longer one count as nearly equal.
NEAR = 0.1


def correct(margin: np.ndarray) -> np.ndarray:
    """Tell where the first answer has the higher score: 1, for a tie 0.5, else 0. (N,) -> (N,)."""
    return (np.sign(margin) + 1) / 2


def gap(both: np.ndarray) -> np.ndarray:
    """Subtract the rejected answer's value from the chosen one's. (N, 2) -> (N,)."""
    return both[:, 0] - both[:, 1]


def relative_gap(lengths: np.ndarray) -> np.ndarray:
    """Give the difference of the lengths as a share of the longer one, -1 to 1. (N, 2) -> (N,)."""
    return gap(lengths) / np.maximum(lengths.max(axis=1), 1)


# --- estimates with the prompt as the unit ---------------------------------------------------------------------------


def share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate a share with Wilson's interval, widened where pairs of one prompt agree more than by chance.

    The pairs count as the number of independent ones that would vary as much as the prompts do (the design effect of
    Kish 1965, put into the interval as by Korn and Graubard 1998). Where no prompt repeats, it is plain Wilson.

    Args:
        values: 0 to 1, shape (N,).
        prompts: shape (N,).

    Raises:
        ValueError: there are no values.
    """
    from statsmodels.stats.proportion import proportion_confint

    values = np.asarray(values, dtype=float)
    sums, counts = _by_prompt(values, prompts)
    n, units = len(values), len(counts)
    if n == 0:
        raise ValueError("a share needs at least one value")
    mean, effective = float(values.mean()), float(units)
    if 1 < units < n and 0 < mean < 1:
        variance = float(((sums - mean * counts) ** 2).sum()) / n**2 * units / (units - 1)
        effective = mean * (1 - mean) / max(variance, mean * (1 - mean) / n)
    low, high = proportion_confint(mean * effective, effective, alpha=0.05, method="wilson")
    return Estimate(mean, min(float(low), mean), max(float(high), mean), n)


def average(values: np.ndarray, prompts: np.ndarray, seed: int) -> Estimate:
    """Estimate a mean with a percentile bootstrap over prompts; for a paired comparison, give the differences.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("a mean needs at least one value")
    sums, counts = _by_prompt(values, prompts)
    found = estimate_ratio(sums.tolist(), counts.tolist())
    return Estimate(float(values.mean()), found.low, found.high, len(values))


def _by_prompt(values: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values of each prompt, and their number."""
    names, codes = np.unique(prompts, return_inverse=True)
    return np.bincount(codes, values, len(names)), np.bincount(codes, minlength=len(names))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Subtract two independent shares, with the interval of Newcombe (1998, method 10)."""
    mean = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Estimate(mean, mean - below, mean + above, first.n + second.n)


def correlation(x: np.ndarray, y: np.ndarray, units: int) -> dict[str, Any]:
    """Correlate by value (Pearson, interval of Fisher's z) and by rank (Spearman, that of Bonett and Wright 2000).

    Args:
        x, y: shape (N,).
        units: number of independent ones among the N.

    Returns:
        `pearson` and `spearman`; both None, with the reason, where they are not defined.
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


# --- measures --------------------------------------------------------------------------------------------------------


def accuracy(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure how often the chosen answer has the higher score, beside how often it is the longer one.

    Args:
        scores: shape (N, 2).
        lengths: shape (N, 2).
        prompts: shape (N,).
        seed: of the bootstrap.

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
        "over_baseline": average(right - longer, prompts, seed).as_dict(),
        "mean_margin": average(margin, prompts, seed).as_dict(),
    }


def auc(scores: np.ndarray, prompts: np.ndarray, seed: int) -> Estimate:
    """Estimate the chance that a chosen answer has a higher score than a rejected one of any pair, ties half.

    A pair's part in it is the sum of the placements of its two answers (DeLong, DeLong and Clarke-Pearson 1988;
    Obuchowski 1997 for clusters); these are what is resampled, by prompt.
    """
    n, (chosen, rejected) = len(scores), scores.T
    ranks = stats.rankdata(np.concatenate([chosen, rejected]))
    above = (ranks[:n] - stats.rankdata(chosen)) / n
    below = 1 - (ranks[n:] - stats.rankdata(rejected)) / n
    area = float(above.mean())
    found = average(above + below - area, prompts, seed)
    return Estimate(area, max(found.low, 0.0), min(found.high, 1.0), n)


def length_bias(scores: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure what the lengths of the answers have to do with their scores.

    Args:
        scores: shape (N, 2).
        lengths: in one unit, shape (N, 2).
        prompts: shape (N,).
        seed: of the bootstrap.

    Returns:
        `score_and_length` (over all answers) and `margin_and_difference` (within the pairs): correlations; `accuracy`
        where the chosen answer is longer, shorter, or neither, with the difference of the first two
        (`longer_minus_shorter`); `near_equal`: accuracy where the lengths differ by less than 10 %;
        `prefers_longer`: how often the longer answer is preferred by the model and by the humans, with the paired
        difference; `logistic`. What cannot be computed is None.
    """
    units, margin, apart = len(np.unique(prompts)), gap(scores), gap(lengths)
    right, differs = correct(margin), apart != 0
    parts = {"chosen_longer": apart > 0, "chosen_shorter": apart < 0, "equal": apart == 0}
    near = np.abs(relative_gap(lengths)) < NEAR
    result: dict[str, Any] = {
        "score_and_length": correlation(scores.ravel(), lengths.ravel(), units),
        "margin_and_difference": correlation(margin, apart, units),
        "accuracy": {name: accuracy(scores[part], lengths[part], prompts[part], seed) for name, part in parts.items()},
        "longer_minus_shorter": None,
        "near_equal": accuracy(scores[near], lengths[near], prompts[near], seed),
        "prefers_longer": None,
        "logistic": logistic(right, apart, prompts),
    }
    if (apart > 0).any() and (apart < 0).any():
        longer, shorter = (share(right[part], prompts[part]) for part in (apart > 0, apart < 0))
        result["longer_minus_shorter"] = difference(longer, shorter).as_dict()
    if differs.any():
        humans = correct(apart[differs])
        model = np.where(humans == 1, right[differs], 1 - right[differs])
        result["prefers_longer"] = {
            "model": share(model, prompts[differs]).as_dict(),
            "humans": share(humans, prompts[differs]).as_dict(),
            "difference": average(model - humans, prompts[differs], seed).as_dict(),
        }
    return result


def logistic(right: np.ndarray, apart: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Fit P(correct) = sigma(a + b x), where x is the length difference in its standard deviations.

    Maximum likelihood, with standard errors that allow for prompts that several pairs share.

    Returns:
        `at_equal_length` = sigma(a), `odds_ratio` = exp(b) for one standard deviation, and that deviation, `std`. The
        first two are None, with the reason, where no finite slope fits best.
    """
    import statsmodels.api as sm

    missing: dict[str, Any] = {"at_equal_length": None, "odds_ratio": None}
    units, codes = np.unique(prompts, return_inverse=True)
    if len(units) < 4 or np.ptp(apart) == 0 or np.ptp(right) == 0:
        return missing | {"why_not": "fewer than 4 prompts, or the length difference or the outcome never changes"}
    some_right, some_wrong = apart[right > 0], apart[right < 1]
    if some_right.min() >= some_wrong.max() or some_right.max() <= some_wrong.min():
        return missing | {"why_not": "the length difference alone tells right from wrong: no finite slope fits best"}
    spread = float(apart.std())
    exog = np.column_stack([np.ones(len(apart)), apart / spread])
    with np.errstate(all="ignore"):  # a slope that runs away is looked for below
        fit = sm.GLM(right, exog, sm.families.Binomial()).fit(cov_type="cluster", cov_kwds={"groups": codes})
    (low, slope_low), (high, slope_high) = fit.conf_int().T
    if not (np.abs(fit.conf_int()) < 50).all():  # also where a limit is not a number
        return missing | {"why_not": "too few pairs break the rule for a stable slope"}
    equal, equal_low, equal_high = (float(expit(x)) for x in (fit.params[0], low, high))
    ratio, ratio_low, ratio_high = (float(np.exp(x)) for x in (fit.params[1], slope_low, slope_high))
    return {
        "at_equal_length": Estimate(equal, equal_low, equal_high, len(right)).as_dict(),
        "odds_ratio": Estimate(ratio, ratio_low, ratio_high, len(right)).as_dict(),
        "std": spread,
    }
