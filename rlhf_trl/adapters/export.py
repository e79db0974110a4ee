"""`adapter export`: a folder with one stage's adapter that others can load, and the evidence of what it is; and
`adapter merge`: an adapter folded into its base, as a model of its own that answers, or scores, the same.

An export has the adapter, the tokenizer with its chat template, `probe.json` (texts and the run's outputs for them),
`evidence.json`, `lineage.json`, `README.md` (the card), the Pareto figure, and `base/` where that has no public id.
The folder appears when a fresh process has verified it.

    rlhf-trl adapter export runs/demo grpo shared/demo-grpo
    rlhf-trl adapter merge shared/demo-grpo merged/demo-grpo
"""

import shutil
from collections.abc import Sequence
from itertools import chain as flatten
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.adapters import check as files
from rlhf_trl.adapters.card import render_card
from rlhf_trl.adapters.check import list_files, require_sound
from rlhf_trl.adapters.evidence import Base, describe, find_base, gather, kind_of, lora_chain, require_current
from rlhf_trl.adapters.load import load, locate_base
from rlhf_trl.adapters.probe_program import outputs
from rlhf_trl.adapters.rules import HEAD, HEADS, LINEAR, PREFIX, is_off
from rlhf_trl.adapters.verify import require_equal, verify
from rlhf_trl.models.base import MODEL_FILES, adapter_config, adapter_path, load_adapter, load_classifier, load_weights
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.documents import now
from rlhf_trl.run.files import read_json, read_jsonl, staged, write_json, write_text
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import read_header

# Settings in which an adapter may differ from plain LoRA. Others add something else than s·B·A to the weights that its
# names say, or change the base.
MAY_DIFFER = {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
              "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "use_rslora", "rank_pattern",
              "alpha_pattern"}  # fmt: skip
# What the outputs of a merged model are compared on.
TEXTS = (("What is a good way to learn a language?", "Read a little every day, and talk to people."),
         ("Why is the sky blue?", "Because air scatters blue light more than red."))  # fmt: skip
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

    `base_id` and `revision` are the public id of a base that the recipe knows by a path; `ship` the base, whatever its
    size. Returns the lineage.

    Raises:
        UserError: the stage has no adapter; it or a stage that it rests on is not current; the adapters cannot be
            combined exactly; the base is large and has no public id; the export does not do what the adapter does.
    """
    require_new(out)
    recipe = require_current(run, stage)
    stages = lora_chain(recipe, stage)
    adapters = [adapter_path(recipe, run, name) for name in stages]
    base = find_base(recipe, run, stages[0], base_id, revision, ship)
    kind, tokenizer = kind_of(recipe, stage), recorded_tokenizer(recipe, run, stage)
    with staged(out) as folder:
        _write_adapter(adapters, base, folder)
        write_tokenizer(tokenizer, kind, folder)
        if base.id is None:
            (folder / files.BASE).mkdir()
            for file in flatten(*map(base.folder.glob, MODEL_FILES)):
                shutil.copyfile(file, folder / files.BASE / file.name)
            _name_as_before(folder / files.BASE_CONFIG, **(one_score(tokenizer) if kind == "reward" else {}))
        write_json(folder / files.PROBE, _probe(run, adapters, base, kind, tokenizer))
        verification = verify(folder, kind, base.folder, base.id, base.revision) | {"finished": now()}
        lineage = describe(recipe, run, stages, base, folder) | {"verification": verification}
        evidence = gather(recipe, run, stage)
        write_json(folder / files.EVIDENCE, evidence)
        if kind == "policy" and evidence["policy"] and run.figure("pareto").exists():
            shutil.copyfile(run.figure("pareto"), folder / files.FIGURE)
        write_text(folder / files.CARD, render_card(lineage, evidence, (folder / files.FIGURE).exists()))
        hashes = {name: hash_file(file) for name, file in list_files(folder).items()}
        write_json(folder / files.LINEAGE, lineage | {"files": hashes})
        require_sound(folder, base.folder)
        for name, file in list_files(folder).items():
            text = file.read_text(encoding="utf-8") if file.suffix in (".json", ".md", ".jinja") else ""
            if told := [path for path in (str(run.root.resolve()), str(base.folder.resolve())) if path in text]:
                raise UserError(name, f"the export would name a place on this machine: {told[0]}", "report this")
    return lineage


def require_new(out: Path) -> None:
    """Refuse, by a UserError, to write over what is there; make the folder around it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "this is there already", "name a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)


def _write_adapter(adapters: Sequence[Path], base: Base, folder: Path) -> None:
    if len(adapters) == 1:
        tensors, config = load_file(adapters[0] / files.ADAPTER), LoraConfig.from_pretrained(str(adapters[0]))
    else:
        tensors, config = combine(base.folder, adapters)
    config.base_model_name_or_path, config.revision = base.id or f"./{files.BASE}", base.revision
    if config.use_rslora and not config.rank_pattern and not config.alpha_pattern:  # others divide by the rank
        config.lora_alpha, config.use_rslora = config.lora_alpha * config.r**0.5, False
    config.inference_mode = True
    config.save_pretrained(folder)
    own = {key: tensor for key, tensor in tensors.items() if ".base_layer." not in key}  # PEFT adds the base's
    save_file(own, folder / files.ADAPTER, metadata={"format": "pt"})
    settings = read_json(folder / files.CONFIG)
    # In one order: a set's differs from process to process.
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings[key], list):
            settings[key].sort()
    write_json(folder / files.CONFIG, settings)


def combine(base: Path, folders: Sequence[Path]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Combine saved adapters, each trained on the base with those before it merged in.

    An adapter adds s·B·A to a weight, with its scaling s. Two of them add s₁·B₁·A₁ + s₂·B₂·A₂, which is exactly the
    product of [B₁, B₂] and [s₁·A₁; s₂·A₂]: one adapter whose rank is the sum of theirs. PEFT concatenates them; zeros
    keep the rank the same for all modules, as servers such as vLLM require.

    Args:
        folders: at least two, the lowest first; the last one may bring a reward head.

    Returns:
        The tensors in float32, and a configuration for them, with the summed rank and a scaling of 1.

    UserError where an adapter cannot be combined exactly."""
    for folder in folders:
        if reason := _not_exact(folder, last=folder == folders[-1]):
            problem = f"the adapter cannot be combined exactly with another one: {reason}"
            raise UserError(str(folder), problem, "export it with the base that it lies on: --with-base")
    names = [f"part{number}" for number in range(len(folders))]
    model = load_weights(AutoModelForCausalLM, str(base), ModelConfig(dtype="float32"))
    adapted = get_peft_model(model, adapter_config(folders[0]), adapter_name=names[0])
    for name, folder in zip(names, folders, strict=True):
        head = load_adapter(adapted, name, folder)
        config = adapted.peft_config[name]
        config.use_rslora = False  # its scaling is known by now, and the combined one is 1
        if isinstance(config.target_modules, str):  # a pattern, which PEFT does not join with a list
            modules = (key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in read_header(folder / files.ADAPTER))
            config.target_modules = set(filter(None, modules))
    adapted.add_weighted_adapter(names, [1.0] * len(names), "combined", combination_type="cat")
    tensors = get_peft_model_state_dict(adapted, adapter_name="combined")
    config, last = adapted.peft_config["combined"], LoraConfig.from_pretrained(str(folders[-1]))
    config.task_type, config.modules_to_save = last.task_type, last.modules_to_save
    return tensors | ({} if head is None else {HEAD: head}), config


def _not_exact(folder: Path, last: bool) -> str | None:
    """Say why an adapter cannot be combined exactly, if it cannot."""
    for key, value in read_json(folder / files.CONFIG).items():
        harmless = key == "modules_to_save" and set(value or ()) <= set(HEADS)
        harmless |= (key, value) == ("init_lora_weights", "gaussian")
        if key not in MAY_DIFFER and not harmless and not is_off(key, value):
            return f"its setting {key} is {value!r}"
    for key in read_header(folder / files.ADAPTER):
        if not key.endswith(LINEAR) and not (last and (key == HEAD or ".base_layer." in key)):
            return f"it adapts an embedding, or replaces a tensor of its base ({key})"
        if not last and ".lm_head." in key:
            return "it adapts the output layer, which a base may share with its embedding"
    return None


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str, folder: Path) -> None:
    """Save a tokenizer without the place that it was read from.

    That of a reward model pads on the right: models with learned positions, such as GPT-2, take padding on the left
    for text. A plain call of it on a text of its template gives the tokens that `score` reads: the template ends on
    the end token, and nothing is added.
    """
    tokenizer.padding_side = "left"
    if kind == "reward":
        tokenizer.padding_side, text = "right", tokenizer.apply_chat_template(TALK, tokenize=False)
        if not text.endswith(tokenizer.eos_token):
            tokenizer.chat_template = ENDED.format(template=tokenizer.chat_template.removesuffix("\n"))
        if tokenizer(text).input_ids != tokenizer(text, add_special_tokens=False).input_ids:
            tokenizer.add_bos_token = tokenizer.add_eos_token = False
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = "left"
    settings = read_json(folder / files.TOKENIZER_CONFIG)
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    # Names that transformers 4 knows, too, which others' tools are pinned to.
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    if "extra_special_tokens" in settings:
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(folder / files.TOKENIZER_CONFIG, settings)


def _name_as_before(file: Path, **more: Any) -> None:
    """Write settings of a model, and `more`, under the names of transformers 4, too, which else takes its defaults."""
    settings = read_json(file) | more
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type") != "default":
            settings["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_json(file, settings)


def one_score(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings of a model with which a classifier, and a pipeline, of `transformers` gives one score."""
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression",
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip


def _probe(
    run: RunDir, adapters: Sequence[Path], base: Base, kind: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Compute the run's outputs for a few held-out texts, on the CPU in float32, with its adapters merged one by one:
    of each text the token ids and the outputs, which are its score, or the logit of each next token."""
    sides = {"reward": ("chosen", "rejected"), "policy": ("chosen",)}[kind]
    pairs = read_jsonl(run.pairs("test"))[:PROBE_PAIRS]
    texts = [list(flatten(*encode(tokenizer, pair["prompt"], pair[side]))) for pair in pairs for side in sides]
    config = ModelConfig(dtype="float32")
    if kind == "reward":
        model: Any = load_classifier(str(base.folder), config, tokenizer)
    else:
        model = load_weights(AutoModelForCausalLM, str(base.folder), config)
    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, folder, config=adapter_config(folder)).merge_and_unload()
    found = outputs(PeftModel.from_pretrained(model, adapters[-1]), [torch.tensor(ids) for ids in texts])
    rows = [{"input_ids": ids, "outputs": values} for ids, values in zip(texts, found, strict=True)]
    return {"kind": kind, "dtype": "float32", "rows": rows}


def merge(folder: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    """Merge an adapter into its base in float32, and compare what was saved with the adapter.

    They are compared in float64: in float32, rounding on the way through the layers is larger than what merging does.
    Returns the largest absolute `difference` of an output, and the `largest` absolute output.

    Raises:
        UserError: the adapter or the base is not sound, the base is quantised, or the merged model's outputs differ.
    """
    require_new(out)
    path = locate_base(folder, base)
    if read_json(path / "config.json").get("quantization_config") is not None:
        problem = "the base is quantised: merged weights would be rounded to its few values"
        raise UserError(str(path), problem, "merge into the base in full precision: --base")
    model, tokenizer, task = load(folder, path, "float32")
    pairs = [encode(tokenizer, [{"role": "user", "content": text}], answer) for text, answer in TEXTS]
    texts = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    before = np.hstack(outputs(model.double(), texts))
    classifier = task == "SEQ_CLS"
    with staged(out) as target:
        merged = model.float().merge_and_unload()  # back from float64 nothing is lost
        if classifier:
            merged.config.update(one_score(tokenizer))
        merged.save_pretrained(target)
        _name_as_before(target / "config.json")
        write_tokenizer(tokenizer, "reward" if classifier else "policy", target)
        del merged, model  # one copy in memory at a time
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        after = np.hstack(outputs(auto.from_pretrained(target, dtype="float64", trust_remote_code=False), texts))
        found = {"difference": float(np.abs(before - after).max()), "largest": float(np.abs(before).max())}
        require_equal(str(folder), "the merged model", **found)
        lineage = read_json(folder / files.LINEAGE) if (folder / files.LINEAGE).exists() else None
        write_json(target / files.LINEAGE, {"merged": found, "adapter": lineage})
    return found
