"""Step `report`: one page, for a reader new to the run, that says what came out and where each number is from.

Reads the JSON and JSONL files of the run directory; writes `report.html`, which needs no other file and no script.
A value gets onto the page as a node of its file (`values`) and carries its address as `data-source`, for instance
`evaluation/metrics.json#/policies/dpo/kl`; lines of a JSONL file count from 0.

    rlhf-trl report recipes/demo.yaml
    rlhf-trl report runs/demo runs/demo-long     # two runs beside each other: `report/beside.py`
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report.figures import draw_comparison, draw_courses, draw_frontiers, draw_panels
from rlhf_trl.report.sentences import judge_gain, order_alarms, view_judge
from rlhf_trl.report.values import Node, build_environment, raw
from rlhf_trl.run.documents import WinRate, read_document
from rlhf_trl.run.files import read_json, read_jsonl, write_text
from rlhf_trl.run.layout import PLACES, REFERENCE, RunDir
from rlhf_trl.stats.trust import compare_with_length
from rlhf_trl.text.display import take_turns

SAMPLES = 8
WORST = 3
NOT_LISTED = {"report", "data", "evaluation", "log", "holder"}  # the page itself, and folders whose files are listed


def report(recipe: Recipe, run: RunDir) -> None:
    """Write the page.

    Raises:
        UserError: an earlier step is missing, or was made with other settings.
    """
    for step in recipe.plan[1:-1]:
        if step == "judge" and _judge_gave_up(recipe, run):
            continue
        run.require(recipe, step, f"train RECIPE {step}" if step in recipe.stages else f"{step} RECIPE")
    write_text(run.report, render(recipe, run))


def _judge_gave_up(recipe: Recipe, run: RunDir) -> bool:
    """Whether the judge could not run, or not to its end, on these answers; the page says so."""
    result, _ = read_document(run.winrate, WinRate)
    return result is not None and result.status != "complete" and result.evaluation == recipe.fingerprint("evaluate")


def render(recipe: Recipe, run: RunDir) -> str:
    """Render the page from the files of a finished run."""
    documents = read_documents(recipe, run)
    metrics, winrate, over = (raw(documents[key]) for key in ("metrics", "winrate", "over_optimisation"))
    claims = raw(documents["compared"]["against_reference"])
    pareto = raw(documents["pareto"]) or {"axes": {}}
    alarms = order_alarms(over["alarms"], recipe.policies) if over else []
    page = build_environment().get_template("report.html.j2")
    return page.render(
        **documents,
        recipe=recipe,
        recipe_lines=_as_yaml(raw(documents["recipe_json"]), list(recipe.stages)).split("\n"),
        contents=list_contents(recipe, run),
        quarantine=_relative(run, run.quarantine),
        samples_folder=_relative(run, run.samples),
        trainers=list(dict.fromkeys(recipe.stages[name].trainer for name in recipe.policies)),
        starts=sorted({recipe.stages[name].init or "" for name in recipe.policies}),
        scores={
            key: {name: judge_gain(metrics["policies"][name], claims.get(name, {}), key) for name in recipe.policies}
            for key in ("reward", "gold")
            if metrics[f"{key}_stage"]
        },
        trained={
            key: [
                name for name in recipe.policies if recipe.stages[name].reward == metrics[f"{key}_stage"] is not None
            ]
            for key in ("reward", "gold")
        },
        reward_verdicts={
            key: compare_with_length(metrics[key]["length_rule"])
            for key in ("reward_model", "gold_model")
            if metrics[key]
        },
        judge=view_judge(winrate, recipe.policies),
        alarms=[documents["over_optimisation"]["alarms"][place] for place in alarms],
        compared_figures=draw_comparison(raw(documents["compared"])),
        frontiers=draw_frontiers(pareto, winrate.get("pareto") if winrate else None),
        courses=draw_courses(over, recipe.policies) if over else [],
        panels={stage: draw_panels(stage, raw(stats["history"])) for stage, stats in documents["stats"].items()},
        **_view_texts(documents),
    ).lstrip()


def _view_texts(documents: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the texts to show: answers to the same prompts, adversarial answers by category, the worst errors."""
    completions: dict[str, Node] = documents["completions"]
    chosen = choose_samples([raw(rows) for rows in completions.values()])
    adversarial: dict[str, list[Node]] = {}
    for row in documents["adversarial_answers"] or []:
        adversarial.setdefault(raw(row["category"]), []).append(row)
    return {
        "samples": [
            {name: rows[line] for (name, rows), line in zip(completions.items(), lines, strict=True)}
            for lines in chosen
        ],
        "subsets": sorted({row["subset"] for row in raw(completions[REFERENCE])}) if completions else [],
        "adversarial_rows": adversarial,
        "worst": {
            stage: [row for row in rows if row["kind"] == "confident_error"][:WORST]
            for stage, rows in documents["examples"].items()
        },
    }


def read_documents(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Read the files that the page shows as nodes; of those that not every run has, None for one that is not there."""

    def node(path: Path) -> Node:
        return Node((read_jsonl if path.suffix == ".jsonl" else read_json)(path), _relative(run, path))

    steps = [step for step in recipe.plan[:-1] if step not in ("explore", "judge") or run.done(step).exists()]
    optional = {
        "pareto": run.pareto,
        "over_optimisation": run.over_optimisation,
        "adversarial": run.adversarial,
        "adversarial_answers": run.adversarial_answers,
        "reward_comparison": run.reward_comparison,
        "winrate": run.winrate,
    }
    documents = {key: node(path) if path.exists() else None for key, path in optional.items()}
    return {
        **documents,
        "winrate": documents["winrate"] if "judge" in recipe.plan else None,
        "recipe_json": node(run.recipe),
        "env": node(run.env),
        "summary": node(run.summary),
        "metrics": node(run.metrics),
        "compared": node(run.comparison),
        "stats": {stage: node(run.training_stats(stage)) for stage in recipe.stages},
        "done": {step: node(run.done(step)) for step in steps},
        "completions": {name: node(run.completions(name)) for name in _answering(recipe)},
        "analyses": {stage: node(run.error_analysis(stage)) for stage in recipe.reward_stages},
        "examples": {stage: node(run.error_examples(stage)) for stage in recipe.reward_stages},
    }


def _answering(recipe: Recipe) -> list[str]:
    return [REFERENCE, *recipe.policies] if recipe.policies else []


def _relative(run: RunDir, path: Path) -> str:
    return path.relative_to(run.root).as_posix()


def _as_yaml(recipe: dict[str, Any], order: Sequence[str]) -> str:
    """Write a recipe in the order that people write it in; in JSON its keys, stages included, are sorted."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    buffer = io.StringIO()
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    recipe = {key: recipe[key] for key in Recipe.model_fields}
    yaml.dump({**recipe, "stages": {stage: recipe["stages"][stage] for stage in order}}, buffer)
    return buffer.getvalue().rstrip("\n")


def list_contents(recipe: Recipe, run: RunDir) -> list[tuple[str, str]]:
    """List the files and folders that the recipe's steps have written: path and content."""
    own = {run.step(step).name for step in recipe.plan}
    found = {
        path.relative_to(run.root): place.holds.replace("`", "")
        for name, place in PLACES.items()
        if name not in NOT_LISTED
        for path in sorted(run.root.glob(place.path.replace("{}", "*")))
    }
    kept = {path: holds for path, holds in found.items() if len(path.parts) == 1 or path.parts[0] in own}
    return [(path.as_posix(), holds) for path, holds in kept.items()]


def choose_samples(completions: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """Choose prompts for show, by subset in turn, in evaluation's own order, whatever the answers are.

    Returns:
        For each prompt, its line in every file of completions.
    """
    if not completions:
        return []
    first = completions[0]
    lines = [{row["id"]: line for line, row in enumerate(rows)} for rows in completions]
    return [[of[first[line]["id"]] for of in lines] for line in take_turns([row["subset"] for row in first], SAMPLES)]
