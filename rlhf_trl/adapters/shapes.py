"""Check from names and shapes alone whether the tensors of a LoRA adapter are complete, and fit a base.

Works on headers of safetensors files, see `run.safetensors`; reads a tensor only to see whether its numbers are
finite. An adapter holds LoRA tensors, and the reward head if it is of a reward model: any other tensor would replace
one of its base, and is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_trl.adapters.files import ADAPTER
from rlhf_trl.recipe.errors import Problem
from rlhf_trl.run.safetensors import FLOATS, Tensor, is_finite

PREFIX = "base_model.model."
HEAD = PREFIX + "score.weight"
# Ends of the two factors of a module; those of an embedding are named otherwise.
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
# Names of the input embedding in the families of models.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OUTPUT = "lm_head"
NUMBER = re.compile(r"\.\d+\.")
AGAIN = "fetch the adapter again, or ask its author"


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Check an adapter by itself: it holds nothing but LoRA and the head, nothing is empty, not finite or half there,
    and every layer has its tensors."""
    classifier = config["task_type"] == "SEQ_CLS"
    for key, tensor in tensors.items():
        if tensor.is_empty:
            yield Problem(ADAPTER, f"the tensor {key} is empty: it was not gathered when it was saved", AGAIN)
        elif tensor.dtype not in FLOATS:
            yield Problem(ADAPTER, f"the tensor {key} is of {tensor.dtype}, not of floats", AGAIN)
        elif not key.startswith(PREFIX):
            yield Problem(ADAPTER, f"the tensor {key} is not named as an adapter's are", AGAIN)
        elif not (_is_lora(config, key) or (classifier and key == HEAD)):
            problem = f"the tensor {key} is neither LoRA nor a reward head: it would replace one of the base"
            yield Problem(ADAPTER, problem, "do not use it; ask its author for LoRA tensors alone")
        elif not is_finite(tensor):
            yield Problem(ADAPTER, f"the tensor {key} holds NaN or infinity", "do not use it; training diverged")
    if classifier and HEAD not in tensors:
        problem = "the reward head (score) is missing: a loader would put a random one in its place"
        yield Problem(ADAPTER, problem, AGAIN)
    elif classifier and (len(tensors[HEAD].shape) != 2 or tensors[HEAD].shape[0] != 1):
        yield Problem(ADAPTER, f"the reward head has the shape {tensors[HEAD].shape}, not that of one score", AGAIN)
    yield from _check_modules(config, tensors)


def _check_modules(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Check the two factors of each module against each other and the rank, and each layer against the others."""
    modules = _modules(tensors)
    if not modules:
        yield Problem(ADAPTER, "there is no LoRA tensor in it", AGAIN)
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for module, ends in sorted(modules.items()):
        missing = [end for end in ends if module + end not in tensors]
        if missing:
            yield Problem(ADAPTER, f"the tensor {module}{missing[0]} is missing", AGAIN)
            continue
        down, up = (tensors[module + end].shape for end in ends)
        rank = _rank(config, module)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            yield Problem(ADAPTER, f"the shapes of {module} do not fit each other: {down} and {up}", AGAIN)
        elif down[0] != rank:
            yield Problem(ADAPTER, f"{module} has rank {down[0]}, and the configuration says {rank}", AGAIN)
        layers[NUMBER.sub(".*.", module, count=1)].add((NUMBER.search(module) or [""])[0])
    # Adapters that leave layers out say so.
    every = set().union(*layers.values())
    if not config.get("layers_to_transform") and isinstance(config.get("target_modules"), list):
        for pattern, found in sorted(layers.items()):
            if "*" in pattern and (absent := sorted(every - found - {""})) and _targets(config, pattern, absent[0]):
                module = pattern.replace(".*.", absent[0], 1)
                yield Problem(ADAPTER, f"the tensors of the target module {module} are missing", AGAIN)


def check_base(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Check an adapter against its base: each module is there, has the right shape, as the reward head has, and none
    of the targets is left without an adapter."""
    matrices = {key.removesuffix(".weight"): tensor for key, tensor in weights.items() if len(tensor.shape) == 2}
    sizes = {_short(module): tensor.shape for module, tensor in matrices.items()}
    embedding = next((sizes[short] for short in sorted(sizes) if short.split(".")[-1] in EMBEDDINGS), None)
    if embedding is not None:
        sizes.setdefault(OUTPUT, embedding)  # tied: the base keeps one matrix for both
    modules = {_short(module.removeprefix(PREFIX)): (module, ends) for module, ends in _modules(tensors).items()}
    for short, (module, ends) in sorted(modules.items()):
        if short not in sizes:
            yield Problem(ADAPTER, f"the base has no module {short}: it is another architecture", "use the right base")
            return
        down, up = (tensors[module + end].shape for end in ends)
        # An embedding and the output layer are never kept transposed, not even by GPT-2.
        turned = config.get("fan_in_fan_out") and ends == LINEAR and short != OUTPUT
        there = sizes[short][::-1] if turned else sizes[short]
        own = (up[0], down[1]) if ends == LINEAR else (down[1], up[0])
        if own != there:
            problem = f"{short} is for a weight of {own[0]} × {own[1]}, and the base's is {there[0]} × {there[1]}"
            yield Problem(ADAPTER, problem, "use the base that it was trained on")
            return
    if HEAD in tensors and embedding is not None and tensors[HEAD].shape != (1, embedding[1]):
        problem = (
            f"the reward head reads {tensors[HEAD].shape[1]} numbers, and the base's hidden size is {embedding[1]}"
        )
        yield Problem(ADAPTER, problem, "use the base that it was trained on")
        return
    targets = config.get("target_modules")
    if isinstance(targets, list) and not config.get("layers_to_transform") and not config.get("exclude_modules"):
        ends_of = tuple(f".{_short(target)}" for target in targets)
        for short in sorted(sizes):
            if f".{short}".endswith(ends_of) and short not in modules:
                yield Problem(ADAPTER, f"the base's module {short} is a target without tensors", AGAIN)
                return


def _is_lora(config: Mapping[str, Any], key: str) -> bool:
    # With the name of an adapter in it (`lora_A.default.weight`), `peft` loads nothing and says nothing.
    return key.endswith((*LINEAR, *EMBEDDING)) or bool(config.get("use_dora") and key.endswith(MAGNITUDE))


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Name of each module -> the ends of the names of its two tensors."""
    return {key.removesuffix(end): ends for key in tensors for ends in (LINEAR, EMBEDDING)
            for end in ends if key.endswith(end)}  # fmt: skip


def _rank(config: Mapping[str, Any], module: str) -> Any:
    """The rank of a module as the configuration has it; patterns are matched as `peft` does it."""
    name = module.removeprefix(PREFIX)
    for pattern, rank in config.get("rank_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return config.get("r")


def _targets(config: Mapping[str, Any], pattern: str, layer: str) -> bool:
    module = pattern.replace(".*.", layer, 1).removeprefix(PREFIX)
    return any(module == target or module.endswith(f".{target}") for target in config["target_modules"])


def _short(name: str) -> str:
    """A module's name without that of the model around it, which some files leave out."""
    for prefix in ("model.", "transformer.", "gpt_neox."):
        name = name.removeprefix(prefix)
    return name
