"""Gain against KL: the Pareto front and its hypervolume, gains at equal KL, best-of-n, over-optimisation curves.

KL is in nats per answer. Gain is a score minus the reference's score on the same prompt, so the reference is (0, 0).
Functions of points raise ValueError where shapes differ, there are no points, or a value is not finite.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from rlhf_trl.stats.intervals import RESAMPLES, Estimate, estimate_mean

Point = TypeVar("Point", bound=Hashable)
# KLs whose ratio is at most this are the same KL.
SAME_KL = 1.05
# A run has been measured near a KL where one of its points lies within this factor of it.
NEAR = 1.5
# Resamples whose weights are in memory together: CHUNK * prompts * 8 bytes.
CHUNK = 200


def non_dominated(gain: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Mark the points that no other point beats or equals in both gain (more is better) and KL (less is better), and
    the first of points that are the same, (K,), (K,) -> (K,)."""
    gain, kl = _points(gain, kl)
    # Along rising KL, and falling gain at the same KL, a point counts when it is above all before it.
    order = np.lexsort((-gain, kl))
    best = np.maximum.accumulate(gain[order])
    mask = np.ones(gain.size, dtype=bool)
    mask[order[1:]] = gain[order][1:] > best[:-1]
    return mask


def hypervolume(gain: np.ndarray, kl: np.ndarray, worst_gain: float, worst_kl: float) -> np.ndarray:
    """Measure the area that the points dominate inside gain > `worst_gain` and KL < `worst_kl`, (..., K) -> (...,)
    (Zitzler and Thiele, 1998)."""
    gain, kl = _points(gain, kl)
    order = np.argsort(kl, axis=-1)
    best = np.maximum.accumulate(np.take_along_axis(gain, order, axis=-1), axis=-1)
    starts = np.minimum(np.take_along_axis(kl, order, axis=-1), worst_kl)
    # From each KL to the next one, the best gain so far.
    widths = np.diff(starts, axis=-1, append=np.full((*starts.shape[:-1], 1), worst_kl))
    return np.asarray((widths * np.maximum(best - worst_gain, 0)).sum(axis=-1))


def describe_front(
    gains: Mapping[Point, np.ndarray], kls: Mapping[Point, np.ndarray], worst_gain: float, worst_kl: float, seed: int
) -> tuple[dict[Point, dict[str, Any]], dict[str, Any]]:
    """Describe every point, which is a mean over the prompts, (P,) each: `kl` and `gain` with their intervals, and
    `on_front`; and the hypervolume, with the interval of a percentile bootstrap over the same prompts for all points.
    """
    if not gains or set(gains) != set(kls):
        raise ValueError("the same points, at least one, need gains and KLs")
    gain, kl = _points(np.stack([*gains.values()]), np.stack([kls[name] for name in gains]))
    generator, prompts, areas = np.random.default_rng(seed), gain.shape[1], []
    for _ in range(RESAMPLES // CHUNK):
        picks = generator.integers(0, prompts, size=(CHUNK, prompts)) + prompts * np.arange(CHUNK)[:, None]
        weights = np.bincount(picks.ravel(), minlength=CHUNK * prompts).reshape(CHUNK, prompts) / prompts
        areas.append(hypervolume(weights @ gain.T, weights @ kl.T, worst_gain, worst_kl))
    low, high = np.quantile(np.concatenate(areas), [0.025, 0.975])
    means = gain.mean(axis=1), kl.mean(axis=1)
    area = Estimate(float(hypervolume(*means, worst_gain, worst_kl)), float(low), float(high), prompts)
    points: dict[Point, dict[str, Any]] = {}
    for point, on in zip(gains, non_dominated(*means).tolist(), strict=True):
        both = {"kl": estimate_mean(kls[point]).as_dict(), "gain": estimate_mean(gains[point]).as_dict()}
        points[point] = {**both, "on_front": on}
    return points, area.as_dict()


def best_of_n_kl(n: int) -> float:
    """Give the KL of best-of-n to the policy that it draws from, nats per answer; an upper bound where answers tie
    (Beirami et al., 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Estimate for each prompt the mean score of the answer that the proxy ranks first of `n`, (P, N), (P, N) -> (P,).

    The exact mean over all C(N, n) subsets: sorted by the proxy, the i-th answer is the best of C(i - 1, n - 1)
    (Nakano et al., 2021, arXiv 2112.09332, appendix I). Answers with the same proxy are taken equally often.
    """
    proxy, scores = _points(proxy, scores)
    prompts, total = proxy.shape
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be told from {total} answers a prompt")
    subsets = math.comb(total, n)
    chance = np.array([math.comb(rank, n - 1) / subsets for rank in range(total)])
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked = np.take_along_axis(proxy, order, axis=1)
    # Number the groups of equal proxies through all prompts.
    begins = np.ones_like(ranked, dtype=bool)
    begins[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    run = begins.ravel().cumsum() - 1
    shared = np.bincount(run, weights=np.tile(chance, prompts)) / np.bincount(run)
    return (shared[run].reshape(prompts, total) * np.take_along_axis(scores, order, axis=1)).sum(axis=1)


def read_path(kls: np.ndarray, gains: np.ndarray, budget: float) -> np.ndarray | None:
    """Read the gain at a mean KL of `budget` off the path of one run, (K, P), (K, P) -> (P,).

    The path joins the run's K points in the order of training by lines over sqrt(KL), in which gain is close to linear
    (Bai et al., 2022, arXiv 2204.05862, section 4.3). Nothing is extrapolated, and of several crossings the last
    counts. A point whose KL differs from the budget by a factor of `SAME_KL` at most stands for it.

    Returns:
        One number for each of the P prompts. Their mean is the gain; their spread is its error, with that of the KLs
        (the delta method). None where the path does not cross the budget, or has no point within a factor of `NEAR`.
    """
    kls, gains = _points(kls, gains)
    if budget <= 0:
        raise ValueError(f"a KL budget of {budget}")
    kl = np.maximum(kls.mean(axis=1), 0)
    x, y, target = np.sqrt(kl), gains.mean(axis=1), math.sqrt(budget)
    apart = np.abs(np.log(np.maximum(kl, 1e-300) / budget))
    if apart.min() > math.log(NEAR):
        return None
    crossings = [k for k in range(len(x) - 1) if (x[k] - target) * (x[k + 1] - target) <= 0 and x[k] != x[k + 1]]
    if not crossings:
        near = np.flatnonzero(apart <= math.log(SAME_KL))
        return gains[near[-1]] if near.size else None
    k = crossings[-1]
    share = (target - x[k]) / (x[k + 1] - x[k])
    slope = (y[k + 1] - y[k]) / (x[k + 1] - x[k])
    return sum(
        weight * (gains[i] - (slope * (kls[i] - kl[i]) / (2 * x[i]) if x[i] else 0.0))  # a KL of 0 has no error
        for i, weight in ((k, 1 - share), (k + 1, share))
        if weight > 0
    )


def fit_over_optimisation(
    kl: np.ndarray, gain: np.ndarray, form: Literal["rl", "bon"]
) -> dict[str, float | None] | None:
    """Fit the curve of over-optimisation over d = sqrt(KL), (K,), (K,), by least squares.

    Gao, Schulman and Hilton (2022, arXiv 2210.10760): R(d) = d (alpha - beta log d) for reinforcement learning,
    highest at d = exp(alpha / beta - 1), and R(d) = d (alpha - beta d) for best-of-n, highest at
    d = alpha / (2 beta).

    Returns:
        `alpha`, `beta` and `peak_kl`, None where there is no finite peak, or one before the first d > 0; None with
        fewer than three different d > 0: two parameters go through any two points.
    """
    kl, gain = _points(kl, gain)
    d, gain = np.sqrt(kl[kl > 0]), gain[kl > 0]
    if np.unique(d).size < 3:
        return None
    bend = d * d if form == "bon" else d * np.log(d)
    alpha, beta = np.linalg.lstsq(np.stack([d, -bend], axis=1), gain, rcond=None)[0].tolist()
    peak = math.nan
    if form == "bon" and alpha > 0 and beta > 0:
        peak = (alpha / (2 * beta)) ** 2
    # exp(350) squared, the peak's KL, is near the largest float.
    if form == "rl" and beta > 0 and alpha / beta - 1 < 350:
        peak = math.exp(alpha / beta - 1) ** 2
    return {"alpha": alpha, "beta": beta, "peak_kl": peak if peak >= d.min() ** 2 else None}


def _points(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take two arrays of the same points as floats."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"points of the shapes {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a point's value is not finite")
    return first, second
