"""The five trainers: for each its library class, its config class and one row of its dataset.

Works on rows of the views that `prepare` wrote; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models.base import encode
from rlhf_trl.train.callbacks import AtomicCheckpoints


class SFTTrainer(AtomicCheckpoints, trl.SFTTrainer):
    pass


class RewardTrainer(AtomicCheckpoints, trl.RewardTrainer):
    pass


class DPOTrainer(AtomicCheckpoints, trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Take the tokens as they are; unlike the other trainers, DPOTrainer has no test for that."""
        return dataset


class GRPOTrainer(AtomicCheckpoints, trl.GRPOTrainer):
    pass


# --- dataset views
# -----------------------------------------------------------------------------------------------------


def sft_view(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen answer; the loss covers its tokens alone."""
    prompt, answer = encode(tokenizer, row["prompt"], row["chosen"])
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def reward_view(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{side}_ids": list(chain(*encode(tokenizer, row["prompt"], row[side]))) for side in ("chosen", "rejected")
    }


def dpo_view(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, chosen = encode(tokenizer, row["prompt"], row["chosen"])
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": encode(tokenizer, row["prompt"], row["rejected"])[1],
    }


def grpo_view(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"]}


def ppo_view(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_ids": encode(tokenizer, row["prompt"])[0]}


class Kind(NamedTuple):
    """What a trainer is built of."""

    trainer: Any
    config: Any
    task_type: str
    """LoRA task type."""
    view: Callable[[Any, Any], dict[str, Any]]
    """One row of its dataset, of a tokenizer and a row of `data/`."""


KINDS = {
    "sft": Kind(SFTTrainer, trl.SFTConfig, "CAUSAL_LM", sft_view),
    "reward": Kind(RewardTrainer, trl.RewardConfig, "SEQ_CLS", reward_view),
    "dpo": Kind(DPOTrainer, trl.DPOConfig, "CAUSAL_LM", dpo_view),
    "grpo": Kind(GRPOTrainer, trl.GRPOConfig, "CAUSAL_LM", grpo_view),
}


def kind_of(word: str) -> Kind:
    """Return what the trainer of that word in a recipe is built of; PPO, which not every TRL has, is imported here."""
    if word == "ppo":
        from rlhf_trl.train.ppo.config import PPOConfig
        from rlhf_trl.train.ppo.trainer import PPOTrainer

        return Kind(PPOTrainer, PPOConfig, "CAUSAL_LM", ppo_view)
    return KINDS[word]
