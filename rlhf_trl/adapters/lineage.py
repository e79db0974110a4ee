"""Where an exported adapter comes from: base, parents, recipe, data, template, versions and seeds, as JSON.

Reads a run directory and an export; writes nothing. What is recorded names no path of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.base import Base
from rlhf_trl.adapters.evidence import without_paths
from rlhf_trl.adapters.files import ADAPTER, CONFIG, LINEAGE, TEMPLATE, list_files
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir

FORMAT = 1
# Keys of a `model` block that say with what precision the base was held in training.
PRECISION = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")


def describe(recipe: Recipe, run: RunDir, stages: Sequence[str], base: Base, folder: Path) -> dict[str, Any]:
    """Describe the adapter of a stage.

    Args:
        stages: the stages whose adapters it holds, the lowest first; the last one is exported.
        folder: the export, with its tokenizer.
    """
    stage = stages[-1]
    block = recipe.model_block(stage)
    summary, document = read_json(run.summary), recipe.model_dump()
    if document["judge"]:
        document["judge"]["base_url"] = None  # the address of a server of the house
    return {
        "format": FORMAT,
        "run": recipe.name,
        "stage": stage,
        "trainer": recipe.stages[stage].trainer,
        "kind": "reward" if recipe.stages[stage].trainer == "reward" else "policy",
        "base": {
            "id": base.id,
            "revision": base.revision,
            "shipped": base.id is None,
            "stage": base.stage,
            "weights": base.weights,
            "model_type": read_json(base.folder / "config.json")["model_type"],
            "held_in": {key: block.get(key) for key in PRECISION},
        },
        "combined": list(stages),
        "rank": read_json(folder / CONFIG)["r"],
        "parents": [_parent(recipe, run, name, relation) for name, relation in recipe.parents(stage).items()],
        "weights": {name: hash_file(run.adapter(name) / ADAPTER) for name in stages},
        "recipe": without_paths(document),
        "fingerprint": run.fingerprint_of(stage),
        "data": {
            "source": without_paths(recipe.data.source),
            "revision": recipe.data.revision,
            "fingerprint": run.fingerprint_of("prepare"),
            "train": hash_file(run.pairs("train")),
            "test": hash_file(run.pairs("test")),
            "rows_kept": summary["rows_kept"],
            "half": recipe.half_of(stage),
        },
        "template": hash_file(folder / TEMPLATE),
        "seed": recipe.args_of(stage)["seed"],
        "trained_with": read_json(run.training_stats(stage))["summary"]["environment"],
    }


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file of an export but `lineage.json` itself: path -> SHA-256."""
    files = sorted(path for path in list_files(folder) if path.name != LINEAGE)
    return {file.relative_to(folder).as_posix(): hash_file(file) for file in files}


def _parent(recipe: Recipe, run: RunDir, name: str, relation: str) -> dict[str, Any]:
    adapted = bool(recipe.model_block(name).get("use_peft"))
    folder = run.adapter(name) if adapted else run.model(name)
    return {
        "stage": name,
        "trainer": recipe.stages[name].trainer,
        "relation": relation,
        "adapter": adapted,
        "files": {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))},
        "fingerprint": run.fingerprint_of(name),
        "seed": recipe.args_of(name)["seed"],
    }
