"""What the settings and the tensors of a sound LoRA adapter for text are.

Settings: those below, and PEFT's defaults. What PEFT would ignore, or what is more than A and B beside weights of the
base, is refused. Tensors: those that the settings ask for, and of the base, and no other. Works on parsed JSON and on
headers of safetensors files; reads a tensor only to see whether its numbers are finite, or all zero.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
from packaging.version import InvalidVersion, Version
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_trl.recipe.library import vllm_rank
from rlhf_trl.run.safetensors import FLOATS, Tensor, is_finite, is_zero

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

# Settings that make a loader import what they name, in any file.
IMPORTS = ("auto_mapping", "megatron_config", "auto_map")
PLAIN = LoraConfig().to_dict()
HEADS = ("score", "classifier")
# `re` tries one way after the other to match. A star over one character multiplies them by about so many.
STAR, MOST_WAYS, MOST_PATTERNS = 30, 2_000_000, 500
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def _ways(parsed: Any) -> int:
    """Bound the ways in which `re` can match a parsed pattern; ValueError for one that can take exponential time."""
    ways = 1
    for name, value in [(str(operator), value) for operator, value in parsed]:
        if name == "BRANCH":
            each, heads = [_ways(branch) for branch in value[1]], [str(branch[:1]) for branch in value[1]]
            apart = all(head.startswith("[(LITERAL") for head in heads)  # then those of one first letter alone compete
            ways *= max(sum(w for w, h in zip(each, heads, strict=True) if not apart or h == head) for head in heads)
        elif name == "SUBPATTERN" and not value[1] and not value[2]:  # without flags
            ways *= _ways(value[3])
        elif name in REPEATS and len(value[2]) == 1 and str(value[2][0][0]) in SINGLE:
            ways *= STAR if value[1] > 1 else 2
        elif name in (*REPEATS, "ASSERT", "ASSERT_NOT") and value[-2] <= 1:
            ways *= 1 + _ways(value[-1])
        elif name not in (*SINGLE, "AT"):
            raise ValueError("it repeats a group, or refers to one")
    return ways


def _count(pattern: str) -> int:
    try:
        if re.compile(pattern).flags != re.UNICODE:
            raise ValueError("it sets flags")
        return _ways(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _safe(pattern: str) -> str:
    if _count(pattern) > MOST_WAYS:
        raise ValueError("it can match in too many ways")
    return pattern


def _end(pattern: str) -> str:
    """The pattern of full names that PEFT makes of one for their ends."""
    return rf"(.*\.)?({pattern})$"


def _known(written: str) -> str:
    try:
        if Version(written.partition("@")[0]) <= Version(peft.__version__):
            return written
    except InvalidVersion as error:
        raise ValueError(str(error)) from error
    raise ValueError("newer")


Rank = Annotated[int, Field(ge=1, le=4096)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*\Z", max_length=200)]
Pattern = Annotated[str, Field(max_length=2_000), AfterValidator(_safe)]
End = Annotated[Pattern, AfterValidator(lambda text: _safe(_end(text)) and text)]
Names = Pattern | Annotated[list[Name], Field(min_length=1, max_length=20_000)]
Known = Annotated[str, AfterValidator(_known)]
Flag = Annotated[bool, Field(description=", not true or false")]
SAFE = "; in a pattern, no group repeats, and at most four stars stand over single characters"
NAMES = f", neither a pattern nor a list of names{SAFE}"
RANKS = f", not names, each with a whole number from 1 to 4096{SAFE}"
NUMBERS = f", not names with finite numbers{SAFE}"
ONLY = ": only the reward head of a base may be replaced"
LATER = f", and what is installed is PEFT {peft.__version__}: a later one may mean more"


class LoraSettings(BaseModel):
    """What may be set; the description of a field is said after its name and value."""

    model_config = ConfigDict(strict=True, extra="allow", regex_engine="python-re")  # strict: `true` is no number

    peft_type: Literal["LORA"] = Field(description=", not 'LORA'")
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = Field(description=", of neither a policy nor a reward model")
    peft_version: Known | None = Field(None, description=LATER)
    base_model_name_or_path: Any = None  # see `check`
    revision: str | None = Field(None, pattern=r"^\w([\w/-]|\.(?!\.))*\Z", description=", not a branch or a commit")
    target_modules: Names = Field(description=NAMES)
    exclude_modules: Names | None = Field(None, description=NAMES)
    r: Rank = Field(description=", not a whole number from 1 to 4096")
    lora_alpha: Number = Field(description=", not a finite number up to a million")
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description=", not a number from 0 to 1")
    rank_pattern: dict[End, Rank] | None = Field(None, max_length=MOST_PATTERNS, description=RANKS)
    alpha_pattern: dict[End, Number] | None = Field(None, max_length=MOST_PATTERNS, description=NUMBERS)
    layers_to_transform: int | list[int] | None = Field(None, description=", not numbers of layers")
    layers_pattern: Name | list[Name] | None = Field(None, description=", not names")
    modules_to_save: list[Literal["score", "classifier"]] | None = Field(None, description=ONLY)
    init_lora_weights: StrictBool | Literal["gaussian"] = Field(True, description=", which changes the base")
    fan_in_fan_out: Flag = False
    use_rslora: Flag = False
    use_dora: Flag = False
    inference_mode: Flag = False


def check_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Say which settings do not belong to a LoRA adapter for text."""
    for key in config.keys() - {*LoraSettings.model_fields, *IMPORTS}:
        if not is_off(key, config[key]):
            why = ": it changes the base, or adds more than A and B to it" if key in PLAIN else ", an unknown setting"
            yield f"{key} is {_quote(config[key])}{why}"
    try:
        LoraSettings.model_validate(config)
    except ValidationError as error:
        for key in dict.fromkeys(str(wrong["loc"][0]) for wrong in error.errors()):
            yield f"{key} is {_quote(config.get(key))}{LoraSettings.model_fields[key].description}"
        return
    if config.get("modules_to_save") and config["task_type"] != "SEQ_CLS":
        yield f"modules_to_save is {config['modules_to_save']}: the head of a policy may not be replaced"
    layers, targets = config.get("layers_to_transform"), config["target_modules"]
    if (config.get("layers_pattern") and layers is None) or (isinstance(targets, str) and layers is not None):
        yield "layers_to_transform and layers_pattern go together, with target_modules as a list"
    if targets == "all-linear":
        yield "target_modules is 'all-linear': which modules were trained is not in it"
    patterns = [_end(text) for key in ("rank_pattern", "alpha_pattern") for text in config.get(key) or ()]
    if sum(map(_count, patterns)) > MOST_WAYS:
        yield f"rank_pattern and alpha_pattern can match in too many ways{SAFE}"


def is_off(key: str, value: Any) -> bool:
    """Tell whether a setting does nothing: it is PEFT's default, or unknown to PEFT and off."""
    if key in PLAIN:  # PEFT refuses `false` where it expects a table
        return value is None or value == PLAIN[key]
    empty = isinstance(value, dict) and len(value) > 0 and not any(value.values())
    return empty or value in (None, False, [])


def _quote(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}…"


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module by its full name."""
    patterns = config.get("rank_pattern") or {}
    rank: int = patterns.get(get_pattern_key(patterns, module), config["r"])
    return rank


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether the settings ask for LoRA on a module, by its full name."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    asked = LoraConfig(**{key: config.get(key) for key in keys}, modules_to_save=HEADS)
    return bool(check_target_module_exists(asked, module))


# --- tensors ---------------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."
HEAD = PREFIX + "score.weight"
# Ends of the two factors of a module; those of an embedding are named otherwise.
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA
LAYER = re.compile(r"\.\d+\.")
# Settings of a model that count its layers, and its other parts.
LAYERS = re.compile(r"^(?!max_)(.*_)?(layers?|blocks|depths?)$")
PARTS = re.compile(r"^(n|num)_(?!ctx|pos)|_(heads|experts)$")
# How a model computes, in the code of `transformers` itself: another name is that of a kernel to be fetched.
IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "batched_mm",
                   "grouped_mm")  # fmt: skip
FOREIGN = (Exception,)  # at files that others wrote: `tokenizers` raises nothing narrower
DEFAULT_RANK = 16  # for which vLLM is started without an option
Tensors = Mapping[str, Tensor]


def check_tensors(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Say what is wrong with an adapter by itself: a tensor that is neither LoRA nor the head, is empty, not finite or
    half there, or that the settings do not ask for."""
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
    for module, ends in modules.items():
        if problem := _check_module(config, tensors, module, (*ends, *magnitudes)):
            yield problem


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


def check_base(folder: Path, base: Path, tensors: Tensors) -> str | None:
    """Say why a sound adapter does not fit its base, if so: PEFT lays it on the base's modules, without weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig.from_pretrained(str(folder))
            config = AutoConfig.from_pretrained(base, trust_remote_code=False, num_labels=1)
            auto = AutoModelForSequenceClassification if settings.task_type == "SEQ_CLS" else AutoModelForCausalLM
            model = auto.from_config(config, trust_remote_code=False)
            adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
            state = {key: torch.empty(tensor.shape) for key, tensor in tensors.items()}
            found = set_peft_model_state_dict(adapted, state)
    except FOREIGN as error:
        said = str(error).split("\n", 1)[-1] or type(error).__name__  # what is wrong stands below a line of its kind
        return f"it does not fit this base: {' '.join(said.split())[:200]}"
    if found.unexpected_keys:
        return f"it does not fit this base, which has no place for {found.unexpected_keys[0]}"
    missing = [key for key in found.missing_keys if ".default" in key]
    return f"it does not fit this base: there is no tensor for {missing[0]}" if missing else None


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
    if config.get("use_dora"):
        yield "it is DoRA, which vLLM does not take: merge it first"
    if config.get("use_rslora") or config.get("alpha_pattern"):
        yield "its scaling is not lora_alpha / r throughout, and llama.cpp reads no other: merge it first"
    if all(is_zero(tensors[module + up]) for module, (_, up) in modules.items()):
        yield "every lora_B is zero: it adds nothing to its base, as before training"


def modules_of(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name of each module with LoRA, or magnitudes -> the ends of the names of its two tensors."""
    kinds = {MAGNITUDE: LINEAR} | {end: ends for ends in (LINEAR, EMBEDDING) for end in ends}
    return {key.removesuffix(end): ends for end, ends in kinds.items() for key in sorted(tensors) if key.endswith(end)}
