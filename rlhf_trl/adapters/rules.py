"""What a LoRA adapter may say and hold: a type for each setting of `adapter_config.json`, names and shapes of tensors.

Works on parsed JSON and on headers of safetensors files, see `run.safetensors`; reads a tensor only to see whether its
numbers are finite. A tensor other than LoRA and the reward head would replace one of the base, and is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError

from rlhf_trl.run.safetensors import FLOATS, Tensor, is_finite

PREFIX = "base_model.model."
HEAD = PREFIX + "score.weight"
# Ends of the two factors of a module; those of an embedding are named otherwise.
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
# Names of the input embedding in the families of models.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OUTPUT = "lm_head"
LAYER = re.compile(r"\.\d+\.")
REVISION = r"^\w([\w/-]|\.(?!\.))*\Z"

Tensors = Mapping[str, Tensor]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return pattern


Rank = Annotated[int, Field(ge=1, le=4096)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[str, AfterValidator(_compiles)]
# What `peft` saves whole for a classifier, under either name.
Head = Literal["score", "classifier"]


class LoraSettings(BaseModel):
    """What `adapter_config.json` may hold; a field's description is said after its name and value."""

    model_config = ConfigDict(strict=True, regex_engine="python-re")  # strict: `true` is no number

    peft_type: Literal["LORA"] = Field(description=", not 'LORA'")
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = Field(description=", of neither a policy nor a reward model")
    target_modules: str | list[str] = Field(description=", neither a pattern nor a list of names")
    r: Rank = Field(description=", not a whole number from 1 to 4096")
    lora_alpha: Number = Field(description=", not a finite number")
    rank_pattern: dict[Names, Rank] = Field({}, description=", not names, each with a whole number from 1 to 4096")
    alpha_pattern: dict[Names, Number] = Field({}, description=", not names with finite numbers")
    revision: str | None = Field(None, pattern=REVISION, description=", not a branch, a tag or a commit")
    bias: Literal["none"] = Field(description=": it would replace biases of the base")
    init_lora_weights: StrictBool | Literal["gaussian"] = Field(True, description=", which changes the base")
    layer_replication: None = Field(None, description=": it repeats layers of the base")
    kasa_config: None = Field(None, description=": it cuts off small singular values of the base")
    modules_to_save: list[Head] | None = Field(None, description=": only the reward head of a base may be replaced")


def check_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Say which settings do not belong to a LoRA adapter for text."""
    try:
        LoraSettings.model_validate(config)
    except ValidationError as error:
        for key in dict.fromkeys(str(found["loc"][0]) for found in error.errors()):
            yield f"{key} is {config.get(key)!r}{LoraSettings.model_fields[key].description}"
    else:
        if config.get("modules_to_save") and config["task_type"] != "SEQ_CLS":
            yield f"modules_to_save is {config['modules_to_save']}: the head of a policy may not be replaced"


def check_tensors(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Say what is wrong with an adapter by itself: a tensor that is neither LoRA nor the head, is empty, not finite or
    half there, or missing in a layer."""
    classifier = config["task_type"] == "SEQ_CLS"
    # With the name of an adapter in it (`lora_A.default.weight`), `peft` loads nothing and says nothing.
    lora = (*LINEAR, *EMBEDDING, MAGNITUDE) if config.get("use_dora") else (*LINEAR, *EMBEDDING)
    for key, tensor in tensors.items():
        if tensor.is_empty:
            yield f"the tensor {key} is empty: it was not gathered when it was saved"
        elif tensor.dtype not in FLOATS:
            yield f"the tensor {key} is of {tensor.dtype}, not of floats"
        elif not key.startswith(PREFIX):
            yield f"the tensor {key} is not named as an adapter's are"
        elif not (key.endswith(lora) or (classifier and key == HEAD)):
            yield f"the tensor {key} is neither LoRA nor a reward head: it would replace one of the base"
        elif not is_finite(tensor):
            yield f"the tensor {key} holds NaN or infinity: training diverged"
    if classifier and HEAD not in tensors:
        yield "the reward head (score) is missing: a loader would put a random one in its place"
    elif classifier and (len(tensors[HEAD].shape) != 2 or tensors[HEAD].shape[0] != 1):
        yield f"the reward head has the shape {tensors[HEAD].shape}, not that of one score"
    modules = modules_of(tensors)
    if not modules:
        yield "there is no LoRA tensor in it"
    for module, ends in modules.items():
        if missing := [module + end for end in ends if module + end not in tensors]:
            yield f"the tensor {missing[0]} is missing"
            continue
        down, up = (tensors[module + end].shape for end in ends)
        rank = _rank(config, module)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            yield f"the shapes of {module} do not fit each other: {down} and {up}"
        elif down[0] != rank:
            yield f"{module} has rank {down[0]}, and the configuration says {rank}"
    yield from _check_layers(config, modules)


def _check_layers(config: Mapping[str, Any], modules: Iterable[str]) -> Iterator[str]:
    """Compare the layers with each other, unless the adapter says that it leaves some out."""
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        if layer := LAYER.search(module):
            layers[module.replace(layer[0], ".*.", 1)].add(layer[0])
    every = set().union(*layers.values())
    for pattern, there in sorted(layers.items()):
        absent = [pattern.replace(".*.", layer, 1) for layer in sorted(every - there)]
        if absent and not config.get("layers_to_transform") and _is_target(config, absent[0].removeprefix(PREFIX)):
            yield f"the tensors of the target module {absent[0]} are missing"


def check_base(config: Mapping[str, Any], tensors: Tensors, weights: Tensors) -> Iterator[str]:
    """Say in what a sound adapter does not fit its base: a module that is not there or has another shape, the width
    that the reward head reads, a target without tensors. A later one may follow from the first."""
    matrices = {key: tensor.shape for key, tensor in weights.items() if len(tensor.shape) == 2}
    sizes = {_short(key.removesuffix(".weight")): shape for key, shape in matrices.items()}
    embedding = next((sizes[short] for short in sorted(sizes) if short.split(".")[-1] in EMBEDDINGS), None)
    if embedding is not None:
        sizes.setdefault(OUTPUT, embedding)  # tied: the base keeps one matrix for both
    modules = {_short(module.removeprefix(PREFIX)): (module, ends) for module, ends in modules_of(tensors).items()}
    for short, (module, ends) in sorted(modules.items()):
        if short not in sizes:
            yield f"the base has no module {short}: it is another architecture"
            continue
        down, up = (tensors[module + end].shape for end in ends)
        # An embedding and the output layer are never kept transposed, not even by GPT-2.
        turned = config.get("fan_in_fan_out") and ends == LINEAR and short != OUTPUT
        there = sizes[short][::-1] if turned else sizes[short]
        own = (up[0], down[1]) if ends == LINEAR else (down[1], up[0])
        if own != there:
            yield f"{short} is for a weight of {own[0]} × {own[1]}, and the base's is {there[0]} × {there[1]}"
    if HEAD in tensors and embedding is not None and (width := tensors[HEAD].shape[1]) != embedding[1]:
        yield f"the reward head reads {width} numbers, and the base's hidden size is {embedding[1]}"
    if not config.get("layers_to_transform") and not config.get("exclude_modules"):
        for short in sorted(set(sizes) - set(modules)):
            if _is_target(config, short):
                yield f"the base's module {short} is a target without tensors"


def modules_of(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name of each module with LoRA, sorted -> the ends of the names of its two tensors."""
    return {key.removesuffix(end): ends for key in sorted(tensors) for ends in (LINEAR, EMBEDDING)
            for end in ends if key.endswith(end)}  # fmt: skip


def _rank(config: Mapping[str, Any], module: str) -> Any:
    """The rank of a module as the configuration has it; patterns are matched as `peft` does it."""
    name = module.removeprefix(PREFIX)
    patterns = config.get("rank_pattern", {}).items()
    return next((rank for pattern, rank in patterns if re.match(rf"(.*\.)?({pattern})$", name)), config["r"])


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether a module is in the list of targets; of a pattern, it is not known."""
    targets = config["target_modules"]
    return isinstance(targets, list) and f".{module}".endswith(tuple(f".{_short(target)}" for target in targets))


def _short(name: str) -> str:
    """A module's name without that of the model around it, which some files leave out."""
    for prefix in ("model.", "transformer.", "gpt_neox."):
        name = name.removeprefix(prefix)
    return name
