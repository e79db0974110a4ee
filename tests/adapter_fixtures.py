"""Runs to export from: a base, and stages whose adapters have random weights, since nothing here has to be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import small_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from trl import ModelConfig

from rlhf_trl.data.preprocess import prepare
from rlhf_trl.models.base import load_causal, load_classifier, start_path
from rlhf_trl.models.tokenizer import build_tiny, recorded_tokenizer
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.documents import environment
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.layout import RunDir

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ID, COMMIT = "owner/base", "0123456789abcdef0123456789abcdef01234567"
TEXT = """
name: {name}
seed: 5
model: {{model_name_or_path: {base}, use_peft: true, lora_r: 4, lora_target_modules: all-linear}}
data: {{source: builtin:demo, max_rows: 80, max_length: 96, test_fraction: 0.2}}
stages:
  sft: {{trainer: sft}}
  rm: {{trainer: reward{init}}}
  dpo: {{trainer: dpo{init}}}
evaluation: {{max_new_tokens: 16}}
"""


def write_base(folder: Path, architecture: str) -> Path:
    """Write a small untrained model with the demo's tokenizer."""
    build_tiny(folder)
    torch.manual_seed(1)
    sizes = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 1024, "pad_token_id": None}
    if architecture == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, **sizes))
    else:
        config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **sizes)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def write_run(folder: Path, base: Path, parent: bool, name: str = "run") -> tuple[Recipe, RunDir]:
    """Write a run with the stages `sft`, `rm` and `dpo`; the last two start from the first, or from the base."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(name=name, base=base, init=", init: sft" if parent else "")
    recipe = small_recipe(folder, text=text)
    run = RunDir(folder / "runs" / name)
    run.replace("prepare")
    prepare(recipe, run)
    run.mark_done(recipe, "prepare", 0.1)
    run.write_provenance(recipe)
    for seed, stage in enumerate(recipe.stages):
        _write_stage(recipe, run, stage, seed)
    return recipe, run


def _write_stage(recipe: Recipe, run: RunDir, stage: str, seed: int) -> None:
    """Save an adapter that changes what the model says: LoRA starts with B = 0, which changes nothing."""
    torch.manual_seed(seed)
    tokenizer, path = recorded_tokenizer(recipe, run), start_path(recipe, run, stage)
    classifier = stage == "rm"
    model = (load_classifier if classifier else load_causal)(path, ModelConfig(), tokenizer)
    config = LoraConfig(
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM", r=4 + 2 * seed, lora_alpha=6, target_modules="all-linear"
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "lora_B" in key:
                param.normal_(0, 0.05 if param.shape[0] < 100 else 0.01)
    model.save_pretrained(run.adapter(stage))
    tokenizer.save_pretrained(run.adapter(stage))
    summary = {"steps": 1, "rows": 60, "seconds": 1.5, "seed": 5, "device": "cpu", "processes": 1,
               "trainable_parameters": 1, "environment": environment()}  # fmt: skip
    write_json(run.training_stats(stage), {"summary": summary})
    run.mark_done(recipe, stage, 1.5)


@torch.no_grad()
def logits(base: Any, adapter: Path | None = None) -> torch.Tensor:
    """The logits of a model, or of the model in a folder, with the adapter of a folder on it."""
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, str | Path) else base
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    return model.eval()(input_ids=torch.tensor([[5, 99, 300, 17, 42, 800, 3]])).logits


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrite the weights of an adapter, and the lineage's hash of them, as an author would."""
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    relist(folder, ADAPTER)


def change_json(folder: Path, name: str, **values: Any) -> None:
    """Rewrite settings of an adapter, as an author would."""
    write_json(folder / name, {**read_json(folder / name), **values})
    relist(folder, name)


def relist(folder: Path, name: str) -> None:
    """Write the hash of a file into the lineage, if there is one, so that it does not give the change away."""
    if (folder / "lineage.json").exists() and name != "lineage.json":
        lineage = read_json(folder / "lineage.json")
        lineage["files"][name] = hash_file(folder / name)
        write_json(folder / "lineage.json", lineage)


def as_rewardbench(model: str | Path, prompts: Any, answers: Any) -> torch.Tensor:
    """Score answers as RewardBench does (scripts/run_v2.py at 05a9005): it knows a model's name and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    talks = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, answers, strict=True)]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=False) for talk in talks]
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    found = pipeline("text-classification", model=classifier, tokenizer=tokenizer)(
        texts, batch_size=4, truncation=True, padding=True, max_length=2048, function_to_apply="none",
        return_token_type_ids=False)  # fmt: skip
    return torch.tensor([one["score"] for one in found])
