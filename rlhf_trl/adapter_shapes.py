"""Whether the tensors of a LoRA adapter are whole, and fit a base: from their names and shapes alone.

Works on headers of safetensors files, see `weights`; reads a tensor only to see whether its numbers are finite.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_trl.recipe import Problem
from rlhf_trl.weights import FLOATS, Tensor, is_finite

PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
HEAD = PREFIX + "score.weight"
NUMBER = re.compile(r"\.\d+\.")
PLACE = "adapter_model.safetensors"
AGAIN = "fetch the adapter again, or ask its author"


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Check an adapter by itself: nothing is empty, not finite or half there, and every layer has its tensors."""
    for key, tensor in tensors.items():
        if tensor.is_empty:
            yield Problem(PLACE, f"the tensor {key} is empty: it was not gathered when it was saved", AGAIN)
        elif tensor.dtype not in FLOATS:
            yield Problem(PLACE, f"the tensor {key} is of {tensor.dtype}, not of floats", AGAIN)
        elif not key.startswith(PREFIX):
            yield Problem(PLACE, f"the tensor {key} is not named as an adapter's are", AGAIN)
        elif not is_finite(tensor):
            yield Problem(PLACE, f"the tensor {key} holds NaN or infinity", "do not use it; training diverged")
    if config["task_type"] == "SEQ_CLS" and HEAD not in tensors:
        problem = "the reward head (score) is missing: a loader would put a random one in its place"
        yield Problem(PLACE, problem, AGAIN)
    modules = _modules(tensors)
    if not modules:
        yield Problem(PLACE, "there is no LoRA tensor in it", AGAIN)
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for module in sorted(modules):
        missing = [end for end in (LORA_A, LORA_B) if module + end not in tensors]
        if missing:
            yield Problem(PLACE, f"the tensor {module}{missing[0]} is missing", AGAIN)
            continue
        down, up = tensors[module + LORA_A].shape, tensors[module + LORA_B].shape
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            yield Problem(PLACE, f"the shapes of {module} do not fit each other: {down} and {up}", AGAIN)
        elif not config.get("rank_pattern") and down[0] != config.get("r"):
            yield Problem(PLACE, f"{module} has rank {down[0]}, and the configuration says {config.get('r')}", AGAIN)
        layers[NUMBER.sub(".*.", module, count=1)].add((NUMBER.search(module) or [""])[0])
    # Adapters that leave layers out say so.
    every = set().union(*layers.values())
    if not config.get("layers_to_transform") and isinstance(config.get("target_modules"), list):
        for pattern, found in sorted(layers.items()):
            if "*" in pattern and (absent := sorted(every - found - {""})) and _targets(config, pattern, absent[0]):
                module = pattern.replace(".*.", absent[0], 1)
                yield Problem(PLACE, f"the tensors of the target module {module} are missing", AGAIN)


def check_base(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Check an adapter against its base: each module is there, has the right shape, and none of the targets is left
    without an adapter."""
    matrices = {key.removesuffix(".weight"): tensor for key, tensor in weights.items() if len(tensor.shape) == 2}
    sizes = {_short(module): tensor.shape for module, tensor in matrices.items()}
    modules = {_short(module.removeprefix(PREFIX)): module for module in _modules(tensors)}
    for short, module in sorted(modules.items()):
        if short not in sizes:
            yield Problem(PLACE, f"the base has no module {short}: it is another architecture", "use the right base")
            return
        own = (tensors[module + LORA_B].shape[0], tensors[module + LORA_A].shape[1])
        there = sizes[short][::-1] if config.get("fan_in_fan_out") else sizes[short]
        if own != there:
            problem = f"{short} is for a weight of {own[0]} × {own[1]}, and the base's is {there[0]} × {there[1]}"
            yield Problem(PLACE, problem, "use the base that it was trained on")
            return
    targets = config.get("target_modules")
    if isinstance(targets, list) and not config.get("layers_to_transform") and not config.get("exclude_modules"):
        ends = tuple(f".{_short(target)}" for target in targets)
        for short in sorted(sizes):
            if f".{short}".endswith(ends) and short not in modules:
                yield Problem(PLACE, f"the base's module {short} is a target without tensors", AGAIN)
                return


def _modules(tensors: Mapping[str, Tensor]) -> set[str]:
    return {key.removesuffix(end) for key in tensors for end in (LORA_A, LORA_B) if key.endswith(end)}


def _targets(config: Mapping[str, Any], pattern: str, layer: str) -> bool:
    module = pattern.replace(".*.", layer, 1).removeprefix(PREFIX)
    return any(module == target or module.endswith(f".{target}") for target in config["target_modules"])


def _short(name: str) -> str:
    """A module's name without that of the model around it, which some files leave out."""
    for prefix in ("model.", "transformer.", "gpt_neox."):
        name = name.removeprefix(prefix)
    return name
