"""What several seeds of one method say together.

Reads and writes nothing; works on arrays, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_trl.stats.intervals import compare_runs

# With fewer seeds than this the interquartile mean is the plain mean, or nearly so, and is left out.
ENOUGH = 5


def interquartile_mean(scores: np.ndarray) -> float:
    """Take the mean of the middle half of all scores, of any shape; of 3 or fewer, their mean.

    Scores are dropped whole: a quarter of them, rounded down, at each end (Agarwal et al., 2021, arXiv 2108.13264).
    """
    from scipy.stats import trim_mean

    return float(trim_mean(scores, 0.25, axis=None))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Tell how often a run of `x` beats a run of `y`, a tie as half, mean over the tasks: (n, tasks), (m, tasks).

    In each task U / (n m), with the U of Mann and Whitney (Agarwal et al., 2021, section 4.3).
    """
    wins, ties = x[:, None] > y[None], x[:, None] == y[None]
    return float((wins + ties / 2).mean())


def summarise_seeds(points: Mapping[str, float]) -> dict[str, Any]:
    """Summarise one number of several seeds of a method, such as the final gain of each stage of a sweep.

    Returns:
        All `points`, `n`, `mean`; `std` and Student's 95 % interval of the mean, `low` to `high`, None for one seed;
        `iqm`, the interquartile mean, None with fewer than `ENOUGH` seeds.

    Raises:
        ValueError: there are no points, or one is not finite.
    """
    values = np.array(list(points.values()), dtype=np.float64)
    found = compare_runs(values[:, None]).estimate
    several = values.size > 1
    return {
        "points": dict(points),
        "n": values.size,
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if several else None,
        "low": found.low if several else None,
        "high": found.high if several else None,
        "iqm": interquartile_mean(values) if values.size >= ENOUGH else None,
    }
