"""The step `report`: the page of a finished run, and a second page with its texts.

Reads the JSON and JSONL files of the run directory; writes `report.html` and `answers.html`, which need no script, and
nothing but each other. Every number on them links to its file and says its address in it: a JSON Pointer (RFC 6901),
in which the lines of a `.jsonl` file count from 0.

    rlhf-trl report recipes/demo.yaml
    rlhf-trl report recipes/demo.yaml --json     # and print the first screen
    rlhf-trl report runs/demo runs/demo-long     # two runs beside each other: `report/beside.py`
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from rlhf_trl.compare.figures import draw_differences, list_differences
from rlhf_trl.figures.frontier import draw_frontier, draw_over_optimisation
from rlhf_trl.figures.style import build_figure
from rlhf_trl.figures.svg import to_svg
from rlhf_trl.figures.training import draw_series, logged_panels
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report import first_screen
from rlhf_trl.report.values import Node, build_environment, raw
from rlhf_trl.run.documents import WinRate, read_document
from rlhf_trl.run.files import read_json, read_jsonl, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.display import take_turns

Row = dict[str, Any]
SAMPLES = 8
WORST = 3
# Files of `RunDir` that not every run has.
OPTIONAL = ("pareto", "over_optimisation", "adversarial", "adversarial_answers", "reward_comparison", "winrate")

# What the page's style sheet calls the lines of `training.SERIES_STYLES`.
SERIES_COLORS = ("blue", "orange", "green")
# What only the PNG of a stage shows.
TECHNICAL = {"Gradient norm", "Learning rate"}
# Score of `pareto.json`, or the win rate of `winrate.json` -> whose it is.
MAKERS = {"gold": "gold model", "reward": "reward model", "win_rate": "judge"}


def report(recipe: Recipe, run: RunDir) -> None:
    """Write both pages.

    UserError where an earlier step is missing, or was made with other settings."""
    for step in recipe.plan[1:-1]:
        if step == "judge":
            result, _ = read_document(run.winrate, WinRate)
            # A judge that could not run, or not to its end, is said on the page.
            if result and result.status != "complete" and result.evaluation == recipe.fingerprint("evaluate"):
                continue
        run.require(recipe, step, f"train RECIPE {step}" if step in recipe.stages else f"{step} RECIPE")
    documents = read_documents(recipe, run)
    write_text(run.answers_page, render_answers(recipe, run, documents))
    write_text(run.report, render(recipe, run, documents))


def summarise(recipe: Recipe, run: RunDir) -> Any:
    """Give the first screen of a run as plain JSON values."""
    screen = first_screen.build(recipe, read_documents(recipe, run))
    return json.loads(json.dumps(screen, default=raw))


def render(recipe: Recipe, run: RunDir, documents: Mapping[str, Any]) -> str:
    """Render the page from the files of a finished run."""
    over, metrics = raw(documents["over_optimisation"]), documents["metrics"]
    alarms: dict[str, dict[str, Node]] = {}
    for alarm in documents["over_optimisation"]["alarms"] if over else ():
        alarms.setdefault(raw(alarm["alarm"]), {})[raw(alarm["policy"])] = alarm
    # Measured on all held-out pairs where a policy is scored by it, otherwise on those of its error analysis.
    models = {raw(metrics[f"{score}_stage"]): {"measured": metrics[f"{score}_model"]}
              for score in ("reward", "gold") if metrics[f"{score}_model"]}  # fmt: skip
    for stage, analysis in documents["analyses"].items():
        models[stage] = {"measured": analysis["overall"]} | models.get(stage, {}) | {"analysis": analysis}
    winrate = raw(documents["winrate"]) or {}
    page = build_environment().get_template("report.html.j2")
    return page.render(
        **documents,
        recipe=recipe,
        screen=first_screen.build(recipe, documents),
        frontiers=draw_frontiers(raw(documents["pareto"]) or {"axes": {}}, winrate.get("pareto")),
        folders={step: _relative(run, run.step(step)) for step in documents["done"]},
        quarantine=_relative(run, run.quarantine),
        comparison_report=_relative(run, run.comparison_report),
        answers_page=_relative(run, run.answers_page),
        reward_models=models,
        alarms=alarms,
        differences=draw_comparison(raw(documents["comparison"])),
        courses=draw_courses(over, recipe.policies) if over else [],
        curves={stage: _relative(run, run.training_curves(stage)) for stage in recipe.stages},
        panels={stage: draw_panels(stage, raw(stats["history"])) for stage, stats in documents["stats"].items()},
    ).lstrip()


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


def read_documents(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Read the files that the pages show as nodes; of those that not every run has, None for one that is not there."""

    def node(path: Path) -> Node:
        return Node((read_jsonl if path.suffix == ".jsonl" else read_json)(path), _relative(run, path))

    steps = [step for step in recipe.plan[:-1] if step not in ("explore", "judge") or run.done(step).exists()]
    answering = [REFERENCE, *recipe.policies] if recipe.policies else []
    optional = {key: getattr(run, key) for key in OPTIONAL if key != "winrate" or "judge" in recipe.plan}
    return {
        **{key: None if (path := optional.get(key)) is None or not path.exists() else node(path) for key in OPTIONAL},
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


# --- the figures, those of the steps as inline SVG -------------------------------------------------------------------


def draw_frontiers(pareto: Row, win_rates: Row | None = None) -> list[Row]:
    """Draw gain against KL by each score, and the win rate (from `winrate.json`), the most telling one first."""
    frontiers = {**pareto["axes"], **({"win_rate": win_rates} if win_rates else {})}
    drawn = []
    for score in (score for score in MAKERS if score in frontiers):
        draw = partial(draw_frontier, frontier=frontiers[score], score=score)
        label = f"{score.replace('_', ' ')} of each policy by the {MAKERS[score]} against its KL to the reference."
        svg = draw_panel(draw, (380, 280), f"{score}-kl", label, legend=True)
        drawn.append({"maker": MAKERS[score], "svg": svg})
    return drawn


def draw_courses(over_optimisation: Row, policies: Sequence[str]) -> list[Row]:
    """Draw how proxy and gold score went along the checkpoints of each policy, and for best-of-n; nothing without
    checkpoints."""
    stages = over_optimisation["stages"]
    entries = [(name, ["stages", name], stages[name])
               for name in policies if name in stages and len(stages[name]["points"]) > 1]  # fmt: skip
    if entries and over_optimisation["best_of_n"]["points"]:
        entries.append(("best of n", ["best_of_n"], over_optimisation["best_of_n"]))
    drawn = []
    for name, keys, entry in entries:
        label = f"Gain of {name} by the reward and the gold model along its KL to the reference."
        svg = draw_panel(partial(draw_over_optimisation, entry=entry), (264, 190), f"course-{name}", label)
        scores = [score for score in ("proxy", "gold") if entry["points"][-1][score]]
        furthest = max(point["kl"]["mean"] for point in entry["points"])
        peaks = [score for score, fit in entry["fit"].items() if fit and (fit["peak_kl"] or math.inf) <= furthest]
        drawn.append({"name": name, "keys": keys, "scores": scores, "peaks": peaks, "svg": svg})
    return drawn


def draw_comparison(results: Row) -> Markup | None:
    """Draw the differences of the methods, if any two were compared."""
    if not results["verdict"]:
        return None
    size = (430, 80 + 62 * len(list_differences(results)))
    return draw_panel(partial(draw_differences, results=results), size, "differences", "Differences of the methods.")


def draw_panels(stage: str, history: Sequence[Row]) -> list[Row]:
    """Draw the training curves of a stage, one small figure for each of the quantities that say what it learned."""
    panels = []
    for title, labels in logged_panels(history).items():
        if title not in TECHNICAL:
            draw = partial(draw_series, history=history, series=labels)
            svg = draw_panel(
                draw, (264, 150), f"{stage}-{next(iter(labels))}", f"{title} of {stage} by training step."
            )
            series = list(zip(SERIES_COLORS, labels.values(), strict=False))
            panels.append({"title": title, "svg": svg, "series": series})
    return panels


def draw_panel(
    draw: Callable[[Axes], None], size: tuple[float, float], key: str, label: str, legend: bool = False
) -> Markup:
    """Draw one panel for the page; `size` is in pixels."""
    return to_svg(build_figure([draw], size=(size[0] / 72, size[1] / 72), legend=legend), key, label)
