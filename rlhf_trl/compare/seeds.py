"""What several seeds of one method say together; works on arrays, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# With fewer seeds than this the interquartile mean is the plain mean, or nearly so, and is left out.
ENOUGH = 5


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Tell how often a run of `x` beats a run of `y`, a tie as half, mean over the tasks: (n, tasks), (m, tasks).

    In each task U / (n m), with the U of Mann and Whitney (Agarwal et al., 2021, arXiv 2108.13264, section 4.3).
    """
    wins, ties = x[:, None] > y[None], x[:, None] == y[None]
    return float((wins + ties / 2).mean())


def interquartile_mean(scores: np.ndarray) -> float:
    """Take the mean of the middle half of all scores: a quarter, rounded down, is dropped at each end."""
    from scipy.stats import trim_mean

    return float(trim_mean(scores, 0.25, axis=None))


def summarise_seeds(points: Mapping[str, float]) -> dict[str, Any]:
    """Summarise one number of several seeds of a method, such as the final gain of each stage of a sweep.

    No interval: one of the seeds' numbers alone leaves the error that all seeds share on their prompts out, and covers
    65 to 96 %, and one with it 88 % at two seeds. The differences of `compare_runs` have one.

    Returns:
        All `points`, `n`, `mean`; `std`, None for one seed; `iqm`, the interquartile mean, None below `ENOUGH` seeds.
    """
    values = np.array(list(points.values()), dtype=np.float64)
    return {
        "points": dict(points),
        "n": values.size,
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if values.size > 1 else None,
        "iqm": interquartile_mean(values) if values.size >= ENOUGH else None,
    }
