"""What stands in for parts of TRL's PPO loop: the terms of an answer's tokens, the order of the prompts, the sampling
in chunks, and the beginning and the end of the loop.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.special import entr
from transformers import TrainerCallback
from trl.experimental.ppo import ppo_trainer as trl_loop
from trl.trainer.utils import selective_log_softmax

LARGE = 2**31  # bytes of resident memory from which it is worth the time to give some back


class AnswerTerms(torch.autograd.Function):
    """Log-probabilities l of tokens and entropies H, in nats: logits z (B, T, V) and tokens (B, T) -> (2, B, T).

    With g the gradient of l and h that of H, the one of z(v) is g (1[v is the token] - p(v)) - h p(v) (log p(v) + H).
    It is made from z again, a row at a time, so that nothing else of z's size is held in between.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(logits, index)
        entropies = torch.stack([entr(z.softmax(-1)).sum(-1) for z in logits])
        return torch.stack((selective_log_softmax(logits, index), entropies))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, index = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row, z, tokens, g, h in zip(result, logits, index, *grad[..., None], strict=True):
            p = z.softmax(-1)
            terms = entr(p)
            row.copy_(h * terms - p * (g + h * terms.sum(-1, keepdim=True)))
            row.scatter_add_(-1, tokens[:, None], g)
        return result, None


class LeaveLoop(Exception):
    """Ends the library's loop from a callback."""


class BeginLoop(TrainerCallback):
    """Begins the loop where a checkpoint ended. Comes before the callbacks that look at the step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore()


class EndLoop(TrainerCallback):
    """Leaves the loop when a callback asks to stop, which TRL's loop ignores. Comes after those callbacks."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stopped:
            control.should_save = False  # the optimizer's state is not that of the policy gone back to
        if control.should_training_stop and not control.should_save:
            raise LeaveLoop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_training_stop:
            raise LeaveLoop


class Batches:
    """The prompts of one update after the other. Their order follows from the seed and the update alone."""

    def __init__(self, loader: Any):
        self.loader, self.done = loader, 0

    def __iter__(self) -> Iterator[Any]:
        epoch, skipped = divmod(self.done, len(self.loader))
        self.loader.set_epoch(epoch)
        for batch in skip_first_batches(self.loader, skipped) if skipped else self.loader:
            self.done += 1
            yield batch


def generate_in_chunks(
    model: Any, queries: Tensor, chunk: int, pad_token_id: int, generation_config: Any
) -> tuple[Tensor, Tensor]:
    """Sample answers, `chunk` prompts at a time: the tokens with the prompts, and, in place of the logits, the
    log-probabilities of the sampled ones, (B, T)."""
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for start in range(0, len(queries), chunk):
        rows, logits = trl_loop.generate(model, queries[start : start + chunk], pad_token_id, generation_config)
        log_probs += selective_log_softmax(logits, rows[:, queries.shape[1] :])
        tokens += rows
        del logits  # before the next chunk has its own
    together = pad_sequence(tokens, batch_first=True, padding_value=pad_token_id)
    return together, pad_sequence(log_probs, batch_first=True)


def trim_heap() -> None:
    """On the CPU, give the memory that a backward pass has freed back to the system.

    The heap of glibc is left in pieces that the next micro-batch does not fit into; docs/ppo.md has the figures.
    """
    on_cpu = sys.platform == "linux" and not torch.accelerator.is_available()
    if on_cpu and psutil.Process().memory_info().rss > LARGE:
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
