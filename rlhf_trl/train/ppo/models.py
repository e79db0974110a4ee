"""The models that PPO trains with: four roles on one frozen base.

The policy and the value model are LoRA adapters on one base; the reference is that base with its adapters off; the
reward model is a third adapter where it was trained on the same base, and a model of its own where it was not. TRL's
loop asks its models for little: the policy generates and gives logits, the value and the reward model have a backbone
that gives hidden states and a `score` that reads them. What stands here gives it that.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import ModelConfig, get_peft_config

from rlhf_trl.models.base import Messages, RewardHead, load_causal, start_path
from rlhf_trl.models.policies import load_adapter, shares_base
from rlhf_trl.models.rewards import RewardModel, SharedClassifier, load_reward_model, score_completions
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_jsonl, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.ppo.memory import Batch, Estimate, Shape, estimate_ppo

logger = logging.getLogger(__name__)

# Names of the adapters on the base. PEFT saves the one called `default` at the top of a folder.
POLICY, VALUE, REWARD = "default", "value", "reward"
TRAINED = (POLICY, VALUE)
# Pairs whose answers are scored for the mean and spread of a reward model.
SCALE_PAIRS = 256


class AnswerLogits:
    """Logits of an answer's positions, which the loop slices as if they were those of the prompt, too."""

    def __init__(self, kept: Tensor, skipped: int):
        self.kept, self._skipped = kept, skipped

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        rows, positions = index
        return self.kept[rows, positions.start - self._skipped : positions.stop]


class SharedPolicy(PeftModelForCausalLM):
    """A language model whose LoRA adapters are the roles of PPO.

    Only one adapter is switched on at a time, and the trained ones stay trainable meanwhile, which PEFT's own
    `set_adapter` and `disable_adapter` would end.
    """

    context_length = 0
    """Length of the prompts of the current rollout, padding included."""

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """Switch an adapter on; it stays on until another one is used."""
        if self.active_adapter != name:
            self.set_adapter(name, inference_mode=name not in TRAINED)
            self.keep_trainable()
        yield self

    def keep_trainable(self) -> None:
        self.set_requires_grad([name for name in TRAINED if name in self.peft_config])

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Switch every adapter off."""
        with self.disable_adapter():
            yield
        self.keep_trainable()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.context_length = kwargs["input_ids"].shape[1]
        with self.use(POLICY):
            return super().generate(*args, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Compute the logits of the answers: (B, T) each -> `AnswerLogits` in float32.

        Those of the prompts, which the loop would drop, are never made.
        """
        skipped = self.context_length - 1
        with self.use(POLICY):
            logits = self.get_base_model()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=input_ids.shape[1] - skipped,
                use_cache=False,
            ).logits
        return CausalLMOutput(logits=AnswerLogits(logits.float(), skipped))

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Recompute each layer under the adapter of its forward pass, whichever is on by then."""
        kwargs = {"use_reentrant": False, "context_fn": self._recompute_contexts}
        self.get_base_model().gradient_checkpointing_enable(kwargs)

    def _recompute_contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), self.use(self.active_adapter)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the policy alone."""
        super().save_pretrained(save_directory, selected_adapters=[POLICY], **kwargs)


class _Backbone(nn.Module):
    """The transformer of a `SharedPolicy` under another adapter; holds no weights, so that none is counted twice."""

    def __init__(self, policy: SharedPolicy, adapter: str):
        super().__init__()
        self._policy = [policy]  # in a list, which hides it from `modules` and `parameters`
        self._adapter = adapter

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> BaseModelOutput:
        with self._policy[0].use(self._adapter) as policy:
            hidden = policy.get_base_model().base_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )[0]
        return BaseModelOutput(hidden_states=(hidden,))


class ValueModel(nn.Module):
    """The value adapter and its head: tokens (B, T) -> a value at each position (B, T, 1)."""

    base_model_prefix = "backbone"

    def __init__(self, policy: SharedPolicy):
        super().__init__()
        self.backbone = _Backbone(policy, VALUE)
        self.score = RewardHead(policy.config.get_text_config().hidden_size, 1, bias=True)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.score.to(policy.device)


class Scale(NamedTuple):
    """Mean and standard deviation of a reward model's scores."""

    mean: float = 0.0
    std: float = 1.0


class TextReward(nn.Module):
    """A reward model as the loop sees one, which reads the answers as text.

    The score is the one of GRPO and of the evaluation, whatever base and tokenizer the reward model has; it stands at
    every position, of which the loop takes the answer's last.

    Args:
        prompts: the messages of each prompt by its token ids.
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        reward: RewardModel,
        policy: SharedPolicy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[tuple[int, ...], Messages],
        scale: Scale,
    ):
        super().__init__()
        self._reward, self._policy, self._tokenizer, self._prompts = reward, [policy], tokenizer, prompts
        self.scale = scale
        self.score = nn.Identity()
        self.raw: list[float] = []
        """Scores since the last log, as the reward model gives them."""

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
        scores = ((scores - self.scale.mean) / self.scale.std).to(input_ids.device)
        return BaseModelOutput(hidden_states=(scores[:, None, None].expand(-1, input_ids.shape[1], 1),))


def build_ppo_models(
    recipe: Recipe, run: RunDir, stage: str, config: Any, tokenizer: PreTrainedTokenizerBase, view: Callable[..., Any]
) -> dict[str, Any]:
    """Build the policy, value and reward models of a PPO stage.

    Args:
        config: the stage's `PPOConfig`.
        view: one row of the stage's dataset, as the trainer sees it.

    Raises:
        UserError: the parameters are sharded, or the value model is to start from a reward model on another base.
    """
    if is_deepspeed_zero3_enabled() or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError("--accelerate", "PPO cannot generate from parameters that are sharded (FSDP, ZeRO-3)",
                        "use ddp or zero2")  # fmt: skip
    model_config = ModelConfig(**recipe.model_block(stage), lora_task_type="CAUSAL_LM")
    base = load_causal(start_path(recipe, run, stage), model_config, tokenizer)
    lora = get_peft_config(model_config)
    policy = SharedPolicy(base, lora, adapter_name=POLICY)
    name = str(recipe.stages[stage].reward)
    shares = shares_base(recipe, run, stage, name, evaluation=False)
    value_head = None
    if config.value_init == "reward":
        if not shares:
            raise UserError(f"stages.{stage}.args.value_init", f"the reward model {name} lies on another base",
                            f"leave it out, or give {name} the init and the model of {stage}")  # fmt: skip
        value_head = load_adapter(policy, VALUE, run.adapter(name), widen=True)
    else:
        policy.add_adapter(VALUE, _value_config(lora, base))
    if shares:
        head = load_adapter(policy, REWARD, run.adapter(name), widen=True)
        assert head is not None
        reward = RewardModel(SharedClassifier(policy, REWARD, head), tokenizer)
    else:
        reward = load_reward_model(recipe, run, name)
    policy.keep_trainable()
    policy.to(PartialState().device)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    value = ValueModel(policy)
    scale = _measure_scale(reward, run, stage) if config.normalize_rewards else Scale()
    if value_head is not None:
        with torch.no_grad():  # so that the value at an answer's end is its reward
            value.score.weight.copy_(value_head / scale.std)
            value.score.bias.fill_(-scale.mean / scale.std)
    rows = [*read_jsonl(run.prompts("train")), *read_jsonl(run.prompts("test"))]
    prompts = {tuple(view(tokenizer, row)["input_ids"]): row["prompt"] for row in rows}
    if PartialState().is_main_process:
        logger.info("memory of a process: %s", _estimate(policy, config, max(map(len, prompts))))
    return {
        "model": policy,
        "ref_model": None,
        "value_model": value,
        "reward_model": TextReward(reward, policy, tokenizer, prompts, scale),
    }


def _estimate(policy: SharedPolicy, config: Any, longest: int) -> Estimate:
    text = policy.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rollout = min(
        config.local_rollout_forward_batch_size,
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
    )
    params = list(policy.parameters())
    return estimate_ppo(
        Shape(text.num_hidden_layers, text.hidden_size, text.vocab_size, heads * head),
        Batch(rollout, config.per_device_train_batch_size, longest, config.response_length),
        weights=sum(param.numel() * param.element_size() for param in params),
        trained=sum(param.numel() for param in params if param.requires_grad),
        bytes_per_value=2 if config.bf16 else policy.dtype.itemsize,
        checkpointing=config.gradient_checkpointing,
    )


def _value_config(lora: Any, base: Any) -> Any:
    """The policy's LoRA without the output head, which the value model does not pass through."""
    config = copy.deepcopy(lora)
    config.modules_to_save = None
    if config.target_modules != "all-linear":
        head = base.get_output_embeddings()
        config.exclude_modules = [name for name, module in base.named_modules() if module is head]
    return config


def _measure_scale(reward: RewardModel, run: RunDir, stage: str) -> Scale:
    """Measure a reward model's scores on the answers of held-out pairs, and store their mean and spread."""
    pairs = read_jsonl(run.pairs("test"))[:SCALE_PAIRS]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    answers = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    scores = reward.score(prompts, answers, [True] * len(answers))
    scale = Scale(scores.mean().item(), scores.std().item())
    if not scale.std > 0:
        raise UserError(f"stages.{stage}.args.normalize_rewards", "the reward model gives every answer one score",
                        "train it again")  # fmt: skip
    if PartialState().is_main_process:
        write_json(run.reward_scale(stage), {**scale._asdict(), "answers": len(answers)})
    return scale
