"""The step `report`: the page of a finished run, and a second page with its texts.

Reads the JSON and JSONL files of the run directory; writes `report.html` and `answers.html`, which need no script, and
nothing but each other. Every number on them links to its file and says its address in it: a JSON Pointer (RFC 6901),
in which the lines of a `.jsonl` file count from 0.

    rlhf-trl report recipes/demo.yaml
    rlhf-trl report recipes/demo.yaml --json     # and print the first screen
    rlhf-trl report runs/demo runs/demo-long     # two runs beside each other: `report/beside.py`
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report import first_screen
from rlhf_trl.report.figures import draw_comparison, draw_courses, draw_frontiers, draw_panels
from rlhf_trl.report.values import Node, build_environment, raw
from rlhf_trl.run.documents import WinRate, read_document
from rlhf_trl.run.files import read_json, read_jsonl, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.display import take_turns

SAMPLES = 8
WORST = 3
# Files of `RunDir` that not every run has.
OPTIONAL = ("pareto", "over_optimisation", "adversarial", "adversarial_answers", "reward_comparison", "winrate")


def report(recipe: Recipe, run: RunDir) -> None:
    """Write both pages.

    Raises:
        UserError: an earlier step is missing, or was made with other settings.
    """
    for step in recipe.plan[1:-1]:
        if step == "judge" and _judge_gave_up(recipe, run):
            continue
        run.require(recipe, step, f"train RECIPE {step}" if step in recipe.stages else f"{step} RECIPE")
    documents = read_documents(recipe, run)
    write_text(run.answers_page, render_answers(recipe, run, documents))
    write_text(run.report, render(recipe, run, documents))


def _judge_gave_up(recipe: Recipe, run: RunDir) -> bool:
    """Whether the judge could not run, or not to its end, on these answers; the page says so."""
    result, _ = read_document(run.winrate, WinRate)
    return result is not None and result.status != "complete" and result.evaluation == recipe.fingerprint("evaluate")


def summarise(recipe: Recipe, run: RunDir) -> Any:
    """Give the first screen of a run as plain JSON values."""
    screen = first_screen.build(recipe, read_documents(recipe, run))
    return json.loads(json.dumps(screen, default=raw))


def render(recipe: Recipe, run: RunDir, documents: Mapping[str, Any]) -> str:
    """Render the page from the files of a finished run."""
    over = raw(documents["over_optimisation"])
    alarms: dict[str, dict[str, Node]] = {}
    for alarm in documents["over_optimisation"]["alarms"] if over else ():
        alarms.setdefault(raw(alarm["alarm"]), {})[raw(alarm["policy"])] = alarm
    page = build_environment().get_template("report.html.j2")
    return page.render(
        **show_screen(recipe, documents),
        folders={step: _relative(run, run.step(step)) for step in documents["done"]},
        quarantine=_relative(run, run.quarantine),
        comparison_report=_relative(run, run.comparison_report),
        answers_page=_relative(run, run.answers_page),
        reward_models=list_reward_models(documents),
        alarms=alarms,
        compared_figures=draw_comparison(raw(documents["comparison"])),
        courses=draw_courses(over, recipe.policies) if over else [],
        curves={stage: _relative(run, run.training_curves(stage)) for stage in recipe.stages},
        panels={stage: draw_panels(stage, raw(stats["history"])) for stage, stats in documents["stats"].items()},
    ).lstrip()


def show_screen(recipe: Recipe, documents: Mapping[str, Any], run: str = "") -> dict[str, Any]:
    """Give what the template of the first screen reads; `run` keeps two runs on one page apart."""
    winrate = raw(documents["winrate"]) or {}
    frontiers = draw_frontiers(raw(documents["pareto"]) or {"axes": {}}, winrate.get("pareto"), run)
    screen = first_screen.build(recipe, documents)
    return {**documents, "recipe": recipe, "screen": screen, "frontiers": frontiers, "beside": run}


def list_reward_models(documents: Mapping[str, Any]) -> dict[str, dict[str, Node]]:
    """List the reward models: `measured` on all held-out pairs where a policy is scored by it, otherwise on those of
    its error analysis; and its `analysis`, unless it comes from elsewhere."""
    metrics = documents["metrics"]
    models = {raw(metrics[f"{score}_stage"]): {"measured": metrics[f"{score}_model"]}
              for score in ("reward", "gold") if metrics[f"{score}_model"]}  # fmt: skip
    for stage, analysis in documents["analyses"].items():
        models[stage] = {"measured": analysis["overall"]} | models.get(stage, {}) | {"analysis": analysis}
    return models


def render_answers(recipe: Recipe, run: RunDir, documents: Mapping[str, Any]) -> str:
    """Render the page of texts: answers to the same prompts, adversarial prompts by category, the worst errors.

    The prompts are the first of each subset in turn, in evaluation's own order, whatever the answers are.
    """
    completions: dict[str, Node] = documents["completions"]
    subsets = [row["subset"] for row in raw(completions[REFERENCE])] if completions else []
    adversarial: dict[str, list[Node]] = {}
    for row in documents["adversarial_answers"] or []:
        adversarial.setdefault(raw(row["category"]), []).append(row)
    page = build_environment().get_template("answers.html.j2")
    return page.render(
        **documents,
        recipe=recipe,
        report_page=_relative(run, run.report),
        samples_folder=_relative(run, run.samples),
        samples=[{name: rows[line] for name, rows in completions.items()} for line in take_turns(subsets, SAMPLES)],
        subsets=sorted(set(subsets)),
        adversarial_rows=adversarial,
        worst={stage: [row for row in rows if row["kind"] == "confident_error"][:WORST]
               for stage, rows in documents["examples"].items()},
    ).lstrip()  # fmt: skip


def read_documents(recipe: Recipe, run: RunDir, folder: Path | None = None) -> dict[str, Any]:
    """Read the files that the pages show as nodes; of those that not every run has, None for one that is not there.

    Args:
        folder: where the page will lie, if not in the run.
    """

    def node(path: Path) -> Node:
        name = os.path.relpath(path.resolve(), (folder or run.root).resolve())
        return Node((read_jsonl if path.suffix == ".jsonl" else read_json)(path), name)

    steps = [step for step in recipe.plan[:-1] if step not in ("explore", "judge") or run.done(step).exists()]
    answering = [REFERENCE, *recipe.policies] if recipe.policies else []
    optional = {key: getattr(run, key) for key in OPTIONAL if key != "winrate" or "judge" in recipe.plan}
    return {
        **dict.fromkeys(OPTIONAL),
        **{key: node(path) for key, path in optional.items() if path.exists()},
        **{key: node(getattr(run, key)) for key in ("env", "summary", "metrics", "comparison")},
        "recipe_json": node(run.recipe),
        "stats": {stage: node(run.training_stats(stage)) for stage in recipe.stages},
        "done": {step: node(run.done(step)) for step in steps},
        "completions": {name: node(run.completions(name)) for name in answering},
        "analyses": {stage: node(run.error_analysis(stage)) for stage in recipe.reward_stages},
        "examples": {stage: node(run.error_examples(stage)) for stage in recipe.reward_stages},
    }


def _relative(run: RunDir, path: Path) -> str:
    return path.relative_to(run.root).as_posix()
