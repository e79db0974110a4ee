"""Win rates from a judge's verdicts, the same at equal length, Elo ratings, and the judge's habits, ready for JSON.

A judge favours a place, and that cancels only over both orders: a comparison is used where both have a verdict, with
the mean of the two; the others are counted. The prompt is the unit: its verdicts go together.
"""

import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from scipy.special import expit

from rlhf_trl.stats.intervals import estimate_rate
from rlhf_trl.stats.pairs import gap, share

NO_PAIR = "no prompt has a verdict in both orders"
ELO = 400 / math.log(10)
# Weights of the pseudo-verdicts of `fit`. Length: of no account beside the data, except where length alone tells who
# wins. Ratings: no rating that the verdicts determine moves by a tenth of a point.
LENGTH_PRIOR, RATING_PRIOR = 0.16, 4e-6
LARGEST_ERROR = 10.0  # in log-odds; one tie among 1,000 won verdicts gives 1.4
# With fewer prompts on one side, the answers of equal length that the figure is about were hardly seen.
MIN_OVERLAP = 0.1
LARGE_CHANGE = 0.1


class Verdict(TypedDict):
    """What a judge says of the answers of `a` and `b` in one order; lengths are in characters."""

    prompt_id: str
    subset: str
    a: str
    b: str
    a_first: bool
    score: float | None
    """1 where `a` wins, 0.5 for a tie, 0 where `b` wins; None where there is no verdict, and `status` says why."""
    status: str  # that of the call; `same` for two equal texts, about which no judge is asked
    length_a: int
    length_b: int


@dataclass(frozen=True)
class Compared:
    """N comparisons with a verdict in both orders, sorted by prompt and policies."""

    prompts: np.ndarray
    policies: list[tuple[str, str]]
    scores: np.ndarray  # of `a` when it is shown first and second, shape (N, 2)
    lengths: np.ndarray  # of the answers of `a` and `b`, shape (N, 2)
    missing: dict[str, Any]
    """`comparisons` that are not used, and the `verdicts` that they lack by cause."""

    @property
    def means(self) -> np.ndarray:
        """The score of `a` over both orders, shape (N,)."""
        return self.scores.mean(axis=1)


def pair_up(verdicts: Iterable[Verdict], of: tuple[str, str] | None = None) -> Compared:
    """Bring the two orders of each comparison together: of all policies, or of `a` and `b`."""
    found: dict[tuple[str, str, str], dict[bool, Verdict]] = defaultdict(dict)
    for verdict in verdicts:
        if of in (None, (verdict["a"], verdict["b"])):
            found[verdict["prompt_id"], verdict["a"], verdict["b"]][verdict["a_first"]] = verdict
    causes = {key: [cause for first in (True, False) if (cause := _cause(orders.get(first)))]
              for key, orders in found.items()}  # fmt: skip
    used = sorted(key for key, lacking in causes.items() if not lacking)
    scores = [[found[key][first]["score"] for first in (True, False)] for key in used]
    lengths = [[found[key][True]["length_a"], found[key][True]["length_b"]] for key in used]
    verdicts_missing = Counter(itertools.chain(*causes.values()))
    return Compared(
        np.array([prompt for prompt, _, _ in used], dtype=str),
        [(a, b) for _, a, b in used],
        np.array(scores, dtype=float).reshape(-1, 2),
        np.array(lengths, dtype=float).reshape(-1, 2),
        {"comparisons": len(causes) - len(used), "verdicts": dict(sorted(verdicts_missing.items()))},
    )


def _cause(verdict: Verdict | None) -> str | None:
    """Why there is no score: the status of the call, `invalid` for a reply that says nothing; None if there is one."""
    if verdict is None:
        return "not judged"
    if verdict["score"] is not None:
        return None
    return "invalid" if verdict["status"] == "ok" else verdict["status"]


def prompt_scores(verdicts: Iterable[Verdict], a: str, b: str) -> dict[str, float]:
    """Give the mean score of `a` against `b` over both orders of each prompt that has both."""
    pairs = pair_up(verdicts, (a, b))
    return dict(zip(pairs.prompts.tolist(), pairs.means.tolist(), strict=True))


def none(why: str) -> dict[str, Any]:
    """Stand in for an estimate that cannot be computed."""
    return {"mean": None, "low": None, "high": None, "n": 0, "why_not": why}


def mean(values: np.ndarray, why_not: str = NO_PAIR) -> dict[str, Any]:
    """Estimate the mean of scores from 0 to 1, one of each prompt; `why_not` says why there may be none."""
    return estimate_rate(values).as_dict() if len(values) else none(why_not)


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


def measure_habits(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Measure a judge's habits, on different texts with both verdicts, and how many of its replies say nothing.

    Returns:
        `consistency`: share of comparisons with the same result in both orders, a tie twice included. `first_share`,
        the position bias: share of the first place among the verdicts with a winner, 0.5 where the place does not
        matter. `tie_rate` among the verdicts. `invalid_rate`: share of the replies (status `ok`) without a verdict.
        `prefers_longer`, the length bias: how often the longer answer wins, a tie as half.
    """
    verdicts = [verdict for verdict in verdicts if verdict["status"] != "same"]
    pairs = pair_up(verdicts)
    scores, prompts = pairs.scores.ravel(), np.repeat(pairs.prompts, 2)
    longer, won = np.repeat(gap(pairs.lengths), 2), scores != 0.5
    first_won = scores == np.tile([1.0, 0.0], len(pairs.prompts))
    replies = [verdict for verdict in verdicts if verdict["status"] == "ok"]
    shares = {
        "consistency": (pairs.scores[:, 0] == pairs.scores[:, 1], pairs.prompts, NO_PAIR),
        "first_share": (first_won[won], prompts[won], "no verdict names a winner"),
        "tie_rate": (~won, prompts, NO_PAIR),
        "prefers_longer": (np.where(longer > 0, scores, 1 - scores)[longer != 0], prompts[longer != 0],
                           "no comparison has a longer answer"),
        "invalid_rate": (np.array([verdict["score"] is None for verdict in replies]),
                         np.array([verdict["prompt_id"] for verdict in replies]), "no reply came"),
    }  # fmt: skip
    return {name: share(values, units).as_dict() if len(values) else none(why)
            for name, (values, units, why) in shares.items()}  # fmt: skip


# --- logistic models -------------------------------------------------------------------------------------------------


def fit(design: np.ndarray, scores: np.ndarray, prompts: np.ndarray, prior: Sequence[float]) -> tuple[Any, Any]:
    """Fit log-odds = design @ coefficients to N scores from 0 to 1.

    A pseudo-verdict, a tie, is added for the first coefficients: a log-F prior around 0 (Greenland and Mansournia
    2015, Statistics in Medicine 34:3133), with which every fit is finite.

    Args:
        design: shape (N, k).
        prompts: of each row, shape (N,).
        prior: weight of each pseudo-verdict, k or fewer.

    Returns:
        The coefficients and the ends of their 95 % intervals, (3, k); and their standard errors by the model alone,
        (k,), which are large where the verdicts do not determine a coefficient.
    """
    import statsmodels.api as sm

    n, k, added = len(scores), design.shape[1], len(prior)
    if n == 0:
        return np.zeros((3, k)), np.full(k, np.inf)
    groups = np.append(np.unique(prompts, return_inverse=True)[1], n + np.arange(added))
    rows, values = np.vstack([design, np.eye(k)[:added]]), np.append(scores, np.full(added, 0.5))
    model = sm.GLM(values, rows, sm.families.Binomial(), var_weights=np.append(np.ones(n), prior))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # a fit that only the prior keeps finite is looked for by its errors
        found = model.fit(maxiter=300, cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    return np.array([found.params, *found.conf_int().T]), np.sqrt(np.diag(found.normalized_cov_params))


def length_controlled(verdicts: Iterable[Verdict], a: str, b: str) -> dict[str, Any]:
    """Estimate how often `a` would beat `b` if both answers always had the same length.

    The model is log-odds(a wins) = phi * tanh((length_b - length_a) / sd) + theta, on the prompts' scores, with ties
    as half; the figure is sigma(theta) (Dubois et al. 2024; AlpacaEval's `length_controlled_minimal`, but with a prior
    on phi, and with an interval where AlpacaEval takes the fit as certain).

    Returns:
        `length_controlled`, which is the plain win rate where the effect of length cannot be told; `warnings`.
    """
    pairs = pair_up(verdicts, (a, b))
    wins, apart, warned = pairs.means, -gap(pairs.lengths), []
    if len(wins) == 0:
        return {"length_controlled": none(NO_PAIR), "warnings": []}
    # The smaller of the shares of prompts where `a` is not shorter and where it is not longer.
    overlap = min(np.mean(apart <= 0), np.mean(apart >= 0))
    if overlap < MIN_OVERLAP:
        answer = f"{a} gives the {'longer' if np.median(apart) < 0 else 'shorter'} answer"
        warned.append(f"{answer} to {1 - overlap:.0%} of the prompts: what would be at equal lengths is a guess")
    if np.ptp(apart) == 0 or np.ptp(wins) == 0:
        return {"length_controlled": mean(wins), "warnings": warned}
    design = np.column_stack([np.tanh(apart / apart.std(ddof=1)), np.ones(len(wins))])
    controlled, low, high = expit(fit(design, wins, pairs.prompts, [LENGTH_PRIOR])[0][:, 1]).tolist()
    change = controlled - float(wins.mean())
    if abs(change) > LARGE_CHANGE:
        warned.append(f"control for length moves the win rate by {100 * change:+.0f} points: the judge goes by length")
    estimate = {"mean": controlled, "low": low, "high": high, "n": len(wins)}
    return {"length_controlled": estimate, "warnings": warned}


def bradley_terry(verdicts: Sequence[Verdict], reference: str) -> dict[str, Any]:
    """Rate all policies by the comparisons with a verdict in both orders (Bradley and Terry 1952).

    log-odds(the answer shown first wins) = ability of its policy - ability of the other + bias; a tie is half a win
    for each. An ability times 400 / ln 10 is an Elo rating; the reference has 0.

    Returns:
        The Elo rating of every policy. Where no finite number fits best (Ford 1957), `mean` is None, and `why_not`
        says why. Where the verdicts do not determine the position bias, the ratings come from a fit without it.
    """
    pairs = pair_up(verdicts)
    names = [reference, *sorted({name for one in verdicts for name in (one["a"], one["b"])} - {reference})]
    policies = np.eye(len(names))
    a, b = np.array([[names.index(name) for name in both] for both in pairs.policies], dtype=int).reshape(-1, 2).T
    # Each comparison twice: `a` shown first, and `b` shown first.
    design = np.vstack([policies[a] - policies[b], policies[b] - policies[a]])[:, 1:]
    scores, prompts = np.append(pairs.scores[:, 0], 1 - pairs.scores[:, 1]), np.tile(pairs.prompts, 2)
    with_bias = np.column_stack([design, np.ones(len(design))])
    found, errors = fit(with_bias, scores, prompts, [RATING_PRIOR] * len(names))
    if errors[-1] >= LARGEST_ERROR and len(names) > 1:
        found, errors = fit(design, scores, prompts, [RATING_PRIOR] * (len(names) - 1))
    ratings = {reference: _estimate(np.zeros(3), len(set(prompts)))}
    for at, name in enumerate(names[1:]):
        n = len({prompt for prompt, both in zip(pairs.prompts, pairs.policies, strict=True) if name in both})
        ratings[name] = _estimate(ELO * found[:, at], n)
        if errors[at] >= LARGEST_ERROR:
            ability = found[0, at]
            side = f"no finite rating fits best: {'above' if ability > 0 else 'below'} any bound"
            joined = abs(ability) > LARGEST_ERROR / 2
            ratings[name] = none(side if joined else "no chain of verdicts leads from it to the reference") | {"n": n}
    return ratings


def _estimate(ends: np.ndarray, n: int) -> dict[str, Any]:
    return {**dict(zip(("mean", "low", "high"), ends.tolist(), strict=True)), "n": n}
