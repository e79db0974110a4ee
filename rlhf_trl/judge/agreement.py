"""How well a judge agrees with human labels, beside a rule that knows nothing but length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rlhf_trl.judge.win_rate import NO_PAIR, Verdict, mean, none, pair_up, resample_counts
from rlhf_trl.stats.trust import length_rule


def agreement(verdicts: Iterable[Verdict], labels: Mapping[str, bool], seed: int) -> dict[str, Any]:
    """Measure a judge against human labels on pairs of answers with a verdict in both orders.

    Args:
        verdicts: on any number of pairs of answers, each with its own `prompt_id`.
        labels: by `prompt_id`, whether the human preferred `a`.
        seed: of the bootstrap.

    Returns:
        `n` pairs, `missing`; `accuracy`, the mean over both orders with a tie as half; `both_correct`, the share of
        pairs that are right in both orders; `kappa`, Cohen's (1960) for judge and human over both orders, where chance
        is 0; `length_rule`, the better of always taking the longer and always the shorter answer, and by how much the
        judge is better.

    Raises:
        KeyError: a pair has no label.
    """
    pairs = pair_up(verdicts)
    result = {"n": len(pairs.prompts), "missing": pairs.missing}
    if not result["n"]:
        return result | {name: none(NO_PAIR) for name in ("accuracy", "both_correct", "kappa")} | {"length_rule": None}
    human = np.array([bool(labels[prompt]) for prompt in pairs.prompts.tolist()])
    right = np.where(human[:, None], pairs.scores, 1 - pairs.scores)
    judge = right.mean(axis=1)
    a_longer = np.sign(pairs.lengths[:, 0] - pairs.lengths[:, 1]) / 2
    # What was named by its place: 1 the first answer, 0 the second, 0.5 neither. So the label does not tell chance.
    places, wanted = np.array([1, -1]) * (pairs.scores - 0.5) + 0.5, np.column_stack([human, ~human])
    return result | {
        "accuracy": mean(judge),
        "both_correct": mean((right == 1).all(axis=1).astype(float)),
        "kappa": kappa(places, wanted, seed),
        "length_rule": length_rule(judge, 0.5 + np.where(human, a_longer, -a_longer)),
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
    tables = np.tensordot(resample_counts(n, seed), cells, 1) / (n * one.shape[1])
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1)
    known = 1 - chance > 1e-12
    if not known[0]:
        return none("all ratings are the same, so that chance alone agrees")
    found = (np.einsum("rkk->r", tables)[known] - chance[known]) / (1 - chance[known])
    low, high = np.quantile(found[1:], [0.025, 0.975])
    agree = np.einsum("nkk->n", cells) / one.shape[1]
    if np.ptp(agree) == 0:  # resampling shows no doubt about the agreement, but `mean` does
        doubt = mean(agree)
        ends = [(doubt[end] - chance[0]) / (1 - chance[0]) for end in ("low", "high")]
        low, high = min(low, ends[0]), max(high, ends[1])
    return {"mean": float(found[0]), "low": float(low), "high": float(high), "n": n}
