"""Sampling answers from a model's own distribution, and the exact KL between two models on them.

Works on models and tensors; reads and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models import Messages, encode


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    ids: list[int]
    text: str
    finished: bool
    """Whether the answer ended by itself, before the length limit."""


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: str = "",
) -> list[Completion]:
    """Sample one answer a prompt from the model's own distribution: temperature 1, no top-k, no top-p.

    Each batch is seeded by its prompts, so that the policies of a comparison share their random numbers.

    Returns:
        Completions in the order of the prompts.
    """
    ids = [encode(tokenizer, prompt)[0] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    answers: list[Completion | None] = [None] * len(ids)
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=not progress, leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(model.device)
        digest = hashlib.sha256(repr((seed, [ids[row] for row in rows])).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )[:, batch["input_ids"].shape[1] :]
        for row, answer in zip(rows, output.tolist(), strict=True):
            finished = tokenizer.eos_token_id in answer
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1] if finished else answer
            answers[row] = Completion(answer, tokenizer.decode(answer, skip_special_tokens=True).strip(), finished)
    return [answer for answer in answers if answer is not None]


def token_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Sum the exact KL(policy || reference) over the vocabulary and over an answer's tokens.

    At each position of an answer sampled from the policy, sum_v pi(v) [log pi(v) - log ref(v)]; its sum over the
    answer is the Rao-Blackwellised estimate of the sequence KL: unbiased and never negative.

    Args:
        logits: policy, (B, T, V).
        ref_logits: reference, (B, T, V).
        mask: 1 on the answer's tokens, its end token included, (B, T).

    Returns:
        Nats per answer, (B,).
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = F.log_softmax(ref_logits.float(), dim=-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum(-1)


@torch.no_grad()
def answer_logits(
    model: Any, prompt_ids: Tensor, answer_ids: Tensor, prompt_mask: Tensor, answer_mask: Tensor
) -> Tensor:
    """Compute the logits that predict each token of the answers.

    Args:
        prompt_ids: padded on the left, (B, P); `prompt_mask` likewise.
        answer_ids: padded on the right, (B, A); `answer_mask` likewise.

    Returns:
        Logits at temperature 1, (B, A, V).
    """
    mask = torch.cat([prompt_mask, answer_mask], dim=1)
    output = model(
        input_ids=torch.cat([prompt_ids, answer_ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=answer_ids.shape[1] + 1,
        use_cache=False,
    )
    return output.logits[:, :-1]
