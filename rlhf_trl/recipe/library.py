"""The options of TRL's configuration classes, read from the libraries' source without importing them.

Importing TRL takes five seconds and torch; a misspelt key should be named in less than one. The classes are plain
dataclasses, so their fields, types, defaults and choices can be read with `ast`. Nothing is re-declared here but what
the libraries state nowhere a program can read: the choices that they check only while training, and the ranges of
numbers. The constructors are run afterwards by `rlhf_trl.train.step.build_config`, which has the last word.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

TRAINING_ARGUMENTS = ("transformers/training_args.py", "TrainingArguments")
TRL_BASE = ("trl/trainer/base_config.py", "_BaseConfig")
# Trainer word -> the classes whose fields it takes, base class first.
CLASSES = {
    "model": [("trl/trainer/model_config.py", "ModelConfig")],
    "sft": [TRAINING_ARGUMENTS, TRL_BASE, ("trl/trainer/sft_config.py", "SFTConfig")],
    "reward": [TRAINING_ARGUMENTS, TRL_BASE, ("trl/trainer/reward_config.py", "RewardConfig")],
    "dpo": [TRAINING_ARGUMENTS, TRL_BASE, ("trl/trainer/dpo_config.py", "DPOConfig")],
    "grpo": [TRAINING_ARGUMENTS, TRL_BASE, ("trl/trainer/grpo_config.py", "GRPOConfig")],
    "ppo": [
        TRAINING_ARGUMENTS,
        TRL_BASE,
        ("trl/experimental/ppo/ppo_config.py", "PPOConfig"),
        ("rlhf_trl/train/ppo/config.py", "PPOConfig"),
    ],
}
ENUM_FILES = ("transformers/trainer_utils.py", "transformers/training_args.py")

# Choices that the libraries test only once training runs.
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
LATE_CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("dpo", "loss_type"): DPO_LOSSES,
    ("dpo", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("grpo", "loss_type"): ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    ("grpo", "scale_rewards"): ("group", "batch", "none", True, False),
    ("grpo", "importance_sampling_level"): ("token", "sequence"),
    ("grpo", "multi_objective_aggregation"): ("sum_then_normalize", "normalize_then_sum"),
    ("sft", "loss_type"): ("nll", "dft", "chunked_nll"),
}
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
LATE_CHOICES |= {
    (kind, name): LOG_LEVELS for kind in CLASSES if kind != "model" for name in ("log_level", "log_level_replica")
}

# Numbers are not negative unless their default is. These must also be above zero ...
# fmt: off
POSITIVE = frozenset({
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_length", "num_iterations", "max_completion_length", "generation_batch_size", "steps_per_generation",
    "temperature", "num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size",
    "total_episodes", "lora_r", "lora_alpha", "missing_eos_penalty", "save_steps", "eval_steps", "logging_steps",
    "dataset_num_proc", "repetition_penalty", "kl_target", "kl_horizon", "max_kl",
})
# fmt: on
# ... and these lie in a closed interval.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("label_smoothing", "adam_beta1", "adam_beta2", "lora_dropout", "cliprange"), (0, 1)),
    **dict.fromkeys(("gamma", "lam", "top_p", "min_p", "epsilon", "ref_model_mixup_alpha", "ld_alpha"), (0, 1)),
    "num_generations": (2, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
# Stands for a default that the source computes (that of `optim` depends on torch).
UNREAD = ...


@dataclass(frozen=True)
class Option:
    """One field of a configuration class: its type, its default and, where there are any, its choices."""

    annotation: Any
    default: Any
    choices: tuple[Any, ...] = ()

    @property
    def type_name(self) -> str:
        parts = (
            typing.get_args(self.annotation)
            if typing.get_origin(self.annotation) is typing.Union
            else (self.annotation,)
        )
        names = [str(part) if typing.get_args(part) else part.__name__ for part in parts]
        return " or ".join(name.replace("typing.", "").replace("NoneType", "null") for name in names)


def _source(path: str) -> ast.Module:
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return ast.parse((Path(spec.submodule_search_locations[0]) / inside).read_text(encoding="utf-8"))


@functools.cache
def _enums() -> dict[str, tuple[str, ...]]:
    """Name of each enumeration of the training arguments -> its values."""
    found = {}
    for path in ENUM_FILES:
        for node in _source(path).body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                values = [item.value.value for item in node.body
                          if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)]  # fmt: skip
                found[node.name] = tuple(value for value in values if isinstance(value, str))
    return found


class _Names(dict[str, Any]):
    """Names that an annotation may use; whatever has to be imported counts as text (an enumeration) or anything."""

    def __missing__(self, name: str) -> Any:
        return str if name in _enums() else Any


def _read_field(node: ast.AnnAssign) -> Option:
    names = _Names(vars(builtins) | {"Any": Any, "Literal": typing.Literal})
    used = [n.id for n in ast.walk(node.annotation) if isinstance(n, ast.Name)]
    parts = tuple(eval(ast.unparse(part), {}, names) for part in _union_parts(node.annotation))
    annotation: Any = typing.Union[parts]  # noqa: UP007
    default: Any = None
    choices: tuple[Any, ...] = next((_enums()[name] for name in used if name in _enums()), ())
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is typing.Literal:
            choices = typing.get_args(part)
    if isinstance(node.value, ast.Call):
        for keyword in node.value.keywords:
            if keyword.arg == "default":
                default = UNREAD if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            elif keyword.arg == "default_factory":
                default = _made_by(keyword.value)
            elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                        choices = tuple(ast.literal_eval(value))
    elif node.value is not None:
        default = ast.literal_eval(node.value)
    return Option(annotation, default, choices)


def _made_by(factory: ast.expr) -> Any:
    """What a `default_factory` gives: `list`, or a lambda around a literal."""
    return ast.literal_eval(factory.body) if isinstance(factory, ast.Lambda) else eval(ast.unparse(factory), {})()


def _union_parts(node: ast.expr) -> list[ast.expr]:
    """`a | b | c` -> [a, b, c]: Python 3.10 cannot evaluate `Any | None`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union_parts(node.left) + _union_parts(node.right)
    return [node]


@functools.cache
def read_options(kind: str) -> dict[str, Option]:
    """Read every option that a recipe block takes.

    Args:
        kind: `"model"` or a trainer word (`"sft"`, `"reward"`, `"dpo"`, `"grpo"`, `"ppo"`).

    Raises:
        ModuleNotFoundError: trl or transformers is not installed.
    """
    options: dict[str, Option] = {}
    for path, class_name in CLASSES[kind]:
        (node,) = [n for n in _source(path).body if isinstance(n, ast.ClassDef) and n.name == class_name]
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                options[item.target.id] = _read_field(item)
    for (trainer, name), choices in LATE_CHOICES.items():
        if trainer == kind:
            options[name] = Option(options[name].annotation, options[name].default, choices)
    return options


def check_value(kind: str, name: str, value: Any) -> tuple[str, str] | None:
    """Check one value against the option's type, choices and range.

    Returns:
        The problem and its remedy, or None where the value is good.
    """
    option = read_options(kind)[name]
    shown = show(value)
    takes_list = "list[" in str(option.annotation)
    if takes_list and isinstance(value, str) and "," in value:
        return f"{shown} is one text, not a list", f"write [{value}]"
    # The classes turn a single text into a list of one themselves, and fields typed `str` may have a boolean default.
    text = isinstance(value, str) and (takes_list or option.choices)
    if not text and not _is_one_of(value, (*option.choices, option.default)):
        try:
            adapter = pydantic.TypeAdapter(option.annotation, config=pydantic.ConfigDict(strict=True))
            adapter.validate_python(value)
        except pydantic.ValidationError:
            return f"{shown} is not of the type {option.type_name}", _type_remedy(option, value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{shown} is not a finite number", "give a finite number"
    if option.choices and value is not None:
        for item in (value or [None]) if isinstance(value, list) else [value]:
            if not _is_one_of(item, option.choices):
                near = nearest(str(item), [str(choice) for choice in option.choices])
                return f"{show(item)} is not a choice", f"did you mean {near!r}?" if near else _choose(option)
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = _check_range(option, name, value)
        return found and (f"{shown} {found[0]}", found[1])
    return None


def show(value: Any) -> str:
    """A value as YAML writes it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_one_of(value: Any, known: typing.Iterable[Any]) -> bool:
    """Compare with the type, too: 1, 1.0 and True are three values."""
    return any(type(value) is type(item) and value == item for item in known)


def _check_range(option: Option, name: str, value: float) -> tuple[str, str] | None:
    low, high = RANGES.get(name, (0, math.inf))
    allows_negative = isinstance(option.default, int | float) and option.default < 0
    if name in POSITIVE and value <= 0:
        return "is not above 0", "give a positive number"
    if not allows_negative and not low <= value <= high:
        return (
            "is out of range",
            f"give a number from {low} to {high}" if high < math.inf else f"give a number of {low} or more",
        )
    return None


def _type_remedy(option: Option, value: Any) -> str:
    if option.choices:
        return _choose(option)
    if isinstance(value, list) and len(value) > 1 and "list[" not in str(option.annotation):
        return "give one value here; several values to compare go under `sweep:`"
    if "bool" in option.type_name:
        return "write true or false"
    if isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value) and re.search("int|float", option.type_name):
        return "write it without quotes"
    example = "" if option.default in (None, UNREAD) else f", such as its default {show(option.default)}"
    return f"give a value of the type {option.type_name}{example}"


def _choose(option: Option) -> str:
    return "choose one of: " + ", ".join(show(choice).strip('"') for choice in option.choices)


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """Return the known word that `word` most likely misspells or begins, or None where none is close."""
    from rapidfuzz import fuzz, process

    words = list(known)
    longer = [other for other in words if len(word) >= 4 and other.startswith(word)]
    match = process.extractOne(word, words, scorer=fuzz.ratio, processor=str.lower, score_cutoff=60)
    return longer[0] if longer else match[0] if match else None


def value_of(kind: str, args: Mapping[str, Any], name: str) -> Any:
    """The value that training will see: the recipe's, or else the library's default."""
    return args[name] if name in args else read_options(kind)[name].default
