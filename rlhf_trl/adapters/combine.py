"""LoRA adapters that lie on top of each other, as one adapter for the base below them all.

An adapter adds s·B·A to a weight, with its scaling s. Two of them add s₁·B₁·A₁ + s₂·B₂·A₂, which is exactly the
product of [B₁, B₂] and [s₁·A₁; s₂·A₂]: one adapter whose rank is the sum of theirs. PEFT concatenates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rlhf_trl.adapters.check import ADAPTER, CONFIG
from rlhf_trl.adapters.rules import HEAD, LINEAR, PREFIX
from rlhf_trl.adapters.settings import HEADS, is_off
from rlhf_trl.models.base import adapter_config, load_adapter, load_weights
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json
from rlhf_trl.run.safetensors import read_header

# Settings in which an adapter may differ from plain LoRA. Others add something else than s·B·A to the weights that its
# names say, or change the base.
MAY_DIFFER = {"task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
              "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "use_rslora", "rank_pattern",
              "alpha_pattern"}  # fmt: skip


def combine(base: Path, folders: Sequence[Path]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Combine saved adapters, each trained on the base with those before it merged in.

    Where an adapter has no tensor for a module, zeros keep the rank the same for all, as servers such as vLLM require.

    Args:
        folders: at least two, the lowest first; the last one may bring a reward head.

    Returns:
        The tensors in float32, and a configuration for them, with the summed rank and a scaling of 1.

    Raises:
        UserError: an adapter cannot be combined exactly.
    """
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
            modules = (key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in read_header(folder / ADAPTER))
            config.target_modules = set(filter(None, modules))
    adapted.add_weighted_adapter(names, [1.0] * len(names), "combined", combination_type="cat")
    tensors = get_peft_model_state_dict(adapted, adapter_name="combined")
    config, last = adapted.peft_config["combined"], LoraConfig.from_pretrained(str(folders[-1]))
    config.task_type, config.modules_to_save = last.task_type, last.modules_to_save
    return tensors | ({} if head is None else {HEAD: head}), config


def _not_exact(folder: Path, last: bool) -> str | None:
    """Say why an adapter cannot be combined exactly, if it cannot."""
    for key, value in read_json(folder / CONFIG).items():
        harmless = key == "modules_to_save" and set(value or ()) <= set(HEADS)
        harmless |= (key, value) == ("init_lora_weights", "gaussian")
        if key not in MAY_DIFFER and not harmless and not is_off(key, value):
            return f"its setting {key} is {value!r}"
    for key in read_header(folder / ADAPTER):
        if not key.endswith(LINEAR) and not (last and key == HEAD):
            return f"it adapts an embedding, or replaces a tensor of its base ({key})"
        if not last and ".lm_head." in key:
            return "it adapts the output layer, which a base may share with its embedding"
    return None
