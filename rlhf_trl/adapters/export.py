"""`adapter export`: a folder with one stage's adapter that others can load, and the evidence of what it is.

Writes the adapter, the tokenizer with its chat template, `probe.json` (texts and the run's outputs for them),
`evidence.json`, `lineage.json`, `README.md` (the card), the Pareto figure, and `base/` where that has no public id.
The folder appears when a fresh process has verified it.

    rlhf-trl adapter export runs/demo grpo shared/demo-grpo
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain as flatten
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.adapters import files
from rlhf_trl.adapters.base import Base, find_base, lora_chain, require_stage
from rlhf_trl.adapters.card import render_card
from rlhf_trl.adapters.check import require_sound
from rlhf_trl.adapters.combine import combine
from rlhf_trl.adapters.evidence import describe, gather, kind_of
from rlhf_trl.adapters.probe_program import outputs
from rlhf_trl.adapters.verify import verify
from rlhf_trl.models.base import MODEL_FILES, adapter_config, load_classifier, load_weights
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.documents import now
from rlhf_trl.run.files import read_json, read_jsonl, staged, write_json, write_text
from rlhf_trl.run.layout import RunDir

PROBE_PAIRS = 4  # of the held-out data, whose texts are the probe
TALK = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
# A template that writes what another one does, up to the last end token.
ENDED = """\
{{% set text %}}{{{{ '' }}}}{template}{{{{ '' }}}}{{% endset %}}{{% set parts = text.rpartition(eos_token) %}}
{{{{ text if add_generation_prompt else (parts[0] if parts[1] else text) + eos_token }}}}"""


def export(
    run: RunDir, stage: str, out: Path, base_id: str | None = None, revision: str | None = None, ship: bool = False
) -> dict[str, Any]:
    """Export the adapter of a stage, applied to the base below all adapters that it was trained on.

    Args:
        base_id, revision: the public id of a base that the recipe knows by a path.
        ship: ship the base with the adapter, whatever its size.

    Returns:
        The lineage.

    Raises:
        UserError: the stage has no adapter; it or a stage that it rests on is not finished, or not current; the
            adapters cannot be combined exactly; the base is large and has no public id; the export does not do what
            the run's adapter does, or names a place on this machine.
    """
    files.require_new(out)
    recipe = require_stage(run, stage)
    stages = lora_chain(recipe, stage)
    _require_current(recipe, run, stage)
    base = find_base(recipe, run, stages[0], base_id, revision, ship)
    kind, tokenizer = kind_of(recipe, stage), recorded_tokenizer(recipe, run, stage)
    _require_no_date(tokenizer)
    with staged(out) as folder:
        _write_adapter([run.adapter(name) for name in stages], base, folder)
        write_tokenizer(tokenizer, kind, folder)
        if base.id is None:
            (folder / files.BASE).mkdir()
            for file in flatten(*map(base.folder.glob, MODEL_FILES)):
                shutil.copyfile(file, folder / files.BASE / file.name)
            if kind == "reward":
                config = read_json(folder / files.BASE_CONFIG)
                write_json(folder / files.BASE_CONFIG, config | one_score(tokenizer))
        probe, rounding = _probe(run, stages, base, kind, tokenizer)
        write_json(folder / files.PROBE, probe)
        verification = verify(folder, kind, base.folder, base.id, base.revision)
        verification |= {"rounding": rounding, "dtype": "float32", "finished": now()}
        lineage = describe(recipe, run, stages, base, folder) | {"verification": verification}
        evidence = gather(recipe, run, stage)
        write_json(folder / files.EVIDENCE, evidence)
        if kind == "policy" and evidence["policy"] and run.figure("pareto").exists():
            shutil.copyfile(run.figure("pareto"), folder / files.FIGURE)
        write_text(folder / files.CARD, render_card(lineage, evidence, (folder / files.FIGURE).exists()))
        hashes = {name: hash_file(file) for name, file in files.list_files(folder).items()}
        write_json(folder / files.LINEAGE, lineage | {"files": hashes})
        require_sound(folder, base.folder)
        _require_no_path(folder, (str(run.root.resolve()), str(base.folder.resolve())))
    return lineage


def _require_current(recipe: Recipe, run: RunDir, stage: str) -> None:
    """Refuse a stage if it, or one that it rests on, is not finished, not current, or older than its own parent."""
    names = [*recipe.parents(stage), stage]
    for name in names:
        require_stage(run, name)
    for name in names:
        for parent in (recipe.stages[name].init, recipe.stages[name].reward):
            if parent is not None and run.finished(name) < run.finished(parent):
                problem = f"its parent {parent!r} was trained again afterwards"
                raise UserError(str(run.step(name)), problem, f"train {name!r} again")


def _require_no_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that renders a text differently on another day: scores would change with it."""
    days = set()
    for day in ("Monday", "Tuesday"):
        template = f"{{%- macro strftime_now(format) -%}}{day}{{%- endmacro -%}}{tokenizer.chat_template}"
        days.add(tokenizer.apply_chat_template(TALK, tokenize=False, chat_template=template))
    if len(days) > 1:
        remedy = "give the tokenizer a template that does not call strftime_now, and prepare again"
        raise UserError("chat template", "the template writes today's date", remedy)


def _require_no_path(folder: Path, paths: Sequence[str]) -> None:
    for name, file in files.list_files(folder).items():
        if file.suffix in (".json", ".md", ".jinja"):
            text = file.read_text(encoding="utf-8")
            for path in paths:
                if path in text:
                    raise UserError(name, f"the export would name a place on this machine: {path}", "report this")


def _write_adapter(adapters: Sequence[Path], base: Base, folder: Path) -> None:
    if len(adapters) == 1:
        tensors, config = load_file(adapters[0] / files.ADAPTER), LoraConfig.from_pretrained(str(adapters[0]))
    else:
        tensors, config = combine(adapters)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(tensors, folder / files.ADAPTER, metadata={"format": "pt"})
    settings = read_json(folder / files.CONFIG)
    # In one order: a set's differs from process to process.
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings[key], list):
            settings[key].sort()
    write_json(folder / files.CONFIG, settings)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str, folder: Path) -> None:
    """Save a tokenizer without the place that it was read from.

    That of a reward model pads on the right: models with learned positions, such as GPT-2, take padding on the left
    for text. A plain call of it on a text of its template gives the tokens that `score` reads.
    """
    tokenizer.padding_side = "right" if kind == "reward" else "left"
    if kind == "reward":
        _read_as_scored(tokenizer)
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = "left"
    settings = read_json(folder / files.TOKENIZER_CONFIG)
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    write_json(folder / files.TOKENIZER_CONFIG, settings)


def _read_as_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a conversation end on its end token, whatever its template writes behind that, and add no tokens to it."""
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    if not text.endswith(tokenizer.eos_token):
        tokenizer.chat_template = ENDED.format(template=tokenizer.chat_template.removesuffix("\n"))
    if tokenizer(text).input_ids != tokenizer(text, add_special_tokens=False).input_ids:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False


def one_score(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings of a model with which a classifier, and a pipeline, of `transformers` gives one score."""
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression",
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip


def _probe(
    run: RunDir, stages: Sequence[str], base: Base, kind: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Compute the run's outputs for a few held-out texts, on the CPU in float32.

    Returns:
        The probe: of each text the token ids and the outputs, which are its score, or the logit of each next token.
        And how far the run's merged start, in the precision of the recipe, rounds them; None without such a start.
    """
    sides = {"reward": ("chosen", "rejected"), "policy": ("chosen",)}[kind]
    pairs = read_jsonl(run.pairs("test"))[:PROBE_PAIRS]
    texts = [list(flatten(*encode(tokenizer, pair["prompt"], pair[side]))) for pair in pairs for side in sides]
    adapters = [run.adapter(name) for name in stages]
    found = _outputs(base.folder, adapters, kind, tokenizer, texts)
    rounding = None
    if len(stages) > 1 and run.model(stages[-2]).exists():
        started = _outputs(run.model(stages[-2]), adapters[-1:], kind, tokenizer, texts)
        rounding = {"difference": float(np.max(np.abs(np.hstack(found) - np.hstack(started))))}
    rows = [{"input_ids": ids, "outputs": values} for ids, values in zip(texts, found, strict=True)]
    return {"kind": kind, "dtype": "float32", "rows": rows}, rounding


def _outputs(
    start: Path, adapters: Sequence[Path], kind: str, tokenizer: PreTrainedTokenizerBase, texts: list[list[int]]
) -> list[list[float]]:
    """Compute the outputs of a model with adapters, all but the last of which are merged into it, one by one."""
    config = ModelConfig(dtype="float32")
    if kind == "reward":
        model: Any = load_classifier(str(start), config, tokenizer)
    else:
        model = load_weights(AutoModelForCausalLM, str(start), config)
    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, folder, config=adapter_config(folder)).merge_and_unload()
    return outputs(PeftModel.from_pretrained(model, adapters[-1]), [torch.tensor(ids) for ids in texts])
