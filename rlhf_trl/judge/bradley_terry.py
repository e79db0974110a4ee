"""Ratings of several policies from a judge's verdicts, after Bradley and Terry (1952), with the effect of the order.

log-odds(the answer shown first wins) = ability of its policy - ability of the other + eta; a tie is half a win for
each. An ability times 400 / ln 10 is an Elo rating; the reference has 0. The fit has no penalty, which would draw the
ratings together, so that it has no finite maximum where no chain of wins leads from one policy to another (Ford 1957):
such ratings are unbounded.

Works on games as `winrates` describes them; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_trl.judge.win_rate import Game, complete, missing, pair_up
from rlhf_trl.stats.estimate import RESAMPLES
from rlhf_trl.stats.logistic import fit_logistic

ELO = 400 / math.log(10)
# By the value of an ability that is not a finite number.
REASONS = {math.inf: "no finite rating fits best: above any bound", -math.inf: "no finite rating fits best: below any"}


def bradley_terry(games: Iterable[Game], reference: str, seed: int) -> dict[str, Any]:
    """Rate all policies of the games, with a bootstrap over prompts and a refit each time.

    Only comparisons with a verdict in both orders count, as in the win rates.

    Returns:
        `n` prompts, `missing`, and each with its interval: `ratings`, the Elo rating of every policy; `order_effect`,
        eta in log-odds, above 0 where the first place helps; `first_wins`, how often the first of two equal answers
        wins by that. Where no finite number fits best, `mean` is None, and `why_not` says why; where that is so in
        more than one of 40 resamples, the limit on that side is None. Without a finite eta, the ratings come from a
        fit without one.

    Raises:
        ValueError: as `winrates.pair_up`, or no game is about the reference.
    """
    pairs = pair_up(games)
    policies = sorted({policy for pair in pairs for policy in (pair.a, pair.b)})
    if reference not in policies:
        raise ValueError(f"no game is about {reference}")
    place = {policy: at for at, policy in enumerate([reference, *(name for name in policies if name != reference)])}
    used, scores = complete(pairs)
    rows = {prompt: row for row, prompt in enumerate(sorted({pair.prompt_id for pair in used}))}
    n = len(rows)
    wins, totals = np.zeros((2, n, len(place), len(place)))
    for pair, (a_first, b_first) in zip(used, scores, strict=True):
        row, a, b = rows[pair.prompt_id], place[pair.a], place[pair.b]
        wins[row, a, b], wins[row, b, a] = a_first, 1 - b_first
        totals[row, a, b] = totals[row, b, a] = 1.0
    counts = np.ones((1 + RESAMPLES, n))
    if n:
        counts[1:] = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    ability, eta = abilities(np.tensordot(counts, wins, 1), np.tensordot(counts, totals, 1))
    judged = totals.any(axis=2).sum(axis=0)
    alone = f"no chain of verdicts leads from it to {reference}"
    reasons = {math.inf: "the first answer won too often", -math.inf: "the second answer won too often"}
    reasons = {sign: f"{why} for a finite effect" for sign, why in reasons.items()}
    open_order = "no verdict tells the effect of the order from the policies' abilities"
    return {
        "reference": reference,
        "n": n,
        "missing": missing(pairs),
        "ratings": {
            policy: _estimate(ELO * ability[:, at], int(judged[at]), REASONS, alone) for policy, at in place.items()
        },
        "order_effect": _estimate(eta, n, reasons, open_order),
        "first_wins": _estimate(expit(eta), n, reasons, open_order),
    }


def _estimate(values: np.ndarray, n: int, reasons: dict[float, str], undetermined: str) -> dict[str, Any]:
    """Put the first value between the limits of the others; what is undetermined could lie on either side."""
    point, resampled = float(values[0]), values[1:]
    result: dict[str, Any] = {"mean": point, "low": None, "high": None, "n": n}
    if not math.isfinite(point):
        return result | {"mean": None, "why_not": reasons.get(point, undetermined)}
    low = float(np.quantile(np.where(np.isnan(resampled), -np.inf, resampled), 0.025, method="lower"))
    high = float(np.quantile(np.where(np.isnan(resampled), np.inf, resampled), 0.975, method="higher"))
    return result | {"low": low if math.isfinite(low) else None, "high": high if math.isfinite(high) else None}


# --- the fit ---------------------------------------------------------------------------------------------------------


def abilities(wins: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the policies' abilities and eta to R tables of results.

    Args:
        wins: [r, i, j] is how often i won when it was shown first and j second, a tie as half, shape (R, K, K).
        totals: how often they were shown like that, shape (R, K, K).

    Returns:
        The abilities, shape (R, K), 0 for policy 0, and eta, shape (R,): infinite where the likelihood grows without
        end that way, NaN where it does not depend on them. Where eta is not finite, the abilities are those of a fit
        without it, as far as they are finite.
    """
    helps, hurts = _distances(wins, totals, 1.0), _distances(wins, totals, -1.0)
    # Whether the likelihood can grow without end with eta, and with minus eta: no chain of wins back to its start has
    # then more wins in the second place, or in the first.
    up, down = (np.einsum("rii->ri", distances).min(axis=1) >= 0 for distances in (helps, hurts))
    eta = np.select([up & down, up, down], [np.nan, np.inf, -np.inf], 0.0)
    reaches = np.isfinite(helps)
    ability, finite = fit_abilities(wins, totals, reaches, order=False), ~up & ~down
    if finite.any():
        both = fit_abilities(wins[finite], totals[finite], reaches[finite], order=True)
        ability[finite], eta[finite] = both[:, :-1], both[:, -1]
    for grows, distances in ((up & ~down, helps), (down & ~up, hurts)):
        # With eta, i rises above policy 0 by at least -distance(i, 0) and by at most distance(0, i).
        ability[grows[:, None] & (distances[:, :, 0] < 0)] = np.inf
        ability[grows[:, None] & (distances[:, 0, :] < 0)] = -np.inf
    ability[~reaches[:, 0, :] & reaches[:, :, 0]] = np.inf
    ability[reaches[:, 0, :] & ~reaches[:, :, 0]] = -np.inf
    ability[~reaches[:, 0, :] & ~reaches[:, :, 0]] = np.nan
    return ability, eta


def _distances(wins: np.ndarray, totals: np.ndarray, eta: float) -> np.ndarray:
    """Bound how far each policy can be above another when all abilities and eta grow together without end.

    Growing along a direction never lowers the likelihood if every win that was seen becomes more likely: a win of i
    over j allows j to be above i by at most eta if i was shown first, by at most -eta if second. Chains of wins add
    up, so that the bounds are shortest paths (Floyd and Warshall); a cycle below 0 rules the direction out.

    Returns:
        Bounds on j's lead over i, infinite where no chain of wins leads from i to j, shape (R, K, K).
    """
    first, second = wins > 0, (totals - wins > 0).swapaxes(1, 2)
    found = np.minimum(np.where(first, eta, np.inf), np.where(second, -eta, np.inf))
    found = np.minimum(found, np.where(np.eye(wins.shape[1]) > 0, 0.0, np.inf))
    for middle in range(wins.shape[1]):
        found = np.minimum(found, found[:, :, middle, None] + found[:, None, middle, :])
    return found


def fit_abilities(wins: np.ndarray, totals: np.ndarray, reaches: np.ndarray, order: bool) -> np.ndarray:
    """Fit the abilities, and with `order` eta, to the results between policies that chains of wins join both ways.

    The other results fit without error in the limit, and say nothing about the rest.

    Returns:
        The abilities, 0 for policy 0, and with `order` eta last, shape (R, K) or (R, K + 1); right for the policies
        that are joined with policy 0.
    """
    policies = np.eye(wins.shape[1])
    design = (policies[:, None, :] - policies[None, :, :]).reshape(-1, len(policies))
    design = np.column_stack([design[:, 1:], np.ones((len(design), int(order)))])
    joined = reaches & reaches.swapaxes(1, 2)
    rows = [np.where(joined, table, 0.0).reshape(len(table), -1) for table in (wins, totals)]
    found = fit_logistic(design, rows[0], rows[1], np.zeros(design.shape[1]))
    return np.column_stack([np.zeros(len(found)), found])
