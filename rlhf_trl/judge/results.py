"""What the verdicts of a judge come to: the content of `judge/winrate.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.judge.agreement import agreement
from rlhf_trl.judge.bradley_terry import bradley_terry
from rlhf_trl.judge.length_control import length_controlled
from rlhf_trl.judge.win_rate import Verdict, compare_pairs, consistency, mean, prompt_scores, win_rate
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.frontier import describe_front
from rlhf_trl.stats.trust import trust_in

Row = dict[str, Any]


def conclude(recipe: Recipe, run: RunDir, settings: Judge, verdicts: Mapping[str, Sequence[Verdict]]) -> Row:
    """Compute every result from the verdicts of each group: `policies`, `labelled`, `injected`."""
    on_policies, seed = verdicts["policies"], recipe.seed
    rates = [
        {
            **win_rate(on_policies, a, b),
            "length_controlled": length_controlled(on_policies, a, b, seed),
            "subsets": {name: win_rate(rows, a, b) for name, rows in _by_subset(on_policies).items()},
        }
        for a, b in dict.fromkeys((verdict["a"], verdict["b"]) for verdict in on_policies)
    ]
    return {
        "prompts": len({verdict["prompt_id"] for verdict in on_policies}),
        "win_rates": rates,
        "comparisons": compare_pairs(on_policies, recipe.policies, REFERENCE) if rates else [],
        "ratings": bradley_terry(on_policies, REFERENCE, seed) if rates else None,
        "habits": consistency(on_policies),
        "calibration": _calibrate(run, settings, verdicts["labelled"], seed),
        "canaries": _measure_injection(verdicts["injected"], verdicts["labelled"]),
        "pareto": _build_axis(recipe, run, on_policies),
    }


def _by_subset(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    subsets = sorted({verdict["subset"] for verdict in verdicts})
    return {name: [verdict for verdict in verdicts if verdict["subset"] == name] for name in subsets}


def _calibrate(run: RunDir, settings: Judge, verdicts: Sequence[Verdict], seed: int) -> Row | None:
    """The judge beside the human labels, for all labelled pairs and each subset."""
    if settings.kind == "reward":
        # On the held-out pairs, each of which it scores once: it has no order.
        return {"reward_model": read_json(run.metrics)["gold_model"], "all": None, "subsets": {}, "verdict": None}
    if not verdicts:
        return None
    labels = {verdict["prompt_id"]: True for verdict in verdicts}
    found = agreement(verdicts, labels, seed)
    subsets = {name: agreement(rows, labels, seed) for name, rows in _by_subset(verdicts).items()}
    return {"reward_model": None, "all": found, "subsets": subsets, "verdict": trust_in(found)}


def _measure_injection(injected: Sequence[Verdict], labelled: Sequence[Verdict]) -> Row | None:
    """How much more often an answer wins with a prompt injection below it, on pairs judged with and without."""
    with_note, without = prompt_scores(injected, "injected", "chosen"), prompt_scores(labelled, "rejected", "chosen")
    both = sorted(with_note.keys() & without.keys())
    if not both:
        return None
    ours, theirs = (np.array([scores[name] for name in both]) for scores in (with_note, without))
    difference = mean(ours - theirs, lowest=-1.0)
    return {"n": len(both), "with_note": mean(ours), "without_note": mean(theirs), "difference": difference}


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
    return {"worst": worst, "points": points, "hypervolume": area, "best_of_n": [], "at_kl": []}
