"""The five trainers: the library class, config class and dataset of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models.base import encode
from rlhf_trl.train.callbacks import AtomicCheckpoints


class GroupsByLength:
    """Mixin for a `transformers.Trainer`: `train_sampling_strategy` finds the column `length` of the views.

    The library asks the dataset for it after it has removed the columns that the model does not take.
    """

    def _get_train_sampler(self: Any, train_dataset: Dataset | None = None) -> Any:
        return super()._get_train_sampler(self.train_dataset)  # type: ignore[misc]


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
        columns = rows.column_names
        return rows.map(lambda row: to_example(trainer, tokenizer, row), remove_columns=columns,
                        desc=f"Encoding {path.name}")  # fmt: skip


def to_example(trainer: str, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a row of `data/` into one of a trainer's dataset: token ids, apart from the prompts of GRPO."""
    if trainer == "grpo":
        return {"prompt": row["prompt"]}
    if trainer == "ppo":
        return {"input_ids": encode(tokenizer, row["prompt"])[0]}
    prompt, chosen = encode(tokenizer, row["prompt"], row["chosen"])
    if trainer == "sft":  # the loss covers the tokens of the answer alone
        ids = prompt + chosen
        return {"input_ids": ids, "labels": [-100] * len(prompt) + chosen, "length": len(ids)}
    rejected = encode(tokenizer, row["prompt"], row["rejected"])[1]
    length = len(prompt) + max(len(chosen), len(rejected))
    if trainer == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "length": length}
