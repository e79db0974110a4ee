"""Adapters that a recipe starts from by their folder: sound ones, of the right kind, on the base of the recipe.

Reads the folders, and the base where it lies on this machine; loads no model and writes nothing into the run.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlhf_trl.adapters.check import BASE, CONFIG, LINEAGE, MODEL_ID, check_adapter
from rlhf_trl.models.tokenizer import TINY, build_tiny
from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json
from rlhf_trl.run.safetensors import hash_weights, read_weights

EXPORT = "give the folder of a LoRA adapter, such as `rlhf-trl adapter export RUN STAGE DIR` writes"


def check_starts(recipe: Recipe, only: str | None = None) -> list[Problem]:
    """Find what is wrong with the folders that `init` names; of the stage `only`, or of every one."""
    problems: dict[str, list[Problem]] = {}  # once for each folder and kind
    for name, stage in recipe.stages.items():
        if stage.outside and only in (None, name):
            task = "SEQ_CLS" if stage.continue_ and stage.trainer == "reward" else "CAUSAL_LM"
            key = f"{task} {stage.outside}"
            if key not in problems:
                place = f"stages.{name}.init"
                problems[key] = list(_check(place, Path(stage.outside), task, str(recipe.model["model_name_or_path"])))
    return [problem for found in problems.values() for problem in found]


def _check(place: str, folder: Path, task: str, base: str) -> Iterator[Problem]:
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        what = f"has no {CONFIG}: it is no adapter" if folder.is_dir() else "is no folder"
        yield Problem(place, f"{str(folder)!r} {what}", EXPORT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if base == TINY:
            build_tiny(Path(scratch))
        local = Path(scratch if base == TINY else base)
        found = check_adapter(folder, local if local.is_dir() else None, here=True)
        config = {} if found else read_json(folder / CONFIG)
        found = found or list(_check_base(place, folder, str(config["base_model_name_or_path"]), base, local))
    for one in found:
        where, remedy = (base if one.place == str(local) else one.place), one.remedy
        if where == base and (folder / BASE).is_dir():
            remedy = f"set model.model_name_or_path: {folder / BASE}"
        yield one if where == place else Problem(place, f"{where}: {one.problem}", remedy)
    if config and config["task_type"] != task:
        kinds = {"SEQ_CLS": "a reward model", "CAUSAL_LM": "a policy"}
        remedy = "give another one; that of a reward model is for a reward stage with `continue: true`"
        yield Problem(place, f"the adapter is of {kinds[config['task_type']]}, not of {kinds[task]}", remedy)


def _check_base(place: str, folder: Path, named: str, base: str, local: Path) -> Iterator[Problem]:
    """Compare the base of a sound adapter, if no lineage has told it, with the recipe's."""
    own = folder / BASE if named == f"./{BASE}" else Path(named)
    if not local.is_dir() and named != base:
        yield Problem(place, f"the adapter lies on {own}, not on {base}", f"set model.model_name_or_path: {own}")
    elif local.is_dir() and not (folder / LINEAGE).exists():
        known = own.is_dir() and hash_weights(read_weights(own)) == hash_weights(read_weights(local))
        if not known and (own.is_dir() or not MODEL_ID.fullmatch(named)):
            yield Problem(place, f"the adapter lies on {own}, which is not {base}", EXPORT)
