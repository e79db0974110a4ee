"""Which method is better, by how much: every two groups of policies on the same prompts at the same KL.

Functions from the answers of `evaluate` and the scores of `judge` to the verdict of `comparison_results.json`. A
method is a group of stages that differ in their seed alone. Prompts and seeds are both drawn again for the intervals
(two-level bootstrap); the p-values of all pairs of one measure are corrected by Holm (1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.rundir import RunDir, read_jsonl
from rlhf_trl.seeds import compare_as_trained, compare_at_equal_kl
from rlhf_trl.stats import holm

Row = dict[str, Any]
# Stage -> for each of its checkpoints, the final policy last, one record for each prompt (`id`, `kl`, scores).
Records = Mapping[str, Sequence[Sequence[Row]]]
LEVEL = 0.05
BY = {"gold": "by the gold model", "reward": "by the reward model", "win_rate": "by the judge"}
NO_SCORES = {
    "gold": "there is no gold model",
    "reward": "there is no reward model",
    "win_rate": "there is no judge, or it has not judged",
}


def compare_groups(
    pairs_of: Sequence[tuple[str, str]],
    groups: Mapping[str, Sequence[str]],
    records: Records,
    judged: Mapping[str, Mapping[str, float]],
    seed: int,
) -> list[Row]:
    """Compare two groups at a time by each measure: the gold model (or, without one, the reward model) and the judge.

    Args:
        pairs_of: names of the groups to compare.
        groups: name -> its stages.
        judged: stage -> prompt -> score against the reference (1 won, 0.5 tied, 0 lost); may lack stages.

    Returns:
        For each pair: `a`, `b`, and `measures`: by name either `why_not`, or `equal_kl` and `as_trained` (see
        `seeds`), each with `p_holm` and `outcome`: `better` (a is), `worse`, `same` (not significantly different) or
        `indistinguishable` (every prompt the same); and the `sentence` that says so.
    """
    final = next(iter(records.values()))[-1][0] if records else {}
    measures = ["gold" if "gold_gain" in final else "reward", "win_rate"]
    pairs: list[Row] = [{"a": a, "b": b, "measures": {}} for a, b in pairs_of]
    for measure in measures:
        found = [_compare(groups[pair["a"]], groups[pair["b"]], measure, records, judged, seed) for pair in pairs]
        for way in ("equal_kl", "as_trained"):
            _correct([result[way] for result in found if result["why_not"] is None])
        for pair, result in zip(pairs, found, strict=True):
            pair["measures"][measure] = result
    for pair in pairs:
        pair["sentence"] = say(pair, len(pairs))
    return pairs


def read_points(run: RunDir, metrics: Mapping[str, Any], policy: str) -> list[list[Row]]:
    """Read a policy's answers at each evaluated checkpoint, the final ones last; `metrics` is `metrics.json`."""
    steps = [entry["step"] for entry in metrics["checkpoints"].get(policy, [])[:-1]]
    return [read_jsonl(run.completions(policy, step)) for step in [*steps, None]]


def _compare(
    a: Sequence[str],
    b: Sequence[str],
    measure: str,
    records: Records,
    judged: Mapping[str, Mapping[str, float]],
    seed: int,
) -> Row:
    # The prompts on which every stage of both groups was judged, in the same order for all.
    prompts = sorted(set.intersection(*(set(judged.get(stage, {})) for stage in (*a, *b))))
    curves = [[curve(records[stage], measure, judged.get(stage, {}), prompts) for stage in group] for group in (a, b)]
    if any(gains.size == 0 for group in curves for _, gains in group):
        return {"why_not": NO_SCORES[measure]}
    finals = [[gains[-1] for _, gains in group] for group in curves]
    return {
        "why_not": None,
        "equal_kl": compare_at_equal_kl(curves[0], curves[1], seed),
        "as_trained": compare_as_trained(finals[0], finals[1], seed),
    }


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


def _correct(results: Sequence[Row]) -> None:
    """Add Holm's p-value and the outcome to each."""
    for result, p in zip(results, holm([result["p"] for result in results]), strict=True):
        result["p_holm"] = p
        if p is None:
            result["outcome"] = "unknown"
        elif result["identical"]:
            result["outcome"] = "indistinguishable"
        elif p >= LEVEL:
            result["outcome"] = "same"
        else:
            result["outcome"] = "better" if result["difference"]["mean"] > 0 else "worse"


def say(pair: Row, pairs: int) -> str:
    """Say in one plain sentence for each measure what was found of two groups."""
    words = [_say(pair["a"], pair["b"], measure, found, pairs)
             for measure, found in pair["measures"].items() if found["why_not"] is None]  # fmt: skip
    if not words:
        reasons = "; ".join(dict.fromkeys(found["why_not"] for found in pair["measures"].values()))
        return f"Nothing can be said about {pair['a']} and {pair['b']}: {reasons}."
    return " ".join(words)


def _say(a: str, b: str, measure: str, found: Row, pairs: int) -> str:
    result = found["equal_kl"]
    if result["difference"] is None:
        return f"{a} and {b} cannot be compared {BY[measure]} at the same KL: {result['why_not']}."
    if result["outcome"] == "indistinguishable":
        return f"{a} and {b} are indistinguishable {BY[measure]}: every prompt has the same score."
    # Told from the better one's side.
    first, second, turn = (b, a, -1) if result["outcome"] == "worse" else (a, b, 1)
    scale, unit = (100, " percentage points") if measure == "win_rate" else (1, "")
    mean, *ends = (turn * scale * result["difference"][key] for key in ("mean", "low", "high"))
    low, high = sorted(ends)
    digits = 1 if unit else 2
    at = f"at the same KL of {result['kl']:{'.2f' if result['kl'] >= 0.1 else '.1g'}} nats: "
    at += f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}], p = {result['p_holm']:.2g}"
    at += f" after Holm's correction for {pairs} pairs" if pairs > 1 else ""
    if result["outcome"] == "same":
        return f"There is no significant difference between {a} and {b} {BY[measure]} {at}."
    return f"{first} is better than {second} {BY[measure]} {at}."


def conclude(groups: Sequence[str], pairs: Sequence[Row]) -> Row | None:
    """Name the winner, if there is one: the group that is better than every other by the first measure.

    Returns:
        `measure`, `winner`, the `sentence`, and the warnings of all pairs; None where no pair was measured.
    """
    measure = next(iter(pairs[0]["measures"])) if pairs else ""
    if pairs and any(pair["measures"][measure]["why_not"] for pair in pairs):
        measure = "win_rate"
    if not pairs or any(pair["measures"][measure]["why_not"] for pair in pairs):
        return None
    results = [(pair["a"], pair["b"], pair["measures"][measure]["equal_kl"]) for pair in pairs]
    beaten: dict[str, list[str]] = {name: [] for name in groups}
    for a, b, result in results:
        if result["outcome"] in ("better", "worse"):
            first, second = (a, b) if result["outcome"] == "better" else (b, a)
            beaten[first].append(second)
    winner = next((name for name, others in beaten.items() if len(others) == len(groups) - 1), None)
    warnings = list(dict.fromkeys(result["warning"] for *_, result in results if result["warning"]))
    return {
        "measure": measure,
        "winner": winner,
        "sentence": _headline(winner, beaten, results, measure),
        "warnings": warnings,
    }


def _headline(
    winner: str | None, beaten: Mapping[str, Sequence[str]], results: Sequence[tuple[str, str, Row]], measure: str
) -> str:
    """The verdict in one sentence."""
    alone = any(1 in result["seeds"] for *_, result in results)
    how = f"{BY[measure]} at the same KL" + (", as far as one seed can tell" if alone else "")
    if winner is not None:
        return f"{winner} is better than {join(beaten[winner])} {how}."
    if not any(beaten.values()):
        if all(result["outcome"] == "indistinguishable" for *_, result in results):
            return f"{join(list(beaten))} are indistinguishable {how}."
        return f"There is no significant difference between {join(list(beaten))} {how}."
    known = "; ".join(f"{name} is better than {join(others)}" for name, others in beaten.items() if others)
    open_ = [f"{a} and {b}" for a, b, result in results if result["outcome"] not in ("better", "worse")]
    undecided = f"; there is no significant difference between {join(open_, ', nor between ')}" if open_ else ""
    return f"No method is better than all others {how}: {known}{undecided}."


def join(names: Sequence[str], between: str = " and ") -> str:
    """Join names as a sentence does: a, b and c."""
    return between.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
