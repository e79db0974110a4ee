"""Numbers with their uncertainty. The prompt is the unit; comparisons on the same prompts are paired.

Reads and writes nothing; works on arrays, without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# Resamples whose weights are in memory together: CHUNK * units * 8 bytes.
CHUNK = 200


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over `n` units."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def wilson(successes: float, n: int) -> Estimate:
    """Estimate a share with the score interval of Wilson (1927); a tie may count as half a success.

    Raises:
        ValueError: `n` is 0 or `successes` lies outside 0 to `n`.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    return Estimate(successes / n, float(low), float(high), n)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Estimate a mean with a percentile bootstrap over the units (Efron, 1979).

    For a paired comparison, give the differences.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    picks = np.random.default_rng(seed).integers(0, array.size, size=(RESAMPLES, array.size))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate sum / sum, such as KL per token over all answers, with a percentile bootstrap over the units.

    Raises:
        ValueError: there are no units, one is not finite, or the denominators are not all positive.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.size == 0 or not np.isfinite(top).all() or not (bottom > 0).all():
        raise ValueError("a ratio needs at least one unit, finite numbers and positive denominators")
    picks = np.random.default_rng(seed).integers(0, top.size, size=(RESAMPLES, top.size))
    low, high = np.quantile(top[picks].sum(axis=1) / bottom[picks].sum(axis=1), [0.025, 0.975])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), int(top.size))


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Correct p-values of several comparisons so that any false finding at all keeps its rate (Holm, 1979).

    None, where there was nothing to test, stays None and does not count as a comparison.
    """
    from statsmodels.stats.multitest import multipletests

    tested = [p for p in pvalues if p is not None]
    corrected = iter(multipletests(tested, method="holm")[1].tolist() if tested else [])
    return [None if p is None else next(corrected) for p in pvalues]


def resample(units: int, seed: int) -> Iterator[np.ndarray]:
    """Draw the units of `RESAMPLES` resamples, a few resamples at a time: each unit's weight in the mean, (CHUNK, N).

    The same draws for every statistic of the same number of units, which makes comparisons paired.
    """
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES // CHUNK):
        picks = generator.integers(0, units, size=(CHUNK, units)) + units * np.arange(CHUNK)[:, None]
        yield np.bincount(picks.ravel(), minlength=CHUNK * units).reshape(CHUNK, units) / units


def resampled_means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Take the means of K rows of N units under each weighting, (R, N), (K, N) -> (R, K).

    One product a row: in a product of two matrices, the last digit of a column depends on its place, and rows that are
    the same would differ.
    """
    return np.stack([weights @ row for row in values], axis=1)
