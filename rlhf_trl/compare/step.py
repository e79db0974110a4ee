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
from rlhf_trl.compare.verdict import compare_groups, conclude, join
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
    names = recipe.compared
    policies = [name for name in names if recipe.stages[name].trainer in POLICY_TRAINERS]
    for name in dict.fromkeys(stage for compared in names for stage in needed(recipe, compared)):
        run.require(recipe, name, f"train RECIPE {name}")
    if policies:
        run.require(recipe, "evaluate", "evaluate RECIPE")
    results = build(recipe, run)
    write_json(run.comparison, results)
    write_text(run.comparison_report, render(recipe.name, results))
    stats = {name: read_json(run.training_stats(name)) for name in names}
    plot_comparison(results, stats, run.comparison_figure)


def build(recipe: Recipe, run: RunDir) -> Row:
    """Build the content of `comparison_results.json` from the files of earlier steps."""
    names = recipe.compared
    policies = [name for name in names if recipe.stages[name].trainer in POLICY_TRAINERS]
    stats = {name: read_json(run.training_stats(name)) for compared in names for name in needed(recipe, compared)}
    metrics = read_json(run.metrics) if policies else {"policies": {}, "checkpoints": {}}
    judged = read_judge(recipe, run)
    results = compare_stages(recipe, stats, metrics, judged.win_rates, names)
    groups = {group: [name for name in own if name in names] for group, own in recipe.groups.items()}
    groups = {group: own for group, own in groups.items() if own}
    results["groups"] = {group: summarise(results["stages"], own) for group, own in groups.items()}
    methods = {group: own for group, own in groups.items() if own[0] in policies}
    trajectories = {name: read_points(run, metrics, name) for name in recipe.policies} if policies else {}
    smallest = smallest_that_matters(recipe, run) if policies else {}
    pairs, gains = compare_groups(list(combinations(methods, 2)), methods, trajectories, judged, smallest)
    results["against_reference"] = gains
    results["pairs"] = [{**pair, "cost": weigh(results, pair["a"], pair["b"])} for pair in pairs]
    doubts = {"gold": None, "reward": describe_doubt(recipe, policies), "win_rate": judged.doubt}
    results["verdict"] = conclude(list(methods), pairs, doubts)
    left_out = [name for name in recipe.policies if name not in names]
    if results["verdict"] and left_out:
        results["verdict"]["warnings"].append(f"not among the compared: {join(left_out)}")
    return {
        **results,
        "definitions": {**TERMS["definitions"], **TERMS["signs"]},
        "settings": recipe.comparison.model_dump(),
    }


def compare_stages(
    recipe: Recipe, stats: Mapping[str, Row], metrics: Row, win_rates: Mapping[str, Row], names: Sequence[str]
) -> Row:
    """Measure each stage by itself.

    Args:
        stats: `training_stats.json` of every stage that is needed.
        metrics: content of `evaluation/metrics.json`; `policies` and `checkpoints` are read.
        win_rates: of each policy against the reference.
    """
    groups = {name: group for group, own in recipe.groups.items() for name in own}
    meanings = {name: describe_meanings(recipe, name, stats[name]) for name in names}
    convergence = measure_convergence(recipe, stats, meanings, metrics)
    stages = {
        name: {
            "trainer": stats[name]["trainer"],
            "group": groups[name],
            "seed": stats[name]["summary"]["seed"],
            "meanings": meanings[name],
            "stability": measure_stability(stats[name], meanings[name]),
            "convergence": convergence[name],
            "efficiency": measure_efficiency(recipe, name, stats),
            "quality": _quality(metrics["policies"].get(name), win_rates.get(name)),
        }
        for name in names
    }
    for name, found in find(stages, stats, recipe.evaluation.worst.kl).items():
        stages[name]["findings"] = found
    return {"stages": stages, "comparable": {quantity: _gather(stages, quantity) for quantity in COMPARABLE}}


def _gather(stages: Mapping[str, Row], quantity: str) -> list[Row]:
    """Gather the stages in which a quantity means the same; those that do not have it are left out."""
    found: dict[str, list[str]] = {}
    for name, stage in stages.items():
        meaning = stage["convergence"]["meaning"] if quantity == "convergence" else stage["meanings"][quantity]
        if meaning and (quantity not in stage["stability"] or stage["stability"][quantity]):
            found.setdefault(meaning, []).append(name)
    return [{"meaning": meaning, "stages": names} for meaning, names in found.items()]


def _quality(policy: Row | None, win_rate: Row | None) -> Row | None:
    if policy is None:
        return None
    return {**{key: policy[key] for key in QUALITY if key in policy}, **({"win_rate": win_rate} if win_rate else {})}


def summarise(stages: Mapping[str, Row], names: Sequence[str]) -> Row:
    """Summarise a group over its seeds: every point, and mean, spread and interval where there are enough."""
    columns: dict[str, dict[str, float]] = {}
    for name in names:
        stage = stages[name]
        for key, value in (stage["quality"] or {}).items():
            if value["mean"] is not None:
                columns.setdefault(key, {})[name] = value["mean"]
        if stage["convergence"]["meaning"]:
            columns.setdefault("final_reward", {})[name] = stage["convergence"]["final"]
        for key in ("seconds_per_step", "device_seconds_with_inputs"):
            columns.setdefault(key, {})[name] = stage["efficiency"][key]
    return {
        "trainer": stages[names[0]]["trainer"],
        "stages": list(names),
        "seeds": {key: summarise_seeds(points) for key, points in columns.items()},
    }


def weigh(results: Row, a: str, b: str) -> Row:
    """Hold the compute of two groups against each other: mean device seconds with inputs, and their ratio, where all
    of it ran on the same kind of device."""
    groups, stages = results["groups"], results["stages"]
    devices = {
        of for group in (a, b) for name in groups[group]["stages"] for of in stages[name]["efficiency"]["devices"]
    }
    if len(devices) > 1:
        return {"ratio": None, "why_not": "they ran on different devices: " + " and ".join(sorted(devices))}
    means = {group: groups[group]["seeds"]["device_seconds_with_inputs"]["mean"] for group in (a, b)}
    return {"ratio": means[a] / means[b], "why_not": None}


def describe_doubt(recipe: Recipe, policies: Sequence[str]) -> str | None:
    """Say which policies were trained to raise the very reward that compares them."""
    trained = [name for name in policies if recipe.stages[name].reward == recipe.evaluation.reward]
    if not trained or recipe.evaluation.reward is None:
        return None
    were = "was" if len(trained) == 1 else "were"
    return f"{join(trained)} {were} trained to raise this very reward; a gold model or a judge would be independent"
