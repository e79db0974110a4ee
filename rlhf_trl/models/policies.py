"""The policies of a run on one base in memory, as adapters that are switched on and off.

The reference is the base with every adapter off. Reward adapters that were trained on the same base lie on it, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.models.base import load_causal, start_path
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.safetensors import check_weights

# What decides which weights a `model` block loads; the rest of it describes the adapter.
BASE_KEYS = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code",
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
)  # fmt: skip


def base_block(recipe: Recipe, stage: str, evaluation: bool = True) -> dict[str, Any]:
    """The keys of a stage's `model` block that its base is loaded with; in evaluation's precision, or its own."""
    block = {key: value for key, value in recipe.model_block(stage).items() if key in BASE_KEYS}
    return block | ({"dtype": recipe.evaluation.dtype} if evaluation and recipe.evaluation.dtype else {})


def shares_base(recipe: Recipe, first: str, stage: str, evaluation: bool = True) -> bool:
    """Whether `stage` is an adapter on the base that `first` is loaded on; `evaluation` as of `base_block`."""
    same = recipe.stages[first].init == recipe.stages[stage].init
    same &= base_block(recipe, first, evaluation) == base_block(recipe, stage, evaluation)
    return same and bool(recipe.model_block(stage).get("use_peft"))


def adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a saved adapter without its head, for use on a language model."""
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type = config.modules_to_save = None
    config.inference_mode = True
    return config


def load_adapter(model: PeftModel, name: str, folder: Path, widen: bool = False) -> Tensor | None:
    """Load a saved adapter onto a base, under a name that may be there already; `widen` keeps it in float32.

    Returns the weight of its reward head, (1, H), if it has one; the head itself stays with the caller.

    Raises:
        UserError: the adapter holds tensors that are not finite, or that the base has no place for.
    """
    check_weights(folder)
    if name not in model.peft_config:
        model.add_adapter(name, adapter_config(folder), autocast_adapter_dtype=widen)
    weights = load_file(folder / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight", None)
    left = set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys
    if left:
        raise UserError(str(folder), f"the adapter does not fit its base: {left[0]}", "train the stage again")
    return head


class Policies:
    """One base, the adapters that lie on it, and, one at a time, the policies that were fine-tuned whole."""

    def __init__(self, recipe: Recipe, run: RunDir, tokenizer: PreTrainedTokenizerBase):
        self.recipe, self.run, self.tokenizer = recipe, run, tokenizer
        first = recipe.policies[0]
        self.block = base_block(recipe, first)
        self.model: Any = self._load(start_path(recipe, run, first))

    def _load(self, path: str) -> Any:
        return load_causal(path, ModelConfig(**self.block), self.tokenizer).to(PartialState().device).eval()

    def can_hold(self, stage: str) -> bool:
        """Whether a stage is an adapter on this very base."""
        return shares_base(self.recipe, self.recipe.policies[0], stage)

    def add(self, name: str, folder: Path) -> Tensor | None:
        """Load an adapter onto the base: as `load_adapter`."""
        if not isinstance(self.model, PeftModel):
            config = adapter_config(folder)
            self.model = get_peft_model(self.model, config, adapter_name=name, autocast_adapter_dtype=False)
        head = load_adapter(self.model, name, folder)
        self.model.to(PartialState().device).eval()
        return head

    @contextlib.contextmanager
    def use(self, name: str, checkpoint: Path | None = None) -> Iterator[Any]:
        """Yield the model of a policy, of one of its checkpoints, or of the `reference`."""
        adapted = isinstance(self.model, PeftModel)
        if name == REFERENCE:
            with self.model.disable_adapter() if adapted else contextlib.nullcontext():
                yield self.model
            return
        if name in self.recipe.stages and not self.recipe.model_block(name).get("use_peft"):
            yield self._load(str(checkpoint or self.run.model(name)))
            return
        key = name if checkpoint is None else f"{name}-{checkpoint.name}"
        if not adapted or key not in self.model.peft_config:
            self.add(key, checkpoint or self.run.adapter(name))
        self.model.set_adapter(key)
        yield self.model
