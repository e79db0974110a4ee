"""How well a judge agrees with human labels, beside a rule that knows nothing but length.

Works on games as `winrates` describes them, in which `a` and `b` are two answers that a human compared; each pair of
answers has its own `prompt_id`. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rlhf_trl.judge.win_rate import NO_PAIR, Game, complete, mean, missing, none, pair_up
from rlhf_trl.stats.intervals import RESAMPLES, Estimate
from rlhf_trl.stats.trust import length_rule


def agreement(games: Iterable[Game], labels: Mapping[str, bool], seed: int) -> dict[str, Any]:
    """Measure a judge against human labels on pairs with a verdict in both orders.

    Args:
        games: of any number of pairs of answers.
        labels: by `prompt_id`, whether the human preferred `a`.
        seed: of the bootstrap.

    Returns:
        `n` pairs, `missing`; `accuracy`, the mean over both orders with a tie as half; `both_correct`, the share of
        pairs that are right in both orders; `kappa`, Cohen's (1960) for judge and human over both orders, where chance
        is 0; `length_baseline`, the accuracy of taking the longer answer; `length_rule`, the better of always taking
        the longer and always the shorter answer, and by how much the judge is better.

    Raises:
        KeyError: a pair has no label.
        ValueError: as `winrates.pair_up`.
    """
    pairs = pair_up(games)
    used, scores = complete(pairs)
    result = {"n": len(used), "missing": missing(pairs)}
    if not used:
        names = ("accuracy", "both_correct", "kappa", "length_baseline")
        return result | {name: none(NO_PAIR) for name in names} | {"length_rule": None}
    human = np.array([bool(labels[pair.prompt_id]) for pair in used])
    right = np.where(human[:, None], scores, 1 - scores)
    judge = right.mean(axis=1)
    apart = np.array([np.sign(pair.length_a - pair.length_b) for pair in used]) / 2
    longer = 0.5 + np.where(human, apart, -apart)
    # What was named by its place: 1 the first answer, 0 the second, 0.5 neither. So the label does not tell chance.
    places, wanted = np.array([1, -1]) * (scores - 0.5) + 0.5, np.column_stack([human, ~human])
    return result | {
        "accuracy": mean(judge).as_dict(),
        "both_correct": mean((right == 1).all(axis=1).astype(float)).as_dict(),
        "kappa": kappa(places, wanted, seed),
        "length_baseline": mean(longer).as_dict(),
        "length_rule": length_rule(judge, longer),
    }


def kappa(one: np.ndarray, other: np.ndarray, seed: int) -> dict[str, Any]:
    """Estimate Cohen's kappa of two raters with a percentile bootstrap over pairs.

    Resamples in which all ratings are the same, so that chance alone agrees, have no kappa and are left out.

    Args:
        one, other: 1, 0.5 or 0, of each pair in each order, shape (N, orders).
        seed: of the bootstrap.
    """
    n, values = len(one), np.array([0.0, 0.5, 1.0])
    cells = np.einsum("nok,nol->nkl", one[:, :, None] == values, other[:, :, None] == values, dtype=float)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    tables = np.tensordot(np.concatenate([np.ones((1, n)), counts]), cells, 1) / (n * one.shape[1])
    seen = np.einsum("rkk->r", tables)
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1)
    known = 1 - chance > 1e-12
    if not known[0]:
        return none("all ratings are the same, so that chance alone agrees")
    found = (seen[known] - chance[known]) / (1 - chance[known])
    low, high = np.quantile(found[1:], [0.025, 0.975])
    agree = np.einsum("nkk->n", cells) / one.shape[1]
    if np.ptp(agree) == 0:  # resampling shows no doubt about the agreement, but `mean` does
        doubt = mean(agree)
        ends = [(end - chance[0]) / (1 - chance[0]) for end in (doubt.low, doubt.high)]
        low, high = min(low, ends[0]), max(high, ends[1])
    return Estimate(float(found[0]), float(low), float(high), n).as_dict()
