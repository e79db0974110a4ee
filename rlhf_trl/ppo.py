"""PPO: the trainer of TRL 1.12, repaired through its own seams.

TRL removed PPOTrainer in 1.13 (huggingface/trl#7020), so everything that is specific to it stands here and in
`ppo_models`, and nothing of its loop is copied. What is repaired, and how:

- three full models become adapters on one base: `ppo_models` gives the loop views of them.
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

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import reduce
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo import ppo_trainer as trl_loop

from rlhf_trl.callbacks import AtomicCheckpoints, diverged
from rlhf_trl.ppo_models import POLICY, SharedPolicy
from rlhf_trl.recipe import UserError
from rlhf_trl.rundir import read_json, write_json

# Logged means of a table with one place for each (epoch, mini-batch, accumulation step of the whole batch).
AVERAGED = {
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg"),
    *("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
}
# What a checkpoint holds beside the library's files.
VALUE_FILE, MEASURED_FILE, STATE_FILE = "value.safetensors", "measured.safetensors", "ppo_state.json"


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
    value_init: Literal["zero", "reward"] = field(
        default="zero",
        metadata={
            "help": "Where the value model starts: at zero, or from the reward model, which must lie on the same base."
        },
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Subtract the mean of the reward model's scores on held-out pairs, and divide by their deviation."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL to the reference, nats per answer, that kl_coef is adapted to (Ziegler et al., 2019)."},
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Episodes over which kl_coef adapts to kl_target."},
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "KL to the reference, nats per answer, at which the run stops with its last good policy."},
    )


class _Entropy(torch.autograd.Function):
    """Entropy of the distributions of logits z, (B, T, V) -> (B, T), in nats: H = log sum exp z - sum_v p(v) z(v).

    Its gradient, -p(v) (log p(v) + H), is made from z again, so that nothing of that size is held in between.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.stack([_entropy(row) for row in logits])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        found = torch.empty_like(logits)
        for row, (z, scale) in enumerate(zip(logits, grad, strict=True)):
            log_p = z.log_softmax(-1)
            found[row] = -log_p.exp() * (log_p + _entropy(z)[:, None]) * scale[:, None]
        return found


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class _Leave(Exception):
    """Ends the library's loop from a callback."""


class _Loop(TrainerCallback):
    """Begins the loop where a checkpoint ended, and leaves it when asked to, which it does not do by itself."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopped:
            control.should_save = False  # the optimizer's state is not that of the policy gone back to
        if control.should_training_stop and not control.should_save:
            raise _Leave

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_training_stop:
            raise _Leave


class _Batches:
    """The prompts of one update after the other. Their order follows from the seed and the update alone."""

    def __init__(self, loader: Any):
        self.loader, self.done = loader, 0

    def __iter__(self) -> Iterator[Any]:
        epoch, skipped = divmod(self.done, len(self.loader))
        self.loader.iteration = epoch
        for batch in skip_first_batches(self.loader, skipped) if skipped else self.loader:
            self.done += 1
            yield batch


class _SampledLogProbs:
    """Log-probabilities of the sampled tokens, (B, T), where the loop expects the logits that they come from."""

    def __init__(self, values: Tensor):
        self.values = values

    def __getitem__(self, rows: slice) -> _SampledLogProbs:
        return _SampledLogProbs(self.values[rows])


def _generate_in_chunks(
    model: Any, queries: Tensor, chunk: int, pad_token_id: int, generation_config: Any
) -> tuple[Tensor, _SampledLogProbs]:
    """Sample answers, `chunk` prompts at a time, and keep of the logits what the loop reads of them."""
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for start in range(0, len(queries), chunk):
        rows, logits = trl_loop.generate(model, queries[start : start + chunk], pad_token_id, generation_config)
        log_probs += _gather(logits, rows[:, queries.shape[1] :])
        tokens += rows
    together = pad_sequence(tokens, batch_first=True, padding_value=pad_token_id)
    return together, _SampledLogProbs(pad_sequence(log_probs, batch_first=True))


_gather = trl_loop.selective_log_softmax


def _log_probs_of(logits: Any, index: Tensor) -> Tensor:
    return logits.values if isinstance(logits, _SampledLogProbs) else _gather(logits, index)


class PPOTrainer(AtomicCheckpoints, trl_ppo.PPOTrainer):
    """TRL's PPOTrainer, repaired; takes the models of `build_ppo_models` and a dataset of `input_ids`.

    Raises:
        UserError: there are fewer prompts than one batch, or the parameters are sharded.
    """

    # Attributes of transformers 5 that PPOTrainer, which does not call its parent's constructor, never sets.
    is_distributed_loading_by_transformers = False
    is_fsdp_xla_v1_enabled = False
    control: Any

    def __init__(self, args: PPOConfig, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        if processing_class.pad_token_id == processing_class.eos_token_id or processing_class.padding_side != "left":
            raise ValueError("PPO needs a padding token that differs from the end token, and padding on the left")
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        per_process = len(kwargs["train_dataset"]) // PartialState().num_processes
        if per_process < batch:
            raise UserError("data",
                            f"{per_process} training prompts per process are fewer than one PPO batch of {batch}",
                            "lower the batch size or gradient_accumulation_steps, or use more data")  # fmt: skip
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
        self.stopped: str | None = None
        """Why the run ended before its last episode."""
        self._checkpoint: str | None = None
        # The trained weights before the last rollout, and before the one before it, each with its step.
        self._sampling: tuple[int, dict[str, Tensor]] = (-1, {})
        self._before = self._sampling
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._targets: list[tuple[Tensor, Tensor]] = []
        self._tokens = 0
        self._first_mini_batch = False
        self._output: Any = None
        inner = self.accelerator.unwrap_model(self.model)
        if inner is not self.model:
            # The loop and the saving reach for these on the distributed wrapper; they must not be registered twice.
            for name, item in (("policy", inner.policy), ("value_model", inner.value_model), ("config", inner.config)):
                object.__setattr__(self.model, name, item)
        self.shared: SharedPolicy = inner.policy
        self._value_head = inner.value_model
        self.dataloader = _Batches(self._prepare_loader())
        self.add_callback(_Loop(self))
        self.optimizer.optimizer.register_step_pre_hook(self._clip)
        self._generate = self.shared.generate
        self.shared.generate = self._generate_and_measure
        self.model.register_forward_hook(self._keep_output, with_kwargs=True)
        self._backward = self.accelerator.backward
        self.accelerator.backward = self._backward_with_entropy

    def _prepare_loader(self) -> Any:
        """The loop's own draws its order, and the seeds of its workers, from the stream that the sampling uses."""
        sampler = SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.local_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run the library's loop, all of it in the configured precision.

        Args:
            resume_from_checkpoint: folder of the checkpoint to go on from.
        """
        self._checkpoint = resume_from_checkpoint
        device = self.accelerator.device.type
        # Without the cache: it would keep the rounded weights of before the first update.
        with (
            torch.autocast(device, torch.bfloat16, enabled=bool(self.args.bf16), cache_enabled=False),
            mock.patch.multiple(trl_loop, batch_generation=_generate_in_chunks, selective_log_softmax=_log_probs_of),
        ):
            try:
                super().train()
            except _Leave:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def null_ref_context(self) -> Any:
        return self.shared.reference()

    # --- what an update measures

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add what the loop does not measure, adapt `kl_coef`, and stop at `max_kl`.

        The loop averages its statistics over `num_mini_batches` times as many places as it fills, and its `eps` counts
        from the start of the process.
        """
        logs = {key: value for key, value in logs.items() if key != "eps"}
        for key in AVERAGED & logs.keys():
            logs[key] *= self.args.num_mini_batches
        own = {key: torch.tensor(values, dtype=torch.float32).mean() for key, values in self._measured.items()}
        own["reward"] = torch.tensor(self.reward_model.raw).mean()
        if self._targets:
            returns, advantages = (torch.cat(parts) for parts in zip(*self._targets, strict=True))
            own |= {"advantage_mean": advantages.mean(), "advantage_std": advantages.std()}
            own["explained_variance"] = 1 - advantages.var() / returns.var().clamp(min=1e-12)
        logs |= {key: reduce(own[key].to(self.accelerator.device), reduction="mean").item() for key in sorted(own)}
        logs |= {"num_tokens": self._tokens, "kl_coef": self.args.kl_coef}
        for record in (self._measured, self._targets, self.reward_model.raw):
            record.clear()
        super().log(logs, *args, **kwargs)
        self._control_kl(logs["objective/kl"])

    def _control_kl(self, kl: float) -> None:
        """Adapt `kl_coef` (Ziegler et al., 2019, "Fine-tuning language models from human preferences", section 2.2),
        or go back to the last policy whose KL was measured below `max_kl`, and stop.

        Args:
            kl: of the policy that sampled this update's rollout, which is the one before the update.
        """
        if self.args.kl_target:
            error = min(max(kl / self.args.kl_target - 1, -0.2), 0.2)
            self.args.kl_coef *= 1 + error * self.args.batch_size / self.args.kl_horizon
        if not self.args.max_kl or kl <= self.args.max_kl:
            return
        step, weights = self._before
        if step <= 0:
            raise UserError("max_kl", f"the first update led to a KL of {kl:.3g} nats, above {self.args.max_kl:g}",
                            "lower learning_rate, or raise max_kl")  # fmt: skip
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
        self._first_mini_batch = False
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        limit = self.args.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(params, limit)
        if not norm.isfinite():
            raise diverged(self.state.global_step, "the gradient", self.args.output_dir)
        self._measured["grad_norm"].append(norm.item())

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
        count = int(kwargs["attention_mask"].sum()) + sum(lengths)
        self._tokens += count * self.accelerator.num_processes
        return output

    def _keep_output(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            policy_output, values = output
            mask = kwargs["attention_mask"][:, self.shared.context_length :]
            self._output = policy_output.logits.kept, mask
            if self._first_mini_batch and self.args.vf_coef:
                answer = (slice(None), slice(self.shared.context_length - 1, -1), 0)
                now = values.detach()[answer]
                values.register_hook(lambda grad: self._keep_targets(now, grad[answer], mask))

    def _keep_targets(self, values: Tensor, grad: Tensor, mask: Tensor) -> None:
        """Read the returns off the gradient of the value loss, since the loop keeps them to itself.

        Before the first step of an update, where no value is clipped, the loss is c / 2 mean (V - R)^2 over the n
        positions up to one past the answers' ends, so that R = V - n / c times the gradient.

        Args:
            values, grad, mask: (B, T); 1 on the answers' tokens.
        """
        read = (mask.sum(1) + 1).clamp(max=mask.shape[1]).sum()
        advantages = -grad * read * self.accelerator.gradient_accumulation_steps / self.args.vf_coef
        kept = mask.bool()
        self._targets.append(((values + advantages)[kept], advantages[kept]))

    def _backward_with_entropy(self, loss: Tensor, **kwargs: Any) -> None:
        logits, mask = self._output
        self._output = None
        # The loop has divided these logits by the temperature in place; the last position predicts nothing.
        with torch.set_grad_enabled(self.args.entropy_coef != 0):
            entropy = (_Entropy.apply(logits[:, :-1]) * mask).sum() / mask.sum()
        self._measured["entropy"].append(entropy.item())
        # DeepSpeed divides by the accumulation steps that it was built with, those of the whole batch.
        scale = self.args.num_mini_batches if self.is_deepspeed_enabled else 1
        self._backward(scale * (loss - self.args.entropy_coef * entropy), **kwargs)

    # --- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy; into a checkpoint, also what the loop goes on from and the library does not save."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or not self.args.should_save:
            return
        folder = Path(str(output_dir))
        value = {name: param for name, param in self._trained().items() if f".{POLICY}." not in name}
        save_file({name: param.detach().contiguous() for name, param in value.items()}, folder / VALUE_FILE)
        state = {"kl_coef": self.args.kl_coef, "tokens": self._tokens}
        if self.args.max_kl:
            state["measured_step"], weights = self._sampling
            save_file(weights, folder / MEASURED_FILE)
        write_json(folder / STATE_FILE, state)

    def restore(self) -> None:
        """Take up a checkpoint: weights, optimizer, schedule, `kl_coef`, random states, position in the data."""
        if self._checkpoint is None:
            return
        folder = Path(self._checkpoint)
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model, str(folder))
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
