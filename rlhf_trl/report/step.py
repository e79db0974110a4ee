"""Step `report`: one page, for a reader new to the run, that says what came out and where each number is from.

Reads the JSON and JSONL files of the run directory; writes `report.html`, which needs no other file and no script.
A value gets onto the page by its address, `evaluation/metrics.json#/policies/dpo/kl` (the file and a JSON Pointer, see
RFC 6901; lines of a JSONL file count from 0), and carries it as `data-source`; the template cannot print a number
otherwise.

    rlhf-trl report recipes/demo.yaml
    rlhf-trl report runs/demo runs/demo-long     # two runs beside each other: `report_beside`
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report.sentences import group_by_verdict, judge_gain, order_alarms, view_judge
from rlhf_trl.report.svg import draw_comparison, draw_courses, draw_frontiers, draw_panels
from rlhf_trl.report.values import PREVIEW, build_environment
from rlhf_trl.run.files import read_json, read_jsonl, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.trust import compare_with_length
from rlhf_trl.text.display import take_turns

SAMPLES = 8
WORST = 3
FIGURES = {
    "pareto": "gain against KL, with the front and best-of-n",
    "reward_distributions": "how each policy's scores are spread",
    "kl_drift": "exact KL beside the sampled estimators",
    "over_optimisation": "proxy and gold score along the checkpoints",
    "training_curves": "the training curves of all stages",
    "reward_kl_tradeoff": "logged reward against logged KL during training",
}


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
    found = read_json(run.winrate) if run.winrate.exists() else {"status": "complete"}
    return found["status"] != "complete" and found["evaluation"] == recipe.fingerprint("evaluate")


def render(recipe: Recipe, run: RunDir) -> str:
    """Render the page from the files of a finished run."""
    files = _name_files(recipe, run)
    documents: dict[str, Any] = {
        name: (read_jsonl if name.endswith(".jsonl") else read_json)(run.root / name) for name in _flat(files)
    }
    page = (
        build_environment(documents)
        .get_template("report.html.j2")
        .render(
            recipe=recipe,
            recipe_lines=_as_yaml(documents[files["recipe"]], list(recipe.stages)).split("\n"),
            files=files,
            contents=list_contents(recipe, run),
            env=documents[files["env"]],
            summary=documents[files["summary"]],
            quarantine=_relative(run, run.quarantine),
            figures={_relative(run, run.figure(name)): FIGURES[name] for name in FIGURES if run.figure(name).exists()},
            PREVIEW=PREVIEW,
            **_view_training(recipe, files, documents),
            compared=documents[files["compared"]],
            compared_figures=draw_comparison(documents[files["compared"]]),
            **_view_results(recipe, files, documents),
            **_view_judge(recipe, files, documents),
            **_view_answers(run, files, documents),
            **_view_reward_models(recipe, run, files, documents),
        )
    )
    return page.lstrip()


def _view_training(recipe: Recipe, files: Mapping[str, Any], documents: Mapping[str, Any]) -> dict[str, Any]:
    stats = {stage: documents[files["stats"][stage]] for stage in recipe.stages}
    panels = {stage: draw_panels(stage, stats[stage]["history"]) for stage in recipe.stages}
    return {"stats": stats, "panels": panels}


def _view_results(recipe: Recipe, files: Mapping[str, Any], documents: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary, the results and the alarms are made of."""
    metrics, stages = documents[files["metrics"]], recipe.stages
    claims = documents[files["compared"]]["against_reference"]
    pareto = documents[files["pareto"]] if "pareto" in files else {"axes": {}}
    over = documents[files["over_optimisation"]] if "over_optimisation" in files else {"alarms": []}
    alarm_order, raised = order_alarms(over["alarms"], recipe.policies)
    verdicts, gold_verdicts = (
        {name: judge_gain(metrics["policies"][name], claims.get(name, {}), score) for name in recipe.policies}
        for score in ("reward", "gold")
    )
    trainers = list(dict.fromkeys(stages[name].trainer for name in recipe.policies))
    return {
        "metrics": metrics,
        "pareto": pareto,
        "alarms": over["alarms"],
        "alarm_order": alarm_order,
        "raised": raised,
        "verdicts": verdicts,
        "gold_verdicts": gold_verdicts,
        "groups": group_by_verdict(verdicts),
        "gold_groups": group_by_verdict(gold_verdicts),
        "trained_on": {
            key: [name for name in recipe.policies if stages[name].reward == metrics[f"{key}_stage"]]
            for key in ("reward", "gold")
        },
        "trainers": trainers,
        "methods": [*recipe.policies, "best_of_n"],
        "starts": sorted({stages[name].init or "" for name in recipe.policies}),
        "courses": draw_courses(over, recipe.policies) if "over_optimisation" in files else [],
    }


def _view_judge(recipe: Recipe, files: Mapping[str, Any], documents: Mapping[str, Any]) -> dict[str, Any]:
    """What the judge found, and the frontiers, which its win rate joins."""
    pareto = documents[files["pareto"]] if "pareto" in files else {"axes": {}}
    winrate = documents[files["winrate"]] if "winrate" in files else None
    return {
        "winrate": winrate,
        "judge": view_judge(winrate, recipe.policies),
        "frontiers": draw_frontiers(pareto, winrate.get("pareto") if winrate else None),
    }


def _view_answers(run: RunDir, files: Mapping[str, Any], documents: Mapping[str, Any]) -> dict[str, Any]:
    completions = {policy: documents[name] for policy, name in files["completions"].items()}
    lines: dict[str, list[int]] = {}
    rows = documents[files["adversarial_answers"]] if "adversarial" in files else []
    for line, row in enumerate(rows):
        lines.setdefault(row["category"], []).append(line)
    return {
        "completions": completions,
        "samples": choose_samples([*completions.values()]),
        "subsets": sorted({row["subset"] for row in completions.get(REFERENCE, [])}),
        "samples_folder": _relative(run, run.samples),
        "adversarial_rows": rows,
        "adversarial_lines": lines,
    }


def _view_reward_models(
    recipe: Recipe, run: RunDir, files: Mapping[str, Any], documents: Mapping[str, Any]
) -> dict[str, Any]:
    metrics = documents[files["metrics"]]
    models = [key for key in ("reward_model", "gold_model") if metrics[key]]
    examples = {stage: documents[name] for stage, name in files["examples"].items()}
    return {
        "reward_models": models,
        "reward_verdicts": {key: compare_with_length(metrics[key]["length_rule"]) for key in models},
        "analyses": {stage: documents[name] for stage, name in files["errors"].items()},
        "comparisons": documents[files["reward_comparison"]]["comparisons"] if "reward_comparison" in files else [],
        "error_examples": examples,
        "worst": {
            stage: [line for line, row in enumerate(rows) if row["kind"] == "confident_error"][:WORST]
            for stage, rows in examples.items()
        },
        "error_files": {
            stage: {
                "the whole analysis": _relative(run, run.error_report(stage)),
                "its figures": _relative(run, run.error_plots(stage)),
                "examples": _relative(run, run.error_examples(stage)),
            }
            for stage in recipe.reward_stages
        },
    }


def _name_files(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Name the files that the page reads, relative to the run directory; those that not every run has only if they are
    there."""
    steps = [step for step in recipe.plan[:-1] if step not in ("explore", "judge") or run.done(step).exists()]
    policies = [REFERENCE, *recipe.policies] if recipe.policies else []
    paths: dict[str, Any] = {
        "recipe": run.recipe,
        "env": run.env,
        "summary": run.summary,
        "metrics": run.metrics,
        "compared": run.comparison,
        "stats": {stage: run.training_stats(stage) for stage in recipe.stages},
        "done": {step: run.done(step) for step in steps},
        "completions": {policy: run.completions(policy) for policy in policies},
        "errors": {stage: run.error_analysis(stage) for stage in recipe.reward_stages},
        "examples": {stage: run.error_examples(stage) for stage in recipe.reward_stages},
    }
    some = {
        "pareto": run.pareto,
        "over_optimisation": run.over_optimisation,
        "adversarial": run.adversarial,
        "adversarial_answers": run.adversarial_answers,
        "reward_comparison": run.reward_comparison,
    }
    some |= {"winrate": run.winrate} if "judge" in recipe.plan else {}
    paths |= {key: path for key, path in some.items() if path.exists()}

    def name(path: Any) -> Any:
        return {key: name(value) for key, value in path.items()} if isinstance(path, dict) else _relative(run, path)

    return name(paths)


def _relative(run: RunDir, path: Path) -> str:
    return path.relative_to(run.root).as_posix()


def _flat(files: Mapping[str, Any]) -> list[str]:
    return [name for value in files.values() for name in (_flat(value) if isinstance(value, dict) else [value])]


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
    """List what lies where in the run directory: path and content."""
    rows = [
        (run.recipe, "the resolved recipe"),
        (run.env, "versions, git state and hardware"),
        (run.exploration, "statistics, figures and samples of the raw data"),
        (run.summary, "what became of every row of the source"),
        (run.quarantine, "the dropped rows, each with its reasons"),
        *((run.pairs(split), f"preference pairs ({split})") for split in ("train", "test")),
        *((run.prompts(split), f"prompts ({split})") for split in ("train", "test")),
        (run.tokenizer, "the tokenizer, as every stage used it"),
    ]
    for stage in recipe.stages:
        adapted = recipe.model_block(stage).get("use_peft")
        weights = (run.adapter(stage), "LoRA adapter") if adapted else (run.model(stage), "full model")
        rows += [weights, (run.training_stats(stage), "every logged step"), (run.training_curves(stage), "its curves")]
    rows += [(run.metrics, "the numbers of this page's results")]
    if recipe.policies:
        names = [REFERENCE, *recipe.policies]
        rows += [(run.completions(name), "every answer, with its scores and KL") for name in names]
        if recipe.evaluation.judge_decoding:
            rows += [(run.judge_answers(name), "a second answer to each prompt, for a judge") for name in names]
        rows += [
            (run.pareto, "gain against KL: front, hypervolume, best-of-n, gains at equal KL"),
            (run.best_of_n, "the scores of several answers of the reference to each prompt"),
            (run.over_optimisation, "proxy and gold score along the checkpoints, and all alarms"),
            (run.adversarial, "shares of refusals and of unsafe patterns by category"),
            (run.adversarial_answers, "every answer to the adversarial prompts"),
            (run.final_results, "what each policy comes to, in short"),
        ]
    rows += [(run.figure(name), content) for name, content in FIGURES.items()]
    if "judge" in recipe.plan and run.winrate.exists():
        rows += [(run.winrate, "win rates, and how good the judge is")]
        replies = sorted(run.winrate.parent.glob("*.jsonl"))
        rows += [(path, "every reply of a judge, as it came") for path in replies]
    rows += [
        (run.comparison_report, "the comparison of the training runs and of the methods, to read"),
        (run.comparison, "its numbers"),
        (run.comparison_figure, "its figures"),
    ]
    for stage in recipe.reward_stages:
        rows += [
            (run.error_report(stage), "the error analysis of the reward model, to read"),
            (run.error_analysis(stage), "its numbers"),
            (run.error_plots(stage), "its figures"),
            (run.error_examples(stage), "pairs that it gets most wrong, hardly tells apart, and gets right"),
            (run.scores(stage), "the scores of every analysed pair"),
        ]
    rows += [(run.reward_comparison, "the reward models beside each other")] if recipe.reward_stages else []
    if recipe.policies:
        rows += [(run.samples, "prompts and responses of every model, as JSONL and to read")]
    # The files of the earlier steps are always there; what the evaluation writes depends on the recipe.
    return [
        (_relative(run, path), content)
        for path, content in rows
        if path.exists() or path.parent not in (run.evaluation, run.errors_folder)
    ]


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
