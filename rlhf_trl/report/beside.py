"""Two runs laid beside each other on one page.

Reads the JSON and JSONL files of both run directories; writes `<A>-beside-<B>.html` and, with what is worked out for
it, `<A>-beside-<B>.json` into the folder that holds the first.

    rlhf-trl report runs/demo runs/demo-long
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_trl.compare.evidence import read_judge, read_points, smallest_that_matters
from rlhf_trl.compare.verdict import compare_groups, warn
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report.step import read_documents, show_screen
from rlhf_trl.report.values import Node, build_environment
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir

Row = dict[str, Any]
NOT_COMPARED = "name"


def lay_beside(first: RunDir, second: RunDir) -> Path:
    """Write the page, and give its path.

    Raises:
        UserError: a directory holds no run, its evaluation is not finished, or both are the same.
    """
    if first.root.resolve() == second.root.resolve():
        raise UserError(str(second.root), "is the same run as the first", "name two different runs")
    runs = {"a": first, "b": second}
    recipes = {key: run.recorded_recipe() for key, run in runs.items()}
    for key, run in runs.items():
        for step in ("evaluate", "compare"):
            run.require(recipes[key], step, f"{step} RECIPE")
    folder = first.root.resolve().parent
    page = folder / f"{first.root.resolve().name}-beside-{second.root.resolve().name}.html"
    worked_out = page.with_suffix(".json")
    write_json(worked_out, compare_runs(recipes, runs))
    write_text(page, render(recipes, runs, worked_out))
    return page


def compare_runs(recipes: Mapping[str, Recipe], runs: Mapping[str, RunDir]) -> Row:
    """Say what differs, and compare the policies of both runs where prompts, scores and reference are the same."""
    settings = [recipes[key].model_dump(exclude={NOT_COMPARED}) for key in "ab"]
    for own, other in (settings, settings[::-1]):
        # Of a stage that the other run does not have, its trainer is difference enough.
        own["stages"] = {
            name: stage if name in other["stages"] else stage["trainer"] for name, stage in own["stages"].items()
        }
    versions = [read_json(runs[key].env)["versions"] for key in "ab"]
    why_not = _why_not_comparable(recipes, runs)
    pairs = [] if why_not else _compare_policies(recipes, runs)
    measured = [one for pair in pairs for one in pair["measures"].values() if one["why_not"] is None]
    return {
        "different": {"recipe": _differences(*settings), "versions": _differences(*versions)},
        "why_not": why_not,
        "pairs": pairs,
        "warnings": warn(measured),
    }


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """The keys whose values differ, each value as text; `–` where a run has no such key."""
    flat = [dict(_flatten(of)) for of in (a, b)]
    keys = sorted({*flat[0], *flat[1]})
    shown = {key: [str(of[key]) if key in of else "–" for of in flat] for key in keys}
    return [{"key": key, "a": one, "b": other} for key, (one, other) in shown.items() if one != other]


def _why_not_comparable(recipes: Mapping[str, Recipe], runs: Mapping[str, RunDir]) -> str | None:
    """Say why gains of the two runs are not of one kind, or None where they are."""
    if not all(recipe.policies for recipe in recipes.values()):
        return "one of the runs has no policy"
    kinds = [
        {
            "their held-out prompts differ": [row["id"] for row in read_jsonl(runs[key].completions(REFERENCE))],
            "their policies start from different references": {
                _identity(recipe, recipe.stages[name].init) for name in recipe.policies
            },
            "their answers are scored by different reward models": _identity(
                recipe, recipe.evaluation.gold or recipe.evaluation.reward
            ),
            "their answers have different longest lengths": recipe.evaluation.max_new_tokens,
        }
        for key, recipe in recipes.items()
    ]
    return next((why for why, kind in kinds[0].items() if kind != kinds[1][why]), None)


def _identity(recipe: Recipe, name: str | None) -> str:
    """What a model was made of: a stage's fingerprint, the base model, or the name of a model elsewhere."""
    if name is None:
        return str(recipe.model["model_name_or_path"])
    return recipe.fingerprint(name) if name in recipe.stages else name


def _name(runs: Mapping[str, RunDir]) -> dict[str, str]:
    """Name the runs after their folders, from the folder on that holds both."""
    roots = {key: run.root.resolve() for key, run in runs.items()}
    return {key: os.path.relpath(root, os.path.commonpath(roots.values())) for key, root in roots.items()}


def _compare_policies(recipes: Mapping[str, Recipe], runs: Mapping[str, RunDir]) -> list[Row]:
    """Compare the groups of one name in both runs; without a name in common, every group with every other."""
    groups: dict[str, dict[str, str]] = {key: {} for key in "ab"}
    stages: dict[str, list[str]] = {}
    records, scores = {}, {}
    names = _name(runs)
    judges = {key: read_judge(recipe, runs[key]) for key, recipe in recipes.items()}
    for key, recipe in recipes.items():
        metrics = read_json(runs[key].metrics)
        for group, own in recipe.groups.items():
            if own[0] in recipe.policies:
                title = groups[key][group] = f"{names[key]} {group}"
                stages[title] = [f"{key}:{name}" for name in own]
        for name in recipe.policies:
            records[f"{key}:{name}"] = read_points(runs[key], metrics, name)
            scores[f"{key}:{name}"] = judges[key].scores.get(name, {})
    judged = replace(judges["a"], scores=scores)
    if judges["a"].who != judges["b"].who:
        judged = replace(judged, why_not="the runs have different judges")
    pairs = [(title, groups["b"][name]) for name, title in groups["a"].items() if name in groups["b"]]
    pairs = pairs or [(one, other) for one in groups["a"].values() for other in groups["b"].values()]
    return compare_groups(pairs, stages, records, judged, smallest_that_matters(recipes["a"], runs["a"]))[0]


def render(recipes: Mapping[str, Recipe], runs: Mapping[str, RunDir], worked_out: Path) -> str:
    """Render the page from the first screens of both runs and what was worked out."""
    names, folder, environment = _name(runs), worked_out.parent, build_environment()
    screens = {}
    for key, run in runs.items():
        documents = read_documents(recipes[key], run, folder)
        template = environment.get_template("report/short.html.j2")
        screens[key] = Markup(template.render(show_screen(recipes[key], documents, key)))
    return (
        environment.get_template("beside.html.j2")
        .render(
            names=names,
            pages={key: os.path.relpath(run.report.resolve(), folder) for key, run in runs.items()},
            result=Node(read_json(worked_out), worked_out.name),
            screens=screens,
        )
        .lstrip()
    )
