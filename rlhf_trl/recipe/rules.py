"""Rules about several values of one stage: sizes that must fit, options that exclude each other.

Each rule sees one stage, its sweep expanded, and is silent where a value that it needs is wrong itself. Imports
neither torch nor the libraries it checks for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.library import value_of
from rlhf_trl.recipe.recipe import POLICY_TRAINERS, Recipe


class _Unusable(Exception):
    """A value that a rule needs is wrong itself, and that has been told."""


class Values(NamedTuple):
    """What the rules see of one stage."""

    recipe: Recipe
    name: str
    args: Mapping[str, Any]
    wrong: Set[str]
    processes: int

    @property
    def trainer(self) -> str:
        return self.recipe.stages[self.name].trainer

    def option(self, key: str) -> Any:
        """The value of a trainer's option that training will see."""
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
        return f"stages.{self.name}.args.{key}"

    def model_place(self, key: str) -> str:
        return f"stages.{self.name}.model.{key}" if key in self.recipe.stages[self.name].model else f"model.{key}"


def check_values(values: Values) -> list[Problem]:
    """Apply every rule to one stage."""
    problems: list[Problem] = []
    for rule in RULES:
        with contextlib.suppress(_Unusable):
            problems += rule(values)
    return problems


def _check_rollout(of: Values) -> Iterator[Problem]:
    if of.trainer != "grpo":
        return
    batch, group = of.option("per_device_train_batch_size"), of.option("num_generations")
    given, steps = of.option("generation_batch_size"), of.option("steps_per_generation")
    whole = batch * of.processes
    if given and steps:
        remedy = "leave out one of the two"
        yield Problem(of.place("steps_per_generation"), "cannot stand beside generation_batch_size", remedy)
    elif given and given % whole:
        problem = f"{given} is not a multiple of the {whole} answers of a batch"
        yield Problem(of.place("generation_batch_size"), problem, f"set it to a multiple of {whole}")
    steps = steps or of.option("gradient_accumulation_steps")
    rollout = given or whole * steps
    if group is None:
        yield Problem(of.place("num_generations"), "is empty", "give a number of 2 or more")
    elif rollout % group:
        divisors = [size for size in range(2, min(rollout, 1024) + 1) if rollout % size == 0]
        best = min(divisors, key=lambda size: abs(size - group), default=None)
        made = f"batch {batch} x {steps} steps x {of.processes} process{'es'[: 2 * (of.processes > 1)]}"
        problem = f"{group} does not divide the {rollout} answers of a rollout"
        remedy = "set per_device_train_batch_size or gradient_accumulation_steps to a multiple of it"
        yield Problem(of.place("num_generations"), f"{problem} ({'generation_batch_size' if given else made})",
                      f"use num_generations: {best}, or {remedy}" if best else remedy)  # fmt: skip


def _check_evaluation_batch(of: Values) -> Iterator[Problem]:
    if of.trainer == "grpo" and of.option("eval_strategy") != "no":
        batch = of.option("per_device_eval_batch_size") * of.processes
        group = of.option("num_generations_eval") or of.option("num_generations")
        if group is not None and batch % group:
            problem = f"the {batch} answers of an evaluation batch are not whole groups of {group}"
            remedy = f"set it to a multiple of {group}, or eval_strategy: 'no'"
            yield Problem(of.place("per_device_eval_batch_size"), problem, remedy)


def _check_mini_batches(of: Values) -> Iterator[Problem]:
    if of.trainer != "ppo":
        return
    steps, parts = of.option("gradient_accumulation_steps"), of.option("num_mini_batches")
    size = of.option("per_device_train_batch_size") * steps // parts
    if steps % parts:
        problem = f"{parts} does not divide gradient_accumulation_steps, which is {steps}"
        remedy = f"set gradient_accumulation_steps to {parts}, or another multiple of it"
        yield Problem(of.place("num_mini_batches"), problem, remedy)
    elif of.option("whiten_rewards") and size < 8:
        remedy = "raise per_device_train_batch_size or gradient_accumulation_steps, or turn it off"
        yield Problem(of.place("whiten_rewards"), f"needs mini-batches of at least 8 answers, not {size}", remedy)


# Option -> the value at which PPO's loop, which does not read it, does what it says; and what to use instead.
UNREAD_BY_PPO = {
    "fp16": (False, "set bf16: true"),
    "max_steps": (-1, "set total_episodes: steps times batch"),
    "data_seed": (None, "set seed"),
    "eval_strategy": ("no", "leave it out: `evaluate` measures the checkpoints"),
}


def _check_shared_base(of: Values) -> Iterator[Problem]:
    if of.trainer != "ppo":
        return
    if not of.model("use_peft"):
        problem = "PPO holds its policy, value model and reference as adapters on one base"
        yield Problem(of.model_place("use_peft"), problem, f"set use_peft: true for the stage {of.name}")
    for key, (default, remedy) in UNREAD_BY_PPO.items():
        if of.option(key) not in (default, None):
            yield Problem(of.place(key), "has no effect in PPO's loop", remedy)
    if of.option("save_strategy") not in ("no", "steps"):
        yield Problem(of.place("save_strategy"), "PPO's loop knows steps alone", "set save_strategy: steps")
    if (of.option("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        problem = "would recompute the value model under the policy's adapter"
        yield Problem(of.place("gradient_checkpointing_kwargs"), f"use_reentrant: true {problem}", "leave it out")


def _check_dpo_loss(of: Values) -> Iterator[Problem]:
    if of.trainer != "dpo":
        return
    if "exo_pair" in of.option("loss_type") and of.option("label_smoothing") <= 0:
        yield Problem(of.place("label_smoothing"), "the loss exo_pair needs it above 0", "set label_smoothing: 0.001")
    if of.option("beta") <= 0:
        remedy = "give a positive number, such as 0.1"
        yield Problem(of.place("beta"), "is not above 0: nothing would be learned", remedy)


def _check_quantisation(of: Values) -> Iterator[Problem]:
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if of.model(key)]
    if quantised and not of.model("use_peft"):
        stage = f" for the stage {of.name}" if "use_peft" in of.recipe.stages[of.name].model else ""
        remedy = f"set use_peft: true{stage}"
        yield Problem(of.model_place(quantised[0]), "a quantised model can be trained only through an adapter", remedy)
    if len(quantised) == 2:
        yield Problem(of.model_place("load_in_8bit"), "cannot stand beside load_in_4bit", "choose one of the two")


def _check_dropout(of: Values) -> Iterator[Problem]:
    if of.trainer == "sft" or (of.trainer != "ppo" and not of.option("disable_dropout")):
        return
    if of.model("use_peft") and (of.model("lora_dropout") or 0) > 0:
        remedy = "" if of.trainer == "ppo" else f", or disable_dropout: false in the args of {of.name}"
        problem = f"{of.trainer} turns every dropout off, LoRA's too"
        yield Problem(of.model_place("lora_dropout"), problem, f"set lora_dropout: 0.0{remedy}")


def _check_cut(of: Values) -> Iterator[Problem]:
    limit = of.option("max_length") if of.trainer in ("sft", "reward", "dpo") else None
    longest = of.own("data", "max_length")
    if limit is not None and limit < longest <= (_positions(of) or longest):
        given = "" if "max_length" in of.args else ", TRL's default,"
        problem = f"{limit}{given} is below data.max_length {longest}: rows would be cut or dropped without a word"
        yield Problem(of.place("max_length"), problem, f"set it to {longest}")


def _check_checkpoints(of: Values) -> Iterator[Problem]:
    wanted = of.own("evaluation", "checkpoints") if of.trainer in POLICY_TRAINERS else 0
    if wanted and of.option("save_strategy") == "no":
        remedy = "set save_strategy: steps with a save_steps, or evaluation.checkpoints: 0"
        yield Problem(of.place("save_strategy"), f"keeps no checkpoint, and {wanted} are to be evaluated", remedy)
    limit = of.option("save_total_limit") if wanted else None
    if limit is not None and limit <= wanted:
        problem = f"keeps {limit} checkpoints, the last one among them, and {wanted} earlier ones are to be evaluated"
        yield Problem(of.place("save_total_limit"), problem, f"set it to {wanted + 1} or more, or leave it out")


def _positions(of: Values) -> int | None:
    return max_positions(str(of.model("model_name_or_path")))


def _check_positions(of: Values) -> Iterator[Problem]:
    positions = _positions(of)
    longest = of.own("data", "max_length")
    if positions is None:
        return
    if longest > positions:
        problem = f"{longest} tokens are more than the {positions} positions of the model"
        yield Problem("data.max_length", problem, f"set it to {positions} or less")
        return
    answers = {}
    if of.trainer in ("grpo", "ppo"):
        option = {"grpo": "max_completion_length", "ppo": "response_length"}[of.trainer]
        answers[of.place(option)] = of.option(option) or 0
    if of.trainer in POLICY_TRAINERS:
        answers["evaluation.max_new_tokens"] = of.own("evaluation", "max_new_tokens")
    for place, tokens in answers.items():
        if longest + tokens > positions:
            room = positions - longest
            remedy = f"set it to {room} or less, or lower data.max_length" if room > 0 else "lower data.max_length"
            problem = (
                f"{tokens} tokens after a prompt of up to {longest} (data.max_length) are more than the {positions}"
            )
            yield Problem(place, f"{problem} positions of the model", remedy)


def max_positions(model: str) -> int | None:
    """The longest input of a model whose config is at hand (a local folder, or the Hub's cache), else None."""
    if model == "builtin:tiny":
        return 512
    config = Path(model) / "config.json"
    try:
        if not config.exists():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(model, "config.json")
            if not isinstance(cached, str):
                return None
            config = Path(cached)
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no model's name, or no JSON: loading the model will say so
        return None
    found = [values.get(key) for key in ("max_position_embeddings", "n_positions")] if isinstance(values, dict) else []
    return next((value for value in found if isinstance(value, int)), None)


RULES = (
    *(_check_rollout, _check_evaluation_batch, _check_mini_batches, _check_shared_base, _check_dpo_loss),
    *(_check_quantisation, _check_dropout, _check_cut, _check_checkpoints, _check_positions),
)
