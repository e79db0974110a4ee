"""The five trainers: the library class, config class and dataset of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models.tokenizer import encode_all
from rlhf_trl.train.callbacks import AtomicCheckpoints


class GroupsByLength:
    """Mixin for a `transformers.Trainer`: `train_sampling_strategy` finds the column `length` of the views.

    The library asks the dataset for it after it has removed the columns that the model does not take.
    """

    def _get_train_sampler(self: Any, train_dataset: Dataset | None = None) -> Any:
        return super()._get_train_sampler(self.train_dataset)  # type: ignore[misc]

    def _get_eval_sampler(self: Any, eval_dataset: Dataset) -> Any:
        return super()._get_eval_sampler(self.eval_dataset)  # type: ignore[misc]


class DPOTrainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Take the tokens as they are; unlike the other trainers, DPOTrainer has no test for that."""
        return dataset


CLASSES = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (DPOTrainer, trl.DPOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


def classes_of(trainer: str) -> tuple[Any, Any]:
    """The trainer class, with atomic checkpoints, and the config class of a recipe's word.

    PPO, which not every TRL has, is imported only here.
    """
    if trainer == "ppo":
        from rlhf_trl.train.ppo.config import PPOConfig
        from rlhf_trl.train.ppo.trainer import PPOTrainer

        return PPOTrainer, PPOConfig
    library, config = CLASSES[trainer]
    mixins = (AtomicCheckpoints,) if trainer == "grpo" else (AtomicCheckpoints, GroupsByLength)
    return type(library.__name__, (*mixins, library), {}), config


def load_view(path: Path, trainer: str, tokenizer: PreTrainedTokenizerBase, half: str | None = None) -> Dataset:
    """Load a view of `data/`, or one half of it, as the dataset of a trainer."""
    with PartialState().main_process_first():
        rows = Dataset.from_json(str(path))
        if half:
            rows = rows.filter(lambda row: row["half"] == half, desc=f"The {half} half of {path.name}")
        return rows.map(lambda batch: to_examples(trainer, tokenizer, batch), batched=True,
                        remove_columns=rows.column_names, desc=f"Encoding {path.name}")  # fmt: skip


def to_examples(trainer: str, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Turn columns of `data/` into those of a trainer's dataset: token ids, apart from the prompts of GRPO."""
    if trainer == "grpo":
        return {"prompt": rows["prompt"]}
    sides = {"ppo": (), "sft": ("chosen",)}.get(trainer, ("chosen", "rejected"))
    encoded = encode_all(tokenizer, rows["prompt"], *(rows[side] for side in sides))
    examples = [_to_example(trainer, *ids) for ids in encoded]
    return {column: [example[column] for example in examples] for column in examples[0]}


def _to_example(trainer: str, prompt: list[int], *answers: list[int]) -> dict[str, Any]:
    if trainer == "ppo":
        return {"input_ids": prompt}
    length = len(prompt) + max(map(len, answers))
    if trainer == "sft":  # the loss covers the tokens of the answer alone
        return {"input_ids": prompt + answers[0], "labels": [-100] * len(prompt) + answers[0], "length": length}
    chosen, rejected = answers
    if trainer == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "length": length}
