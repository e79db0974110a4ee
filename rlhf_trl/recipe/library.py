"""The options of TRL's configuration classes, read from the libraries' source without importing them.

Importing TRL takes five seconds and torch; a misspelt key should be named in less than one. The classes are plain
dataclasses, so their fields, types, defaults and choices can be read with `ast`. Declared here is only what the
libraries state nowhere a program can read: the choices that they check while training, and the ranges of numbers. The
constructors, which `rlhf_trl.train.step` runs afterwards, have the last word.
"""

import ast
import builtins
import functools
import importlib.util
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic


def _source(path: str) -> Path:
    """A file of a package, found without importing it."""
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.submodule_search_locations[0]) / inside


BASES = (("transformers/training_args.py", "TrainingArguments"), ("trl/trainer/base_config.py", "_BaseConfig"))
# Trainer word -> the classes whose fields it takes, base class first.
CLASSES = {
    "model": [("trl/trainer/model_config.py", "ModelConfig")],
    **{kind: [*BASES, (f"trl/trainer/{kind}_config.py", f"{name}Config")]
       for kind, name in {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "grpo": "GRPO"}.items()},
}  # fmt: skip
PPO = "trl/experimental/ppo/ppo_config.py"
if _source(PPO).exists():  # up to TRL 1.12
    CLASSES["ppo"] = [*BASES, (PPO, "PPOConfig"), ("rlhf_trl/train/ppo/config.py", "PPOConfig")]
ENUM_FILES = ("transformers/trainer_utils.py", "transformers/training_args.py")

# Choices that the libraries test only once training runs.
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
LATE_CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("dpo", "loss_type"): DPO_LOSSES,
    ("dpo", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("grpo", "loss_type"): ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    ("grpo", "scale_rewards"): ("group", "batch", "none", True, False),
    ("grpo", "importance_sampling_level"): ("token", "sequence"),
    ("grpo", "multi_objective_aggregation"): ("sum_then_normalize", "normalize_then_sum"),
    ("sft", "loss_type"): ("nll", "dft", "chunked_nll"),
    **{(kind, name): LOG_LEVELS for kind in [*CLASSES][1:] for name in ("log_level", "log_level_replica")},
}
# Numbers are not negative unless their default is. These must also be above zero ...
# fmt: off
POSITIVE = frozenset({
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_length", "num_iterations", "max_completion_length", "generation_batch_size", "steps_per_generation",
    "temperature", "num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size",
    "total_episodes", "lora_r", "lora_alpha", "missing_eos_penalty", "save_steps", "eval_steps", "logging_steps",
    "dataset_num_proc", "repetition_penalty", "kl_target", "kl_horizon", "max_kl", "max_steps", "top_p",
    "eval_accumulation_steps",
})
# fmt: on
# ... and these lie in a closed interval.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("label_smoothing", "label_smoothing_factor", "adam_beta1", "adam_beta2", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("gamma", "lam", "top_p", "min_p", "epsilon", "cliprange", "top_entropy_quantile"), (0, 1)),
    **dict.fromkeys(("ref_model_mixup_alpha", "ld_alpha"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc"), (0, 256)),  # processes, each with the data
    "num_generations": (2, math.inf),
}
# The ranks that vLLM can be started for.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Stands for a default that the source computes (that of `optim` depends on torch).
UNREAD = ...


@dataclass(frozen=True)
class Option:
    """One field of a configuration class."""

    annotation: Any
    type_name: str
    default: Any
    choices: tuple[Any, ...] = ()

    @property
    def takes_list(self) -> bool:
        return "list[" in self.type_name


def _classes(path: str) -> dict[str, ast.ClassDef]:
    nodes = ast.parse(_source(path).read_text(encoding="utf-8")).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


@functools.cache
def _enums() -> dict[str, tuple[str, ...]]:
    """Name of each enumeration of the training arguments -> its values."""
    enums = {}
    for node in [node for path in ENUM_FILES for node in _classes(path).values()]:
        if any("Enum" in ast.unparse(base) for base in node.bases):
            values = [getattr(item.value, "value", None) for item in node.body if isinstance(item, ast.Assign)]
            enums[node.name] = tuple(value for value in values if isinstance(value, str))
    return enums


class _Names(dict[str, Any]):
    """Names in the source of a field; whatever would have to be imported is a text (an enumeration) or unread."""

    def __missing__(self, name: str) -> Any:
        return str if name in _enums() else self["unknown"]


def _read_field(node: ast.AnnAssign) -> Option:
    def evaluate(expression: ast.expr, unknown: Any) -> Any:
        return eval(ast.unparse(expression), {}, _Names(known, unknown=unknown))

    # `object` is as good as `Any`, which Python 3.10 cannot put in a union.
    known = {**vars(builtins), "Literal": typing.Literal, "Any": object}
    annotation = evaluate(node.annotation, object)
    used = [part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)]
    choices: tuple[Any, ...] = next((_enums()[name] for name in used if name in _enums()), ())
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is typing.Literal:
            choices = typing.get_args(part)
    given: dict[str | None, ast.expr | None] = {"default": node.value}
    if isinstance(node.value, ast.Call):  # field(...)
        given = {word.arg: word.value for word in node.value.keywords}
    if isinstance(metadata := given.get("metadata"), ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                choices = tuple(ast.literal_eval(value))
    type_name = ast.unparse(node.annotation).replace(" | ", " or ").replace("None", "null")
    if factory := given.get("default_factory"):
        return Option(annotation, type_name, evaluate(factory, UNREAD)(), choices)
    default = given.get("default")
    return Option(annotation, type_name, None if default is None else evaluate(default, UNREAD), choices)


@functools.cache
def read_options(kind: str) -> dict[str, Option]:
    """Read every option that a recipe block takes; `kind` is `"model"` or a trainer word."""
    options = {
        item.target.id: _read_field(item)
        for path, class_name in CLASSES[kind]
        for item in _classes(path)[class_name].body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    late = {name: choices for (trainer, name), choices in LATE_CHOICES.items() if trainer == kind}
    return options | {name: replace(options[name], choices=choices) for name, choices in late.items()}


def check_value(kind: str, name: str, value: Any) -> tuple[str, str] | None:
    """Check one value against the option's type, choices and range; return the problem and its remedy, or None."""
    option, shown = read_options(kind)[name], show(value)
    if option.takes_list and isinstance(value, str) and "," in value:
        return f"{shown} is one text, not a list", f"write [{value}]"
    # The classes turn a single text into a list of one themselves, and fields typed `str` may have a boolean default.
    text = isinstance(value, str) and (option.takes_list or option.choices)
    if not text and not _is_one_of(value, (*option.choices, option.default)):
        try:
            strict = pydantic.ConfigDict(strict=True)
            pydantic.TypeAdapter(option.annotation, config=strict).validate_python(value)
        except pydantic.ValidationError:
            return f"{shown} is not of the type {option.type_name}", _type_remedy(option, value)
    if option.choices and value is not None:
        for item in (value or [None]) if isinstance(value, list) else [value]:
            if not _is_one_of(item, option.choices):
                return f"{show(item)} is not a choice", suggest(item, map(str, option.choices), _choose(option))
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = RANGES.get(name, (0, math.inf))
        allows_negative = isinstance(option.default, int | float) and option.default < 0
        if not math.isfinite(value):
            return f"{shown} is not a finite number", "give a finite number"
        if name in POSITIVE and value <= 0 and not _is_one_of(value, [option.default]):
            return f"{shown} is not above 0", "give a positive number"
        if not allows_negative and not low <= value <= high:
            limits = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
            return f"{shown} is out of range", f"give a number {limits}"
    return None


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """Compare with the type, too: 1, 1.0 and True are three values."""
    return any(type(value) is type(item) and value == item for item in known)


def _type_remedy(option: Option, value: Any) -> str:
    if option.choices:
        return _choose(option)
    if isinstance(value, list) and len(value) > 1 and not option.takes_list:
        return "give one value here; several values to compare go under `sweep:`"
    if "bool" in option.type_name:
        return "write true or false"
    if isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value) and re.search("int|float", option.type_name):
        return "write it without quotes"
    example = "" if option.default in (None, UNREAD) else f", such as its default {show(option.default)}"
    return f"give a value of the type {option.type_name}{example}"


def _choose(option: Option) -> str:
    return "choose one of: " + ", ".join(show(choice).strip('"') for choice in option.choices)


def show(value: Any) -> str:
    """A value as YAML writes it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` most likely misspells or begins, or None where none is close."""
    from rapidfuzz import fuzz, process

    words = list(known)
    longer = [other for other in words if len(word) >= 4 and other.startswith(word)]
    match = process.extractOne(word, words, scorer=fuzz.ratio, processor=str.lower, score_cutoff=60)
    return longer[0] if longer else match[0] if match else None


def suggest(word: object, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a misspelt word: the nearest one that is known, if any is near."""
    near = nearest(str(word), known)
    return f"did you mean {near!r}?" if near else otherwise


def value_of(kind: str, args: Mapping[str, Any], name: str) -> Any:
    """The value that training will see: the recipe's, or else the library's default."""
    return args[name] if name in args else read_options(kind)[name].default


def vllm_rank(rank: int) -> int | None:
    """The option `max_lora_rank` with which vLLM takes a rank, if any."""
    return next((one for one in VLLM_RANKS if one >= rank), None)


# What a batch over all processes is made of, besides their number.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def parts_of(kind: str, args: Mapping[str, Any]) -> int:
    """The equal parts of the rows that a process adds to a batch: PPO's mini-batches."""
    return int(value_of(kind, args, "num_mini_batches")) if kind == "ppo" else 1


def spread_batch(kind: str, args: Mapping[str, Any], size: int, processes: int) -> dict[str, int]:
    """The options that make a batch of `size` rows, which processes and parts divide.

    As many rows at once as divide a part, and not more than the args' own per_device_train_batch_size.
    """
    most, part = value_of(kind, args, "per_device_train_batch_size"), size // (processes * parts_of(kind, args))
    rows = next(rows for rows in range(min(most, part), 0, -1) if part % rows == 0)
    return dict(zip(BATCH, (rows, size // (processes * rows)), strict=True))
