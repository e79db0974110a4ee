"""A win rate with the judge's taste for long answers taken out.

Works on games as `winrates` describes them; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_trl.judge.win_rate import NO_PAIR, Game, between, complete, mean, missing, none
from rlhf_trl.stats.intervals import RESAMPLES, Estimate
from rlhf_trl.stats.logistic import fit_logistic

# Standard deviation of the prior on the length coefficient, in log-odds. It is of no account beside the data, except
# where length alone tells who wins: no finite coefficient fits best then.
PRIOR_STD = 5.0
# With fewer prompts on one side, the answers of equal length that the figure is about were hardly seen.
MIN_OVERLAP = 0.1
LARGE_CHANGE = 0.1
# Resamples fitted at once: memory is this many times the number of prompts.
BLOCK = 250


def length_controlled(games: Iterable[Game], a: str, b: str, seed: int) -> dict[str, Any]:
    """Estimate how often `a` would beat `b` if both answers always had the same length.

    The model is log-odds(a wins) = phi * tanh((length_b - length_a) / sd) + theta, on the prompts' scores, with ties
    as half; the figure is sigma(theta), the term of length set to 0 (Dubois et al. 2024; AlpacaEval's
    `length_controlled_minimal`, but with a prior on phi, and with an interval from refits over resampled prompts where
    AlpacaEval takes the fit as certain). The scale sd is the one of all prompts in every refit.

    Returns:
        `n`, `missing`; `raw` and `length_controlled`, the two win rates; `warnings`. Where the effect of
        length cannot be told, both win rates are the same, and `why_same` says why.

    Raises:
        ValueError: as `winrates.pair_up`.
    """
    pairs = between(games, a, b)
    used, scores = complete(pairs)
    wins = scores.mean(axis=1)
    apart = np.array([pair.length_b - pair.length_a for pair in used], dtype=float)
    result: dict[str, Any] = {"a": a, "b": b, "n": len(wins), "missing": missing(pairs), "warnings": []}
    if len(wins) == 0:
        return result | {name: none(NO_PAIR) for name in ("raw", "length_controlled")}
    # The smaller of the shares of prompts where `a` is not shorter and where it is not longer.
    raw, overlap = mean(wins).as_dict(), min(np.mean(apart <= 0), np.mean(apart >= 0))
    result["raw"] = raw
    if overlap < MIN_OVERLAP:
        side = "longer" if np.median(apart) < 0 else "shorter"
        result["warnings"].append(
            f"{a} gives the {side} answer to {1 - overlap:.0%} of the prompts: "
            "what would be at equal lengths is a guess"
        )
    if np.ptp(apart) == 0 or np.ptp(wins) == 0:
        why = "the scores are" if np.ptp(wins) == 0 else "the difference of the lengths is"
        why = f"{why} the same for every prompt, so that the effect of length cannot be told"
        return result | {"length_controlled": raw, "why_same": why}
    values = expit(fit_length(wins, apart, seed)[:, 1])
    low, high = np.quantile(values[1:], [0.025, 0.975])
    controlled = Estimate(float(values[0]), float(low), float(high), len(wins))
    if abs(controlled.mean - raw["mean"]) > LARGE_CHANGE:
        result["warnings"].append(
            f"control for length moves the win rate by {100 * (controlled.mean - raw['mean']):+.0f} points: "
            "the judge goes by length"
        )
    return result | {"length_controlled": controlled.as_dict()}


def fit_length(wins: np.ndarray, apart: np.ndarray, seed: int) -> np.ndarray:
    """Fit phi and theta to the prompts, then to resamples of them, (N,) and (N,) -> (1 + RESAMPLES, 2)."""
    n, random = len(wins), np.random.default_rng(seed)
    design = np.column_stack([np.tanh(apart / apart.std(ddof=1)), np.ones(n)])
    ridge = np.array([PRIOR_STD**-2, 0.0])
    fits = [fit_logistic(design, wins[None], np.ones((1, n)), ridge)]
    for _ in range(RESAMPLES // BLOCK):
        counts = random.multinomial(n, np.full(n, 1 / n), size=BLOCK)
        fits.append(fit_logistic(design, counts * wins, counts, ridge))
    return np.concatenate(fits)
