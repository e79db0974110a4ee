"""Step `compare`: which method was better, how steadily and how fast it got there, and what it cost.

Reads `<stage>/training_stats.json` and, where policies are compared, the answers of `evaluation/` and the scores of
`judge/`; writes `comparison/`: `comparison_results.json`, `comparison_report.txt` and `comparison.png`.

    rlhf-trl compare recipes/demo.yaml
    rlhf-trl compare recipes/demo.yaml --stages dpo,grpo
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_trl.compare.evidence import read_judge, read_points, smallest_that_matters
from rlhf_trl.compare.figures import plot_comparison
from rlhf_trl.compare.seeds import summarise_seeds
from rlhf_trl.compare.text_report import render
from rlhf_trl.compare.training import (
    TERMS,
    describe_meanings,
    find,
    measure_convergence,
    measure_efficiency,
    measure_stability,
    needed,
)
from rlhf_trl.compare.verdict import compare_groups, join, name_winner
from rlhf_trl.figures.style import save
from rlhf_trl.recipe.recipe import POLICY_TRAINERS, Recipe
from rlhf_trl.run.files import read_json, write_json, write_text
from rlhf_trl.run.layout import RunDir

Row = dict[str, Any]
# The quantities whose meaning depends on the trainer or the machine.
COMPARABLE = ("loss", "reward", "kl", "convergence", "seconds", "pace")
QUALITY = ("kl", "kl_per_token", "entropy", "reward_gain", "gold_gain", "answer_tokens")


def compare(recipe: Recipe, run: RunDir) -> None:
    """Compare the stages that `comparison.stages` names, by default all policies.

    Raises:
        UserError: a stage is not trained, or policies among them are not evaluated.
    """
    for name in dict.fromkeys(stage for compared in recipe.compared for stage in needed(recipe, compared)):
        run.require(recipe, name, f"train RECIPE {name}")
    if _policies(recipe):
        run.require(recipe, "evaluate", "evaluate RECIPE")
    results = build(recipe, run)
    write_json(run.comparison, results)
    write_text(run.comparison_report, render(recipe.name, results))
    stats = {name: read_json(run.training_stats(name)) for name in recipe.compared}
    save(plot_comparison(results, stats), run.comparison_figure)


def _policies(recipe: Recipe) -> list[str]:
    return [name for name in recipe.compared if recipe.stages[name].trainer in POLICY_TRAINERS]


def build(recipe: Recipe, run: RunDir) -> Row:
    """Build the content of `comparison_results.json` from the files of earlier steps."""
    names, policies = recipe.compared, _policies(recipe)
    stats = {name: read_json(run.training_stats(name)) for compared in names for name in needed(recipe, compared)}
    metrics = read_json(run.metrics) if policies else {"policies": {}, "checkpoints": {}}
    judged = read_judge(recipe, run)
    results = compare_stages(recipe, stats, metrics, judged.win_rates, names)
    groups = {group: [name for name in own if name in names] for group, own in recipe.groups.items()}
    results["groups"] = {group: summarise(results["stages"], own) for group, own in groups.items() if own}
    methods = {group: own for group, own in groups.items() if own and own[0] in policies}
    trajectories = {name: read_points(run, metrics, name) for name in recipe.policies} if policies else {}
    smallest = smallest_that_matters(recipe, run) if policies else {}
    pairs, gains = compare_groups(list(combinations(methods, 2)), methods, trajectories, judged, smallest)
    doubts = {"gold": None, "reward": describe_doubt(recipe, policies), "win_rate": judged.doubt}
    verdict = name_winner(list(methods), pairs, doubts)
    left_out = [name for name in recipe.policies if name not in names]
    if verdict and left_out:
        verdict["warnings"].append(f"not among the compared: {join(left_out)}")
    return {
        **results,
        "against_reference": gains,
        "pairs": [{**pair, "cost": weigh(results, pair["a"], pair["b"])} for pair in pairs],
        "verdict": verdict,
        "definitions": {**TERMS["definitions"], **TERMS["signs"]},
        "settings": recipe.comparison.model_dump(),
    }


def compare_stages(
    recipe: Recipe, stats: Mapping[str, Row], metrics: Row, win_rates: Mapping[str, Row], names: Sequence[str]
) -> Row:
    """Measure each named stage by itself, and gather those in which a quantity means the same.

    Args:
        stats: `training_stats.json` of every stage that is needed.
        metrics: content of `evaluation/metrics.json`; `policies` and `checkpoints` are read.
        win_rates: of each policy against the reference.
    """
    groups = {name: group for group, own in recipe.groups.items() for name in own}
    meanings = {name: describe_meanings(recipe, name, stats[name]) for name in names}
    convergence = measure_convergence(recipe, stats, meanings, metrics)
    stages: dict[str, Row] = {}
    for name in names:
        policy = metrics["policies"].get(name, {})
        quality = {key: policy[key] for key in QUALITY if key in policy}
        stages[name] = {
            "trainer": stats[name]["trainer"],
            "group": groups[name],
            "seed": stats[name]["summary"]["seed"],
            "meanings": meanings[name],
            "stability": measure_stability(stats[name], meanings[name]),
            "convergence": convergence[name],
            "efficiency": measure_efficiency(recipe, name, stats),
            "quality": {**quality, **({"win_rate": win_rates[name]} if name in win_rates else {})}
            if quality
            else None,
        }
    for name, found in find(stages, stats, recipe.evaluation.worst.kl).items():
        stages[name]["findings"] = found
    comparable: dict[str, list[Row]] = {}
    for quantity in COMPARABLE:
        alike: dict[str, list[str]] = {}
        for name, stage in stages.items():
            meaning = stage["convergence"]["meaning"] if quantity == "convergence" else stage["meanings"][quantity]
            if meaning and stage["stability"].get(quantity, True):
                alike.setdefault(meaning, []).append(name)
        comparable[quantity] = [{"meaning": meaning, "stages": own} for meaning, own in alike.items()]
    return {"stages": stages, "comparable": comparable}


def summarise(stages: Mapping[str, Row], names: Sequence[str]) -> Row:
    """Summarise a group over its seeds (`summarise_seeds`)."""
    columns: dict[str, dict[str, float]] = {}
    for name in names:
        stage = stages[name]
        values = {key: of["mean"] for key, of in (stage["quality"] or {}).items()}
        values["final_reward"] = stage["convergence"].get("final")
        values |= {key: stage["efficiency"][key] for key in ("seconds_per_step", "device_seconds_with_inputs")}
        for key, value in values.items():
            if value is not None:
                columns.setdefault(key, {})[name] = value
    seeds = {key: summarise_seeds(points) for key, points in columns.items()}
    return {"trainer": stages[names[0]]["trainer"], "stages": list(names), "seeds": seeds}


def weigh(results: Row, a: str, b: str) -> Row:
    """Hold the compute of two groups against each other: mean device seconds with inputs, and their ratio, where all
    of it ran on the same kind of device."""
    groups = [results["groups"][name] for name in (a, b)]
    devices = {of for group in groups for name in group["stages"]
               for of in results["stages"][name]["efficiency"]["devices"]}  # fmt: skip
    if len(devices) > 1:
        return {"ratio": None, "why_not": "they ran on different devices: " + " and ".join(sorted(devices))}
    one, other = (group["seeds"]["device_seconds_with_inputs"]["mean"] for group in groups)
    return {"ratio": one / other, "why_not": None}


def describe_doubt(recipe: Recipe, policies: Sequence[str]) -> str | None:
    """Say which policies were trained to raise the very reward that compares them."""
    trained = [name for name in policies if recipe.stages[name].reward == recipe.evaluation.reward]
    if not trained or recipe.evaluation.reward is None:
        return None
    were = "was" if len(trained) == 1 else "were"
    return f"{join(trained)} {were} trained to raise this very reward; a gold model or a judge would be independent"
