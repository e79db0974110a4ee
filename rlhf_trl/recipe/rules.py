"""Rules about several values of one stage: sizes that must fit, options that exclude each other.

A rule is a row of `RULES`. It sees one stage, its sweep expanded, and is silent where a value that it needs is wrong
itself.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.errors import Problem
from rlhf_trl.recipe.library import BATCH, spread_batch, value_of
from rlhf_trl.recipe.recipe import POLICY_TRAINERS, Recipe

EVERY = ("sft", "reward", *POLICY_TRAINERS)


class _Unusable(Exception):
    """A value that a rule needs is wrong itself, and that has been told."""


@dataclass(frozen=True)
class Values:
    """What the training of a stage will see: `of["beta"]` of its options, `of["model.lora_r"]`, `of["data.seed"]`."""

    recipe: Recipe
    name: str
    args: Mapping[str, Any]
    wrong: Set[str]
    processes: int

    @property
    def trainer(self) -> str:
        return self.recipe.stages[self.name].trainer

    def __getitem__(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        own = f"stages.{self.name}"
        self._require(*{"": (f"{own}.args.{key}", f"{own}.sweep.{key}"), "model": (key, f"{own}.{key}"),
                        "stage": (f"{own}.{name}",)}.get(section, (key,)))  # fmt: skip
        if section == "":
            spread = self.spread if key in BATCH else {}
            return spread[key] if spread else value_of(self.trainer, self.args, key)
        if section == "stage":
            return getattr(self.recipe.stages[self.name], name)
        if section == "model":
            return self.recipe.model_block(self.name).get(name)
        return getattr(getattr(self.recipe, section), name)

    def _require(self, *places: str) -> None:
        for place in places:
            if any(f"{place}.".startswith(f"{bad}.") or bad.startswith(f"{place}.") for bad in self.wrong):
                raise _Unusable

    def place(self, key: str) -> str:
        if key.startswith("stage."):
            return f"stages.{self.name}.{key.removeprefix('stage.')}"
        if "." not in key:
            return f"stages.{self.name}.args.{key}"
        own = key.startswith("model.") and key.removeprefix("model.") in self.recipe.stages[self.name].model
        return f"stages.{self.name}.{key}" if own else key

    @property
    def positions(self) -> float:
        return max_positions(str(self["model.model_name_or_path"])) or math.inf

    @property
    def room(self) -> float:
        """Tokens that are left for an answer to the longest prompt."""
        return self.positions - int(self["data.max_length"])

    @property
    def parts(self) -> int:
        """The equal parts of a batch over all processes."""
        return self.processes * (self["num_mini_batches"] if self.trainer == "ppo" else 1)

    @property
    def spread(self) -> dict[str, int]:
        """What `global_batch_size` comes to; empty where none is given."""
        size = self["stage.global_batch_size"]
        if size is None:
            return {}
        self._require(*(f"stages.{self.name}.{block}.{key}" for block in ("args", "sweep") for key in BATCH))
        if BATCH[1] in self.args or size % self.parts:
            raise _Unusable
        return spread_batch(self.trainer, self.args, size, self.processes)

    @property
    def dividing(self) -> str:
        """The numbers of processes next to this one among which a batch divides."""
        size, own = self["stage.global_batch_size"], self.parts // self.processes
        fits = [number for number in range(1, min(size // own, 4096) + 1) if size % (number * own) == 0]
        below, above = [n for n in fits if n < self.processes], [n for n in fits if n > self.processes]
        numbers = " or ".join(map(str, [*below[-1:], *above[:1]]))
        return f", or launch {numbers} process(es)" if numbers else ""

    @property
    def rollout(self) -> int:
        """Answers that GRPO samples at once."""
        steps = self["steps_per_generation"] or self["gradient_accumulation_steps"]
        return int(self["generation_batch_size"] or self["per_device_train_batch_size"] * self.processes * steps)

    @property
    def group(self) -> int:
        """The divisor of a rollout that comes nearest to the group that is asked for."""
        divisors = [size for size in range(2, min(self.rollout, 1024) + 1) if self.rollout % size == 0]
        return min(divisors, key=lambda size: abs(size - self["num_generations"]), default=2)

    @property
    def is_plain_lora(self) -> bool:
        """Whether the stage trains a LoRA adapter that an engine can lay on the reference."""
        other = any(self[f"model.{key}"] for key in ("use_dora", "load_in_4bit", "load_in_8bit"))
        return bool(self["model.use_peft"]) and not other and not self["stage.continue_"]


def check_values(values: Values) -> Iterator[Problem]:
    """Apply every rule to one stage."""
    for trainers, key, breaks, problem, remedy in RULES:
        with contextlib.suppress(_Unusable):
            if values.trainer in trainers and breaks(values):
                yield Problem(values.place(key), problem.format(of=values), remedy.format(of=values))


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


# Trainers, key, when it is wrong, problem and remedy (which may name values of the stage).
RULES: tuple[tuple[tuple[str, ...], str, Callable[[Values], Any], str, str], ...] = (
    (("ppo",), "model.use_peft", lambda of: not of["model.use_peft"],
     "PPO holds its policy, value model and reference as adapters on one base",
     "set use_peft: true, here or in the `model:` of the stage"),
    *((("ppo",), key, lambda of, key=key, off=off: of[key] not in off, "has no effect in PPO's loop", remedy)
      for key, off, remedy in (
          ("fp16", [False], "set bf16: true"), ("max_steps", [-1], "set total_episodes: steps times batch"),
          ("data_seed", [None], "set seed"), ("eval_strategy", ["no"], "leave it out: checkpoints are evaluated"),
          ("load_best_model_at_end", [False], "leave it out"), ("neftune_noise_alpha", [None], "leave it out"))),
    (("ppo",), "save_strategy", lambda of: of["save_strategy"] not in ("no", "steps"),
     "PPO's loop knows steps alone", "set save_strategy: steps"),
    (("ppo",), "gradient_checkpointing_kwargs",
     lambda of: (of["gradient_checkpointing_kwargs"] or {}).get("use_reentrant"),
     "use_reentrant: true would recompute the value model under the policy's adapter", "leave it out"),
    (EVERY, BATCH[1], lambda of: of["stage.global_batch_size"] and BATCH[1] in of.args,
     "follows from global_batch_size and the number of processes", "leave out one of the two"),
    (EVERY, "stage.global_batch_size", lambda of: (of["stage.global_batch_size"] or 0) % of.parts,
     "{of[stage.global_batch_size]} is no multiple of {of.parts} (processes, and PPO's mini-batches)",
     "give a multiple of it{of.dividing}"),
    (("grpo",), "steps_per_generation", lambda of: of["stage.global_batch_size"] and of["steps_per_generation"],
     "would make a rollout depend on the number of processes", "set generation_batch_size, or leave it out"),
    (("ppo",), "num_mini_batches", lambda of: of["gradient_accumulation_steps"] % of["num_mini_batches"],
     "{of[num_mini_batches]} does not divide gradient_accumulation_steps, which is {of[gradient_accumulation_steps]}",
     "set gradient_accumulation_steps to {of[num_mini_batches]}, or another multiple of it"),
    (("ppo",), "whiten_rewards",
     lambda of: of["whiten_rewards"] and of["gradient_accumulation_steps"] * of["per_device_train_batch_size"]
     < 8 * of["num_mini_batches"], "needs mini-batches of at least 8 answers",
     "raise per_device_train_batch_size or gradient_accumulation_steps, or turn it off"),
    (("grpo", "ppo"), "train_sampling_strategy", lambda of: of["train_sampling_strategy"] != "random",
     "has no effect: the trainer draws its prompts in an order of its own", "leave it out"),
    (("grpo",), "num_generations", lambda of: of["num_generations"] is None, "is empty", "give a number of 2 or more"),
    (("grpo",), "num_generations", lambda of: of["num_generations"] and of.rollout % of["num_generations"],
     "{of[num_generations]} does not divide the {of.rollout} answers of a rollout (generation_batch_size, or else "
     "batch x steps x {of.processes} process(es))",
     "use num_generations: {of.group}, or make per_device_train_batch_size or gradient_accumulation_steps a multiple"),
    (("dpo",), "label_smoothing", lambda of: of["label_smoothing"] >= 0.5,
     "at 0.5 the loss no longer tells the chosen answer from the rejected one", "set it below 0.5"),
    (("dpo",), "beta", lambda of: of["beta"] <= 0, "is not above 0: nothing would be learned",
     "give a positive number, such as 0.1"),
    (("sft",), "completion_only_loss", lambda of: of["completion_only_loss"] is False,
     "has no effect: the loss is that of the answer", "leave it out"),
    (("dpo",), "padding_free", lambda of: of["padding_free"],
     "has no effect: TRL has switched it off", "leave it out"),
    (EVERY, "dataloader_persistent_workers",
     lambda of: of["dataloader_persistent_workers"] and not of["dataloader_num_workers"],
     "there are no workers to keep", "set dataloader_num_workers beside it, or leave it out"),
    (EVERY, "fsdp", lambda of: of["fsdp"] and of.processes == 1, "shards over processes, and this is one",
     "leave it out, and launch with --accelerate fsdp2"),
    *((EVERY, f"model.{key}", lambda of, key=key: of[f"model.{key}"] and not of["model.use_peft"],
       "a quantised model can be trained only through an adapter", "set use_peft: true beside it")
      for key in ("load_in_4bit", "load_in_8bit")),
    (EVERY[:4], "fp16", lambda of: of["fp16"] and (of["model.load_in_4bit"] or of["model.load_in_8bit"]),
     "TRL trains the adapter of a quantised base in bfloat16, and the loss scaler takes none", "set bf16: true"),
    (EVERY[:4], "fp16", lambda of: of["fp16"] and of["model.dtype"] == "float16" and not of["model.use_peft"],
     "the loss scaler takes no weights in float16", "set model.dtype: float32"),
    (EVERY, "model.load_in_8bit", lambda of: of["model.load_in_8bit"] and of["model.load_in_4bit"],
     "cannot stand beside load_in_4bit", "choose one of the two"),
    (("reward", *POLICY_TRAINERS), "model.lora_dropout",
     lambda of: (of.trainer == "ppo" or of["disable_dropout"]) and of["model.use_peft"] and of["model.lora_dropout"],
     "{of.trainer} turns every dropout off, LoRA's too",
     "set lora_dropout: 0.0, or, where the trainer has the option, disable_dropout: false"),
    (("sft", "reward", "dpo"), "max_length",
     lambda of: of["max_length"] is not None and of["max_length"] < of["data.max_length"] <= of.positions,
     "{of[max_length]} is below data.max_length {of[data.max_length]}: rows would be cut or dropped without a word",
     "set it to {of[data.max_length]}"),
    (POLICY_TRAINERS, "save_strategy", lambda of: of["evaluation.checkpoints"] and of["save_strategy"] == "no",
     "keeps no checkpoint, and evaluation.checkpoints asks for some",
     "set save_strategy: steps with a save_steps, or evaluation.checkpoints: 0"),
    (POLICY_TRAINERS, "save_total_limit",
     lambda of: 0 < (of["save_total_limit"] or 0) <= of["evaluation.checkpoints"] and of["save_strategy"] != "no",
     "keeps {of[save_total_limit]} checkpoints with the last one, and evaluation.checkpoints asks for more",
     "set it above {of[evaluation.checkpoints]}, or leave it out"),
    (EVERY, "data.max_length", lambda of: of.room < 0,
     "{of[data.max_length]} tokens are more than the {of.positions} positions of the model",
     "set it to {of.positions} or less"),
    *((trainers, key, lambda of, key=key: 0 <= of.room < (of[key] or 0),
       f"{{of[{key}]}} tokens after a prompt of up to {{of[data.max_length]}} (data.max_length) are more than the "
       "{of.positions} positions of the model", "set it to {of.room} or less, or lower data.max_length")
      for trainers, key in ((("grpo",), "max_completion_length"), (("ppo",), "response_length"),
                            (POLICY_TRAINERS, "evaluation.max_new_tokens"))),
    (POLICY_TRAINERS, "evaluation.backend", lambda of: of["evaluation.backend"] == "vllm" and not of.is_plain_lora,
     "vLLM answers with LoRA adapters on one base in full precision, and the stage {of.name} trains none",
     "set evaluation.backend: transformers"),
    # What the rehearsal of the trainers does not come to.
    *((trainers, key, lambda of, key=key, module=module: of[key] not in (None, False, "transformers")
       and find_spec(module) is None, f"needs the package {module}, which is not installed", f"pip install {brings}")
      for trainers, key, module, brings in (
          (("grpo",), "use_vllm", "vllm", '"rlhf-trl[vllm]"'),
          (EVERY, "evaluation.backend", "vllm", '"rlhf-trl[vllm]"'),
          (EVERY, "use_liger_kernel", "liger_kernel", '"rlhf-trl[liger]"'),
          (EVERY[:4], "model_init_kwargs", "kernels", "kernels"))),
)  # fmt: skip
