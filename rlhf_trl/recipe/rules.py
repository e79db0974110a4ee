"""Rules about several values of one stage: sizes that must fit, options that exclude each other.

Each rule sees one stage, its sweep expanded, and is silent where a value that it needs is wrong itself.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.library import read_options, value_of
from rlhf_trl.recipe.recipe import POLICY_TRAINERS, Recipe

Found = Iterator[tuple[str, str, str]]
"""Key, problem and remedy; the key is one of the trainer's options, or that of another section, with its name."""
EVERY = ("sft", "reward", *POLICY_TRAINERS)


class _Unusable(Exception):
    """A value that a rule needs is wrong itself, and that has been told."""


@dataclass(frozen=True)
class Values:
    """The resolved options of one stage: `values["beta"]` is what its training will see."""

    recipe: Recipe
    name: str
    args: Mapping[str, Any]
    wrong: Set[str]
    processes: int

    @property
    def trainer(self) -> str:
        return self.recipe.stages[self.name].trainer

    def __getitem__(self, key: str) -> Any:
        self._require(f"stages.{self.name}.args.{key}", f"stages.{self.name}.sweep.{key}")
        return value_of(self.trainer, self.args, key)

    def model(self, key: str) -> Any:
        """The value of a key of the stage's model block, None where it is not given."""
        self._require(f"model.{key}", f"stages.{self.name}.model.{key}")
        return self.recipe.model_block(self.name).get(key)

    def own(self, section: str, key: str) -> Any:
        """The value of a key of one of our own sections."""
        self._require(f"{section}.{key}")
        return getattr(getattr(self.recipe, section), key)

    def _require(self, *places: str) -> None:
        for place in places:
            if any(f"{place}.".startswith(f"{bad}.") or bad.startswith(f"{place}.") for bad in self.wrong):
                raise _Unusable

    def place(self, key: str) -> str:
        section, dot, rest = key.partition(".")
        if not dot:
            return f"stages.{self.name}.args.{key}"
        own = section == "model" and rest in self.recipe.stages[self.name].model
        return f"stages.{self.name}.{key}" if own else key


def check_values(values: Values) -> list[Problem]:
    """Apply every rule to one stage."""
    problems: list[Problem] = []
    for trainers, rule in RULES:
        if values.trainer in trainers:
            with contextlib.suppress(_Unusable):
                problems += [Problem(values.place(key), problem, remedy) for key, problem, remedy in rule(values)]
    for trainers, key, breaks, problem, remedy in CONDITIONS:
        if values.trainer in trainers:
            with contextlib.suppress(_Unusable):
                if breaks(values):
                    problems.append(Problem(values.place(key), problem, remedy))
    return problems


# Trainers, key, when it is wrong, problem, remedy.
CONDITIONS: tuple[tuple[tuple[str, ...], str, Callable[[Values], Any], str, str], ...] = (
    (("ppo",), "model.use_peft", lambda of: not of.model("use_peft"),
     "PPO holds its policy, value model and reference as adapters on one base",
     "set use_peft: true, here or in the `model:` of the stage"),
    *((("ppo",), key, lambda of, key=key, off=off: of[key] not in off, "has no effect in PPO's loop", remedy)
      for key, off, remedy in (
          ("fp16", [False], "set bf16: true"), ("max_steps", [-1], "set total_episodes: steps times batch"),
          ("data_seed", [None], "set seed"), ("eval_strategy", ["no"], "leave it out: checkpoints are evaluated"))),
    (("ppo",), "save_strategy", lambda of: of["save_strategy"] not in ("no", "steps"),
     "PPO's loop knows steps alone", "set save_strategy: steps"),
    (("ppo",), "gradient_checkpointing_kwargs",
     lambda of: (of["gradient_checkpointing_kwargs"] or {}).get("use_reentrant"),
     "use_reentrant: true would recompute the value model under the policy's adapter", "leave it out"),
    (("grpo", "ppo"), "train_sampling_strategy", lambda of: of["train_sampling_strategy"] != "random",
     "has no effect: the trainer draws its prompts in an order of its own", "leave it out"),
    (("dpo",), "label_smoothing", lambda of: "exo_pair" in of["loss_type"] and of["label_smoothing"] <= 0,
     "the loss exo_pair needs it above 0", "set label_smoothing: 0.001"),
    (("dpo",), "label_smoothing", lambda of: of["label_smoothing"] >= 0.5,
     "at 0.5 the loss no longer tells the chosen answer from the rejected one", "set it below 0.5"),
    (("dpo",), "padding_free", lambda of: of["padding_free"], "TRL's DPO trainer switches it off without an error",
     "leave it out"),
    (EVERY, "fsdp", lambda of: of["fsdp"] and of.processes == 1, "shards over processes, and this is one",
     "leave it out, and launch with --accelerate fsdp2"),
    (("dpo",), "beta", lambda of: of["beta"] <= 0, "is not above 0: nothing would be learned",
     "give a positive number, such as 0.1"),
    *((EVERY, f"model.{key}", lambda of, key=key: of.model(key) and not of.model("use_peft"),
       "a quantised model can be trained only through an adapter", "set use_peft: true beside it")
      for key in ("load_in_4bit", "load_in_8bit")),
    (EVERY, "model.load_in_8bit", lambda of: of.model("load_in_8bit") and of.model("load_in_4bit"),
     "cannot stand beside load_in_4bit", "choose one of the two"),
)  # fmt: skip


def _check_rollout(of: Values) -> Found:
    batch, group, given = of["per_device_train_batch_size"], of["num_generations"], of["generation_batch_size"]
    steps = of["steps_per_generation"] or of["gradient_accumulation_steps"]
    rollout = given or batch * of.processes * steps
    if group is None:
        yield "num_generations", "is empty", "give a number of 2 or more"
    elif rollout % group:
        divisors = [size for size in range(2, min(rollout, 1024) + 1) if rollout % size == 0]
        best = min(divisors, key=lambda size: abs(size - group), default=None)
        made = f"batch {batch} x {steps} steps x {of.processes} process{'es' if of.processes > 1 else ''}"
        problem = f"{group} does not divide the {rollout} answers of a rollout"
        remedy = "set per_device_train_batch_size or gradient_accumulation_steps to a multiple of it"
        remedy = f"use num_generations: {best}, or {remedy}" if best else remedy
        yield "num_generations", f"{problem} ({'generation_batch_size' if given else made})", remedy


def _check_mini_batches(of: Values) -> Found:
    steps, parts = of["gradient_accumulation_steps"], of["num_mini_batches"]
    size = of["per_device_train_batch_size"] * steps // parts
    if steps % parts:
        problem = f"{parts} does not divide gradient_accumulation_steps, which is {steps}"
        yield "num_mini_batches", problem, f"set gradient_accumulation_steps to {parts}, or another multiple of it"
    elif of["whiten_rewards"] and size < 8:
        remedy = "raise per_device_train_batch_size or gradient_accumulation_steps, or turn it off"
        yield "whiten_rewards", f"needs mini-batches of at least 8 answers, not {size}", remedy


def _check_dropout(of: Values) -> Found:
    turned_off = of.trainer == "ppo" or of["disable_dropout"]
    if turned_off and of.model("use_peft") and (of.model("lora_dropout") or 0) > 0:
        remedy = "" if of.trainer == "ppo" else f", or disable_dropout: false in the args of {of.name}"
        problem = f"{of.trainer} turns every dropout off, LoRA's too"
        yield "model.lora_dropout", problem, f"set lora_dropout: 0.0{remedy}"


def _check_cut(of: Values) -> Found:
    limit, longest = of["max_length"], of.own("data", "max_length")
    positions = max_positions(str(of.model("model_name_or_path"))) or longest
    if limit is not None and limit < longest <= positions:
        given = "" if "max_length" in of.args else ", TRL's default,"
        problem = f"{limit}{given} is below data.max_length {longest}: rows would be cut or dropped without a word"
        yield "max_length", problem, f"set it to {longest}"


def _check_kept(of: Values) -> Found:
    wanted, limit = of.own("evaluation", "checkpoints"), of["save_total_limit"]
    if wanted and of["save_strategy"] == "no":
        remedy = "set save_strategy: steps with a save_steps, or evaluation.checkpoints: 0"
        yield "save_strategy", "keeps no checkpoint, and evaluation.checkpoints asks for some", remedy
    elif wanted and limit is not None and limit <= wanted:
        problem = f"keeps {limit} checkpoints, the last one among them, and {wanted} earlier ones are to be evaluated"
        yield "save_total_limit", problem, f"set it to {wanted + 1} or more, or leave it out"


def _check_positions(of: Values) -> Found:
    positions = max_positions(str(of.model("model_name_or_path")))
    longest = of.own("data", "max_length")
    if positions is None:
        return
    if longest > positions:
        problem = f"{longest} tokens are more than the {positions} positions of the model"
        yield "data.max_length", problem, f"set it to {positions} or less"
        return
    answers = {}
    if option := {"grpo": "max_completion_length", "ppo": "response_length"}.get(of.trainer):
        answers[option] = of[option] or 0
    if of.trainer in POLICY_TRAINERS:
        answers["evaluation.max_new_tokens"] = of.own("evaluation", "max_new_tokens")
    for key, tokens in answers.items():
        if longest + tokens > positions:
            room = positions - longest
            remedy = f"set it to {room} or less, or lower data.max_length" if room > 0 else "lower data.max_length"
            prompt = f"after a prompt of up to {longest} (data.max_length)"
            yield key, f"{tokens} tokens {prompt} are more than the {positions} positions of the model", remedy


# Option, the values that need a package, its module, what brings it.
NEEDS = (
    ("use_vllm", "True", "vllm", '"rlhf-trl[vllm]"'),
    ("use_liger_kernel", "True", "liger_kernel", '"rlhf-trl[liger]"'),
    ("deepspeed", "*", "deepspeed", '"rlhf-trl[deepspeed]"'),
    ("report_to", "trackio", "trackio", '"rlhf-trl[trackio]"'),
    *(("report_to", name, name, name) for name in ("wandb", "mlflow", "tensorboard", "swanlab", "clearml")),
    ("model.attn_implementation", "flash_attention_2", "flash_attn", "flash-attn"),
    ("model.attn_implementation", "*/*", "kernels", "kernels"),
)


def _check_packages(of: Values) -> Found:
    for key, pattern, module, package in NEEDS:
        own = key.startswith("model.")
        if own or key in read_options(of.trainer):
            value = of.model(key.removeprefix("model.")) if own else of[key]
            given = [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]
            if fnmatch.filter(given, pattern) and importlib.util.find_spec(module) is None:
                yield key, f"needs the package {module}, which is not installed", f"pip install {package}"


def max_positions(model: str) -> int | None:
    """The longest input of a model whose config is at hand (a local folder, or the Hub's cache), else None."""
    if model == "builtin:tiny":
        return 512
    config = Path(model) / "config.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not one that is here: loading the model will say so
        if not config.exists():
            from huggingface_hub import try_to_load_from_cache

            config = Path(str(try_to_load_from_cache(model, "config.json")))
        values = dict(json.loads(config.read_text(encoding="utf-8")))
        keys = ("max_position_embeddings", "n_positions")
        return next((values[key] for key in keys if isinstance(values.get(key), int)), None)
    return None


RULES: tuple[tuple[tuple[str, ...], Callable[[Values], Found]], ...] = (
    (("grpo",), _check_rollout),
    (("ppo",), _check_mini_batches),
    (("reward", *POLICY_TRAINERS), _check_dropout),
    (("sft", "reward", "dpo"), _check_cut),
    (POLICY_TRAINERS, _check_kept),
    (EVERY, _check_positions),
    (EVERY, _check_packages),
)
