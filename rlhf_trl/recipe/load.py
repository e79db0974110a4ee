"""Load a recipe: read the YAML, lay the overrides over it, parse it, check it whole, expand its sweeps."""

import copy
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from rlhf_trl.recipe.document import read_document
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.library import CLASSES, nearest, show, suggest
from rlhf_trl.recipe.links import check_block, check_recipe
from rlhf_trl.recipe.recipe import Recipe, expand_sweeps
from rlhf_trl.recipe.schema import Stage, Strict, Trainer


def load_recipe(path: Path, overrides: Sequence[str] = (), processes: int = 1) -> Recipe:
    """Read a recipe, lay the overrides over it, and check it whole.

    Args:
        overrides: `path.to.key=value` texts; the value is read as YAML.
        processes: number of training processes, for the checks on batch sizes.

    Raises:
        RecipeError: with every problem found, each with its place (file, line and key).
    """
    document = read_document(path, overrides)
    recipe, problems = _parse(document.raw)
    if recipe is not None:
        wrong = {place for p in (*document.problems, *problems) for place in (p.place, p.meant_place)}
        problems += check_recipe(recipe, list(document.raw["stages"]), wrong, processes)
    elif isinstance(document.raw.get("model"), dict):
        problems += check_block("model", "model", document.raw["model"])
    if problems or document.problems or recipe is None:
        raise document.error(problems)
    return expand_sweeps(recipe)


def locate(error: UserError, path: Path, overrides: Sequence[str]) -> RecipeError:
    """Give the problems that the libraries find in a loaded recipe their places in its file."""
    return read_document(path, overrides).error(error.problems)


def _parse(raw: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Parse the document; on mistakes, also try it without them so that the later checks can find more."""
    stages = raw.get("stages")
    problems = []
    if isinstance(stages, dict) and "ppo" not in CLASSES:
        gone = [name for name, stage in stages.items() if isinstance(stage, dict) and stage.get("trainer") == "ppo"]
        for name in gone:
            problem = f"TRL {importlib.metadata.version('trl')} has no PPO trainer: the last with one is 1.12"
            remedy = f"pip install -c constraints.txt trl, or leave the stage out: --without {name}"
            problems.append(Problem(f"stages.{name}.trainer", problem, remedy))
        raw = {**raw, "stages": {name: stage for name, stage in stages.items() if name not in gone}}
    try:
        return Recipe.model_validate(raw), problems
    except ValidationError as error:
        rest = copy.deepcopy(raw)
        for item in error.errors():
            loc = [str(part) for part in item["loc"] if part != "[key]"]
            problems.append(_describe(item, loc))
            _remove(rest, loc)
        try:
            return Recipe.model_validate({"name": "unnamed", "model": {}, **rest}), problems
        except ValidationError:
            return None, problems


EXAMPLES = {
    "name": "`name: my-run`, the folder of the run",
    "model": "`model: {model_name_or_path: ...}`",
    "stages": "`stages:` with at least one stage below it",
    "trainer": f"`trainer:` (one of {', '.join(get_args(Trainer))})",
}
# Kind of pydantic's error -> what to do, where pydantic's own words do not tell it to a writer of YAML.
TYPE_REMEDIES = {
    "string_type": "give a text; put quotes around it",
    "list_type": "give a list, such as [a, b]",
    **dict.fromkeys(("dict_type", "model_type"), "write `key: value` lines here, or remove the key"),
}


def _describe(error: Any, loc: list[str]) -> Problem:
    place, value, kind = ".".join(loc), show(error["input"]), error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(place, loc)
    if kind == "missing":
        return Problem(place, "is missing", f"add {EXAMPLES[loc[-1]]}")
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])  # 'a', 'b' or 'c'
        problem = f"{value} is not a trainer" if loc[-1] == "trainer" else f"{value} is not valid"
        return Problem(place, problem, suggest(error["input"], choices, f"choose one of: {', '.join(choices)}"))
    if kind == "value_error":
        return Problem(place, f"{value} is not valid", error["msg"].removeprefix("Value error, "))
    empty = error["input"] in (None, "", [], {})
    remedy = TYPE_REMEDIES.get(kind, error["msg"].replace("Input", "the value"))
    if place in EXAMPLES and (empty or kind != "string_type"):
        remedy = f"add {EXAMPLES[place]}"
    return Problem(place, "is empty" if empty else f"{value} is not valid", remedy)


def _unknown_key(place: str, loc: list[str]) -> Problem:
    section: type[Strict] = Recipe
    for part in loc[:-1]:
        if part in section.model_fields:  # the name of a stage need not be a field, or is one that holds no section
            annotation = section.model_fields[part].annotation  # such as Data, Judge | None, dict[Name, Stage]
            types = (annotation, *get_args(annotation))
            section = next((item for item in types if isinstance(item, type(Strict))), section)
    near = nearest(loc[-1], section.names())
    hint = "; options of the trainer go under `args:`" if section is Stage else ""
    remedy = f"did you mean {near!r}?" if near else f"the keys here are: {', '.join(section.names())}{hint}"
    return Problem(place, f"unknown key {loc[-1]!r}", remedy, near or "")


def _remove(raw: Any, loc: list[str]) -> None:
    """Delete the offending key, with it a whole list, or the whole stage where its trainer is the offence."""
    if loc[0] == "stages" and loc[2:] == ["trainer"]:
        loc = loc[:2]
    for part in loc[:-1]:
        if not isinstance(raw.get(part), dict):
            raw.pop(part, None)
            return
        raw = raw[part]
    raw.pop(loc[-1], None)
