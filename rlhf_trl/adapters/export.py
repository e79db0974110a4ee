"""`adapter export`: a folder with one stage's adapter that others can load, and the evidence of what it is.

Reads a run directory; writes `adapter_config.json`, `adapter_model.safetensors`, the tokenizer with its chat template,
`probe.json` (texts and the run's outputs for them), `evidence.json`, `lineage.json`, `README.md` (the card) and the
Pareto figure; `base/` where the base has no public id. The folder appears when a fresh process has verified it.

    rlhf-trl adapter export runs/demo grpo shared/demo-grpo
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain as flatten
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.adapters.base import Base, find_base, lora_chain, ship
from rlhf_trl.adapters.card import write_card
from rlhf_trl.adapters.check import require_sound
from rlhf_trl.adapters.combine import combine
from rlhf_trl.adapters.evidence import gather
from rlhf_trl.adapters.files import ADAPTER, CONFIG, EVIDENCE, FIGURE, LINEAGE, PROBE
from rlhf_trl.adapters.lineage import describe, hash_files
from rlhf_trl.adapters.verify import verify
from rlhf_trl.models.base import encode, load_classifier, load_weights, recorded_tokenizer, staged
from rlhf_trl.models.policies import adapter_config
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.environment import now
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir

# Pairs of the held-out data whose texts are the probe.
PROBE_PAIRS = 4


def export(
    run: RunDir,
    stage: str,
    out: Path,
    base_id: str | None = None,
    revision: str | None = None,
    with_base: bool = False,
) -> dict[str, Any]:
    """Export the adapter of a stage, applied to the base below all adapters that it was trained on.

    Args:
        base_id, revision: the public id of a base that the recipe knows by a path.
        with_base: ship the base with the adapter.

    Returns:
        The lineage, as it stands in `lineage.json`.

    Raises:
        UserError: there is no such stage, or it has no adapter; it or a stage that it rests on is not finished, or was
            trained with other settings, or before its own parent; the adapters cannot be combined
            exactly; the base is large and has no public id; the export does not do what the run's adapter does, or it
            names a place on this machine.
    """
    recipe = open_recipe(run, stage)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "this is there already", "name a folder that does not exist")
    stages = lora_chain(recipe, stage)
    _require_current(recipe, run, stage)
    base = find_base(recipe, run, stages[0], base_id, revision, with_base)
    kind = "reward" if recipe.stages[stage].trainer == "reward" else "policy"
    tokenizer = recorded_tokenizer(recipe, run, stage)
    _require_no_date(tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with staged(out) as folder:
        _write_adapter([run.adapter(name) for name in stages], base, folder)
        write_tokenizer(tokenizer, kind, folder)
        if base.id is None:
            ship(base, folder)
        probe, rounding = _probe(recipe, run, stages, base, tokenizer)
        write_json(folder / PROBE, probe)
        found = verify(folder, kind, base.folder, base.id, base.revision)
        verification = {**found, "rounding": rounding, "dtype": "float32", "finished": now()}
        lineage = {**describe(recipe, run, stages, base, folder), "verification": verification}
        evidence = gather(recipe, run, stage)
        write_json(folder / EVIDENCE, evidence)
        if kind == "policy" and evidence["policy"] and run.figure("pareto").exists():
            shutil.copyfile(run.figure("pareto"), folder / FIGURE)
        write_card(folder, lineage, evidence)
        write_json(folder / LINEAGE, {**lineage, "files": hash_files(folder)})
        require_sound(folder, base.folder)
        _require_no_path(folder, (run.root.resolve(), base.folder.resolve()))
    return lineage


def open_recipe(run: RunDir, stage: str) -> Recipe:
    """Read the recipe of a run directory.

    Raises:
        UserError: it is no run directory, or the recipe has no such stage.
    """
    recipe = run.recorded_recipe()
    if stage not in recipe.stages:
        raise UserError(str(run.root), f"there is no stage {stage!r}", f"the stages are: {', '.join(recipe.stages)}")
    return recipe


def _require_current(recipe: Recipe, run: RunDir, stage: str) -> None:
    """Refuse a stage if it, or one that it rests on, is not finished as the recipe has it, or is older than its own
    parent."""
    names = [*recipe.parents(stage), stage]
    for name in names:
        run.require(recipe, name, f"train RECIPE {name}")
    for name in names:
        for parent in (recipe.stages[name].init, recipe.stages[name].reward):
            if parent is not None and run.finished(name) < run.finished(parent):
                problem = f"its parent {parent!r} was trained again afterwards"
                raise UserError(str(run.step(name)), problem, f"train {name!r} again")


def _require_no_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that renders a text differently on another day: scores would change with it."""
    text = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    days = {
        tokenizer.apply_chat_template(
            text,
            tokenize=False,
            chat_template=f"{{%- macro strftime_now(format) -%}}{day}{{%- endmacro -%}}{tokenizer.chat_template}",
        )
        for day in ("Monday", "Tuesday")
    }
    if len(days) > 1:
        remedy = "give the tokenizer a template that does not call strftime_now, and prepare again"
        raise UserError("chat template", "the template writes today's date", remedy)


def _require_no_path(folder: Path, paths: Sequence[Path]) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")):
        text = file.read_text(encoding="utf-8")
        if found := [str(path) for path in paths if str(path) in text]:
            raise UserError(file.name, f"the export would name a place on this machine: {found[0]}", "report this")


def _write_adapter(adapters: Sequence[Path], base: Base, folder: Path) -> None:
    if len(adapters) == 1:
        tensors, config = load_file(adapters[0] / ADAPTER), LoraConfig.from_pretrained(str(adapters[0]))
    else:
        tensors, config = combine(adapters)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    settings = read_json(folder / CONFIG)
    # In one order: a set's differs from process to process.
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings[key], list):
            settings[key].sort()
    write_json(folder / CONFIG, settings)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str, folder: Path) -> None:
    """Save a tokenizer without the place that it was read from.

    That of a reward model pads on the right, since models with learned positions, such as GPT-2, take padding on the
    left for text.

    Args:
        kind: `policy` or `reward`.
    """
    tokenizer.padding_side = "right" if kind == "reward" else "left"
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = "left"
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    write_json(folder / "tokenizer_config.json", settings)


# --- the probe
# ---------------------------------------------------------------------------------------------------------


def _probe(
    recipe: Recipe, run: RunDir, stages: Sequence[str], base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Compute the run's outputs for a few held-out texts, on the CPU in float32.

    Returns:
        The probe: of each text the token ids and the outputs, which are its score, or the logit of each next token.
        And how far the run's merged start, which is kept in the precision of the recipe, rounds these outputs; None
        where the stage starts from no adapter.
    """
    classifier = recipe.stages[stages[-1]].trainer == "reward"
    pairs = read_jsonl(run.pairs("test"))[:PROBE_PAIRS]
    sides = ("chosen", "rejected") if classifier else ("chosen",)
    texts = [list(flatten(*encode(tokenizer, pair["prompt"], pair[side]))) for pair in pairs for side in sides]
    model = _load(base.folder, classifier, tokenizer)
    for name in stages[:-1]:
        model = PeftModel.from_pretrained(model, run.adapter(name), config=adapter_config(run.adapter(name)))
        model = model.merge_and_unload()
    outputs = _outputs(PeftModel.from_pretrained(model, run.adapter(stages[-1])), texts, classifier)
    rounding = None
    if len(stages) > 1 and run.model(stages[-2]).exists():
        start = _load(run.model(stages[-2]), classifier, tokenizer)
        started = _outputs(PeftModel.from_pretrained(start, run.adapter(stages[-1])), texts, classifier)
        pairs_of = zip(flatten(*outputs), flatten(*started), strict=True)
        rounding = {"difference": max(abs(one - other) for one, other in pairs_of)}
    rows = [{"input_ids": ids, "outputs": values} for ids, values in zip(texts, outputs, strict=True)]
    return {"kind": "reward" if classifier else "policy", "dtype": "float32", "rows": rows}, rounding


def _load(folder: Path, classifier: bool, tokenizer: PreTrainedTokenizerBase) -> Any:
    config = ModelConfig(dtype="float32")
    if classifier:
        return load_classifier(str(folder), config, tokenizer)
    return load_weights(AutoModelForCausalLM, str(folder), config)


@torch.no_grad()
def _outputs(model: Any, texts: Sequence[list[int]], classifier: bool) -> list[list[float]]:
    model.eval()
    found = []
    for ids in texts:
        row = torch.tensor(ids)
        logits = model(input_ids=row[None]).logits[0]
        found.append(logits.tolist() if classifier else logits[:-1].gather(1, row[1:, None])[:, 0].tolist())
    return found
