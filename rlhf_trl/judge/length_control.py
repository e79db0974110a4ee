"""A win rate with the judge's taste for long answers taken out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_trl.judge.win_rate import NO_PAIR, Verdict, mean, none, pair_up, resample_counts
from rlhf_trl.stats.logistic import fit_logistic

# Standard deviation of the prior on the length coefficient, in log-odds. It is of no account beside the data, except
# where length alone tells who wins: no finite coefficient fits best then.
PRIOR_STD = 5.0
# With fewer prompts on one side, the answers of equal length that the figure is about were hardly seen.
MIN_OVERLAP = 0.1
LARGE_CHANGE = 0.1
# Resamples fitted at once: memory is this many times the number of prompts.
BLOCK = 250


def length_controlled(verdicts: Iterable[Verdict], a: str, b: str, seed: int) -> dict[str, Any]:
    """Estimate how often `a` would beat `b` if both answers always had the same length.

    The model is log-odds(a wins) = phi * tanh((length_b - length_a) / sd) + theta, on the prompts' scores, with ties
    as half; the figure is sigma(theta), the term of length set to 0 (Dubois et al. 2024; AlpacaEval's
    `length_controlled_minimal`, but with a prior on phi, and with an interval from refits over resampled prompts where
    AlpacaEval takes the fit as certain). The scale sd is the one of all prompts in every refit.

    Returns:
        `raw` and `length_controlled`, the two win rates; `warnings`. Where the effect of length cannot be told, both
        win rates are the same, and `why_same` says why.
    """
    pairs = pair_up(verdicts, (a, b))
    wins, apart = pairs.means, pairs.lengths[:, 1] - pairs.lengths[:, 0]
    if len(wins) == 0:
        return {"raw": none(NO_PAIR), "length_controlled": none(NO_PAIR), "warnings": []}
    raw, warnings = mean(wins), []
    # The smaller of the shares of prompts where `a` is not shorter and where it is not longer.
    overlap = min(np.mean(apart <= 0), np.mean(apart >= 0))
    if overlap < MIN_OVERLAP:
        answer = f"{a} gives the {'longer' if np.median(apart) < 0 else 'shorter'} answer"
        warnings.append(f"{answer} to {1 - overlap:.0%} of the prompts: what would be at equal lengths is a guess")
    if np.ptp(apart) == 0 or np.ptp(wins) == 0:
        why = "the scores are" if np.ptp(wins) == 0 else "the difference of the lengths is"
        why = f"{why} the same for every prompt, so that the effect of length cannot be told"
        return {"raw": raw, "length_controlled": raw, "warnings": warnings, "why_same": why}
    values = expit(fit_length(wins, apart, seed)[:, 1])
    low, high = np.quantile(values[1:], [0.025, 0.975])
    change = float(values[0]) - raw["mean"]
    if abs(change) > LARGE_CHANGE:
        moved = f"control for length moves the win rate by {100 * change:+.0f} points"
        warnings.append(f"{moved}: the judge goes by length")
    controlled = {"mean": float(values[0]), "low": float(low), "high": float(high), "n": len(wins)}
    return {"raw": raw, "length_controlled": controlled, "warnings": warnings}


def fit_length(wins: np.ndarray, apart: np.ndarray, seed: int) -> np.ndarray:
    """Fit phi and theta to the prompts, then to resamples of them, (N,) and (N,) -> (1 + RESAMPLES, 2)."""
    design = np.column_stack([np.tanh(apart / apart.std(ddof=1)), np.ones(len(wins))])
    ridge, counts = np.array([PRIOR_STD**-2, 0.0]), resample_counts(len(wins), seed)
    blocks = np.split(counts, range(1, len(counts), BLOCK))
    return np.concatenate([fit_logistic(design, block * wins, block, ridge) for block in blocks])
