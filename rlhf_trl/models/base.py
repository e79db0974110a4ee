"""Base model and reward head: what every step that loads weights starts with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from rlhf_trl.models.tokenizer import base_path, build_once, recorded_tokenizer, unreachable
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.text.display import first_line

# What a model needs to be loaded, without its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: ids and mask, both (B, T)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.long(), (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def fetch(name: str, revision: str | None) -> Path:
    """Find a model of the Hub in the local cache, or fetch it (else UserError); the folder's name is the commit."""
    patterns = [*MODEL_FILES, "*.jinja", "token*.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        problem = f"the base cannot be reached: {first_line(error)}"
        raise UserError(name, problem, "check the name, the network, and access") from error


def start_path(recipe: Recipe, run: RunDir, stage: str) -> str:
    """Where the model that a stage starts from lies: its `init` stage's, or the base.

    The adapter of the `init` stage is merged into a full-precision base once, next to that adapter. Every loader
    understands that folder (4-bit, ZeRO-3), and it is the exact reference of what is trained on it. A damaged one is
    merged again.
    """
    init = recipe.stages[stage].init
    if init is None:
        return base_path(recipe.model_block(stage), run)
    if not run.adapter(init).exists():
        return str(run.model(init))

    def merge(folder: Path) -> None:
        config, start = ModelConfig(**recipe.model_block(init)), start_path(recipe, run, init)
        check_weights(run.adapter(init))
        base = load_weights(transformers.AutoModelForCausalLM, start, config, quantize=False)
        PeftModel.from_pretrained(base, run.adapter(init)).merge_and_unload().save_pretrained(folder)
        recorded_tokenizer(recipe, run).save_pretrained(folder)

    return build_once(run, init, run.model(init), merge)


class RewardHead(torch.nn.Linear):
    """A scalar head that is kept and applied in float32, whatever the base's precision.

    In bfloat16 its updates would round away, and scores that differ by less than 1 in 256 would tie.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)


def load_causal(path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a language model as the recipe's `model` block says (dtype, attention, quantisation)."""
    model = load_weights(transformers.AutoModelForCausalLM, path, config)
    model.config.pad_token_id = tokenizer.pad_token_id
    # Contiguous: on the CPU, torch multiplies a slice of positions row by row, each with a copy of the head's weights.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    # Not the model's own settings: some stop at other tokens than the template's, some penalise repetition.
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    return model


def load_classifier(path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the same weights under a head with one output; the head is random until an adapter brings its own."""
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)  # it reports the head, which no language model has, as a fault
    try:
        model = load_weights(transformers.AutoModelForSequenceClassification, path, config, num_labels=1)
    finally:
        report.setLevel(level)
    model.config.pad_token_id = tokenizer.pad_token_id
    with contextlib.ExitStack() as stack:
        if is_deepspeed_zero3_enabled():  # it has sharded the weight while loading
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([model.score.weight]))
        weight = model.score.weight.detach().float().clone()
    head = RewardHead(weight.shape[1], 1, bias=False, device=weight.device)
    head.weight = torch.nn.Parameter(weight)
    model.score = head
    return model


def load_weights(auto: Any, path: str, config: ModelConfig, quantize: bool = True, **more: Any) -> PreTrainedModel:
    """Load a model of a transformers Auto class as a `model` block says, without running code that comes with it."""
    quantization = get_quantization_config(config) if quantize else None
    if quantization is not None:
        more |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    more |= {"revision": config.model_revision, "dtype": dtype, "attn_implementation": config.attn_implementation}
    try:
        # Without trust_remote_code=False, a model that brings code has the user asked whether to run it.
        return auto.from_pretrained(path, trust_remote_code=False, **more)
    except (OSError, ValueError) as error:
        raise unreachable(path, error) from error


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Return how many tokens a model reads at most; None where it sets no limit, as with ALiBi or a state space."""
    config, name = model.config.get_text_config(), "max_position_embeddings"
    limit: int | None = config.to_dict().get(config.attribute_map.get(name, name))
    return limit


def prompt_room(model: PreTrainedModel | PeftModel, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have before an answer of `max_new_tokens`; None where there is no limit.

    Raises:
        UserError: none is left for a prompt.
    """
    limit = positions(model)
    if limit is not None and limit <= max_new_tokens:
        problem = f"{max_new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
        raise UserError("max_new_tokens", problem, f"give less than {limit}")
    return limit and limit - max_new_tokens
