"""Two runs laid beside each other on one page.

Reads the JSON and JSONL files of both run directories; writes `<A>-beside-<B>.html` and, with what is worked out for
it, `<A>-beside-<B>.json` into the folder that holds the first.

    rlhf-trl report runs/demo runs/demo-long
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_trl.compare.evidence import find_doubts, read_judge, read_points, smallest_that_matters
from rlhf_trl.compare.verdict import compare_groups, warn
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report.values import Node, build_environment
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_text
from rlhf_trl.run.layout import REFERENCE, RunDir

Row = dict[str, Any]
Recipes = Mapping[str, Recipe]
Runs = Mapping[str, RunDir]


def lay_beside(first: RunDir, second: RunDir) -> Path:
    """Write the page, and give its path.

    UserError where a directory holds no run, its evaluation is not finished, or both are the same."""
    if first.root.resolve() == second.root.resolve():
        raise UserError(str(second.root), "is the same run as the first", "name two different runs")
    runs = {"a": first, "b": second}
    recipes = {key: run.recorded_recipe() for key, run in runs.items()}
    for key, run in runs.items():
        for step in ("evaluate", "compare"):
            run.require(recipes[key], step, f"{step} RECIPE")
    folder = first.root.resolve().parent
    page = folder / f"{first.root.resolve().name}-beside-{second.root.resolve().name}.html"
    result = compare_runs(recipes, runs)
    write_json(page.with_suffix(".json"), result)
    pages = {key: os.path.relpath(run.report.resolve(), folder) for key, run in runs.items()}
    template = build_environment().get_template("beside.html.j2")
    text = template.render(names=_name(runs), pages=pages, result=Node(result, page.with_suffix(".json").name))
    write_text(page, text.lstrip())
    return page


def compare_runs(recipes: Recipes, runs: Runs) -> Row:
    """Say what differs, and compare the policies of both runs where prompts, scores and reference are the same."""
    settings = [recipes[key].model_dump(exclude={"name"}) for key in "ab"]
    for own, other in (settings, settings[::-1]):
        # Of a stage that the other run does not have, its trainer is difference enough.
        own["stages"] = {name: stage if name in other["stages"] else stage["trainer"]
                         for name, stage in own["stages"].items()}  # fmt: skip
    versions = [read_json(runs[key].env)["versions"] for key in "ab"]
    why_not = _why_not_comparable(recipes, runs)
    pairs, doubts = ([], {}) if why_not else _compare_policies(recipes, runs)
    used = [(key, one) for pair in pairs for key, one in pair["measures"].items() if one["why_not"] is None]
    warnings = [says for key in dict(used) for says in doubts[key]] + warn([one for _, one in used])
    return {
        "different": {"recipe": _differences(*settings), "versions": _differences(*versions)},
        "why_not": why_not,
        "pairs": pairs,
        "warnings": list(dict.fromkeys(warnings)),
    }


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, str(value)


def _differences(a: Row, b: Row) -> list[Row]:
    """The keys whose values differ, each value as text; `–` where a run has no such key."""
    one, other = dict(_flatten(a)), dict(_flatten(b))
    return [{"key": key, "a": one.get(key, "–"), "b": other.get(key, "–")}
            for key in sorted({*one, *other}) if one.get(key) != other.get(key)]  # fmt: skip


def _why_not_comparable(recipes: Recipes, runs: Runs) -> str | None:
    """Say why gains of the two runs are not of one kind, or None where they are."""
    if not all(recipe.policies for recipe in recipes.values()):
        return "one of the runs has no policy"

    def identify(recipe: Recipe, name: str | None) -> str:
        """What a model was made of: a stage's fingerprint, the base model, or the hash of a model elsewhere."""
        base = str(recipe.model["model_name_or_path"])
        return recipe.identify(name) if name else base

    one, other = (
        {
            "their held-out prompts differ": [row["id"] for row in read_jsonl(runs[key].completions(REFERENCE))],
            "their policies start from different references": {
                identify(recipe, recipe.stages[name].init) for name in recipe.policies
            },
            "their answers are scored by different reward models": identify(
                recipe, recipe.evaluation.gold or recipe.evaluation.reward
            ),
            "their answers have different longest lengths": recipe.evaluation.max_new_tokens,
        }
        for key, recipe in recipes.items()
    )
    return next((why for why in one if one[why] != other[why]), None)


def _name(runs: Runs) -> dict[str, str]:
    """Name the runs after their folders, from the folder on that holds both."""
    roots = {key: run.root.resolve() for key, run in runs.items()}
    return {key: os.path.relpath(root, os.path.commonpath(roots.values())) for key, root in roots.items()}


def _compare_policies(recipes: Recipes, runs: Runs) -> tuple[list[Row], dict[str, list[str]]]:
    """Compare the groups of one name in both runs; without a name in common, every group with every other. Beside the
    pairs, why each measure may mean little."""
    groups: dict[str, dict[str, str]] = {key: {} for key in "ab"}
    stages: dict[str, list[str]] = {}
    records, scores, doubts = {}, {}, dict[str, list[str]]()
    names = _name(runs)
    judges = {key: read_judge(recipe, runs[key]) for key, recipe in recipes.items()}
    for key, recipe in recipes.items():
        metrics = read_json(runs[key].metrics)
        for measure, says in find_doubts(recipe, metrics, judges[key], recipe.policies).items():
            doubts.setdefault(measure, []).extend(says)
        for group, own in recipe.groups.items():
            if own[0] in recipe.policies:
                title = groups[key][group] = f"{names[key]} {group}"
                stages[title] = [f"{key}:{name}" for name in own]
        for name in recipe.policies:
            records[f"{key}:{name}"] = read_points(runs[key], metrics, name)
            scores[f"{key}:{name}"] = judges[key].scores.get(name, {})
    judged = replace(judges["a"], scores=scores)
    asked = [(judges[key].who, recipe.evaluation.judge_decoding, recipe.judge and recipe.judge.harmless)
             for key, recipe in recipes.items()]  # fmt: skip
    if asked[0] != asked[1]:
        judged = replace(judged, why_not="the runs have different judges, or other answers or questions for them")
    pairs = [(title, groups["b"][name]) for name, title in groups["a"].items() if name in groups["b"]]
    pairs = pairs or [(one, other) for one in groups["a"].values() for other in groups["b"].values()]
    return compare_groups(pairs, stages, records, judged, smallest_that_matters(recipes["a"], runs["a"]))[0], doubts
