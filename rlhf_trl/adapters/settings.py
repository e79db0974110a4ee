"""What the settings of an adapter and its tokenizer may say: rules for `adapter_config.json`, and names and paths.

Works on parsed JSON; loads and opens nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rlhf_trl.adapters.files import BASE, CONFIG, TOKENIZER_CONFIG
from rlhf_trl.recipe.errors import Problem

FETCH = "do not load it; ask its author for a clean one"
# Settings that make a loader import what they name.
IMPORTS = ("auto_mapping", "megatron_config", "auto_map")
MAX_RANK = 4096
# What `peft` saves whole for a classifier, under either name.
HEADS = {"score", "classifier"}
REVISION = re.compile(r"\w[\w./-]*")
MODEL_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+|[\w-][\w.-]*)")


def keeps_base(start: Any) -> bool:
    """Return whether LoRA that is initialised so (`init_lora_weights`) leaves the weights of its base as they are.

    Others, such as PiSSA, change them when an adapter is loaded.
    """
    return start in (True, False, "gaussian") and type(start) in (bool, str)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK  # `true` is no number


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_pattern(is_right: Callable[[Any], bool], value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(is_right, value.values())):
        return False
    try:
        for key in value:
            re.compile(key)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _names_modules(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_revision(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(REVISION.fullmatch(value)) and ".." not in value)


RANKS = f"whole number from 1 to {MAX_RANK}"
AGAIN = "fetch the adapter again"
PLAIN = "ask its author for plain LoRA weights"
# Setting of `adapter_config.json`, what it must fulfil, what is said after its name and value, and the remedy.
RULES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("peft_type", lambda method: method == "LORA", ", not 'LORA'", "use a LoRA adapter"),
    ("task_type", lambda task: task in ("CAUSAL_LM", "SEQ_CLS"),
     ": the adapter is of neither a policy nor a reward model", "ask its author what it is for"),
    ("target_modules", _names_modules, ", neither a pattern nor a list of names", AGAIN),
    ("r", _is_rank, f", not a {RANKS}", AGAIN),
    ("lora_alpha", _is_number, ", not a finite number", AGAIN),
    ("rank_pattern", partial(_is_pattern, _is_rank), f", not names, each with a {RANKS}", AGAIN),
    ("alpha_pattern", partial(_is_pattern, _is_number), ", not names with finite numbers", AGAIN),
    ("revision", _is_revision, ", not a branch, a tag or a commit", AGAIN),
    ("bias", lambda bias: bias == "none", ": it would replace biases of the base", FETCH),
    ("init_lora_weights", keeps_base, ", which changes the base when it is loaded", PLAIN),
    ("layer_replication", lambda layers: layers is None, ": it repeats layers of the base", PLAIN),
    ("kasa_config", lambda kasa: kasa is None, ": it cuts off small singular values of the base", PLAIN),
)  # fmt: skip
# What `peft` takes where a setting is missing; None for the others.
DEFAULTS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def check_config(config: dict[str, Any]) -> Iterator[Problem]:
    """Find settings that do not belong to a LoRA adapter for text."""
    for key, holds, problem, remedy in RULES:
        value = config.get(key, DEFAULTS.get(key))
        if not holds(value):
            yield Problem(CONFIG, f"{key} is {value!r}{problem}", remedy)
    whole = config.get("modules_to_save") or []
    heads = HEADS if config.get("task_type") == "SEQ_CLS" else set()
    if not isinstance(whole, list) or any(name not in heads for name in map(str, whole)):
        problem = f"modules_to_save is {whole!r}: an adapter may replace no module of its base but the reward head"
        yield Problem(CONFIG, problem, FETCH)


def check_settings(folder: Path, documents: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Find what an adapter would have a loader import or open outside its folder."""
    config = documents[CONFIG]
    name = config.get("base_model_name_or_path")
    shipped = name == f"./{BASE}" and (folder / BASE).is_dir()
    if not shipped and (not isinstance(name, str) or is_path(name) or not MODEL_ID.fullmatch(name)):
        problem = f"base_model_name_or_path is {name!r}: a place on somebody's machine, not a public model"
        yield Problem(CONFIG, problem, "write the OWNER/NAME of the base there, and check with --base")
    for file, document in documents.items():
        yield from check_imports(file, document)
    for key, value in documents.get(TOKENIZER_CONFIG, {}).items():
        if key.endswith(("_file", "_path")) and isinstance(value, str) and is_path(value):
            yield Problem(TOKENIZER_CONFIG, f"{key} is {value!r}, a place outside the folder", FETCH)


def check_imports(file: str, document: dict[str, Any]) -> Iterator[Problem]:
    """Find settings that make a loader import what they name."""
    for key in IMPORTS:
        if document.get(key):
            yield Problem(file, f"{key} makes the loader import code that the adapter names", FETCH)


def is_path(text: str) -> bool:
    """Tell whether a text is the path of a file, on any system, or climbs out of a folder."""
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or text.startswith(("~", ".")) or "\\" in text or ".." in PurePosixPath(text).parts
