"""What the tensors of a LoRA adapter must be: those that its settings ask for, and of its base, and no other.

Works on headers of safetensors files, see `run.safetensors`; reads a tensor only to see whether its numbers are
finite, or all zero. A tensor other than LoRA and the reward head would replace one of the base, and is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf_trl.adapters.settings import is_target, rank_of
from rlhf_trl.run.safetensors import FLOATS, Tensor, is_finite, is_zero

PREFIX = "base_model.model."
HEAD = PREFIX + "score.weight"
# Ends of the two factors of a module; those of an embedding are named otherwise.
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA
# Names of the input embedding in the families of models.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OUTPUT = "lm_head"
LAYER = re.compile(r"\.\d+\.")
# Settings of a model that count its layers, and its other parts.
LAYERS = re.compile(r"^(?!max_)(.*_)?(layers?|blocks|depths?)$")
PARTS = re.compile(r"^(n|num)_(?!ctx|pos)|_(heads|experts)$")
# How a model computes, in the code of `transformers` itself: another name is that of a kernel to be fetched.
IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "batched_mm",
                   "grouped_mm")  # fmt: skip
# The ranks that vLLM can be started for, and that for which it is without an option.
RANKS, DEFAULT_RANK = (8, 16, 32, 64, 128, 256, 320, 512), 16

Tensors = Mapping[str, Tensor]


def check_tensors(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Say what is wrong with an adapter by itself: a tensor that is neither LoRA nor the head, is empty, not finite or
    half there, that the settings do not ask for, or that is missing in a layer."""
    classifier, modules = config["task_type"] == "SEQ_CLS", modules_of(tensors)
    # With the name of an adapter in it (`lora_A.default.weight`), PEFT loads nothing and says nothing.
    magnitudes = (MAGNITUDE,) if config.get("use_dora") else ()
    for key, tensor in tensors.items():
        if tensor.is_empty:
            yield f"the tensor {key} is empty: it was not gathered when it was saved"
        elif tensor.dtype not in FLOATS:
            yield f"the tensor {key} is of {tensor.dtype}, not of floats"
        elif not key.startswith(PREFIX):
            yield f"the tensor {key} is not named as an adapter's are"
        elif not (key.endswith((*LINEAR, *EMBEDDING, *magnitudes)) or (classifier and key == HEAD)):
            yield f"the tensor {key} is neither LoRA nor a reward head: it would replace one of the base"
        elif not is_finite(tensor):
            yield f"the tensor {key} holds NaN or infinity: training diverged"
    if classifier and HEAD not in tensors:
        yield "the reward head (score) is missing: a loader would put a random one in its place"
    elif classifier and (len(tensors[HEAD].shape) != 2 or tensors[HEAD].shape[0] != 1):
        yield f"the reward head has the shape {tensors[HEAD].shape}, not that of one score"
    if not modules:
        yield "there is no LoRA tensor in it"
    layers: defaultdict[str, set[str]] = defaultdict(set)  # modules but for the number of their layer -> the layers
    for module, ends in modules.items():
        if problem := _check_module(config, tensors, module, (*ends, *magnitudes)):
            yield problem
        if layer := LAYER.search(module):
            layers[module.replace(layer[0], ".*.", 1)].add(layer[0])
    every = set().union(*layers.values())
    for pattern, there in sorted(layers.items()):
        absent = [pattern.replace(".*.", layer, 1) for layer in sorted(every - there)]
        if asked := [module for module in absent if is_target(config, module.removeprefix(PREFIX))]:
            yield f"the tensors of the target module {asked[0]} are missing"


def _check_module(config: Mapping[str, Any], tensors: Tensors, module: str, ends: tuple[str, ...]) -> str | None:
    """Say what is wrong with the factors of a module, and their magnitudes where those are asked for."""
    name = module.removeprefix(PREFIX)
    if missing := [module + end for end in ends if module + end not in tensors]:
        return f"the tensor {missing[0]} is missing"
    down, up, *magnitudes = (tensors[module + end].shape for end in ends)
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return f"the shapes of {module} do not fit each other: {down} and {up}"
    if down[0] != (rank := rank_of(config, name)):
        return f"{module} has rank {down[0]}, and the configuration says {rank}"
    if magnitudes not in ([], [up[:1]]):
        return f"the magnitudes of {module} are not one for each of its {up[0]} outputs"
    unasked = f"the settings do not ask for LoRA on {module}: a loader would leave its tensors out"
    return None if is_target(config, name) else unasked


def check_base(config: Mapping[str, Any], tensors: Tensors, weights: Tensors) -> Iterator[str]:
    """Say in what a sound adapter does not fit its base: a module that is not there or has another shape, the width
    that the reward head reads, a target without tensors. A later one may follow from the first."""
    matrices = {key.removesuffix(".weight"): tensor.shape for key, tensor in weights.items() if len(tensor.shape) == 2}
    sizes = {_short(key): shape for key, shape in matrices.items()}
    embedding = next((sizes[short] for short in sorted(sizes) if short.split(".")[-1] in EMBEDDINGS), None)
    if embedding is not None:
        sizes.setdefault(OUTPUT, embedding)  # tied: the base keeps one matrix for both
    modules = {_short(module.removeprefix(PREFIX)): (module, ends) for module, ends in modules_of(tensors).items()}
    around = ""  # the name of the model around the modules, which the files of some bases leave out
    for short, (module, ends) in sorted(modules.items()):
        if short not in sizes:
            yield f"the base has no module {short}: it is another architecture"
            continue
        around = around or module.removeprefix(PREFIX).removesuffix(short)
        down, up = (tensors[module + end].shape for end in ends)
        # An embedding and the output layer are never kept transposed, not even by GPT-2.
        turned = config.get("fan_in_fan_out") and ends == LINEAR and short != OUTPUT
        there = sizes[short][::-1] if turned else sizes[short]
        own = (up[0], down[1]) if ends == LINEAR else (down[1], up[0])
        if own != there:
            yield f"{short} is for a weight of {own[0]} × {own[1]}, and the base's is {there[0]} × {there[1]}"
    if HEAD in tensors and embedding is not None and (width := tensors[HEAD].shape[1]) != embedding[1]:
        yield f"the reward head reads {width} numbers, and the base's hidden size is {embedding[1]}"
    for short in sorted(set(sizes) - set(modules)):
        if is_target(config, short if short == OUTPUT else around + short):
            yield f"the base's module {short} is a target without tensors"


def check_model(config: Mapping[str, Any], weights: Tensors) -> Iterator[str]:
    """Say which settings of a base would have a loader build more than its weights hold, or fetch code."""
    layers = 1 + max((int(number[1:-1]) for name in weights for number in LAYER.findall(f".{name}")), default=0)
    parts = max(layers, *(size for tensor in weights.values() for size in tensor.shape))
    for key, value in walk(config):
        limit = layers if LAYERS.search(key) else parts if PARTS.search(key) else None
        if limit is not None and isinstance(value, int | float) and value > limit:
            yield f"{key} is {value}, and the weights hold {limit} at most"
        if key.endswith("_implementation") and not isinstance(value, dict) and value not in IMPLEMENTATIONS:
            yield f"{key} is {value!r}: a loader would fetch code of that name"


def walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Go through all settings, and those inside of them; each of a list under the list's own name."""
    values = list(config.items())
    for key, value in values:
        yield key, value
        if isinstance(value, dict):
            values += value.items()
        elif isinstance(value, list):
            values += ((key, one) for one in value)


def notes(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Say what whoever uses a sound adapter should know of it."""
    modules = modules_of(tensors)
    if (rank := max(rank_of(config, module.removeprefix(PREFIX)) for module in modules)) > DEFAULT_RANK:
        how = f"up to {DEFAULT_RANK} without --max-lora-rank {vllm_rank(rank)}" if vllm_rank(rank) else "none so large"
        yield f"its rank is {rank}, and vLLM takes {how}"
    if all(is_zero(tensors[module + up]) for module, (_, up) in modules.items()):
        yield "every lora_B is zero: it adds nothing to its base, as before training"


def vllm_rank(rank: int) -> int | None:
    """The option with which vLLM takes a rank, if any."""
    return next((one for one in RANKS if one >= rank), None)


def modules_of(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name of each module with LoRA, or magnitudes -> the ends of the names of its two tensors."""
    kinds = {MAGNITUDE: LINEAR} | {end: ends for ends in (LINEAR, EMBEDDING) for end in ends}
    return {key.removesuffix(end): ends for end, ends in kinds.items() for key in sorted(tensors) if key.endswith(end)}


def _short(name: str) -> str:
    """A module's name without that of the model around it, which some files leave out."""
    for prefix in ("model.", "transformer.", "gpt_neox."):
        name = name.removeprefix(prefix)
    return name
