"""The base of an exported adapter: a public id, or the model's own files, shipped with the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_trl.adapters.files import BASE, REPOSITORY
from rlhf_trl.models.base import fetch
from rlhf_trl.models.tokenizer import TINY, base_path
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import hash_weights, read_weights

# A base of up to this many bytes is shipped without being asked for.
SMALL = 200_000_000


@dataclass(frozen=True)
class Base:
    """The model below an adapter; without an `id` its files have to be shipped."""

    folder: Path
    id: str | None
    revision: str | None
    stage: str | None  # that fine-tuned it whole, if one did
    weights: str  # their hash

    @property
    def name(self) -> str:
        """What `adapter_config.json` calls it."""
        return self.id or f"./{BASE}"


def require_stage(run: RunDir, stage: str) -> Recipe:
    """Return the recipe of a run; a UserError where it has no such stage, or has not finished it."""
    recipe = run.recorded_recipe()
    if stage not in recipe.stages:
        raise UserError(str(run.root), f"there is no stage {stage!r}", f"the stages are: {', '.join(recipe.stages)}")
    run.require(recipe, stage, f"train RECIPE {stage}")
    return recipe


def lora_chain(recipe: Recipe, stage: str) -> list[str]:
    """List the stages whose adapters lie on one base, the lowest first, up to `stage`, which must have one."""
    if not recipe.model_block(stage).get("use_peft"):
        problem = "the stage was fine-tuned whole: it is a model, and has no adapter"
        raise UserError(f"stages.{stage}", problem, "share its folder `model/`, or export a stage that starts from it")
    chain = [stage]
    while (init := recipe.stages[chain[0]].init) and recipe.model_block(init).get("use_peft"):
        chain.insert(0, init)
    return chain


def find_base(
    recipe: Recipe, run: RunDir, first: str, base_id: str | None, revision: str | None, with_base: bool
) -> Base:
    """Find the base that the adapter of the stage `first` lies on, and decide whether it is named or shipped.

    Raises:
        UserError: the base cannot be reached, or is large, has no public id, and `with_base` is not given.
    """
    block, stage = recipe.model_block(first), recipe.stages[first].init
    name = str(block["model_name_or_path"])
    if base_id is not None and not REPOSITORY.fullmatch(base_id):
        raise UserError("--base-id", f"{base_id!r} is not the id of a model", "give OWNER/NAME, as on the Hub")
    if stage is not None:
        folder = run.model(stage)
    elif name == TINY or Path(name).is_dir():
        folder = Path(base_path(block, run))
    else:
        folder = fetch(name, str(block.get("model_revision", "main")))
        base_id, revision = name, folder.name
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    if not with_base and base_id is None and size > SMALL:
        problem = f"the base has no public id that is known, and its {size / 1e6:,.0f} MB would have to be shipped"
        remedy = "name it with --base-id ID (and --revision), or ship it with --with-base"
        raise UserError(str(folder), problem, remedy)
    public = None if with_base else base_id
    return Base(folder, public, revision if public else None, stage, hash_weights(read_weights(folder)))
