"""What `adapter_config.json` may say, and which modules it asks for.

Keys, types and values are an allow-list: those below, and PEFT's own defaults. What PEFT would ignore, or what is more
than A and B beside weights of the base, is refused. Works on parsed JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import peft
from packaging.version import InvalidVersion, Version
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError

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
            yield f"{key} is {_short(config[key])}{why}"
    try:
        LoraSettings.model_validate(config)
    except ValidationError as error:
        for key in dict.fromkeys(str(wrong["loc"][0]) for wrong in error.errors()):
            yield f"{key} is {_short(config.get(key))}{LoraSettings.model_fields[key].description}"
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
    """Tell whether a setting does nothing: it is PEFT's default, or a table of what is off."""
    empty = isinstance(value, dict) and len(value) > 0 and not any(value.values())
    return empty or value in (None, False, [], PLAIN.get(key))


def _short(value: Any) -> str:
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
