"""What the verdicts of a judge come to: win rates, ratings, the judge's habits, and whether to believe it.

Pure functions from games (see `winrates`) and the files of `evaluate` to the content of `judge/winrate.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.judge.agreement import agreement
from rlhf_trl.judge.bradley_terry import bradley_terry
from rlhf_trl.judge.length_control import length_controlled
from rlhf_trl.judge.win_rate import compare_pairs, consistency, mean, prompt_scores, win_rate
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.frontier import describe_front
from rlhf_trl.stats.trust import trust_in

Row = dict[str, Any]
Games = Mapping[str, Sequence[Row]]


def conclude(recipe: Recipe, run: RunDir, settings: Judge, games: Games) -> Row:
    """Compute every result from the games of each group: `policies`, `labelled`, `canaries`."""
    of, seed = games["policies"], recipe.seed
    pairs = list(dict.fromkeys((game["a"], game["b"]) for game in of))
    subsets = sorted({game["subset"] for game in of})
    rates = [
        {
            **win_rate(of, a, b),
            "length_controlled": length_controlled(of, a, b, seed),
            "subsets": {name: win_rate([g for g in of if g["subset"] == name], a, b) for name in subsets},
        }
        for a, b in pairs
    ]
    return {
        "prompts": len({game["prompt_id"] for game in of}),
        "win_rates": rates,
        "comparisons": compare_pairs(of, recipe.policies, REFERENCE) if of else [],
        "ratings": bradley_terry(of, REFERENCE, seed) if of else None,
        "habits": consistency(of),
        "calibration": _calibrate(run, settings, games["labelled"], seed),
        "canaries": _compare_canaries(games),
        "pareto": _build_axis(recipe, run, of),
    }


def _calibrate(run: RunDir, settings: Judge, games: Sequence[Row], seed: int) -> Row | None:
    """The judge beside the human labels, for all labelled pairs and each subset."""
    if settings.kind == "reward":
        # On the held-out pairs, each of which it scores once: it has no order.
        return {"reward_model": read_json(run.metrics)["gold_model"], "all": None, "subsets": {}, "verdict": None}
    if not games:
        return None
    labels = {game["prompt_id"]: True for game in games}
    found = agreement(games, labels, seed)
    subsets = {
        name: agreement([game for game in games if game["subset"] == name], labels, seed)
        for name in sorted({game["subset"] for game in games})
    }
    return {"reward_model": None, "all": found, "subsets": subsets, "verdict": trust_in(found)}


def _compare_canaries(games: Games) -> Row | None:
    """How much more often an answer wins with a note to the judge below it, on pairs judged with and without."""
    with_note = prompt_scores(games["canaries"], "canary", "chosen")
    without = prompt_scores(games["labelled"], "rejected", "chosen")
    both = sorted(with_note.keys() & without.keys())
    if not both:
        return None
    swayed = [with_note[name] - without[name] for name in both]
    return {
        "n": len(both),
        "with_note": mean([with_note[name] for name in both]).as_dict(),
        "without_note": mean([without[name] for name in both]).as_dict(),
        "difference": mean(swayed, -1.0).as_dict(),
    }


def _build_axis(recipe: Recipe, run: RunDir, games: Sequence[Row]) -> Row | None:
    """Win rate against KL, in the shape of an axis of `pareto.json`, on the prompts with verdicts for every policy."""
    scores = {name: prompt_scores(games, name, REFERENCE) for name in recipe.policies}
    prompts = sorted(set.intersection(*map(set, scores.values()))) if scores else []
    if not prompts:
        return None
    kls = {}
    for name in recipe.policies:
        kl = {row["id"]: row["kl"] for row in read_jsonl(run.completions(name))}
        kls[name] = np.array([kl[prompt] for prompt in prompts])
    rates = {name: np.array([of[prompt] for prompt in prompts]) for name, of in scores.items()}
    kls[REFERENCE], rates[REFERENCE] = np.zeros(len(prompts)), np.full(len(prompts), 0.5)
    worst = {"gain": 0.5, "kl": recipe.evaluation.worst.kl}
    described, area = describe_front(rates, kls, worst["gain"], worst["kl"], recipe.seed)
    return {
        "worst": worst,
        "points": [
            {"policy": name, "step": None, "trainer": None if name == REFERENCE else recipe.stages[name].trainer,
             **described[name]}
            for name in rates
        ],
        "hypervolume": area,
        "best_of_n": [],
        "at_kl": [],
    }  # fmt: skip
