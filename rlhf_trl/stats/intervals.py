"""Numbers with 95 % intervals and p-values: means, shares, ratios, and differences of methods over seeds and prompts.

The prompt is the unit; comparisons on the same prompts are paired. `make simulate` measures what the intervals cover.
Every function raises ValueError where there are no values, or one is not finite. Works on arrays, without torch.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.05
# Fewest units from which an interval decides anything: `make simulate` checks the intervals from here up.
FEWEST = 20
# Numbers that differ by less than this share of the largest are the same but for rounding.
ROUNDING = 1e-12
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over `n` units."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def wilson(successes: float, n: float) -> Estimate:
    """Estimate a share with the score interval of Wilson (1927); a tie may count as half a success."""
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    low, high = proportion_confint(successes, n, alpha=LEVEL, method="wilson")
    return Estimate(successes / n, max(float(low), 0.0), min(float(high), 1.0), int(n))  # rounding may leave 0 to 1


def estimate_rate(values: Values) -> Estimate:
    """Estimate the mean of scores from 0 to 1, such as a win rate in which a tie is half.

    Wilson's interval with the effective sample size of Korn and Graubard (1998): the number of wins and losses whose
    mean would have the same variance; where ties make it more than n, with one more of each (Agresti and Caffo, 2000):
    the variance of a few tells little. Where all are the same, others are at most 1 - 0.025^(1/n) (Clopper and
    Pearson, 1934).
    """
    scores = _finite(values)
    n, mean = scores.size, float(scores.mean())
    if np.ptp(scores) == 0:
        others = 1 - 0.025 ** (1 / n)
        return Estimate(mean, mean - others * mean, mean + others * (1 - mean), n)
    effective = mean * (1 - mean) / (scores.var(ddof=1) / n)
    if effective > n:
        effective = max(mean * (1 - mean) / (np.append(scores, [0.0, 1.0]).var(ddof=1) / n), n)
    return dataclasses.replace(wilson(mean * effective, effective), mean=mean, n=n)


def estimate_mean(values: Values, level: float = LEVEL) -> Estimate:
    """Estimate a mean by Student's t, with and without the correction for skewness of Hall (1992, JRSS B 54:221): the
    interval reaches as far as the wider of the two. Values that are all the same are both its ends.
    """
    from scipy.special import stdtrit

    array = _finite(values)
    mean, error, skewness = _studentise(array)
    if error == 0:
        return Estimate(mean, mean, mean, array.size)
    quantile = float(stdtrit(array.size - 1, 1 - level / 2))
    low = mean - error * max(quantile, _uncorrect(quantile, skewness))
    high = mean - error * min(-quantile, _uncorrect(-quantile, skewness))
    return Estimate(mean, low, high, array.size)


def p_of_mean(values: Values) -> float:
    """Test that a mean is 0, two-sided: below 0.05 exactly where the interval of `estimate_mean` excludes 0.

    If all values are equal and not 0, p is that of a sign test.
    """
    from scipy.special import stdtr

    array = _finite(values)
    mean, error, skewness = _studentise(array)
    if error == 0:
        return 1.0 if mean == 0 else 2 * 0.5**array.size
    statistic = mean / error
    # The cube that Hall's correction is; `_uncorrect` is its inverse.
    corrected = statistic + skewness * (statistic**2 / 3 + 1 / 6) + skewness**2 * statistic**3 / 27
    smaller = min(abs(statistic), max(0.0, math.copysign(1, statistic) * corrected))
    return 2 * float(stdtr(array.size - 1, -smaller))


def _finite(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    return array


def _studentise(array: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard error, and skewness over the root of n; the last two 0 where the values are all the same."""
    mean = float(array.mean())
    if np.ptp(array) <= ROUNDING * float(np.abs(array).max()):
        return mean, 0.0, 0.0
    n, scale = array.size, float(np.abs(array - mean).max())
    apart = (array - mean) / scale  # so that no power of it leaves the range of floats
    spread = math.sqrt(float((apart**2).mean()))
    skewness = float((apart**3).mean()) / spread**3 * (math.sqrt(n * (n - 1)) / (n - 2) if n > 2 else 1.0)
    return mean, scale * spread / math.sqrt(n - 1), skewness / math.sqrt(n)


def _uncorrect(quantile: float, skewness: float) -> float:
    if abs(skewness) < 1e-6:
        return quantile
    return float(3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1))


def estimate_ratio(numerators: Values, denominators: Values) -> Estimate:
    """Estimate sum / sum, such as KL per token over all answers, by the units' linear influence on it."""
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.size == 0 or not np.isfinite(top).all() or not (bottom > 0).all():
        raise ValueError("a ratio needs at least one unit, finite numbers and positive denominators")
    ratio = float(top.sum() / bottom.sum())
    return dataclasses.replace(estimate_mean(ratio + (top - ratio * bottom) / bottom.mean()), mean=ratio)


def compare_runs(a: np.ndarray, b: np.ndarray) -> tuple[Estimate, float]:
    """Estimate the mean of method `a` less that of `b` from runs on the same P prompts, (seeds, P) each, and test it.

    With two seeds or more of each, seeds and prompts are crossed random effects (two-way analysis of variance; Owen,
    2007, Annals of Applied Statistics 1:386). The variance of the difference is s_a^2 / S_a + s_b^2 / S_b + main / P:
    s^2 is the variance of a method's run means, with the noise of single answers; `main` is the variance over prompts
    of the difference of the methods' means, without that noise, not below 0. The degrees of freedom are Welch's (1947)
    and Satterthwaite's (1946). With one seed of either, the prompts alone are the unit: it is about these very runs.

    Returns:
        The estimate, whose `n` are the prompts, and the two-sided p-value.
    """
    from scipy.special import stdtr, stdtrit

    a, b = np.atleast_2d(_finite(a)), np.atleast_2d(_finite(b))
    prompts = a.shape[1]
    if b.shape[1] != prompts:
        raise ValueError("a comparison needs runs on the same prompts")
    values = a.mean(axis=0) - b.mean(axis=0)
    if min(len(a), len(b), prompts) == 1:
        return estimate_mean(values), p_of_mean(values)
    parts: list[tuple[float, int]] = []
    main = float(values.var(ddof=1)) / prompts
    for runs in (a, b):
        seeds, means = len(runs), runs.mean(axis=1)
        parts.append((float(means.var(ddof=1)) / seeds, seeds - 1))
        noise = runs - means[:, None] - runs.mean(axis=0) + means.mean()
        main -= float((noise**2).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
    parts.append((max(main, 0.0), prompts - 1))
    mean, variance = float(values.mean()), sum(part for part, _ in parts)
    if variance <= (ROUNDING * float(np.abs(values).max())) ** 2:
        return Estimate(mean, mean, mean, prompts), 1.0 if mean == 0 else 2 * 0.5**prompts
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    error, reach = math.sqrt(variance), float(stdtrit(freedom, 1 - LEVEL / 2)) * math.sqrt(variance)
    return Estimate(mean, mean - reach, mean + reach, prompts), 2 * float(stdtr(freedom, -abs(mean) / error))


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Correct the p-values of several comparisons (Holm, 1979); None, where nothing was tested, stays None."""
    # By hand: statsmodels' multipletests collects garbage on every call, which takes longer than all else here.
    tested = np.array([p for p in pvalues if p is not None])
    order = tested.argsort()
    corrected = np.empty_like(tested)
    corrected[order] = np.minimum(np.maximum.accumulate(tested[order] * np.arange(tested.size, 0, -1)), 1.0)
    left = iter(corrected.tolist())
    return [None if p is None else next(left) for p in pvalues]
