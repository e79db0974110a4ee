"""What the history of one training run says: how noisy it is, whether it broke, how soon it got somewhere.

Works on the columns of the history in `<stage>/training_stats.json`, one number a logged row, one row at least. Noise
is told from events by the median absolute change from row to row: unlike a standard deviation it hardly feels the
events, and unlike the median distance to the running median it is steady in short runs. Every function raises
ValueError where there are no values, one is not finite, or the lengths differ. Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Better = Literal["higher", "lower"]
# In median absolute changes. Of runs of independent normal noise with 50 to 500 rows 0.3 to 0.5 % have a spike, of
# shorter ones up to 1.2 %. Of spikes of 8 standard deviations 94 to 98 % are found, of 10 nearly all; in 20 rows 83
# and 96 %.
SPIKE = 5.25
# Likewise; the same noise counts as diverging in 0.7 % of runs of 6 rows, 0.3 % of 10, and next to none of 20 or more.
WORSE = 6.0
# In median absolute changes.
JUMP = 5.0
# A spike is a visible part of the curve's range, a jump one of the largest KL.
VISIBLE = 0.05
# Numbers that are equal but for their last digits differ by less, as a share of the largest.
ROUNDING = 1e-9


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Take the running median of 5 rows, of 3 next to the ends, and the ends as they are, (N,) -> (N,)."""
    curve = _curve(values)
    smoothed = curve.copy()
    for half in (1, 2):
        if curve.size > 2 * half:
            smoothed[half:-half] = np.median(sliding_window_view(curve, 2 * half + 1), axis=1)
    return smoothed


def describe_stability(values: Sequence[float], better: Better) -> dict[str, float | None]:
    """Describe how steadily a run went, in the unit of the values; None where there are too few rows.

    - `variance`: of all values, the trend included; `noise_variance`: of the values minus their `smooth`, without the
      ends, which are their own median: 0.89 of the variance of independent normal noise, whatever slow trend it is on;
    - `end_std`: standard deviation of the last 20 % of the rows, 3 at least;
    - `oscillation`: share of the inner rows at which a rise is followed by a fall or a fall by a rise: 0 for a
      monotone curve, 1 for a zigzag, 2/3 for independent noise;
    - `drawdown`: how much of its best so far the smoothed curve lost at worst, never below 0;
    - `final_minus_best`: its last value against its best one, below 0 where it ends worse, whichever way is better.
    """
    curve, smoothed = _curve(values), smooth(values)
    progress = smoothed if better == "higher" else -smoothed
    noise, end = (curve - smoothed)[1:-1], _end(curve)
    turns = np.diff(np.sign(np.diff(curve)))
    return {
        "variance": float(curve.var(ddof=1)) if curve.size > 1 else None,
        "noise_variance": float(noise.var(ddof=1)) if noise.size > 1 else None,
        "end_std": float(end.std(ddof=1)) if end.size > 2 else None,
        "oscillation": float((np.abs(turns) == 2).mean()) if turns.size else None,
        "drawdown": float((np.maximum.accumulate(progress) - progress).max()),
        "final_minus_best": float(progress[-1] - progress.max()),
    }


def find_spikes(steps: Sequence[int], values: Sequence[float]) -> list[int]:
    """Find the steps whose value stands out from the running median, by more than 5 % of the curve's range.

    The first and the last row are never found: nothing tells a spike there from a new level. Two spikes side by side
    are, three are a level.
    """
    curve = _curve(values)
    return _beyond(steps, np.abs(curve - smooth(curve)), SPIKE * _change(curve), np.ptp(curve))


def find_jumps(steps: Sequence[int], kl: Sequence[float]) -> list[int]:
    """Find the steps at which the KL changed since the row before, by more than 5 % of the largest.

    Where the logged KL is independent noise on a level, and no smaller than that, a tenth of runs of 100 rows have one
    and a third of 500: one jump is only a place to look at.
    """
    curve = _curve(kl)
    return _beyond(steps, np.abs(np.diff(curve, prepend=curve[0])), JUMP * _change(curve), np.abs(curve).max())


def is_diverging(values: Sequence[float], better: Better) -> bool:
    """Tell whether a run ends worse than it started, and worse than its best by more than can be noise.

    Start and end are the medians of the first and the last 20 % of the rows, 3 at least; the best is the smoothed
    curve's. False with fewer than 6 rows, and for a fall too small for its noise: of sudden falls by 8 standard
    deviations of the noise, two thirds are found in 8 rows and 91 % in 20.
    """
    curve = _curve(values) if better == "higher" else -_curve(values)
    start, end = np.median(_end(curve[::-1])), np.median(_end(curve))
    return bool(curve.size >= 6 and end < start and smooth(curve).max() - end > WORSE * _change(curve))


def describe_convergence(
    costs: Mapping[str, Sequence[float] | None], values: Sequence[float], threshold: float, hold: int
) -> dict[str, Any]:
    """Tell when the smoothed reward reached a threshold, and how it rose; all sequences have one number a row.

    Args:
        costs: `steps`, from 1 on, `seconds` and `tokens`, rising; None where the method generates no tokens.
        values: rewards, higher is better.
        hold: rows in a row that must reach the threshold; the last `hold - 1` rows are too late to begin.

    Returns:
        `threshold` and `hold`; `reached`; each cost at the first of the rows that held, None where none did: then the
        run is censored, and `censored_at` has the costs of the last row from which the threshold was not held, 0 where
        there are too few rows to tell even that. Of the smoothed reward, `final` and `best`.

    Raises:
        ValueError: also where `hold` is below 1.
    """
    smoothed = smooth(values)
    if hold < 1 or any(column is not None and len(column) != smoothed.size for column in costs.values()):
        raise ValueError(f"{smoothed.size} values held for {hold}")
    enough = (smoothed >= threshold).tolist()
    refuted = len(enough) - hold
    row = next((first for first in range(refuted + 1) if all(enough[first : first + hold])), None)
    last = {name: None if column is None else column[refuted] if refuted >= 0 else 0 for name, column in costs.items()}
    return {
        "threshold": threshold,
        "hold": hold,
        "reached": row is not None,
        **{name: None if column is None or row is None else column[row] for name, column in costs.items()},
        "censored_at": last if row is None else None,
        "final": float(smoothed[-1]),
        "best": float(smoothed.max()),
    }


def area_until(spent: Sequence[float], values: Sequence[float], start: float, budget: float) -> float | None:
    """Average the rise of the smoothed reward over its start, from 0 to `budget`: the normalised area under the curve.

    By trapezoids from (0, `start`) on, cut at the budget; a straight rise has half of its end. `spent` are steps,
    seconds or tokens. None where the run did not get as far as the budget.

    Raises:
        ValueError: also where `spent` falls or begins below 0, or the budget is not above 0.
    """
    x, y = np.append(0.0, _curve(spent)), np.append(start, smooth(values))
    if x.size != y.size or (np.diff(x) < 0).any() or not budget > 0:
        raise ValueError(f"{y.size - 1} values at {x.size - 1} rising steps, with a budget of {budget}")
    if x[-1] < budget:
        return None
    end, inside = np.interp(budget, x, y), x < budget
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], budget)) / budget - start)


def _curve(values: Sequence[float] | np.ndarray) -> np.ndarray:
    curve = np.asarray(values, dtype=np.float64)
    if curve.size == 0 or not np.isfinite(curve).all():
        raise ValueError("a curve needs at least one value, and finite ones")
    return curve


def _beyond(steps: Sequence[int], sizes: np.ndarray, noise: float, largest: float) -> list[int]:
    found = (sizes > noise) & (sizes > VISIBLE * largest)
    return [step for step, event in zip(steps, found.tolist(), strict=True) if event]


def _end(curve: np.ndarray) -> np.ndarray:
    """The last 20 % of the rows, at least 3; all where there are fewer."""
    return curve[-max(3, math.ceil(0.2 * curve.size)) :]


def _change(curve: np.ndarray) -> float:
    """The median absolute change from row to row, kept above what rounding makes of equal numbers."""
    changes = np.abs(np.diff(curve))
    return max(float(np.median(changes)) if changes.size else 0.0, ROUNDING * float(np.abs(curve).max()))
