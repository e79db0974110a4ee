"""LoRA adapters that lie on top of each other, written as one adapter for the base below them all.

An adapter adds s·B·A to a weight, with its scaling s. Two of them add s₁·B₁·A₁ + s₂·B₂·A₂, which is exactly the
product of [s₁·B₁, s₂·B₂] and [A₁; A₂]: one adapter whose rank is the sum of theirs. Works on tensors in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from rlhf_trl.adapters.files import ADAPTER
from rlhf_trl.adapters.settings import HEADS, keeps_base
from rlhf_trl.adapters.shapes import LINEAR, PREFIX
from rlhf_trl.recipe.errors import UserError

LORA_A, LORA_B = LINEAR
# Options with which an adapter adds something else than s·B·A to the weights that its names say.
NOT_EXACT = {
    "use_dora": "DoRA scales the columns of the weight that it lies on",
    "lora_bias": "its LoRA layers have biases",
    "layer_replication": "it repeats layers of its base",
    "kasa_config": "KaSA cuts off small singular values of its base",
    "layers_to_transform": "it leaves layers out by number",
    "exclude_modules": "it leaves modules out by name, which would leave out those of the others",
    "target_parameters": "it adapts parameters, not modules",
    "trainable_token_indices": "it trains rows of the embedding",
    "alora_invocation_tokens": "it is switched on by tokens",
    "use_qalora": "it pools its inputs",
}


def combine(folders: Sequence[Path]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Combine saved adapters, each trained on the base with those before it merged in.

    The scaling is folded into B. Where an adapter has no tensor for a module, zeros keep the rank the same for all,
    which servers such as vLLM require.

    Args:
        folders: at least two, the lowest first; the last one may bring modules of its own, such as a reward head.

    Returns:
        The tensors in float32, and the configuration: the last adapter's, with the summed rank and a scaling of 1.

    Raises:
        UserError: an adapter cannot be combined exactly.
    """
    configs = [LoraConfig.from_pretrained(str(folder)) for folder in folders]
    weights = [load_file(folder / ADAPTER) for folder in folders]
    for folder, config, tensors in zip(folders, configs, weights, strict=True):
        _require_exact(folder, config, tensors, last=folder == folders[-1])
    last = configs[-1]
    rank = sum(max(_ranks(tensors)) for tensors in weights)
    combined = {key: tensor for key, tensor in weights[-1].items() if not key.endswith((LORA_A, LORA_B))}
    modules = sorted({module for tensors in weights for module in _modules(tensors)})
    for module in modules:
        parts = [
            (tensors[module + LORA_A].float(), _scaling(config, module, tensors) * tensors[module + LORA_B].float())
            for config, tensors in zip(configs, weights, strict=True)
            if module + LORA_A in tensors
        ]
        down, up = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        missing = rank - len(down)
        combined[module + LORA_A] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        combined[module + LORA_B] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    last.r = last.lora_alpha = rank
    if all(isinstance(config.target_modules, set) for config in configs):
        last.target_modules = set().union(*(config.target_modules for config in configs))
    else:  # a pattern
        last.target_modules = {module.removeprefix(PREFIX) for module in modules}
    last.rank_pattern, last.alpha_pattern, last.use_rslora = {}, {}, False
    return combined, last


def _require_exact(folder: Path, config: LoraConfig, tensors: dict[str, Tensor], last: bool) -> None:
    values: dict[str, Any] = config.to_dict()
    reasons = [reason for option, reason in NOT_EXACT.items() if values[option]]
    if config.bias != "none":
        reasons.append("it trains biases of its base")
    if not keeps_base(config.init_lora_weights):
        reasons.append(f"its start ({config.init_lora_weights}) changes the weights of its base")
    if whole := sorted(set(config.modules_to_save or ()) - HEADS):
        reasons.append(f"it replaces a whole module of its base ({whole[0]})")
    others = [key for key in tensors if not key.endswith((LORA_A, LORA_B))]
    reasons += [f"it adapts an embedding ({key})" for key in others if ".lora_" in key]
    if others and not last:
        reasons.append(f"it replaces a whole module of its base ({others[0]})")
    if not last and any(".lm_head." in key for key in tensors):
        reasons.append("it adapts the output layer, which a base may share with its embedding")
    if reasons:
        raise UserError(
            str(folder),
            f"the adapter cannot be combined exactly with another one: {reasons[0]}",
            "export it with the base that it lies on: --with-base",
        )


def _modules(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(LORA_A) for key in tensors if key.endswith(LORA_A)]


def _ranks(tensors: dict[str, Tensor]) -> list[int]:
    return [len(tensors[module + LORA_A]) for module in _modules(tensors)]


def _scaling(config: LoraConfig, module: str, tensors: dict[str, Tensor]) -> float:
    """The scaling of a module; patterns are matched as `peft` does it."""
    name = module.removeprefix(PREFIX)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    rank = len(tensors[module + LORA_A])
    return float(alpha / (sqrt(rank) if config.use_rslora else rank))
