"""The options of TRL's configuration classes, read from the libraries' source without importing them.

Importing TRL takes five seconds and torch; a misspelt key should be named in less than one. The classes are plain
dataclasses, so their fields, types, defaults and choices can be read with `ast`. Nothing is re-declared here but what the
libraries state nowhere a program can read: the choices that they check only while training, and the ranges of numbers.
The constructors of the classes are run afterwards by `rlhf_trl.train.build_config`, which has the last word.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import math
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
        ("rlhf_trl/ppo.py", "PPOConfig"),
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

# Numbers are not negative unless their default is. These must also be above zero ...
POSITIVE = frozenset(
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_length"
    " num_iterations max_completion_length generation_batch_size steps_per_generation temperature num_ppo_epochs"
    " num_mini_batches response_length local_rollout_forward_batch_size total_episodes lora_r lora_alpha"
    " missing_eos_penalty save_steps eval_steps logging_steps dataset_num_proc repetition_penalty".split()
)
# ... and these lie in an interval (closed, unless the bound is named in OPEN).
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("label_smoothing", "adam_beta1", "adam_beta2", "lora_dropout", "cliprange"), (0.0, 1.0)),
    **dict.fromkeys(("gamma", "lam", "top_p", "min_p", "epsilon", "ref_model_mixup_alpha", "ld_alpha"), (0.0, 1.0)),
    "num_generations": (2, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class Option:
    """One field of a configuration class: its type, its default and, where there are any, its choices."""

    annotation: Any
    default: Any
    choices: tuple[Any, ...] = ()

    @property
    def type_name(self) -> str:
        return getattr(self.annotation, "__name__", None) or str(self.annotation).replace("typing.", "")


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
    annotation = typing.Union[tuple(eval(ast.unparse(part), {}, names) for part in _union_parts(node.annotation))]  # noqa: S307, UP007
    default: Any = None
    choices: tuple[Any, ...] = next((_enums()[name] for name in used if name in _enums()), ())
    if typing.get_origin(annotation) is typing.Literal:
        choices = typing.get_args(annotation)
    if isinstance(node.value, ast.Call):
        for keyword in node.value.keywords:
            if keyword.arg == "default" and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
                default = ast.literal_eval(keyword.value)
            elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                        choices = tuple(ast.literal_eval(value))
    elif node.value is not None:
        default = ast.literal_eval(node.value)
    return Option(annotation, default, choices)


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
    takes_list = "list[" in str(option.annotation)
    if takes_list and isinstance(value, str) and "," in value:
        return f"{value!r} is one text, not a list", f"write [{value}]"
    # The classes turn a single text into a list of one themselves, and fields typed `str` may have a boolean default.
    if not (takes_list and isinstance(value, str)) and value not in (*option.choices, option.default):
        try:
            adapter = pydantic.TypeAdapter(option.annotation, config=pydantic.ConfigDict(strict=True))
            adapter.validate_python(value)
        except pydantic.ValidationError:
            return f"{value!r} is not of the type {option.type_name}", _type_remedy(option, value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value!r} is not a finite number", "give a finite number"
    if option.choices and value is not None:
        for item in value if isinstance(value, list) else [value]:
            if item not in option.choices:
                near = nearest(str(item), [str(choice) for choice in option.choices])
                known = ", ".join(str(choice) for choice in option.choices)
                return f"{item!r} is not a choice", f"did you mean {near!r}?" if near else f"choose one of: {known}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _check_range(option, name, value)
    return None


def _check_range(option: Option, name: str, value: float) -> tuple[str, str] | None:
    low, high = RANGES.get(name, (0.0, math.inf))
    allows_negative = isinstance(option.default, int | float) and option.default < 0
    if name in POSITIVE and value <= 0:
        return f"{value} is not above 0", "give a positive number"
    if not allows_negative and not low <= value <= high:
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
        return f"{value} is out of range", f"give a number {allowed}"
    return None


def _type_remedy(option: Option, value: Any) -> str:
    if option.choices:
        return f"choose one of: {', '.join(str(choice) for choice in option.choices)}"
    if isinstance(value, list) and len(value) > 1 and "list[" not in str(option.annotation):
        return "give one value here; several values to compare go under `sweep:`"
    return f"give a value of the type {option.type_name}" + (
        f", such as its default {option.default!r}" if option.default is not None else ""
    )


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """Return the known word that `word` most likely misspells, or None where none is close."""
    from rapidfuzz import fuzz, process

    match = process.extractOne(word, list(known), scorer=fuzz.ratio, score_cutoff=60)
    return match[0] if match else None


def value_of(kind: str, args: Mapping[str, Any], name: str) -> Any:
    """The value that training will see: the recipe's, or else the library's default."""
    return args[name] if name in args else read_options(kind)[name].default
