"""PPO: the trainer of TRL 1.12, repaired through its own seams.

TRL removed PPOTrainer in 1.13 (huggingface/trl#7020), so everything that is specific to it stands in this room, and
nothing of its loop is copied. What is repaired, and how:

- three full models become adapters on one base: `ppo.models` gives the loop views of them.
- `num_mini_batches` and `max_grad_norm` had no effect: the accelerator's accumulation steps are set after
  construction, and a hook of the optimizer clips (and stops a run whose gradient is not finite).
- `bf16` reached neither the rollout nor the reference: the whole of `train` runs under autocast.
- `gradient_checkpointing` was never turned on.
- the logged averages were too small by `num_mini_batches`: they are scaled back.
- an entropy bonus, `entropy_coef`, is subtracted from the loss as it enters `backward`.
- `kl_coef` can follow a target, and the run stops at `max_kl`; the loop ignored every request to stop.
- nothing could be resumed: all that the loop goes on from is in its checkpoints, and read again as it begins.
- the logits of a whole rollout were held through the update: two functions of the loop's module, which has no seam
  there, are replaced while it runs.
- with several processes the policy was looked for on the distributed wrapper: it is put there.
- fewer prompts than a batch made the loop spin for ever: they are refused.
"""

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import reduce
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo import ppo_trainer as trl_loop
from trl.trainer.utils import selective_log_softmax

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.train.callbacks import AtomicCheckpoints, diverged
from rlhf_trl.train.ppo import loop
from rlhf_trl.train.ppo.config import PPOConfig
from rlhf_trl.train.ppo.models import POLICY, SharedPolicy

# Logged means of a table with one place for each (epoch, mini-batch, accumulation step of the whole batch).
AVERAGED = {
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg"),
    *("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
}
# What a checkpoint holds beside the library's files.
VALUE_FILE, MEASURED_FILE, STATE_FILE = "value.safetensors", "measured.safetensors", "ppo_state.json"


class PPOTrainer(AtomicCheckpoints, trl_ppo.PPOTrainer):
    """TRL's PPOTrainer, repaired; takes the models of `build_ppo_models` and a dataset of `input_ids`, which has to
    hold one batch (else UserError)."""

    # Attributes of transformers 5 that PPOTrainer, which does not call its parent's constructor, never sets.
    is_distributed_loading_by_transformers = False
    is_fsdp_xla_v1_enabled = False
    control: Any
    model: Any

    def __init__(self, args: PPOConfig, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        if processing_class.pad_token_id == processing_class.eos_token_id or processing_class.padding_side != "left":
            raise ValueError("PPO needs a padding token that differs from the end token, and padding on the left")
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        per_process = len(kwargs["train_dataset"]) // PartialState().num_processes
        if per_process < batch:
            problem = f"{per_process} training prompts per process are fewer than one PPO batch of {batch}"
            raise UserError("data", problem, "lower the batch size or gradient_accumulation_steps, or use more data")
        # PPOTrainer builds an Accelerator of its own, which reads these from here alone.
        os.environ |= {
            "ACCELERATE_MIXED_PRECISION": "bf16" if args.bf16 else "no",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(args.gradient_accumulation_steps),
            "ACCELERATE_GRADIENT_CLIPPING": str(args.max_grad_norm or 0.0),  # of DeepSpeed, which clips itself
        }
        with mock.patch.object(trl_loop, "prepare_deepspeed", lambda model, _: model):  # no weights to spread
            super().__init__(args=args, processing_class=processing_class, **kwargs)
        self.dataloader = loop.Batches(self._prepare_loader())
        # After the loader: under DeepSpeed, whatever is prepared sets them back.
        steps = args.gradient_accumulation_steps // args.num_mini_batches
        self.accelerator.gradient_accumulation_steps = steps
        # Accelerate ends an accumulation with each pass through the data, which would cut the mini-batches of its
        # last batch.
        self.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        self.stopped: str | None = None  # why the run ended before its last episode
        self._checkpoint: str | None = None
        # The trained weights before the last rollout, and before the one before it, each with its step.
        self._sampling: tuple[int, dict[str, Tensor]] = (-1, {})
        self._before = self._sampling
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._tokens = self._new_tokens = 0
        self._first_mini_batch = False
        inner = self.accelerator.unwrap_model(self.model)
        if inner is not self.model:
            # The loop and the saving reach for these on the distributed wrapper; they must not be registered twice.
            for name, item in (("policy", inner.policy), ("value_model", inner.value_model), ("config", inner.config)):
                object.__setattr__(self.model, name, item)
        self.shared: SharedPolicy = inner.policy
        self._value_head = inner.value_model
        self.add_callback(loop.BeginLoop(self))
        if not self.is_deepspeed_enabled:
            self.optimizer.optimizer.register_step_pre_hook(self._clip)
        if args.stop_token:
            ends = [processing_class.eos_token_id, processing_class.pad_token_id]  # as the answer is read everywhere
            self.shared.generation_config.eos_token_id = ends
        self._generate = self.shared.generate
        self.shared.generate = self._generate_and_measure
        self._backward = self.accelerator.backward
        self.accelerator.backward = self._backward_with_entropy

    def _prepare_loader(self) -> Any:
        """Build a loader with random numbers of its own: the library's draws from the stream that sampling uses."""
        sampler = SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed)
        loader = DataLoader(self.train_dataset, self.args.local_batch_size, sampler=sampler, drop_last=True,
                            collate_fn=self.data_collator, generator=torch.Generator())  # fmt: skip
        return self.accelerator.prepare(loader)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run the library's loop, all of it in the configured precision; from a checkpoint's folder where given."""
        self._checkpoint = resume_from_checkpoint
        self.add_callback(loop.EndLoop(self))
        device, bf16 = self.accelerator.device.type, bool(self.args.bf16)
        # Without the cache: it would keep the rounded weights of before the first update.
        precision = torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False)
        sampling = mock.patch.object(trl_loop, "batch_generation", loop.generate_in_chunks)
        with precision, sampling, mock.patch.object(trl_loop, "selective_log_softmax", self._measure_answers):
            try:
                super().train()
            except loop.LeaveLoop:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def null_ref_context(self) -> Any:
        return self.shared.reference()

    # --- what an update measures

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add what the loop does not measure, adapt `kl_coef`, and stop at `max_kl`.

        The loop averages its statistics over `num_mini_batches` times as many places as it fills, so that their
        variance means nothing; its `eps` counts from the start of the process.
        """
        logs = {key: value for key, value in logs.items() if key not in ("eps", "val/ratio_var")}
        for key in AVERAGED & logs.keys():
            logs[key] *= self.args.num_mini_batches
        own = {key: torch.tensor(values, dtype=torch.float32).mean() for key, values in self._measured.items()}
        rewards = torch.tensor(self.reward_model.raw)
        own |= {"reward": rewards.mean(), "reward_std": rewards.std(correction=0)}
        logs |= {key: reduce(own[key].to(self.accelerator.device), reduction="mean").item() for key in sorted(own)}
        new = torch.tensor(self._new_tokens, device=self.accelerator.device)  # sampled since the last log
        self._tokens += int(reduce(new, reduction="sum"))
        self._new_tokens = 0
        logs |= {"num_tokens": self._tokens, "kl_coef": self.args.kl_coef}
        for record in (self._measured, self.reward_model.raw):
            record.clear()
        super().log(logs, *args, **kwargs)
        self._control_kl(logs["objective/kl"])

    def _control_kl(self, kl: float) -> None:
        """Adapt `kl_coef` (Ziegler et al., 2019, arXiv 1909.08593, section 2.2), or stop with the last policy whose KL
        was below `max_kl`. `kl` is of the policy that sampled this rollout: the one before the update.
        """
        if self.args.kl_target:
            error = min(max(kl / self.args.kl_target - 1, -0.2), 0.2)
            self.args.kl_coef *= 1 + error * self.args.batch_size / self.args.kl_horizon
        if not self.args.max_kl or kl <= self.args.max_kl:
            return
        step, weights = self._before
        if step <= 0:
            cause = "the first update led to" if step == 0 else "the policy at the start of training has"
            problem = f"{cause} a KL of {kl:.3g} nats, above {self.args.max_kl:g}"
            raise UserError("max_kl", problem, "lower learning_rate, or raise max_kl")
        for name, param in self._trained().items():
            param.data.copy_(weights[name])
        bad = self.state.global_step - 1
        self.stopped = f"KL {kl:.3g} nats after update {bad} is above max_kl: the policy is that of update {step}"
        self.state.global_step = step
        self.control.should_training_stop = True

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: param for name, param in model.named_parameters() if param.requires_grad}

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        self._record_norm(torch.nn.utils.clip_grad_norm_(params, self.args.max_grad_norm or math.inf).item())

    def _record_norm(self, norm: float) -> None:
        self._first_mini_batch = False
        if not math.isfinite(norm):
            raise diverged(self.state.global_step, "the gradient", self.args.output_dir)
        self._measured["grad_norm"].append(norm)

    def _generate_and_measure(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.max_kl and not self._first_mini_batch:
            now = {name: param.detach().clone() for name, param in self._trained().items()}
            self._before, self._sampling = self._sampling, (self.state.global_step, now)
        self._first_mini_batch = True
        output = self._generate(*args, **kwargs)
        answers = output.sequences[:, self.shared.context_length :]
        lengths = (answers != self.processing_class.pad_token_id).sum(1).tolist()
        self._measured["answer_tokens"] += lengths
        self._measured["finished"] += (answers == self.processing_class.eos_token_id).any(1).double().tolist()
        self._new_tokens += int(kwargs["attention_mask"].sum()) + sum(lengths)
        return output

    def _measure_answers(self, logits: Tensor, index: Tensor) -> Tensor:
        """Read log-probabilities (B, T) off logits (B, T, V); those of `generate_in_chunks` are (B, T) already."""
        if logits.ndim == 2:
            return logits
        if not torch.is_grad_enabled():  # of the reference
            return selective_log_softmax(logits, index)
        log_probs, entropy = loop.AnswerTerms.apply(logits, index)
        mask = index != self.processing_class.pad_token_id
        self._entropy = (entropy * mask).sum() / mask.sum().clamp(min=1)
        return log_probs

    def _backward_with_entropy(self, loss: Tensor, **kwargs: Any) -> None:
        self._measured["entropy"].append(self._entropy.item())
        # DeepSpeed divides by the accumulation steps that it was built with, those of the whole batch.
        scale = self.args.num_mini_batches if self.is_deepspeed_enabled else 1
        self._backward(scale * (loss - self.args.entropy_coef * self._entropy), **kwargs)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:  # it has made the step by now
            self._record_norm(float(self.model.get_global_grad_norm()))
        # Accelerate's autocast keeps the rounded weights of the first forward pass for as long as ours lasts.
        torch.clear_autocast_cache()
        loop.trim_heap()

    # --- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy; into a checkpoint, also what the loop goes on from and the library does not save."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir))
        self.shared.save_pretrained(str(folder))
        self.processing_class.save_pretrained(folder)
        if not _internal_call:
            return
        value = {name: param for name, param in self._trained().items() if f".{POLICY}." not in name}
        save_file({name: param.detach().contiguous() for name, param in value.items()}, folder / VALUE_FILE)
        state = {"kl_coef": self.args.kl_coef, "tokens": self._tokens}
        if self.args.max_kl:
            state["measured_step"], weights = self._sampling
            save_file(weights, folder / MEASURED_FILE)
        write_json(folder / STATE_FILE, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under DeepSpeed the library leaves frozen weights out of a checkpoint where it sees an adapter."""
        with mock.patch.object(self, "model", self.shared):
            super()._save_optimizer_and_scheduler(output_dir)

    def restore(self) -> None:
        """Take up a checkpoint: weights, optimizer, schedule, `kl_coef`, random states, position in the data."""
        if self._checkpoint is None:
            return
        folder = Path(self._checkpoint)
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model, str(folder), load_module_strict=False)
        else:
            set_peft_model_state_dict(self.shared, load_file(folder / "adapter_model.safetensors"), POLICY)
            trained = self._trained()
            for name, tensor in load_file(folder / VALUE_FILE).items():
                trained[name].data.copy_(tensor)
        self._load_optimizer_and_scheduler(str(folder))
        state, saved = read_json(folder / STATE_FILE), read_json(folder / "trainer_state.json")
        self.args.kl_coef, self._tokens = state["kl_coef"], state["tokens"]
        if self.args.max_kl:
            weights = load_file(folder / MEASURED_FILE, device=str(self.accelerator.device))
            self._sampling = state["measured_step"], weights
        self.state.global_step, self.state.episode = saved["global_step"], saved["episode"]
        self.state.log_history = saved["log_history"]
        self.dataloader.done = self.state.global_step
        self.args.num_total_batches = self.state.max_steps - self.state.global_step
        self._load_rng_state(str(folder))
