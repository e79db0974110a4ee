"""Win rates from a judge's verdicts, and what the judge's habits have to do with them. Results are ready for JSON.

A judge favours a place, and that cancels only over both orders: a comparison is used where both have a verdict, with
the mean of the two; the others are counted. The prompt is the unit. The order of the verdicts does not matter.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from rlhf_trl.stats.intervals import RESAMPLES, estimate_mean, estimate_rate, estimate_ratio, holm

NO_PAIR = "no prompt has a verdict in both orders"


class Verdict(TypedDict):
    """What a judge says of the answers of `a` and `b` in one order; lengths are in characters."""

    prompt_id: str
    subset: str
    a: str
    b: str
    a_first: bool
    score: float | None
    """1 where `a` wins, 0.5 for a tie, 0 where `b` wins; None where there is no verdict, and `status` says why."""
    status: str
    length_a: int
    length_b: int


@dataclass(frozen=True)
class Compared:
    """N comparisons with a verdict in both orders, sorted by prompt and policies."""

    prompts: np.ndarray
    policies: list[tuple[str, str]]
    scores: np.ndarray  # of `a` when it is shown first and second, shape (N, 2)
    means: np.ndarray  # of `a` over both orders, shape (N,)
    lengths: np.ndarray  # of the answers of `a` and `b`, shape (N, 2)
    missing: dict[str, Any]
    """`comparisons` that are not used, and the `verdicts` that they lack by cause."""


def pair_up(verdicts: Iterable[Verdict], of: tuple[str, str] | None = None) -> Compared:
    """Bring the two orders of each comparison together: of all policies, or of two, seen from the first.

    The cause of a missing verdict is its status, `invalid` where a reply came but says nothing (status `ok`), and
    `not judged` where there is no such row.

    Raises:
        ValueError: a comparison has two verdicts in one order, or a score is not 1, 0.5, 0 or None.
    """
    found: dict[tuple[str, str, str], dict[bool, Verdict]] = defaultdict(dict)
    for verdict in verdicts:
        prompt, a, b = key = (verdict["prompt_id"], verdict["a"], verdict["b"])
        if of and {a, b} != set(of):
            continue
        if a == b or (prompt, b, a) in found or verdict["a_first"] in found[key]:
            raise ValueError(f"prompt {prompt}: {a} against {b} is there twice")
        if verdict["score"] not in (0.0, 0.5, 1.0, None):
            raise ValueError(f"prompt {prompt}: {verdict['score']} is no score")
        found[key][verdict["a_first"]] = verdict
    used, causes = [], []
    for (prompt, a, b), orders in sorted(found.items(), key=lambda item: item[0]):
        lacking = [cause for first in (True, False) if (cause := _cause(orders.get(first)))]
        causes.append(lacking)
        if not lacking:
            scores: Any = orders[True]["score"], orders[False]["score"]
            lengths = orders[True]["length_a"], orders[True]["length_b"]
            if of and a != of[0]:  # shown first, b has what a lacks where it is shown second
                a, b, scores, lengths = b, a, (1 - scores[1], 1 - scores[0]), lengths[::-1]
            used.append((prompt, (a, b), scores, lengths))
    prompts, policies, both, sizes = zip(*used, strict=True) if used else ((), (), (), ())
    array, by_cause = np.array(both, dtype=float).reshape(-1, 2), Counter(itertools.chain(*causes))
    missing = {"comparisons": sum(map(bool, causes)), "verdicts": dict(sorted(by_cause.items()))}
    lengths_of = np.array(sizes, dtype=float).reshape(-1, 2)
    return Compared(np.array(prompts, dtype=str), list(policies), array, array.mean(axis=1), lengths_of, missing)


def _cause(verdict: Verdict | None) -> str | None:
    """Why there is no score; None if there is one."""
    if verdict is None:
        return "not judged"
    cause = "invalid" if verdict["status"] == "ok" else verdict["status"]
    return cause if verdict["score"] is None else None


def prompt_scores(verdicts: Iterable[Verdict], a: str, b: str) -> dict[str, float]:
    """Give the mean score of `a` against `b` over both orders of each prompt that has both."""
    pairs = pair_up(verdicts, (a, b))
    return dict(zip(pairs.prompts.tolist(), pairs.means.tolist(), strict=True))


def none(why: str) -> dict[str, Any]:
    """Stand in for an estimate that cannot be computed."""
    return {"mean": None, "low": None, "high": None, "n": 0, "why_not": why}


def mean(values: np.ndarray, why_not: str = NO_PAIR, lowest: float = 0.0) -> dict[str, Any]:
    """Estimate a mean of numbers from `lowest` to 1, one of each prompt; `why_not` says why there may be none.

    From 0 on it is a rate. Differences have the interval of a mean; where all are the same, that of a rate, moved.
    """
    if len(values) == 0:
        return none(why_not)
    if lowest == 0.0:
        return estimate_rate(values).as_dict()
    if np.ptp(values) > 0:
        return estimate_mean(values).as_dict()
    found = estimate_rate((values - lowest) / (1 - lowest))
    low, high = (lowest + (1 - lowest) * end for end in (found.low, found.high))
    return {"mean": float(values.mean()), "low": low, "high": high, "n": found.n}


def rate(tops: np.ndarray, bottoms: np.ndarray, prompts: np.ndarray, why_not: str) -> dict[str, Any]:
    """Estimate a share over N comparisons, sum / sum, such as ties among verdicts; the prompt of each is the unit."""
    names, codes = np.unique(prompts, return_inverse=True)
    top, bottom = (np.bincount(codes, part, len(names)) for part in (tops, bottoms))
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) == 0 or np.ptp(top / bottom) == 0:
        return mean(top / bottom, why_not)
    return estimate_ratio(top.tolist(), bottom.tolist()).as_dict()


def resample_counts(n: int, seed: int) -> np.ndarray:
    """Say how often each of n units is in the sample itself and in its resamples, shape (1 + RESAMPLES, n)."""
    counts = np.ones((1 + RESAMPLES, n))
    if n:
        counts[1:] = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts


def win_rate(verdicts: Iterable[Verdict], a: str, b: str) -> dict[str, Any]:
    """Estimate how often `a` beats `b`, a tie as half, over prompts with a verdict in both orders.

    Returns:
        `win_rate`; `n`; `wins`, `ties` and `losses` by the prompt's mean over the orders; `missing`; and two other
        readings of the same verdicts under `alternatives`: `consistent_only` leaves out the prompts whose orders
        disagree, `disagreement_is_tie` counts these as ties (FastChat, show_result.py).
    """
    pairs = pair_up(verdicts, (a, b))
    values, same = pairs.means, pairs.scores[:, 0] == pairs.scores[:, 1]
    return {
        "a": a,
        "b": b,
        "n": len(values),
        "win_rate": mean(values),
        "wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values < 0.5).sum()),
        "missing": pairs.missing,
        "alternatives": {
            "consistent_only": mean(values[same], "no prompt has the same verdict in both orders"),
            "disagreement_is_tie": mean(np.where(same, values, 0.5)),
        },
    }


def consistency(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Measure a judge's habits over comparisons with both verdicts, and how many replies say nothing.

    Returns:
        `consistency`: share of comparisons with the same result in both orders, a tie twice included. `first_share`,
        the position bias: share of the first place among the verdicts with a winner, 0.5 where the place does not
        matter. `tie_rate` among the verdicts. `invalid_rate`: share of the replies (status `ok`) without a verdict.
        `prefers_longer`, the length bias: how often the longer answer wins, a tie as half.
    """
    verdicts = list(verdicts)
    pairs = pair_up(verdicts)
    a_first, b_first = pairs.scores.T
    longer = np.sign(pairs.lengths[:, 0] - pairs.lengths[:, 1])  # 1 where that is a's answer, -1 where it is b's
    longer_wins, differ = np.abs(longer) * (0.5 + longer * (pairs.means - 0.5)), np.abs(longer)
    first, ties = 1.0 * (a_first == 1) + (b_first == 0), (pairs.scores == 0.5).sum(axis=1)
    each = np.ones(len(ties))
    replies = [verdict for verdict in verdicts if verdict["status"] == "ok"]
    silent = np.array([verdict["score"] is None for verdict in replies])
    asked = np.array([verdict["prompt_id"] for verdict in replies])
    no_winner, no_longer = "no verdict names a winner", "no comparison has a longer answer"
    shares = {
        "consistency": (a_first == b_first, each, NO_PAIR),
        "first_share": (first, 2 - ties, no_winner if len(ties) else NO_PAIR),
        "tie_rate": (ties, 2 * each, NO_PAIR),
        "prefers_longer": (longer_wins, differ, no_longer if len(ties) else NO_PAIR),
    }
    habits = {name: rate(top, bottom, pairs.prompts, why) for name, (top, bottom, why) in shares.items()}
    return habits | {"invalid_rate": rate(silent, np.ones(len(silent)), asked, "no reply came")}


def compare_pairs(verdicts: Sequence[Verdict], policies: Sequence[str], reference: str) -> list[Any]:
    """Compare every two policies by their scores against one reference on the prompts that both have.

    Returns:
        For each two, in the order given: `n` prompts; `difference` of the win rates, `first` minus `second` (paired);
        `sign_test`, exact, on the prompts where they differ, whose `p_holm` is corrected for the number of
        comparisons. Without shared prompts, the test is None.
    """
    from scipy.stats import binomtest

    scores = {policy: prompt_scores(verdicts, policy, reference) for policy in policies}
    rows: list[dict[str, Any]] = []
    for first, second in itertools.combinations(policies, 2):
        shared = sorted(scores[first].keys() & scores[second].keys())
        apart = np.array([scores[first][prompt] - scores[second][prompt] for prompt in shared])
        difference = mean(apart, "no prompt has scores of both", -1.0)
        better, worse = int((apart > 0).sum()), int((apart < 0).sum())
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        test = {"first_better": better, "second_better": worse, "p": p} if shared else None
        rows.append({"first": first, "second": second, "n": len(shared), "difference": difference, "sign_test": test})
    tests = [row["sign_test"] for row in rows if row["sign_test"]]
    for test, p_holm in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p_holm
    return rows
