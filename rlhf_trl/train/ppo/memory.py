"""Memory of a PPO stage, by arithmetic: printed before the start, and for a model that is not here.

    weights         bytes of the base and of all adapters
    training        gradient and two Adam moments, 4 bytes each, for every trained parameter
    rollout         key-value cache of one chunk of prompts, and twice the logits of its answers in float32
    update          activations of two forward passes of a micro-batch, and five times its answers' logits in float32

The activations of one layer are 34 s b h bytes in 16 bit for s tokens, b rows and h hidden units (Korthikanti et al.,
2022, "Reducing activation recomputation in large transformer models", with an attention that stores no scores); with
recomputation, its input alone, and one whole layer at a time.
"""

from __future__ import annotations

from typing import NamedTuple

ACTIVATIONS = 34 / 2
LOGIT_COPIES = 5


class Shape(NamedTuple):
    """What of a transformer decides its memory."""

    layers: int
    hidden: int
    vocabulary: int
    kv_width: int
    """Key-value heads times the dimension of a head."""


class Batch(NamedTuple):
    """Rows of a rollout chunk and of a micro-batch, and the longest prompt and answer in tokens."""

    rollout: int
    micro: int
    prompt: int
    answer: int


class Estimate(NamedTuple):
    """Bytes of each part; the rollout and the update follow each other."""

    weights: float
    training: float
    rollout: float
    update: float

    @property
    def total(self) -> float:
        return self.weights + self.training + max(self.rollout, self.update)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"about {self.total / 1e9:.2f} GB ({parts}; rollout and update follow each other)"


def estimate_ppo(
    shape: Shape, batch: Batch, weights: float, trained: int, bytes_per_value: int, checkpointing: bool
) -> Estimate:
    """Estimate the memory of one process.

    Args:
        weights: bytes of all weights.
        trained: number of trained parameters.
        bytes_per_value: of an activation: 4, or 2 under bf16.
        checkpointing: whether activations are recomputed.
    """
    tokens = batch.prompt + batch.answer
    cache = batch.rollout * tokens * shape.layers * 2 * shape.kv_width * bytes_per_value
    logits = 4 * shape.vocabulary * batch.answer
    layer = batch.micro * tokens * shape.hidden * bytes_per_value
    whole = ACTIVATIONS * layer
    activations = 2 * shape.layers * layer + whole if checkpointing else 2 * shape.layers * whole
    return Estimate(
        weights,
        12 * trained,
        cache + 2 * batch.rollout * logits,
        activations + LOGIT_COPIES * batch.micro * logits,
    )
