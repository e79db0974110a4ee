"""Elo ratings of several policies from a judge's verdicts: Bradley and Terry (1952) with position bias.

log-odds(the answer shown first wins) = ability of its policy - ability of the other + bias; a tie is half a win for
each. An ability times 400 / ln 10 is an Elo rating; the reference has 0.

Abilities and bias have a normal prior around 0 with standard deviation `PRIOR_STD`. It is so weak that it moves no
rating that the verdicts determine (published abilities are met to four digits), and it gives every fit a finite
maximum. A policy that always wins has no finite rating without it (Ford 1957): its standard error is then far above
`LARGEST_ERROR`, and it is reported as unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_trl.judge.win_rate import Verdict, none, pair_up, resample_counts
from rlhf_trl.stats.logistic import fit_logistic

ELO = 400 / math.log(10)
PRIOR_STD = 1000.0  # in log-odds
LARGEST_ERROR = 10.0  # in log-odds; one tie among 1,000 won verdicts gives 1.4
UNBOUNDED = {
    math.inf: "no finite rating fits best: above any bound",
    -math.inf: "no finite rating fits best: below any",
}
ALONE = "no chain of verdicts leads from it to the reference"
UNKNOWN_BIAS = "the verdicts do not determine the effect of the order"


def bradley_terry(verdicts: Sequence[Verdict], reference: str, seed: int) -> dict[str, Any]:
    """Rate all policies by the comparisons with a verdict in both orders, with a refit to each resample of prompts.

    Returns:
        Each with its interval: `ratings`, the Elo rating of every policy, and `first_wins`, how often the first of two
        equally good answers wins. Where no finite number fits best, `mean` is None, and `why_not` says why; where that
        is so in more than one of 40 resamples, the limit on that side is None. Where the position bias is not
        determined, the ratings come from a fit without it.
    """
    pairs = pair_up(verdicts)
    others = {policy for verdict in verdicts for policy in (verdict["a"], verdict["b"])} - {reference}
    names = [reference, *sorted(others)]
    prompts, rows = np.unique(pairs.prompts, return_inverse=True)
    a, b = np.array([[names.index(name) for name in both] for both in pairs.policies], dtype=int).reshape(-1, 2).T
    wins, totals = np.zeros((2, len(prompts), len(names), len(names)))
    wins[rows, a, b], wins[rows, b, a] = pairs.scores[:, 0], 1 - pairs.scores[:, 1]
    totals[rows, a, b] = totals[rows, b, a] = 1.0
    counts = resample_counts(len(prompts), seed)
    ability, bias = fit_abilities(np.tensordot(counts, wins, 1), np.tensordot(counts, totals, 1))
    judged = totals.any(axis=2).sum(axis=0)
    return {
        "ratings": {
            policy: _estimate(ELO * ability[:, at], int(judged[at]), UNBOUNDED.get(ability[0, at], ALONE))
            for at, policy in enumerate(names)
        },
        "first_wins": _estimate(expit(bias), len(prompts), UNKNOWN_BIAS),
    }


def _estimate(values: np.ndarray, n: int, why_not: str) -> dict[str, Any]:
    """Put the first value between the limits of the others; what is undetermined (NaN) could lie on either side."""
    point, resampled = float(values[0]), values[1:]
    if not math.isfinite(point):
        return none(why_not) | {"n": n}
    low = float(np.quantile(np.where(np.isnan(resampled), -np.inf, resampled), 0.025, method="lower"))
    high = float(np.quantile(np.where(np.isnan(resampled), np.inf, resampled), 0.975, method="higher"))
    limits = {name: end if math.isfinite(end) else None for name, end in (("low", low), ("high", high))}
    return {"mean": point, **limits, "n": n}


def fit_abilities(wins: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the policies' abilities and the position bias to R tables of results.

    Args:
        wins: [r, i, j] is how often i won when it was shown first and j second, a tie as half, shape (R, K, K).
        totals: how often they were shown like that, shape (R, K, K).

    Returns:
        The abilities, shape (R, K), 0 for policy 0: infinite where no finite number fits best, NaN where no chain of
        verdicts leads to policy 0. The bias, shape (R,), NaN where it is not determined.
    """
    policies = np.eye(wins.shape[1])
    design = (policies[:, None, :] - policies[None, :, :]).reshape(-1, len(policies))[:, 1:]
    results = wins.reshape(len(wins), -1), totals.reshape(len(wins), -1)
    biased, plain = _fit(np.column_stack([design, np.ones(len(design))]), *results), _fit(design, *results)
    bias = np.where(np.isfinite(biased[:, -1]), biased[:, -1], np.nan)
    ability = np.where(np.isnan(bias)[:, None], plain, biased[:, :-1])
    joined = np.linalg.matrix_power((totals > 0) + policies, len(policies))[:, 0, 1:] > 0
    return np.column_stack([np.zeros(len(wins)), np.where(joined, ability, np.nan)]), bias


def _fit(design: np.ndarray, wins: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Fit with the prior, and put plus or minus infinity for what the results do not determine."""
    prior = np.full(design.shape[1], PRIOR_STD**-2)
    found = fit_logistic(design, wins, totals, prior)
    chance = expit(found @ design.T)
    information = np.einsum("rn,ni,nj->rij", totals * chance * (1 - chance), design, design) + np.diag(prior)
    errors = np.sqrt(np.einsum("rii->ri", np.linalg.inv(information)))
    return np.where(errors > LARGEST_ERROR, np.copysign(np.inf, found), found)
