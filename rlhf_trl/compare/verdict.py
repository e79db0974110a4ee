"""Which method is better, by how much: what is significant, what matters, who is named, and in which words.

*As trained* compares the final policies, those that an export would share; *at equal KL* reads each run along its own
path. A winner needs a significant difference that matters at equal KL, and none in the other direction as trained. The
p-values of all claims are corrected together (Holm, 1979). Reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.compare.evidence import Judged, Trajectory, measure_gains, measure_pair
from rlhf_trl.stats.intervals import LEVEL, holm
from rlhf_trl.text.format import format_estimate, format_number, format_p, join

Row = dict[str, Any]
BY = {"gold": "by the gold model", "reward": "by the reward model", "win_rate": "by the judge"}
QUESTIONS = {"equal_kl": "at equal KL", "as_trained": "as trained"}
OPPOSITE = {"better": "worse", "worse": "better"}
# Outcome -> what is said of two for which no better one is named, and the word between several such pairs.
DRAWS = {
    "trivial": ("there is no difference that matters between {}", " or "),
    "equivalent": ("{} are equivalent", " and "),
    "same": ("there is no significant difference between {}", " or "),
    "indistinguishable": ("{} have the same score on every prompt", " and "),
    "unknown": ("nothing can be said about {}", " or "),
}
FEW_SEEDS = 5


def compare_groups(
    pairs_of: Sequence[tuple[str, str]],
    groups: Mapping[str, Sequence[str]],
    trajectories: Mapping[str, Trajectory],
    judged: Judged,
    smallest: Mapping[str, float],
) -> tuple[list[Row], dict[str, dict[str, Row]]]:
    """Compare two groups of stages at a time, and each final policy with the reference.

    Args:
        smallest: for each measure, the smallest difference that matters.

    Returns:
        For each pair `a`, `b`, the `sentence` and `measures` (`evidence.measure_pair`): the gold model or, without
        one, the reward model, and the judge; and for each stage its gains (`evidence.measure_gains`). Every result
        that was tested has `p_holm` and `outcome` (`decide`).
    """
    scored = "gold" if any("gold_gain" in of.numbers for of in trajectories.values()) else "reward"
    pairs: list[Row] = []
    for a, b in pairs_of:
        of = {
            measure: measure_pair([groups[a], groups[b]], measure, trajectories, judged, smallest.get(measure, 0.0))
            for measure in (scored, "win_rate")
        }
        pairs.append({"a": a, "b": b, "measures": of})
    gains = measure_gains(trajectories, judged, smallest)
    claims = [claim for of_stage in gains.values() for claim in of_stage.values()]
    claims += [found[question] for pair in pairs for found in pair["measures"].values() if found["why_not"] is None
               for question in QUESTIONS]  # fmt: skip
    for claim, p in zip(claims, holm([claim.get("p") for claim in claims]), strict=True):
        claim |= {"p_holm": p, "outcome": decide(claim, p)}
    return [{**pair, "sentence": say(pair)} for pair in pairs], gains


def decide(claim: Row, p: float | None) -> str:
    """Decide what a difference shows.

    Returns:
        `better` (the first is) or `worse`: significant, and large enough to matter; `equivalent`: the whole interval
        is too small to matter; `trivial`: significant, and too small to matter; `same`: not significant;
        `indistinguishable`: every prompt has the same score; `unknown`.
    """
    if p is None:
        return "unknown"
    if claim["identical"]:
        return "indistinguishable"
    found, smallest = claim["difference"], claim["smallest"]
    if -smallest < found["low"] and found["high"] < smallest:
        return "equivalent"
    if p >= LEVEL:
        return "same"
    if abs(found["mean"]) < smallest:
        return "trivial"
    return "better" if found["mean"] > 0 else "worse"


def say(pair: Row) -> str:
    """Say in plain sentences for each measure what was found of two groups."""
    words = []
    for measure, found in pair["measures"].items():
        if found["why_not"] is not None:
            continue
        names, told = [_subject(pair, found, side) for side in "ab"], []
        for question, title in QUESTIONS.items():
            claim = found[question]
            kl = f" ({format_number(claim['kl'])} nats)" if claim["kl"] else ""
            told.append(f"{title}{kl}, {_answer(claim, names, measure, found)}")
        words.append(f"{BY[measure].capitalize()}, {'; '.join(told)}.")
        one, other = (found[question]["outcome"] for question in QUESTIONS)
        if OPPOSITE.get(one) == other:
            words.append("The two answers differ, so that neither is named the better one.")
    reasons = "; ".join(dict.fromkeys(str(found["why_not"]) for found in pair["measures"].values()))
    return " ".join(words) or f"Nothing can be said about {pair['a']} and {pair['b']}: {reasons}."


def _subject(pair: Row, found: Row, side: str) -> str:
    """Call one of a pair by what was compared: a method, an adapter, or the adapters of a method."""
    name, seeds = pair[side], found["seeds"]["ab".index(side)]
    if found["unit"] == "methods":
        return str(name)
    return f"the adapter {name}" if seeds == 1 else f"the {seeds} adapters of {name}"


def _verb(subject: str, adapters: bool) -> str:
    if adapters:
        return "score higher than" if " adapters of " in subject else "scores higher than"
    return "is better than"


def _answer(claim: Row, names: Sequence[str], measure: str, found: Row) -> str:
    """Answer one question, from the better one's side."""
    outcome = claim["outcome"]
    if outcome == "unknown":
        return f"nothing can be said: {claim['why_not']}"
    draw = DRAWS[outcome][0].format(" and ".join(names)) if outcome in DRAWS else ""
    if outcome == "indistinguishable":
        return draw
    low, mean, high = (claim["difference"][key] for key in ("low", "mean", "high"))
    ends = {"low": -high, "mean": -mean, "high": -low} if outcome == "worse" else claim["difference"]
    is_share = measure == "win_rate"
    numbers = f"{format_estimate(ends, '+', is_share)} on {claim['difference']['n']} prompts"
    if not draw:
        one, other = names[::-1] if outcome == "worse" else names
        return f"{one} {_verb(one, found['unit'] == 'adapters')} {other}: {numbers}, {format_p(claim['p_holm'])}"
    smallest = dict.fromkeys(("low", "mean", "high"), found["smallest"])
    limit = format_estimate(smallest, "+", is_share).removeprefix("+")
    tail = {"equivalent": f"within {limit} either way", "trivial": f"less than {limit}"}
    return f"{draw}: {numbers}, {tail.get(outcome) or format_p(claim['p_holm'])}"


def name_winner(groups: Sequence[str], pairs: Sequence[Row], doubts: Mapping[str, Sequence[str]]) -> Row | None:
    """Name the winner, if there is one: the group that wins against every other by the first measure.

    Args:
        doubts: for each measure, why it may mean little.

    Returns:
        `measure`, `winner`, the `sentence`, and `warnings`; None where no pair was measured.
    """
    measures = pairs[0]["measures"] if pairs else ()
    measure = next((of for of in measures if not all(pair["measures"][of]["why_not"] for pair in pairs)), None)
    if measure is None:
        return None
    results = [(pair, pair["measures"][measure]) for pair in pairs if not pair["measures"][measure]["why_not"]]
    adapters = any(found["unit"] == "adapters" for _, found in results)
    unit = {"unit": "adapters" if adapters else "methods"}
    subjects = {pair[side]: _subject(pair, {**found, **unit}, side) for pair, found in results for side in "ab"}
    beaten: dict[str, list[str]] = {name: [] for name in groups}
    for pair, found in results:
        equal_kl, trained = (found[question]["outcome"] for question in QUESTIONS)
        if equal_kl in OPPOSITE and trained != OPPOSITE[equal_kl]:
            first, second = _in_order(pair, equal_kl)
            beaten[first].append(subjects[second])
    winner = next((name for name, others in beaten.items() if len(others) == len(groups) - 1), None)
    if winner is not None:
        subject, others = subjects[winner], _several(beaten[winner], "others")
        words = f"{subject[0].upper() + subject[1:] if adapters else subject} {_verb(subject, adapters)} {others} "
        words += f"{BY[measure]} at equal KL, and {'not lower' if adapters else 'no worse'} as trained."
    else:
        told = [f"{title.capitalize().replace('kl', 'KL')}, {_tell(question, results, adapters)}."
                for question, title in QUESTIONS.items()]  # fmt: skip
        words = " ".join([f"No winner {BY[measure]}.", *told])
    missing = [f"{pair['a']} and {pair['b']}" for pair in pairs if pair["measures"][measure]["why_not"]]
    warnings = [*doubts[measure], *warn([found for _, found in results])]
    warnings += [f"not compared: {_several(missing, 'pairs', '; ')}"] if missing else []
    return {"measure": measure, "winner": winner, "sentence": words, "warnings": warnings}


def _tell(question: str, results: Sequence[tuple[Row, Row]], adapters: bool) -> str:
    """Tell the outcomes of one question for all pairs."""
    better: dict[str, list[str]] = {}
    draws: dict[str, list[Row]] = {}
    for pair, found in results:
        outcome = found[question]["outcome"]
        if outcome in OPPOSITE:
            first, second = _in_order(pair, outcome)
            better.setdefault(first, []).append(second)
        else:
            draws.setdefault(outcome, []).append(pair)
    told = [f"{name} {_verb(name, adapters)} {_several(others, 'others')}" for name, others in better.items()]
    for outcome, of in draws.items():
        sentence, between = DRAWS[outcome]
        names = _several([f"{pair['a']} and {pair['b']}" for pair in of], "pairs", between)
        if len(of) == len(results):  # all pairs came out the same: the names say it
            names = _several(list(dict.fromkeys(pair[side] for pair in of for side in "ab")), "all")
        told.append(sentence.format(names))
    return "; ".join(told)


def _in_order(pair: Row, outcome: str) -> tuple[str, str]:
    """The names of a pair, the better one first."""
    return (pair["a"], pair["b"]) if outcome == "better" else (pair["b"], pair["a"])


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


def _several(names: Sequence[str], kind: str, between: str = " and ") -> str:
    """Join a few names; of many, say how many."""
    return join(names, between) if len(names) <= 5 else f"{len(names)} {kind}"
