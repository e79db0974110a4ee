"""Which method is better, by how much: what is significant, what matters, who is named, and in which words.

Two questions are kept apart. *As trained*: the final policies, those that an export would share. *At equal KL*: each
run is read along its own path. A winner needs a significant difference that matters at equal KL, and none in the other
direction as trained. With one seed the sentences are about two adapters, never about methods. The p-values of all that
is claimed are corrected together (Holm, 1979). Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.compare.evidence import Judged, Trajectory, measure_gains, measure_pair
from rlhf_trl.stats.intervals import LEVEL, holm
from rlhf_trl.text.format import format_p

Row = dict[str, Any]
BY = {"gold": "by the gold model", "reward": "by the reward model", "win_rate": "by the judge"}
QUESTIONS = {"equal_kl": "at equal KL", "as_trained": "as trained"}
OPPOSITE = {"better": "worse", "worse": "better"}
# Outcome -> what is said of two for which no better one is named.
DRAWS = {
    "trivial": "there is no difference that matters between {}",
    "equivalent": "{} are equivalent",
    "same": "there is no significant difference between {}",
    "indistinguishable": "{} have the same score on every prompt",
    "unknown": "nothing can be said about {}",
}
FEW_SEEDS = 5


def compare_groups(
    pairs_of: Sequence[tuple[str, str]],
    groups: Mapping[str, Sequence[str]],
    trajectories: Mapping[str, Trajectory],
    judged: Judged,
    smallest: Mapping[str, float],
) -> tuple[list[Row], dict[str, dict[str, Row]]]:
    """Compare two groups at a time, and each final policy with the reference.

    Args:
        pairs_of: names of the groups to compare.
        groups: name -> its stages.
        smallest: for each measure, the smallest difference that matters.

    Returns:
        For each pair `a`, `b`, the `sentence` and `measures` (`evidence.measure_pair`): the gold model or, without
        one, the reward model, and the judge; and for each stage its gains (`evidence.measure_gains`). Every result
        that was tested has `p_holm` and `outcome` (`decide`).
    """
    final = next(iter(trajectories.values())).records[-1][0] if trajectories else {}
    measures = ["gold" if "gold_gain" in final else "reward", "win_rate"]
    pairs: list[Row] = []
    for a, b in pairs_of:
        of = {measure: measure_pair([groups[a], groups[b]], measure, trajectories, judged, smallest.get(measure, 0.0))
              for measure in measures}  # fmt: skip
        pairs.append({"a": a, "b": b, "measures": of})
    gains = measure_gains(trajectories, judged, smallest)
    claims = [of for of_stage in gains.values() for of in of_stage.values()]
    for pair in pairs:
        for found in pair["measures"].values():
            for question in QUESTIONS if found["why_not"] is None else ():
                found[question]["smallest"] = found["smallest"]
                claims.append(found[question])
    for claim, p in zip(claims, holm([claim.get("p") for claim in claims]), strict=True):
        claim |= {"p_holm": p, "outcome": decide(claim, p)}
    for pair in pairs:
        pair["sentence"] = say(pair)
    return pairs, gains


def decide(result: Row, p: float | None) -> str:
    """Decide what a difference shows.

    Returns:
        `better` (the first is) or `worse`: significant, and large enough to matter; `equivalent`: the whole interval
        is too small to matter; `trivial`: significant, and too small to matter; `same`: not significant;
        `indistinguishable`: every prompt has the same score; `unknown`.
    """
    if p is None:
        return "unknown"
    if result["identical"]:
        return "indistinguishable"
    found, smallest = result["difference"], result["smallest"]
    if -smallest < found["low"] and found["high"] < smallest:
        return "equivalent"
    if p >= LEVEL:
        return "same"
    if abs(found["mean"]) < smallest:
        return "trivial"
    return "better" if found["mean"] > 0 else "worse"


def find_winner(found: Row) -> str | None:
    """Name the winner of a measured pair, `a` or `b`: significant at equal KL, and not the other way as trained."""
    outcomes = [found[question]["outcome"] for question in QUESTIONS]
    if outcomes[0] not in OPPOSITE or outcomes[1] == OPPOSITE[outcomes[0]]:
        return None
    return "a" if outcomes[0] == "better" else "b"


def say(pair: Row) -> str:
    """Say in plain sentences for each measure what was found of two groups."""
    words = [_say(pair["a"], pair["b"], measure, found)
             for measure, found in pair["measures"].items() if found["why_not"] is None]  # fmt: skip
    if not words:
        reasons = "; ".join(dict.fromkeys(found["why_not"] for found in pair["measures"].values()))
        return f"Nothing can be said about {pair['a']} and {pair['b']}: {reasons}."
    return " ".join(words)


def _say(a: str, b: str, measure: str, found: Row) -> str:
    names = [_subject(name, seeds, found["unit"]) for name, seeds in zip((a, b), found["seeds"], strict=True)]
    told = [f"{title}{_at(found[question])} {_state(found[question], names, measure, found)}"
            for question, title in QUESTIONS.items()]  # fmt: skip
    words = f"{BY[measure].capitalize()}, {'; '.join(told)}."
    outcomes = [found[question]["outcome"] for question in QUESTIONS]
    if OPPOSITE.get(outcomes[0]) == outcomes[1]:
        words += " The two answers differ, so that neither is named the better one."
    return words


def _subject(name: str, seeds: int, unit: str) -> str:
    if unit == "methods":
        return name
    return f"the adapter {name}" if seeds == 1 else f"the {seeds} adapters of {name}"


def _at(result: Row) -> str:
    return f" ({result['kl']:{'.2f' if result['kl'] >= 0.1 else '.1g'}} nats)," if result["kl"] else ","


def _state(result: Row, names: Sequence[str], measure: str, found: Row) -> str:
    """State the answer to one question, from the better one's side."""
    both, outcome = " and ".join(names), result["outcome"]
    if outcome == "unknown":
        return f"nothing can be said: {result['why_not']}"
    if outcome == "indistinguishable":
        return DRAWS[outcome].format(both)
    turn = -1 if outcome == "worse" else 1
    numbers = _difference(result, turn, measure)
    if outcome in OPPOSITE:
        first, second = names[::turn]
        return f"{first} {_verb(found)} {second}: {numbers}, {format_p(result['p_holm'])}"
    limit = _number(found["smallest"], measure).removeprefix("+")
    tail = {"equivalent": f"within {limit} either way", "trivial": f"less than {limit}"}
    return f"{DRAWS[outcome].format(both)}: {numbers}, {tail.get(outcome) or format_p(result['p_holm'])}"


def _verb(found: Row, names: int = 1) -> str:
    if found["unit"] == "adapters":
        return "scores higher than"
    return "is better than" if names == 1 else "are better than"


def _number(value: float, measure: str) -> str:
    return f"{100 * value:+.1f} points" if measure == "win_rate" else f"{value:+.2f}"


def _difference(result: Row, turn: int, measure: str) -> str:
    scale, digits = (100, 1) if measure == "win_rate" else (1, 2)
    low, high = sorted(turn * scale * result["difference"][key] for key in ("low", "high"))
    mean = _number(turn * result["difference"]["mean"], measure)
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}] on {result['difference']['n']} prompts"


def conclude(groups: Sequence[str], pairs: Sequence[Row], doubts: Mapping[str, str | None]) -> Row | None:
    """Name the winner, if there is one: the group that wins against every other by the first measure.

    Args:
        doubts: for each measure, why it may mean little, if so.

    Returns:
        `measure`, `winner`, the `sentence`, and `warnings`; None where no pair was measured.
    """
    measures = list(pairs[0]["measures"]) if pairs else []
    known = {of: [pair for pair in pairs if pair["measures"][of]["why_not"] is None] for of in measures}
    measure = next((of for of in measures if known[of]), None)
    if measure is None:
        return None
    results = [(pair["a"], pair["b"], pair["measures"][measure]) for pair in known[measure]]
    beaten: dict[str, list[str]] = {name: [] for name in groups}
    for a, b, found in results:
        winner = find_winner(found)
        if winner:
            first, second = (a, b) if winner == "a" else (b, a)
            beaten[first].append(second)
    winner = next((name for name, others in beaten.items() if len(others) == len(groups) - 1), None)
    missing = [f"{pair['a']} and {pair['b']}" for pair in pairs if pair not in known[measure]]
    warnings = [doubts[measure], *warn([found for *_, found in results])]
    if missing:
        warnings.append(f"not compared: {_several(missing, 'pairs', '; ')}")
    return {
        "measure": measure,
        "winner": winner,
        "sentence": _headline(winner, beaten, results, measure),
        "warnings": [warning for warning in warnings if warning],
    }


def warn(measured: Sequence[Row]) -> list[str]:
    """Say what the number of seeds means, and which runs fell after a peak, each once."""
    words = []
    for fewest in sorted({min(found["seeds"]) for found in measured}):
        if fewest == 1:
            words.append("one seed: nothing is known about the spread between seeds; this is about these adapters, "
                         "not about methods")  # fmt: skip
        elif fewest < FEW_SEEDS:
            words.append(f"{fewest} seeds: only large differences between methods can be seen")
    return words + list(dict.fromkeys(
        f"{peak['stage']} fell after a peak at step {peak['step']} (KL {peak['kl']:.2f} nats), from a gain of "
        f"{peak['gain']:+.2f} to {peak['final']:+.2f}"
        for found in measured for peak in found["collapsed"]
    ))  # fmt: skip


def _headline(
    winner: str | None, beaten: Mapping[str, Sequence[str]], results: Sequence[tuple[str, str, Row]], measure: str
) -> str:
    """The verdict in one sentence."""
    adapters = any(found["unit"] == "adapters" for *_, found in results)
    kind = "adapter" if adapters else "method"
    if winner is not None:
        verb, the = ("scores higher than", "the adapter ") if adapters else ("is better than", "")
        subject, others = f"{the}{winner}", _several([f"{the}{name}" for name in beaten[winner]], f"other {kind}s")
        words = f"{subject[0].upper() + subject[1:] if the else subject} {verb} {others} {BY[measure]} at equal KL, "
        return words + "and not lower as trained." if adapters else words + "and no worse as trained."
    told = [f"{title}, {_tell(question, results)}" for question, title in QUESTIONS.items()]
    between = "two adapters" if adapters else "two methods"
    best = "the better one" if len(results) == 1 else "the best"
    return f"No {kind} is named {best} of the {between if len(results) == 1 else kind + 's'} {BY[measure]}: " + (
        "; ".join(told) + "."
    )


def _tell(question: str, results: Sequence[tuple[str, str, Row]]) -> str:
    """Tell the outcomes of one question for all pairs."""
    better: dict[str, list[str]] = {}
    draws: dict[str, list[tuple[str, str]]] = {}
    for a, b, found in results:
        outcome = found[question]["outcome"]
        if outcome in OPPOSITE:
            first, second = (a, b) if outcome == "better" else (b, a)
            better.setdefault(first, []).append(second)
        else:
            draws.setdefault(outcome, []).append((a, b))
    verb = _verb(results[0][2])
    told = [f"{name} {verb} {_several(others, 'others')}" for name, others in better.items()]
    for outcome, of in draws.items():
        # Where all pairs came out the same, the names say it; otherwise the pairs do.
        alone = len(of) == len(results)
        names = list(dict.fromkeys(name for pair in of for name in pair)) if alone else [" and ".join(p) for p in of]
        told.append(DRAWS[outcome].format(_several(names, "names" if alone else "pairs", " and " if alone else ", ")))
    return ", ".join(told)


def _several(names: Sequence[str], kind: str, between: str = " and ") -> str:
    """Join a few names; of many, say how many."""
    return join(names, between) if len(names) <= 5 else f"{len(names)} {kind}"


def join(names: Sequence[str], between: str = " and ") -> str:
    """Join names as a sentence does: a, b and c."""
    return between.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
