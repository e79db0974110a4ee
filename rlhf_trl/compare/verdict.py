"""Which method is better, by how much: two groups of policies on the same prompts at the same KL.

Functions from the answers of `evaluate` and the scores of `judge` to the verdict of `comparison_results.json`. A
method is a group of stages that differ in their seed alone. Prompts and seeds are both drawn again for the intervals
(two-level bootstrap); the p-values of all pairs of one measure are corrected by Holm (1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_trl.compare.seeds import compare_as_trained, compare_at_equal_kl, probability_of_improvement
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.estimate import holm
from rlhf_trl.stats.trust import weigh_trust

Row = dict[str, Any]
# Stage -> for each of its checkpoints, the final policy last, one record for each prompt (`id`, `kl`, scores).
Records = Mapping[str, Sequence[Sequence[Row]]]
LEVEL = 0.05
# A bootstrap of a few prompts knows nothing of the others.
FEWEST = 20
# A run has been measured near a KL where one of its points lies within this factor of it.
NEAR = 1.5
BY = {"gold": "by the gold model", "reward": "by the reward model", "win_rate": "by the judge"}
NO_SCORES = {"gold": "there is no gold model", "reward": "there is no reward model"}


@dataclass(frozen=True)
class Judged:
    """What a judge said of the answers of a run's policies."""

    scores: Mapping[str, Mapping[str, float]]
    """Stage -> prompt -> score against the reference: 1 won, 0.5 tied, 0 lost."""
    win_rates: Mapping[str, Row]
    """Stage -> estimate over the prompts."""
    who: str | None
    """The judge's id; None where there is none."""
    why_not: str | None = None
    """Why its scores are no measure of their own."""
    doubt: str | None = None
    """Why its scores may mean little."""


def read_judge(recipe: Recipe, run: RunDir) -> Judged:
    """Read the judge's win rates against the reference and the scores behind them, if it judged these answers."""
    nothing = Judged({}, {}, None, "there is no judge, or it has not judged")
    if "judge" not in recipe.plan or not run.winrate.exists():
        return nothing
    found = read_json(run.winrate)
    if found["status"] == "not run" or found["evaluation"] != recipe.fingerprint("evaluate"):
        return nothing
    rates = {row["a"]: row["win_rate"] for row in found["win_rates"] if row["b"] == REFERENCE}
    kind, trust = found["judge"]["kind"], weigh_trust(found)
    doubt = None if trust == "informed" else "the judge has not shown that it can tell better answers"
    return Judged(
        read_json(run.prompt_scores),
        rates,
        found["judge"]["id"],
        "the judge is the gold model, whose scores stand beside this" if kind == "reward" else None,
        "the judge is a rule for tests, which says nothing about answers" if kind == "offline" else doubt,
    )


def read_points(run: RunDir, metrics: Mapping[str, Any], policy: str) -> list[list[Row]]:
    """Read a policy's answers at each evaluated checkpoint, the final ones last; `metrics` is `metrics.json`."""
    steps = [entry["step"] for entry in metrics["checkpoints"].get(policy, [])[:-1]]
    return [read_jsonl(run.completions(policy, step)) for step in [*steps, None]]


def compare_groups(
    pairs_of: Sequence[tuple[str, str]],
    groups: Mapping[str, Sequence[str]],
    records: Records,
    judged: Judged,
    seed: int,
) -> list[Row]:
    """Compare two groups at a time by each measure: the gold model (or, without one, the reward model) and the judge.

    Args:
        pairs_of: names of the groups to compare.
        groups: name -> its stages.
        judged: what the judge said of the stages.

    Returns:
        For each pair: `a`, `b`, and `measures`: by name either `why_not`, or `equal_kl` and `as_trained` (see `seeds`)
        with `improvement`, the probability that a run of `a` ends above a run of `b`. `equal_kl` also has `lines`, the
        groups that were read off a line far from their points, `p_holm` and `outcome`: `better` (a is), `worse`,
        `same` (not significantly different), `indistinguishable` (every prompt the same) or `unknown`. Where there are
        such `lines`, `p` is the larger of the two ways' and 1 where they point in opposite directions, so that no
        line alone makes a winner. The `sentence` says it all.
    """
    final = next(iter(records.values()))[-1][0] if records else {}
    measures = ["gold" if "gold_gain" in final else "reward", "win_rate"]
    pairs: list[Row] = [{"a": a, "b": b, "measures": {}} for a, b in pairs_of]
    for measure in measures:
        found = [_measure(pair["a"], pair["b"], groups, measure, records, judged, seed) for pair in pairs]
        results = [result["equal_kl"] for result in found if result["why_not"] is None]
        for result, p in zip(results, holm([result["p"] for result in results]), strict=True):
            result |= {"p_holm": p, "outcome": _conclude(result, p)}
        for pair, result in zip(pairs, found, strict=True):
            pair["measures"][measure] = result
    for pair in pairs:
        pair["sentence"] = say(pair, len(pairs))
    return pairs


def _measure(
    a: str, b: str, groups: Mapping[str, Sequence[str]], measure: str, records: Records, judged: Judged, seed: int
) -> Row:
    if measure == "win_rate" and judged.why_not:
        return {"why_not": judged.why_not}
    stages = [*groups[a], *groups[b]]
    # The prompts on which every stage of both groups was judged, in the same order for all.
    prompts = sorted(set.intersection(*(set(judged.scores.get(stage, {})) for stage in stages)))
    curves = {stage: curve(records[stage], measure, judged.scores.get(stage, {}), prompts) for stage in stages}
    count = min(gains.shape[-1] for _, gains in curves.values())
    if count == 0 and measure != "win_rate":
        return {"why_not": NO_SCORES[measure]}
    if count < FEWEST:
        return {"why_not": f"only {count} prompts have a score for all of their runs; {FEWEST} are needed"}
    runs = [[curves[stage] for stage in groups[name]] for name in (a, b)]
    finals = [[gains[-1] for _, gains in of] for of in runs]
    equal, trained = compare_at_equal_kl(runs[0], runs[1], seed), compare_as_trained(finals[0], finals[1], seed)
    trained["improvement"] = probability_of_improvement(*(np.array([[of.mean()] for of in final]) for final in finals))
    equal["lines"] = [
        name for name, of in zip((a, b), runs, strict=True) if not all(_near(run, equal["kl"]) for run in of)
    ]
    if equal["lines"] and equal["difference"] is not None and not equal["identical"]:
        agree = equal["difference"]["mean"] * trained["difference"]["mean"] > 0
        equal["p"] = max(equal["p"], trained["p"]) if agree else 1.0
    return {"why_not": None, "equal_kl": equal, "as_trained": trained}


def _near(run: tuple[np.ndarray, np.ndarray], kl: float) -> bool:
    """Whether a run has a point whose mean KL lies within a factor of `NEAR` of this one."""
    return any(kl / NEAR <= mean <= kl * NEAR for mean in run[0].mean(axis=1))


def curve(
    points: Sequence[Sequence[Row]], measure: str, scores: Mapping[str, float], prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """KL and gain of each point of a run on each prompt, (K, P) both; of a win rate, the final policy alone and its
    score less the half that the reference has."""
    if measure == "win_rate":
        kl = {row["id"]: row["kl"] for row in points[-1]}
        return np.array([[kl[name] for name in prompts]]), np.array([[scores[name] - 0.5 for name in prompts]])
    kls = np.array([[row["kl"] for row in rows] for rows in points])
    return kls, np.array([[row[f"{measure}_gain"] for row in rows if f"{measure}_gain" in row] for rows in points])


def _conclude(result: Row, p: float | None) -> str:
    if p is None:
        return "unknown"
    if result["identical"]:
        return "indistinguishable"
    if p >= LEVEL:
        return "same"
    return "better" if result["difference"]["mean"] > 0 else "worse"


def say(pair: Row, pairs: int) -> str:
    """Say in one plain sentence for each measure what was found of two groups."""
    words = [_say(pair["a"], pair["b"], measure, found, pairs)
             for measure, found in pair["measures"].items() if found["why_not"] is None]  # fmt: skip
    if not words:
        reasons = "; ".join(dict.fromkeys(found["why_not"] for found in pair["measures"].values()))
        return f"Nothing can be said about {pair['a']} and {pair['b']}: {reasons}."
    return " ".join(words)


def _say(a: str, b: str, measure: str, found: Row, pairs: int) -> str:
    result, trained = found["equal_kl"], found["as_trained"]
    if result["difference"] is None:
        return f"{a} and {b} cannot be compared {BY[measure]} at the same KL: {result['why_not']}."
    if result["outcome"] == "indistinguishable":
        return f"{a} and {b} are indistinguishable {BY[measure]}: every prompt has the same score."
    # Told from the better one's side.
    first, second, turn = (b, a, -1) if result["outcome"] == "worse" else (a, b, 1)
    kl = f"{result['kl']:{'.2f' if result['kl'] >= 0.1 else '.1g'}}"
    lines = f" ({join(result['lines'])} read off a line, far from what was measured)" if result["lines"] else ""
    corrected = f" after Holm's correction for {pairs} pairs" if pairs > 1 else ""
    numbers = (
        f"at the same KL of {kl} nats{lines}: {_difference(result, turn, measure)}; as trained "
        f"{_difference(trained, turn, measure)}; p = {result['p_holm']:.2g}{corrected}, on "
        f"{result['difference']['n']} prompts."
    )
    if result["outcome"] == "same":
        return f"There is no significant difference between {a} and {b} {BY[measure]} {numbers}"
    return f"{first} is better than {second} {BY[measure]} {numbers}"


def _difference(result: Row, turn: int, measure: str) -> str:
    scale, unit, digits = (100, " points", 1) if measure == "win_rate" else (1, "", 2)
    mean, *ends = (turn * scale * result["difference"][key] for key in ("mean", "low", "high"))
    low, high = sorted(ends)
    return f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]"


def conclude(groups: Sequence[str], pairs: Sequence[Row], doubts: Mapping[str, str | None]) -> Row | None:
    """Name the winner, if there is one: the group that is better than every other by the first measure.

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
    results = [(pair["a"], pair["b"], pair["measures"][measure]["equal_kl"]) for pair in known[measure]]
    beaten: dict[str, list[str]] = {name: [] for name in groups}
    for a, b, result in results:
        if result["outcome"] in ("better", "worse"):
            first, second = (a, b) if result["outcome"] == "better" else (b, a)
            beaten[first].append(second)
    winner = next((name for name, others in beaten.items() if len(others) == len(groups) - 1), None)
    warnings = [doubts[measure], *(result["warning"] for *_, result in results)]
    missing = [f"{pair['a']} and {pair['b']}" for pair in pairs if pair not in known[measure]]
    missing += [f"{a} and {b}" for a, b, result in results if result["outcome"] == "unknown"]
    if missing:
        warnings.append(f"not compared: {_several(missing, 'pairs', '; ')}")
    return {
        "measure": measure,
        "winner": winner,
        "sentence": _headline(winner, beaten, results, measure),
        "warnings": list(dict.fromkeys(warning for warning in warnings if warning)),
    }


def _headline(
    winner: str | None, beaten: Mapping[str, Sequence[str]], results: Sequence[tuple[str, str, Row]], measure: str
) -> str:
    """The verdict in one sentence."""
    alone = any(1 in result["seeds"] for *_, result in results)
    how = f"{BY[measure]} at the same KL" + (", as far as one seed can tell" if alone else "")
    if winner is not None:
        return f"{winner} is better than {_several(beaten[winner], 'others')} {how}."
    outcomes = {result["outcome"] for *_, result in results}
    names = list(dict.fromkeys(name for a, b, result in results if result["outcome"] != "unknown" for name in (a, b)))
    if outcomes == {"unknown"}:
        return "No two methods could be compared at the same KL."
    if outcomes <= {"indistinguishable", "unknown"}:
        return f"{_several(names, 'methods')} are indistinguishable {how}."
    if not any(beaten.values()):
        return f"There is no significant difference between {_several(names, 'methods')} {how}."
    known = "; ".join(
        f"{name} is better than {_several(others, 'others')}" for name, others in beaten.items() if others
    )
    open_ = [f"{a} and {b}" for a, b, result in results if result["outcome"] in ("same", "indistinguishable")]
    between = ", nor between "
    undecided = f"; there is no significant difference between {_several(open_, 'pairs', between)}" if open_ else ""
    return f"No method is better than all others {how}: {known}{undecided}."


def _several(names: Sequence[str], kind: str, between: str = " and ") -> str:
    """Join a few names; of many, say how many."""
    return join(names, between) if len(names) <= 5 else f"{len(names)} {kind}"


def join(names: Sequence[str], between: str = " and ") -> str:
    """Join names as a sentence does: a, b and c."""
    return between.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
