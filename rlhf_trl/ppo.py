"""PPO: the trainer of TRL 1.12, repaired through its own seams.

TRL removed PPOTrainer in 1.13 (huggingface/trl#7020), so everything that is specific to it stands here, and nothing
of its loop is copied. What is repaired, and how:

- `num_mini_batches` and `max_grad_norm` had no effect: the accelerator's accumulation steps are set after
construction, and
  a hook of the optimizer clips (and stops a run whose gradient is not finite).
- `bf16` reached neither the rollout nor the reference: the whole of `train` runs under autocast.
- `gradient_checkpointing` was never turned on.
- the logged averages were too small by that factor: they are scaled back.
- an entropy bonus, `entropy_coef`, is subtracted from the loss as it enters `backward`.
- with several processes the policy was looked for on the distributed wrapper: it is put there.
- fewer prompts than a batch made the loop spin for ever: they are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config
from trl.experimental import ppo as trl_ppo

from rlhf_trl.callbacks import AtomicCheckpoints, diverged
from rlhf_trl.models import load_causal, load_classifier
from rlhf_trl.recipe import UserError
from rlhf_trl.rewards import RewardModel

# Logged means of a table with one place for each (epoch, mini-batch, accumulation step of the whole batch).
AVERAGED = {
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg"),
    *("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
}


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    """TRL's PPOConfig and the options that it lacks."""

    entropy_coef: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient c of the entropy bonus: c times the mean entropy of the answer tokens is added to "
            "the objective."
        },
    )


def build_ppo_models(
    path: str,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardModel,
    config: PPOConfig,
    prompts: int,
) -> dict[str, Any]:
    """Build the policy, value and reward models of a PPO stage.

    The value model is a LoRA classifier on the same base. The reference is the policy with its adapter off.

    Raises:
        UserError: there are fewer prompts than one batch, or the reward model reads other tokens than the policy
        writes.
    """
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    per_process = prompts // PartialState().num_processes
    if per_process < batch:
        raise UserError("data", f"{per_process} training prompts per process are fewer than one PPO batch of {batch}",
                        "lower the batch size or gradient_accumulation_steps, or use more data")  # fmt: skip
    if (
        reward.tokenizer.get_vocab() != tokenizer.get_vocab()
        or reward.tokenizer.chat_template != tokenizer.chat_template
    ):
        raise UserError("stages", "PPO scores the policy's own tokens, and its reward model has another tokenizer",
                        "train the reward model on the policy's base, or use grpo, which scores text")  # fmt: skip
    policy: Any = load_causal(path, model_config, tokenizer)
    value: Any = load_classifier(path, model_config, tokenizer)
    if model_config.use_peft:
        policy = get_peft_model(policy, get_peft_config(model_config))
        value_config = get_peft_config(model_config)
        value_config.task_type = "SEQ_CLS"
        value = get_peft_model(value, value_config)
    if config.gradient_checkpointing:
        for model in (policy, value):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    model = reward.model.merge_and_unload() if isinstance(reward.model, PeftModel) else reward.model
    return {"model": policy, "ref_model": None, "reward_model": model, "value_model": value}


class PPOTrainer(AtomicCheckpoints, trl_ppo.PPOTrainer):
    """TRL's PPOTrainer, repaired; takes the models of `build_ppo_models` and a dataset of `input_ids`."""

    # Attributes of transformers 5 that PPOTrainer, which does not call its parent's constructor, never sets.
    is_distributed_loading_by_transformers = False

    def __init__(self, args: PPOConfig, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        if processing_class.pad_token_id == processing_class.eos_token_id or processing_class.padding_side != "left":
            raise ValueError("PPO needs a padding token that differs from the end token, and padding on the left")
        # PPOTrainer builds an Accelerator of its own, which reads the precision from here alone.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
        super().__init__(args=args, processing_class=processing_class, **kwargs)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise UserError("--accelerate", "PPO cannot generate from parameters that are sharded (FSDP, ZeRO-3)",
                            "use ddp or zero2")  # fmt: skip
        steps = args.gradient_accumulation_steps // args.num_mini_batches
        self.accelerator.gradient_accumulation_steps = steps
        # Accelerate ends an accumulation with each pass through the data, which would cut the mini-batches of its
        # last batch.
        self.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        self._grad_norms: list[float] = []
        self._entropies: list[float] = []
        self._tokens = 0
        self.optimizer.optimizer.register_step_pre_hook(self._clip)
        inner = self.accelerator.unwrap_model(self.model)
        if inner is not self.model:
            # The loop and the saving reach for these on the distributed wrapper; they must not be registered twice.
            for name, item in (("policy", inner.policy), ("value_model", inner.value_model), ("config", inner.config)):
                object.__setattr__(self.model, name, item)
        policy = inner.policy
        self._generate = policy.generate
        policy.generate = self._generate_and_measure
        self._context_length = 0
        self._output: Any = None
        self.model.register_forward_hook(self._keep_output, with_kwargs=True)
        self._backward = self.accelerator.backward
        self.accelerator.backward = self._backward_with_entropy

    def train(self) -> None:
        """Run the library's loop, all of it in the configured precision."""
        device = self.accelerator.device.type
        # Without the cache: it would keep the rounded weights of before the first update.
        with torch.autocast(device, torch.bfloat16, enabled=bool(self.args.bf16), cache_enabled=False):
            super().train()

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add what the loop does not measure: gradient norm (before clipping), entropy on answer tokens, and tokens.

        The loop averages its statistics over `num_mini_batches` times as many places as it fills.
        """
        for key in AVERAGED & logs.keys():
            logs[key] *= self.args.num_mini_batches
        if self._grad_norms:
            logs["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
            logs["entropy"] = sum(self._entropies) / len(self._entropies)
            self._grad_norms.clear()
            self._entropies.clear()
        logs["num_tokens"] = self._tokens
        super().log(logs, *args, **kwargs)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        limit = self.args.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(params, limit)
        if not norm.isfinite():
            raise diverged(self.state.global_step, "the gradient", self.args.output_dir)
        self._grad_norms.append(norm.item())

    def _generate_and_measure(self, *args: Any, **kwargs: Any) -> Any:
        self._context_length = kwargs["input_ids"].shape[1]
        output = self._generate(*args, **kwargs)
        self._tokens += (
            int((output.sequences != self.processing_class.pad_token_id).sum()) * self.accelerator.num_processes
        )
        return output

    def _keep_output(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._output = (output[0].logits, kwargs["attention_mask"]) if torch.is_grad_enabled() else None

    def _backward_with_entropy(self, loss: Tensor, **kwargs: Any) -> None:
        logits, attention_mask = self._output
        self._output = None
        # The loop has divided these logits by the temperature in place; the last position predicts nothing.
        answer = logits[:, self._context_length - 1 : -1]
        mask = attention_mask[:, self._context_length :].to(answer.dtype)
        with torch.set_grad_enabled(self.args.entropy_coef != 0):
            log_p = answer.float().log_softmax(-1)
            entropy = (-(log_p.exp() * log_p).sum(-1) * mask).sum() / mask.sum()
        self._entropies.append(entropy.item())
        self._backward(loss - self.args.entropy_coef * entropy, **kwargs)
