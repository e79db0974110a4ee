"""LoRA adapters that lie on top of each other, written as one adapter for the base below them all.

An adapter adds s·B·A to a weight, with its scaling s. Two of them add s₁·B₁·A₁ + s₂·B₂·A₂, which is exactly the
product of [s₁·B₁, s₂·B₂] and [A₁; A₂]: one adapter whose rank is the sum of theirs. Works on tensors in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from rlhf_trl.adapters.files import ADAPTER
from rlhf_trl.adapters.rules import LINEAR, PREFIX
from rlhf_trl.recipe.errors import UserError

LORA_A, LORA_B = LINEAR
# Settings in which an adapter may differ from plain LoRA. Others add something else than s·B·A to the weights that its
# names say, or change the base.
MAY_DIFFER = {"task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
              "lora_dropout", "target_modules", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern",
              "modules_to_save"}  # fmt: skip


def combine(folders: Sequence[Path]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Combine saved adapters, each trained on the base with those before it merged in, with the scaling folded into B.

    Where an adapter has no tensor for a module, zeros keep the rank the same for all, as servers such as vLLM require.

    Args:
        folders: at least two, the lowest first; the last one may bring a reward head.

    Returns:
        The tensors in float32, and the last adapter's configuration, with the summed rank and a scaling of 1.

    Raises:
        UserError: an adapter cannot be combined exactly.
    """
    adapters = [(LoraConfig.from_pretrained(str(folder)), load_file(folder / ADAPTER)) for folder in folders]
    for folder, (config, tensors) in zip(folders, adapters, strict=True):
        if reason := _not_exact(config, tensors, last=folder == folders[-1]):
            problem = f"the adapter cannot be combined exactly with another one: {reason}"
            raise UserError(str(folder), problem, "export it with the base that it lies on: --with-base")
    config, own = adapters[-1]
    rank = sum(max(len(tensor) for key, tensor in tensors.items() if key.endswith(LORA_A)) for _, tensors in adapters)
    combined = {key: tensor for key, tensor in own.items() if not key.endswith(LINEAR)}
    modules = {key.removesuffix(LORA_A) for _, tensors in adapters for key in tensors if key.endswith(LORA_A)}
    for module in sorted(modules):
        parts = [
            (tensors[module + LORA_A].float(), _scaling(config, module, tensors) * tensors[module + LORA_B].float())
            for config, tensors in adapters
            if module + LORA_A in tensors
        ]
        down, up = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        combined[module + LORA_A] = torch.nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        combined[module + LORA_B] = torch.nn.functional.pad(up, (0, rank - len(down))).contiguous()
    config.r = config.lora_alpha = rank
    targets = [adapter[0].target_modules for adapter in adapters]
    if not all(isinstance(names, set) for names in targets):  # a pattern
        targets = [{module.removeprefix(PREFIX) for module in modules}]
    config.target_modules = set().union(*targets)
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    return combined, config


def _not_exact(config: LoraConfig, tensors: dict[str, Tensor], last: bool) -> str | None:
    """Say why an adapter cannot be combined exactly, if it cannot."""
    plain = LoraConfig().to_dict()
    for key, value in config.to_dict().items():
        harmless = key in MAY_DIFFER or (key, value) == ("init_lora_weights", "gaussian")
        if value and value != plain[key] and not harmless:
            return f"its setting {key} is {value!r}"
    others = [key for key in tensors if not key.endswith(LINEAR)]
    if any(".lora_" in key for key in others):
        return "it adapts an embedding"
    if whole := [*sorted(set(config.modules_to_save or ()) - {"score", "classifier"}), *([] if last else others)]:
        return f"it replaces a whole module of its base ({whole[0]})"
    if not last and any(".lm_head." in key for key in tensors):
        return "it adapts the output layer, which a base may share with its embedding"
    return None


def _scaling(config: LoraConfig, module: str, tensors: dict[str, Tensor]) -> float:
    """The scaling of a module; patterns are matched as `peft` does it."""
    patterns, rank = config.alpha_pattern, len(tensors[module + LORA_A])
    alpha = patterns.get(get_pattern_key(patterns, module.removeprefix(PREFIX)), config.lora_alpha)
    return float(alpha / (sqrt(rank) if config.use_rslora else rank))
