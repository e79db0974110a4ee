"""Win rates from a judge's verdicts, and what the judge's habits have to do with them.

Works on games: `{"prompt_id", "subset", "a", "b", "a_first", "score", "status", "length_a", "length_b"}`, one for each
verdict. `score` is 1 where policy `a` wins, 0.5 for a tie, 0 where `b` wins, None where there is no verdict; `status`
then says why. Lengths are in characters. The two orders in which two answers are shown are two games.

A judge favours a place, and that cancels only over both orders: a prompt is used where both have a verdict, with the
mean of the two; the others are counted. The prompt is the unit. The order of the games does not
matter. Reads and writes nothing; results are ready for JSON.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_trl.stats.intervals import Estimate, estimate_mean, estimate_rate, estimate_ratio, holm

Game = Mapping[str, Any]
NO_PAIR = "no prompt has a verdict in both orders"


@dataclass(frozen=True)
class Pair:
    """A comparison of two answers to a prompt: the scores of `a` in both orders, None where there is no verdict."""

    prompt_id: str
    a: str
    b: str
    a_first: float | None
    b_first: float | None
    causes: tuple[str, ...]
    length_a: int
    length_b: int

    def turned(self) -> Pair:
        """Give the same comparison seen from the other policy."""
        first, second = (None if score is None else 1 - score for score in (self.b_first, self.a_first))
        return Pair(self.prompt_id, self.b, self.a, first, second, self.causes, self.length_b, self.length_a)


def pair_up(games: Iterable[Game]) -> list[Pair]:
    """Bring the two orders of each comparison together, sorted by prompt and policies.

    The cause of a missing verdict is the game's status, `invalid` where a reply came but says nothing (status `ok`),
    and `not judged` where there is no game.

    Raises:
        ValueError: a comparison has two games in one order, or a score is not 1, 0.5, 0 or None.
    """
    found: dict[tuple[str, str, str], dict[bool, Game]] = defaultdict(dict)
    for game in games:
        prompt, a, b = key = (game["prompt_id"], game["a"], game["b"])
        if a == b or (prompt, b, a) in found or game["a_first"] in found[key]:
            raise ValueError(f"prompt {prompt}: {a} against {b} is there twice")
        if game["score"] not in (0.0, 0.5, 1.0, None):
            raise ValueError(f"prompt {prompt}: {game['score']} is no score")
        found[key][game["a_first"]] = game
    pairs = []
    for key, orders in sorted(found.items(), key=lambda item: item[0]):
        both = [orders.get(True), orders.get(False)]
        scores = [None if game is None else game["score"] for game in both]
        causes = tuple(_cause(game) for game, score in zip(both, scores, strict=True) if score is None)
        shown = next(iter(orders.values()))
        pairs.append(Pair(*key, scores[0], scores[1], causes, shown["length_a"], shown["length_b"]))
    return pairs


def _cause(game: Game | None) -> str:
    if game is None:
        return "not judged"
    return "invalid" if game["status"] == "ok" else game["status"]


def between(games: Iterable[Game], a: str, b: str) -> list[Pair]:
    """Pick the comparisons of two policies, seen from `a`, sorted by prompt.

    Raises:
        ValueError: as `pair_up`.
    """
    pairs = pair_up(game for game in games if {game["a"], game["b"]} == {a, b})
    return [pair if pair.a == a else pair.turned() for pair in pairs]


def complete(pairs: Iterable[Pair]) -> tuple[list[Pair], np.ndarray]:
    """Pick the comparisons with a verdict in both orders, N of them.

    Returns:
        Them, and the scores of their `a` when shown first and second, shape (N, 2).
    """
    used = [pair for pair in pairs if not pair.causes]
    return used, np.array([(pair.a_first, pair.b_first) for pair in used], dtype=float).reshape(-1, 2)


def missing(pairs: Iterable[Pair]) -> dict[str, Any]:
    """Count the comparisons that are not used, and the verdicts that they lack by cause."""
    left_out = [pair for pair in pairs if pair.causes]
    causes = Counter(cause for pair in left_out for cause in pair.causes)
    return {"comparisons": len(left_out), "verdicts": dict(sorted(causes.items()))}


def prompt_scores(games: Iterable[Game], a: str, b: str) -> dict[str, float]:
    """Give the mean score of `a` against `b` over both orders of each prompt that has both.

    A judge that always names the first answer gives 0.5; the scores of `b` against `a` are 1 minus these.

    Raises:
        ValueError: as `pair_up`.
    """
    pairs, scores = complete(between(games, a, b))
    return {pair.prompt_id: score for pair, score in zip(pairs, scores.mean(axis=1).tolist(), strict=True)}


# --- estimates -------------------------------------------------------------------------------------------------------


def none(why: str) -> dict[str, Any]:
    """Stand in for an estimate that cannot be computed."""
    return {"mean": None, "low": None, "high": None, "n": 0, "why_not": why}


def mean(values: Sequence[float] | np.ndarray, lowest: float = 0.0) -> Estimate:
    """Estimate a mean of numbers from `lowest` to 1 over prompts: by the score interval that is shifted to them where
    they lie around 0, else as a rate.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, dtype=float)
    if lowest == 0.0:
        return estimate_rate(array)
    if np.ptp(array) > 0:
        return estimate_mean(array)
    found = estimate_rate((array - lowest) / (1 - lowest))
    low, high = (lowest + (1 - lowest) * end for end in (found.low, found.high))
    return Estimate(float(array.mean()), low, high, found.n)


def rate(tops: np.ndarray, bottoms: np.ndarray, prompts: np.ndarray, why_not: str) -> dict[str, Any]:
    """Estimate a share over all comparisons, sum / sum, with the prompts as the unit.

    Args:
        tops, bottoms: numerator and denominator of each comparison, such as its ties and its verdicts, shape (N,).
        prompts: the prompt of each, shape (N,).
        why_not: what to say where all denominators are 0.
    """
    names, codes = np.unique(prompts, return_inverse=True)
    top, bottom = (np.bincount(codes, part, len(names)) for part in (tops, bottoms))
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) == 0:
        return none(why_not)
    if np.ptp(top / bottom) == 0:
        return mean(top / bottom).as_dict()
    return estimate_ratio(top.tolist(), bottom.tolist()).as_dict()


# --- measures --------------------------------------------------------------------------------------------------------


def win_rate(games: Iterable[Game], a: str, b: str) -> dict[str, Any]:
    """Estimate how often `a` beats `b`, a tie as half, over prompts with a verdict in both orders.

    Returns:
        `win_rate`; `n`; `wins`, `ties` and `losses` by the prompt's mean over the orders; `missing`; and two other
        readings of the same verdicts under `alternatives`: `consistent_only` leaves out the prompts whose orders
        disagree, `disagreement_is_tie` counts these as ties (FastChat, show_result.py), with its own counts.

    Raises:
        ValueError: as `pair_up`.
    """
    pairs = between(games, a, b)
    scores = complete(pairs)[1]
    values, same = scores.mean(axis=1), scores[:, 0] == scores[:, 1]
    consistent, strict = values[same], np.where(same, values, 0.5)
    disagree = "no prompt has the same verdict in both orders"
    return {
        "a": a,
        "b": b,
        "n": len(values),
        "win_rate": mean(values).as_dict() if len(values) else none(NO_PAIR),
        **_counts(values),
        "missing": missing(pairs),
        "alternatives": {
            "consistent_only": mean(consistent).as_dict() if len(consistent) else none(disagree),
            "disagreement_is_tie": (mean(strict).as_dict() if len(strict) else none(NO_PAIR)) | _counts(strict),
        },
    }


def _counts(values: np.ndarray) -> dict[str, int]:
    return {"wins": int((values > 0.5).sum()), "ties": int((values == 0.5).sum()), "losses": int((values < 0.5).sum())}


def consistency(games: Iterable[Game]) -> dict[str, Any]:
    """Measure a judge's habits: how often it contradicts itself, goes by place or by length, or says nothing.

    Returns:
        `n` prompts and the `comparisons` of theirs with both verdicts, on which all is computed but `invalid_rate`.
        `consistency`: share of comparisons with the same result in both orders, a tie twice included.
        `first_share`: share of the first place among the verdicts with a winner, 0.5 where the place does not matter;
        `verdicts` has the counts. `tie_rate`: share of ties among the verdicts. `invalid_rate`: share of the replies
        (status `ok`) that say nothing; `missing`: all that is not used, by cause. `prefers_longer`: how often the
        longer answer wins, a tie as half.

    Raises:
        ValueError: as `pair_up`.
    """
    games = list(games)
    pairs = pair_up(games)
    used, scores = complete(pairs)
    prompts, (a_first, b_first) = np.array([pair.prompt_id for pair in used]), scores.T
    lengths = np.array([(pair.length_a, pair.length_b) for pair in used]).reshape(-1, 2)
    apart = np.sign(lengths[:, 0] - lengths[:, 1])
    differ, each = np.abs(apart), np.ones(len(used))
    first = 1.0 * (a_first == 1) + (b_first == 0)
    ties = 1.0 * (a_first == 0.5) + (b_first == 0.5)
    longer_wins = differ * (0.5 + apart * (scores.mean(axis=1) - 0.5))
    replies = [game for game in games if game["status"] == "ok"]
    silent = np.array([game["score"] is None for game in replies])
    asked = np.array([game["prompt_id"] for game in replies])
    no_winner = "no verdict names a winner" if used else NO_PAIR
    no_longer = "no comparison has a longer answer" if used else NO_PAIR
    return {
        "n": len(np.unique(prompts)),
        "comparisons": len(used),
        "verdicts": {"first": int(first.sum()), "second": int((2 - ties - first).sum()), "tie": int(ties.sum())},
        "consistency": rate(a_first == b_first, each, prompts, NO_PAIR),
        "first_share": rate(first, 2 - ties, prompts, no_winner),
        "tie_rate": rate(ties, 2 * each, prompts, NO_PAIR),
        "invalid_rate": rate(silent, np.ones(len(silent)), asked, "no reply came"),
        "missing": missing(pairs),
        "prefers_longer": rate(longer_wins, differ, prompts, no_longer),
    }


# --- two policies against one reference ------------------------------------------------------------------------------


def compare_pairs(games: Iterable[Game], policies: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """Compare every two policies by their scores against one reference on the prompts that both have.

    Returns:
        For each two, in the order given: `n` prompts; `difference` of the win rates, `first` minus `second` (paired);
        `sign_test`, exact, on the prompts where they differ, whose `p_holm` is `p` corrected for the number of
        comparisons. Without shared prompts, the test is None.

    Raises:
        ValueError: as `pair_up`.
    """
    games = list(games)
    scores = {policy: prompt_scores(games, policy, reference) for policy in policies}
    rows: list[dict[str, Any]] = []
    for first, second in combinations(policies, 2):
        shared = sorted(scores[first].keys() & scores[second].keys())
        row = {"first": first, "second": second, "reference": reference, "n": len(shared)}
        mine, theirs = (np.array([scores[name][prompt] for prompt in shared]) for name in (first, second))
        rows.append(row | _compare(mine, theirs))
    tests = [row["sign_test"] for row in rows if row["sign_test"] is not None]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return rows


def _compare(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Compare the scores of two policies on the same prompts, (N,) and (N,)."""
    if len(first) == 0:
        return {"difference": none("no prompt has scores of both"), "sign_test": None}
    better, worse = int((first > second).sum()), int((first < second).sum())
    return {
        "difference": mean(first - second, -1.0).as_dict(),
        "sign_test": {"first_better": better, "second_better": worse, "p": exact_test(better, worse)},
    }


def exact_test(one: int, other: int) -> float:
    """Test that two counts differ by chance alone: the sign test, by the binomial distribution.

    Returns:
        The two-sided p-value; 1 where both counts are 0.
    """
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0
