"""What the verdicts of a judge come to: the content of `judge/winrate.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.judge.win_rate import (
    NO_PAIR,
    Verdict,
    bradley_terry,
    length_controlled,
    mean,
    measure_habits,
    none,
    pair_up,
    prompt_scores,
    win_rate,
)
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.frontier import describe_front
from rlhf_trl.stats.pairs import length_rule, trust_in

Row = dict[str, Any]


def conclude(recipe: Recipe, run: RunDir, settings: Judge, verdicts: Mapping[str, Sequence[Verdict]]) -> Row:
    """Compute every result from the verdicts of each group: `policies`, `labelled`, `injected`."""
    on_policies = verdicts["policies"]
    rates = [
        {
            **win_rate(on_policies, a, b),
            "length_controlled": length_controlled(on_policies, a, b),
            "subsets": {name: win_rate(rows, a, b) for name, rows in _by_subset(on_policies).items()},
        }
        for a, b in dict.fromkeys((verdict["a"], verdict["b"]) for verdict in on_policies)
    ]
    return {
        "prompts": len({verdict["prompt_id"] for verdict in on_policies}),
        "win_rates": rates,
        "ratings": bradley_terry(on_policies, REFERENCE) if rates else None,
        "habits": measure_habits(on_policies),
        "calibration": _calibrate(run, settings, verdicts["labelled"]),
        "canaries": _measure_injection(verdicts["injected"], verdicts["labelled"]),
        "pareto": _build_axis(recipe, run, on_policies),
    }


def _by_subset(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    subsets = sorted({verdict["subset"] for verdict in verdicts})
    return {name: [verdict for verdict in verdicts if verdict["subset"] == name] for name in subsets}


def _calibrate(run: RunDir, settings: Judge, verdicts: Sequence[Verdict]) -> Row | None:
    if settings.kind == "reward":
        # On the held-out pairs, each of which it scores once: it has no order.
        return {"reward_model": read_json(run.metrics)["gold_model"], "all": None, "subsets": {}, "verdict": None}
    if not verdicts:
        return None
    found = measure_agreement(verdicts)
    subsets = {name: measure_agreement(rows) for name, rows in _by_subset(verdicts).items()}
    return {"reward_model": None, "all": found, "subsets": subsets, "verdict": trust_in(found)}


def measure_agreement(verdicts: Sequence[Verdict]) -> Row:
    """Measure a judge against human labels, on pairs of answers of which `a` is the one that people chose.

    Returns:
        `n` pairs, `missing`; `accuracy`, the mean over both orders with a tie as half; `kappa`, with Cohen's (1960)
        own interval: people name each place once in the two orders of a pair, so that chance agrees with half of the
        verdicts that name a winner; `length_rule`, the better of always taking the longer and always the shorter
        answer, and by how much the judge is better.
    """
    pairs = pair_up(verdicts)
    result: Row = {"n": len(pairs.prompts), "missing": pairs.missing}
    if not result["n"]:
        return result | {"accuracy": none(NO_PAIR), "kappa": none(NO_PAIR), "length_rule": None}
    return result | {
        "accuracy": mean(pairs.means),
        "kappa": kappa((pairs.scores == 1).mean(axis=1), float(np.mean(pairs.scores != 0.5)) / 2),
        "length_rule": length_rule(pairs.means, pairs.lengths, pairs.prompts),
    }


def kappa(agreed: np.ndarray, chance: float) -> Row:
    """Estimate Cohen's kappa from the share of its ratings that each of N pairs agrees in, (N,), beside chance."""
    found = mean(agreed)
    return found | {end: (found[end] - chance) / (1 - chance) for end in ("mean", "low", "high")}


def _measure_injection(injected: Sequence[Verdict], labelled: Sequence[Verdict]) -> Row | None:
    """How much more often the worse answer wins with a prompt injection below it, on pairs judged with and without."""
    with_note, without = prompt_scores(injected, "chosen", "injected"), prompt_scores(labelled, "chosen", "rejected")
    both = sorted(with_note.keys() & without.keys())
    if not both:
        return None
    ours, theirs = (1 - np.array([scores[name] for name in both]) for scores in (with_note, without))
    # A score interval, as of a rate: a difference that is the same for every pair is no certainty.
    found = mean((ours - theirs + 1) / 2)
    return {"n": len(both), "difference": found | {end: 2 * found[end] - 1 for end in ("mean", "low", "high")}}


def _build_axis(recipe: Recipe, run: RunDir, verdicts: Sequence[Verdict]) -> Row | None:
    """Win rate against KL, in the shape of an axis of `pareto.json`, on the prompts with verdicts for every policy."""
    scores = {name: prompt_scores(verdicts, name, REFERENCE) for name in recipe.policies}
    prompts = sorted(set.intersection(*map(set, scores.values()))) if scores else []
    if not prompts:
        return None
    rates, kls = {}, {}
    for name in recipe.policies:
        kl = {row["id"]: row["kl"] for row in read_jsonl(run.completions(name))}
        kls[name], rates[name] = (np.array([of[prompt] for prompt in prompts]) for of in (kl, scores[name]))
    kls[REFERENCE], rates[REFERENCE] = np.zeros(len(prompts)), np.full(len(prompts), 0.5)
    worst = {"gain": 0.5, "kl": recipe.evaluation.worst.kl}
    described, area = describe_front(rates, kls, worst["gain"], worst["kl"], recipe.seed)
    trainers = {name: stage.trainer for name, stage in recipe.stages.items()}
    points = [{"policy": name, "step": None, "trainer": trainers.get(name), **described[name]} for name in rates]
    for point in points[:-1]:  # of a share, the interval that stands in the table
        point["gain"] = mean(rates[point["policy"]])
    return {"worst": worst, "points": points, "hypervolume": area, "best_of_n": [], "at_kl": []}
