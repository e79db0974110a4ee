"""Memory of a PPO stage, by arithmetic, printed before the start."""

from __future__ import annotations

from typing import Any


def estimate_ppo(
    model: Any, config: Any, prompt: int, weights: float, trained: int, bytes_per_value: int
) -> dict[str, float]:
    """Estimate the memory of one process in bytes: of each part, and in all; rollout and update follow each other.

    `training` is a gradient and two Adam moments, 4 bytes each; `rollout` the key-value cache of one chunk of prompts,
    and twice the logits of its answers; `update` the activations of two forward passes of a micro-batch, and five
    times its answers' logits. A layer's activations are 34 s b h bytes in 16 bit for s tokens, b rows and h hidden
    units (Korthikanti et al., 2022, arXiv 2205.05198); with recomputation, its input alone, and one layer at a time.

    Args:
        model: the transformers config of the base's text model; `config` is the stage's `PPOConfig`.
        prompt: tokens of the longest prompt.
        weights: bytes of the base and of all adapters; `trained` is the number of trained parameters.
        bytes_per_value: of an activation: 4, or 2 under bf16.
    """
    micro, layers = config.per_device_train_batch_size, model.num_hidden_layers
    rows = min(config.local_rollout_forward_batch_size, micro * config.gradient_accumulation_steps)
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    tokens = prompt + config.response_length
    cache = rows * tokens * layers * 2 * heads * head * bytes_per_value
    logits = 4 * model.vocab_size * config.response_length
    layer_input = micro * tokens * model.hidden_size * bytes_per_value
    layer = 34 / 2 * layer_input
    activations = 2 * layers * layer_input + layer if config.gradient_checkpointing else 2 * layers * layer
    rollout, update = cache + 2 * rows * logits, activations + 5 * micro * logits
    total = weights + 12 * trained + max(rollout, update)
    return {"total": total, "weights": weights, "training": 12 * trained, "rollout": rollout, "update": update}
