"""The models that PPO trains with: four roles on one frozen base.

The policy and the value model are LoRA adapters on one base; the reference is that base with its adapters off; the
reward model is a third adapter where it was trained on the same base, else a model of its own. TRL's loop needs logits
of the policy, and a backbone and a `score` of the value and the reward model.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import ModelConfig, get_peft_config

from rlhf_trl.models.base import RewardHead, load_adapter, load_causal
from rlhf_trl.models.rewards import RewardModel, SharedClassifier, score_completions
from rlhf_trl.models.tokenizer import Messages, encode_all
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_jsonl, write_json
from rlhf_trl.run.layout import RunDir

# Names of the adapters on the base. PEFT saves the one called `default` at the top of a folder.
POLICY, VALUE, REWARD = "default", "value", "reward"
TRAINED = (POLICY, VALUE)
# Pairs whose answers are scored for the mean and standard deviation of a reward model.
SCALE_PAIRS = 256
# The messages of each prompt by its token ids.
Prompts = Mapping[tuple[int, ...], Messages]


class AnswerLogits:
    """Logits of the answers alone; the loop slices them by positions of the whole sequence."""

    def __init__(self, kept: Tensor, skipped: int):
        self.kept, self._skipped = kept, skipped

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        rows, positions = index
        return self.kept[rows, positions.start - self._skipped : positions.stop]


class SharedPolicy(PeftModelForCausalLM):
    """A language model whose LoRA adapters are the roles of PPO.

    One adapter is on at a time; the trained ones stay trainable, which PEFT's own `disable_adapter` would end.
    """

    active_adapter: str
    context_length = 0  # of the prompts of the current rollout, padding included

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """Switch an adapter on; it stays on until another one is used."""
        if self.active_adapter != name:
            # `set_adapter` also sets `requires_grad` of every parameter: 28 ms, twice a micro-batch.
            for module in self.modules():
                if isinstance(module, BaseTunerLayer):
                    module._active_adapter = [name]
            self.active_adapter = self.base_model.active_adapter = name
        yield self

    def keep_trainable(self) -> None:
        self.set_requires_grad([name for name in TRAINED if name in self.peft_config])

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Switch every adapter off."""
        with self.use(POLICY), self.disable_adapter():  # which leaves the active one trainable
            yield
        self.keep_trainable()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.context_length = kwargs["input_ids"].shape[1]
        with self.use(POLICY):
            return super().generate(*args, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Compute the logits of the answers alone, in float32: (B, T) each -> `AnswerLogits`."""
        skipped = self.context_length - 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with self.use(POLICY):
            output = self.get_base_model()(**inputs, logits_to_keep=input_ids.shape[1] - skipped, use_cache=False)
        return CausalLMOutput(logits=AnswerLogits(output.logits.float(), skipped))

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Recompute each layer under the adapter that was on in its forward pass."""

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self.use(self.active_adapter)

        self.get_base_model().gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the policy alone."""
        super().save_pretrained(save_directory, selected_adapters=[POLICY], **kwargs)


class ValueModel(nn.Module):
    """The value adapter and its head: tokens (B, T) -> a value at each position (B, T, 1)."""

    base_model_prefix = "backbone"

    def __init__(self, policy: SharedPolicy):
        super().__init__()
        self._policy = [policy]  # in a list, which hides it from `parameters`: none is counted twice
        self.score = RewardHead(policy.config.get_text_config().hidden_size, 1, bias=True)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.score.to(policy.device)

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> BaseModelOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with self._policy[0].use(VALUE) as policy:
            hidden = policy.get_base_model().base_model(**inputs, use_cache=False)[0]
        return BaseModelOutput(hidden_states=(hidden,))


class TextReward(nn.Module):
    """A reward model as the loop sees one, which reads the answers as text.

    The score is the one of GRPO and of the evaluation, less `mean` and divided by `std`; it stands at every position,
    of which the loop takes the answer's last.
    """

    base_model_prefix = "backbone"

    def __init__(
        self, reward: RewardModel, policy: SharedPolicy, tokenizer: Any, prompts: Prompts, mean: float, std: float
    ):
        super().__init__()
        self._reward, self._policy, self._tokenizer, self._prompts = reward, [policy], tokenizer, prompts
        self._mean, self._std = mean, std
        self.score = nn.Identity()
        self.raw: list[float] = []  # scores since the last log, as the reward model gives them

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
        start = self._policy[0].context_length
        prompts, answers = [], []
        for ids, mask in zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True):
            prompts.append(self._prompts[tuple(token for token, kept in zip(ids[:start], mask, strict=False) if kept)])
            end = start + mask[start:].index(False) if False in mask[start:] else len(ids)
            answers.append(ids[start:end])
        with torch.autocast(input_ids.device.type, enabled=False):  # in the reward model's own precision
            scores = score_completions(self._reward, self._tokenizer, prompts, answers)
        self.raw += scores.tolist()
        scores = ((scores - self._mean) / self._std).to(input_ids.device)
        return BaseModelOutput(hidden_states=(scores[:, None, None].expand(-1, input_ids.shape[1], 1),))


def build_ppo_models(
    path: str, block: ModelConfig, tokenizer: Any, config: Any, reward: RewardModel | Path, run: RunDir, stage: str
) -> dict[str, Any]:
    """Build the policy, value and reward models of a PPO stage, on the base in the folder `path`.

    `reward` is a reward model, or the folder of one that is an adapter on the same base. UserError where parameters
    are sharded, or the value model is to start from a reward model on another base.
    """
    if is_deepspeed_zero3_enabled() or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        problem = "PPO cannot generate from parameters that are sharded (FSDP, ZeRO-3)"
        raise UserError("--accelerate", problem, "use ddp or zero2")
    base = load_causal(path, block, tokenizer)
    lora: Any = get_peft_config(block)
    policy = SharedPolicy(base, lora, adapter_name=POLICY)
    value_head = None
    if config.value_init == "reward":
        if isinstance(reward, RewardModel):
            remedy = f"leave it out, or give the reward stage the init and the model of {stage}"
            raise UserError(f"stages.{stage}.args.value_init", "the reward model lies on another base", remedy)
        value_head = load_adapter(policy, VALUE, reward, widen=True)
    else:
        config_of_value = copy.deepcopy(lora)  # without the output head, which the value model does not pass through
        config_of_value.modules_to_save = None
        if lora.target_modules != "all-linear":
            head = base.get_output_embeddings()
            config_of_value.exclude_modules = [name for name, module in base.named_modules() if module is head]
        policy.add_adapter(VALUE, config_of_value)
    if isinstance(reward, Path):
        reward_head: Any = load_adapter(policy, REWARD, reward, widen=True)
        reward = RewardModel(SharedClassifier(policy.use, REWARD, reward_head), tokenizer)
    policy.keep_trainable()
    policy.to(PartialState().device)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    value = ValueModel(policy)
    mean, std = _measure_scale(reward, run, stage) if config.normalize_rewards else (0.0, 1.0)
    if value_head is not None:
        with torch.no_grad():  # so that the value at an answer's end is its reward
            value.score.weight.copy_(value_head / std)
            value.score.bias.fill_(-mean / std)
    rows = [*read_jsonl(run.prompts("train")), *read_jsonl(run.prompts("test"))]
    encoded = encode_all(tokenizer, [row["prompt"] for row in rows])
    prompts = {tuple(ids): row["prompt"] for (ids,), row in zip(encoded, rows, strict=True)}
    text_reward = TextReward(reward, policy, tokenizer, prompts, mean, std)
    return {"model": policy, "ref_model": None, "value_model": value, "reward_model": text_reward}


def _measure_scale(reward: RewardModel, run: RunDir, stage: str) -> tuple[float, float]:
    """Measure and store the mean and standard deviation of a reward model's scores on answers of held-out pairs."""
    pairs = read_jsonl(run.pairs("test"))[:SCALE_PAIRS]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    answers = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    scores = reward.score(prompts, answers, [True] * len(answers))
    mean, std = scores.mean().item(), scores.std().item()
    if not std > 0:
        place = f"stages.{stage}.args.normalize_rewards"
        raise UserError(place, "the reward model gives every answer one score", "train it again")
    if PartialState().is_main_process:
        write_json(run.reward_scale(stage), {"mean": mean, "std": std, "answers": len(answers)})
    return mean, std
