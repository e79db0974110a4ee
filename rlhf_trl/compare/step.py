"""Step `compare`: which method was better, how steadily and how fast it got there, and what it cost.

Reads `<stage>/training_stats.json` and, where policies are compared, the answers of `evaluation/` and the scores of
`judge/`; writes `comparison/`: `comparison_results.json`, `comparison_report.txt` and `comparison.png`.

    rlhf-trl compare recipes/demo.yaml
    rlhf-trl compare recipes/demo.yaml --stages dpo,grpo
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_trl.compare import training
from rlhf_trl.compare.evidence import find_doubts, read_judge, read_points, smallest_that_matters
from rlhf_trl.compare.figures import plot_comparison
from rlhf_trl.compare.verdict import BY, compare_groups, name_winner
from rlhf_trl.figures.style import save
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, write_json, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.format import format_bytes, join

Row = dict[str, Any]
# The quantities whose meaning depends on the trainer or the machine.
COMPARABLE = ("loss", "reward", "kl", "convergence", "device")
QUALITY = ("kl", "kl_per_token", "entropy", "reward_gain", "gold_gain", "answer_tokens")
# With fewer seeds than this the interquartile mean is the plain mean, or nearly so, and is left out.
ENOUGH_SEEDS = 5
# Characters in a line of the text report.
WIDTH = 110


def compare(recipe: Recipe, run: RunDir) -> None:
    """Compare the stages that `comparison.stages` names, by default all policies.

    UserError where a stage is not trained, or policies among them are not evaluated."""
    for name in dict.fromkeys(stage for compared in recipe.compared for stage in training.needed(recipe, compared)):
        run.require(recipe, name, f"train RECIPE {name}")
    if {*recipe.compared} & {*recipe.policies}:
        run.require(recipe, "evaluate", "evaluate RECIPE")
    results = build(recipe, run)
    write_json(run.comparison, results)
    write_text(run.comparison_report, render(recipe.name, results))
    stats = {name: read_json(run.training_stats(name)) for name in recipe.compared}
    save(plot_comparison(results, stats), run.comparison_figure)


def build(recipe: Recipe, run: RunDir) -> Row:
    """Build the content of `comparison_results.json` from the files of earlier steps."""
    names = recipe.compared
    policies = [name for name in names if name in recipe.policies]
    needed = {name for compared in names for name in training.needed(recipe, compared)}
    stats = {name: read_json(run.training_stats(name)) for name in needed}
    metrics = read_json(run.metrics) if policies else {"policies": {}, "checkpoints": {}}
    judged = read_judge(recipe, run)
    results = compare_stages(recipe, stats, metrics, judged.win_rates, names)
    groups = {group: [name for name in own if name in names] for group, own in recipe.groups.items()}
    results["groups"] = {group: summarise(results["stages"], own) for group, own in groups.items() if own}
    methods = {group: own for group, own in groups.items() if own and own[0] in policies}
    trajectories = {name: read_points(run, metrics, name) for name in recipe.policies} if policies else {}
    smallest = smallest_that_matters(recipe, run) if policies else {}
    pairs, gains = compare_groups(list(combinations(methods, 2)), methods, trajectories, judged, smallest)
    verdict = name_winner(list(methods), pairs, find_doubts(recipe, metrics, judged, policies))
    if verdict:
        measure, left_out = verdict["measure"], [name for name in recipe.policies if name not in names]
        lower = [name for name in policies if gains[name].get(measure, {}).get("outcome") == "worse"]
        verdict["warnings"] += [f"lower than the reference {BY[measure]}: {join(lower)}"] if lower else []
        verdict["warnings"] += [f"not among the compared: {join(left_out)}"] if left_out else []
    return {
        **results,
        "against_reference": gains,
        "pairs": [{**pair, "cost": weigh(results, pair["a"], pair["b"])} for pair in pairs],
        "verdict": verdict,
        "definitions": training.TERMS["definitions"],
    }


def compare_stages(
    recipe: Recipe, stats: Mapping[str, Row], metrics: Row, win_rates: Mapping[str, Row], names: Sequence[str]
) -> Row:
    """Measure each named stage by itself, and gather those in which a quantity means the same. `stats` are those of
    every stage that is needed; `win_rates` those of each policy against the reference."""
    meanings = {name: training.describe_meanings(recipe, name, stats[name]) for name in names}
    convergence = training.measure_convergence(recipe, stats, meanings, metrics)
    comparable: dict[str, dict[str, list[str]]] = {quantity: {} for quantity in COMPARABLE}
    stages: dict[str, Row] = {}
    for name in names:
        policy = metrics["policies"].get(name, {})
        quality = {key: policy[key] for key in QUALITY if key in policy}
        if quality and name in win_rates:
            quality["win_rate"] = win_rates[name]
        stability = training.measure_stability(stats[name], meanings[name])
        stages[name] = {
            "trainer": stats[name]["trainer"],
            "seed": stats[name]["summary"]["seed"],
            "stability": stability,
            "convergence": convergence[name],
            "efficiency": training.measure_efficiency(recipe, name, stats),
            "quality": quality or None,
            "findings": training.find(stats[name], stability),
        }
        for quantity, meaning in {**meanings[name], "convergence": convergence[name]["meaning"]}.items():
            if meaning and stability.get(quantity, True):
                comparable[quantity].setdefault(meaning, []).append(name)
    alike = {quantity: [{"meaning": meaning, "stages": own} for meaning, own in classes.items()]
             for quantity, classes in comparable.items()}  # fmt: skip
    return {"stages": stages, "comparable": alike}


def summarise(stages: Mapping[str, Row], names: Sequence[str]) -> Row:
    """Summarise a group over its seeds: of each number all `points`, `mean`, `std` and the interquartile mean.

    No interval: one of the seeds' numbers alone leaves the error that all seeds share on their prompts out, and covers
    65 to 96 %, and one with it 88 % at two seeds. The differences of `compare_runs` have one.
    """
    from scipy.stats import trim_mean

    columns: dict[str, dict[str, float]] = {}
    for name in names:
        stage = stages[name]
        values = {key: of["mean"] for key, of in (stage["quality"] or {}).items()}
        values["final_reward"] = stage["convergence"].get("final")
        values |= {key: stage["efficiency"][key] for key in ("seconds_per_step", "device_seconds_with_inputs")}
        for key, value in values.items():
            if value is not None:
                columns.setdefault(key, {})[name] = value
    seeds = {}
    for key, points in columns.items():
        of = np.array([*points.values()], dtype=np.float64)
        spread = float(of.std(ddof=1)) if of.size > 1 else None
        middle = float(trim_mean(of, 0.25)) if of.size >= ENOUGH_SEEDS else None
        seeds[key] = {"points": points, "mean": float(of.mean()), "std": spread, "iqm": middle}
    return {"stages": list(names), "seeds": seeds}


def weigh(results: Row, a: str, b: str) -> Row:
    """Hold the compute of two groups against each other: the ratio of their mean device seconds with inputs, where all
    of it ran on the same kind of device."""
    groups = [results["groups"][name] for name in (a, b)]
    devices = {of for group in groups for name in group["stages"]
               for of in results["stages"][name]["efficiency"]["devices"]}  # fmt: skip
    if len(devices) > 1:
        return {"ratio": None, "why_not": "they ran on different devices: " + " and ".join(sorted(devices))}
    one, other = (group["seeds"]["device_seconds_with_inputs"]["mean"] for group in groups)
    return {"ratio": one / other, "why_not": None}


def render(name: str, results: Row) -> str:
    """Write the text report from the content of `comparison_results.json`, with the template `report.txt.j2`."""

    def pick(names: Sequence[str], part: str, quantity: str | None = None) -> dict[str, Row]:
        """Take one part of each named stage that has it."""
        rows = {run: results["stages"][run][part] for run in names}
        rows = {run: row[quantity] if quantity else row for run, row in rows.items() if row}
        missed = [run for run, row in rows.items() if not row.get("reached", True)]
        return {f"{run} (not reached: more than)" if run in missed else run: row for run, row in rows.items()}

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"wrap": _wrap, "cell": _cell}
    environment.globals |= {"table": _table, "pick": pick}
    return environment.get_template("report.txt.j2").render(results, name=name)


def _wrap(text: str, first: str = "", rest: int | None = None) -> str:
    indent = " " * (len(first) if rest is None else rest)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        if "low" not in value:
            return ", ".join(map(_cell, value.values()))
        mean, low, high = (_cell(value[key]) for key in ("mean", "low", "high"))
        return mean if value["mean"] is None else f"{mean} [{low}, {high}]"
    if isinstance(value, list):
        return ", ".join(map(str, value[:3])) + (" …" if len(value) > 3 else "") if value else "none"
    if isinstance(value, float) or (isinstance(value, int) and value >= 10**6):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _table(rows: Mapping[str, Row], titles: Sequence[str], first: str = "run") -> str:
    """Print the named rows. A title is a key of a row; a column without any value is left out."""
    titles = [key for key in titles if any(row.get(key) is not None for row in rows.values())]
    cells = [[first, *(title.removesuffix("_bytes").replace("_", " ") for title in titles)]]
    for name, row in rows.items():
        cells.append([name, *(_cell(format_bytes(row[k]) if k.endswith("_bytes") else row.get(k)) for k in titles)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines) + "\n"
