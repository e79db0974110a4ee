"""Sampling answers, and measuring on them how far a policy has moved: exact KL, its estimators, entropy.

Works on models and tensors, with the rows of a batch spread over the processes of a launch; reads and writes nothing.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models.base import pad_right
from rlhf_trl.models.tokenizer import Messages, encode
from rlhf_trl.recipe.schema import Decoding

T = TypeVar("T")
# Answer positions whose full distributions are compared at a time, and the bytes that the logits of one model may
# take for a batch of answers.
KL_POSITIONS = 16
LOGITS_BYTES = 2**28
# Where a batch is read in one pass, its rows are at least this long, compared with the longest.
SHORTEST = 0.8


@dataclass(frozen=True)
class Completion:
    """One sampled answer; `finished` where it ended by itself, before the length limit.

    `hidden`: what the output head read before each token, (T, H); only where asked for, and where it gives the logits.
    `log_prob`: of the answer, in nats, by the engine that sampled it; None where the model itself did.
    """

    ids: list[int]
    text: str
    finished: bool
    hidden: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)
    log_prob: float | None = dataclasses.field(default=None, compare=False)


def spread(
    batches: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[T]], progress: str = ""
) -> list[T]:
    """Work through batches of row numbers, each on one process, and give every process the results in row order.

    The batches are the same however many processes there are, and so are the results.
    """
    state = PartialState()
    hidden = not progress or not state.is_main_process or None  # None: also where the output is not a terminal
    mine = tqdm(batches[state.process_index :: state.num_processes], desc=progress, disable=hidden, leave=False)
    done = [(row, result) for rows in mine for row, result in zip(rows, work(rows), strict=True)]
    if state.num_processes > 1:
        done = gather_object(done)
    return [result for _, result in sorted(done, key=lambda item: item[0])]


def sorted_batches(lengths: Sequence[int], size: int, shortest: float = 0.0) -> list[list[int]]:
    """Group rows of similar length, the longest first, so that little is padded and memory runs out at once or never.

    A batch ends early before a row that is shorter than the share `shortest` of its longest: that pays where a batch
    is read at once, and not in generation.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and len(batches[-1]) < size and lengths[row] >= shortest * lengths[batches[-1][0]]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class InverseTransform(transformers.LogitsProcessor):
    """Turn greedy decoding into sampling: the token where the distribution function passes a uniform number.

    Each answer has random numbers of its own: it does not depend on the other rows of its batch, and the policies of a
    comparison share theirs. `first` are the logits of the first step, (B, V).
    """

    first: Tensor | None = None

    def __init__(self, seeds: Sequence[int], length: int):
        rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self._uniform = torch.stack(rows)
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token of each row possible: logits (B, V) -> (B, V)."""
        self.first = scores if self.first is None else self.first
        cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        level = self._uniform[:, self._step, None].to(scores.device) * cdf[:, -1:]
        self._step += 1
        token = torch.searchsorted(cdf, level, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    decoding: Decoding | None = None,
    draws: Sequence[int] | None = None,
    max_prompt_tokens: int | None = None,
    progress: str = "",
    keep_hidden: bool = False,
) -> list[Completion]:
    """Sample an answer to each prompt, fixed by the seed, its prompt and its draw.

    Args:
        decoding: without it, from the model's own distribution: temperature 1, no top-k, no top-p.
        draws: tells apart several answers to one prompt; 0 for each by default.
        max_prompt_tokens: a longer prompt loses its beginning.
        keep_hidden: keep what the output head read, from which `head_logits` makes the logits once more.
    """
    decoding = decoding or Decoding()
    ids, seeds = encode_seeded(tokenizer, prompts, seed, draws, max_prompt_tokens)
    head = model.get_output_embeddings()

    def answer(rows: Sequence[int]) -> list[Completion]:
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(model.device)
        processors = _processors(decoding, [seeds[row] for row in rows], max_new_tokens)
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]) if keep_hidden else None)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=processors)
        hook.remove()
        completions = [read_answer(tokenizer, row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]
        # Some models bend the logits after their head (a soft cap, a scale).
        if not seen or not torch.allclose(head(seen[0]).float(), processors[-1].first, rtol=1e-3, atol=1e-3):
            return completions
        states = zip(completions, torch.stack(seen, dim=1).cpu(), strict=True)
        return [dataclasses.replace(row, hidden=hidden[: len(row.ids)].clone()) for row, hidden in states]

    return spread(sorted_batches([len(row) for row in ids], batch_size), answer, progress)


def _processors(decoding: Decoding, seeds: Sequence[int], length: int) -> transformers.LogitsProcessorList:
    processors = transformers.LogitsProcessorList()
    if decoding.temperature not in (0, 1):
        processors.append(transformers.TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        processors.append(transformers.TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(decoding.top_p))
    return transformers.LogitsProcessorList(
        [*processors, *[InverseTransform(seeds, length)] * bool(decoding.temperature)]
    )


def encode_seeded(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    seed: int,
    draws: Sequence[int] | None = None,
    max_prompt_tokens: int | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Encode prompts, and give each answer a seed of its own; the arguments are those of `sample`."""
    ids = [encode(tokenizer, prompt)[0][-(max_prompt_tokens or 0) :] for prompt in prompts]
    keys = [repr((seed, row, draw)).encode() for row, draw in zip(ids, draws or [0] * len(ids), strict=True)]
    return ids, [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1 for key in keys]


def read_answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int], log_prob: float | None = None) -> Completion:
    finished = tokenizer.eos_token_id in tokens
    tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1] if finished else tokens
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Completion(tokens, text, finished, log_prob=log_prob)


class KL(NamedTuple):
    """KL(policy || reference) on answers of the policy, in nats: sums over the answer's tokens, (B,)."""

    kl: Tensor  # exact over the vocabulary at each position
    k1: Tensor  # sampled estimate log pi - log ref
    k3: Tensor  # sampled estimate ref / pi - 1 - log(ref / pi)
    entropy: Tensor  # of the policy's distribution at each position
    log_prob: Tensor  # of the answer, by the policy


def measure_kl(logits: Tensor, ref_logits: Tensor, answer_ids: Tensor, mask: Tensor) -> KL:
    """Compare two models on answers that were sampled from the first.

    At each position of an answer, kl = sum_v pi(v) [log pi(v) - log ref(v)]; its sum over the answer estimates the
    sequence KL without bias, and is never negative. k1 and k3 (Schulman, 2020, "Approximating KL divergence") see the
    sampled tokens alone; their means agree with it.

    Args:
        logits, ref_logits: of the policy and of the reference, (B, T, V).
        answer_ids: the sampled tokens, (B, T); `mask` is 1 on the answer's tokens, its end token included, (B, T).
    """
    sums = torch.zeros(5, logits.shape[0], dtype=torch.float64, device=logits.device)
    for start in range(0, logits.shape[1], KL_POSITIONS):
        part = slice(start, start + KL_POSITIONS)
        log_p, log_q = logits[:, part].float().log_softmax(-1), ref_logits[:, part].float().log_softmax(-1)
        tokens = answer_ids[:, part, None]
        log_prob = log_p.gather(-1, tokens).squeeze(-1).double()
        log_ratio = log_q.gather(-1, tokens).squeeze(-1).double() - log_prob
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        kl = (p * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding alone puts it below
        terms = torch.stack([kl, -log_ratio, log_ratio.expm1() - log_ratio, entropy, log_prob])
        sums += torch.where(mask[:, part].bool(), terms, 0.0).sum(-1)
    return KL(*sums.unbind())


@torch.no_grad()
def head_logits(model: Any, answers: Sequence[Completion]) -> Tensor:
    """Make the logits that each token of sampled answers was drawn from, (B, A, V), from what the head has read."""
    hidden = pad_sequence([answer.hidden for answer in answers if answer.hidden is not None], batch_first=True)
    return model.get_output_embeddings()(hidden.to(model.device))


@torch.no_grad()
def answer_logits(
    model: Any, prompt_ids: Tensor, answer_ids: Tensor, prompt_mask: Tensor, answer_mask: Tensor
) -> Tensor:
    """Compute the logits that predict each token of the answers, at temperature 1: (B, A, V).

    Args:
        prompt_ids: padded on the left, (B, P); `prompt_mask` likewise.
        answer_ids: padded on the right, (B, A); `answer_mask` likewise.
    """
    ids, mask = torch.cat([prompt_ids, answer_ids], dim=1), torch.cat([prompt_mask, answer_mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                   logits_to_keep=answer_ids.shape[1] + 1, use_cache=False)  # fmt: skip
    return output.logits[:, :-1]


def answer_batch(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], answers: Sequence[Completion], device: Any
) -> tuple[Tensor, ...]:
    """Lay out prompts and answers as `answer_logits` takes them."""
    prompt = tokenizer.pad({"input_ids": [encode(tokenizer, row)[0] for row in prompts]}, return_tensors="pt")
    answer_ids, answer_mask = pad_right([answer.ids for answer in answers], tokenizer.pad_token_id)
    tensors = (prompt["input_ids"], answer_ids, prompt["attention_mask"], answer_mask)
    return tuple(tensor.to(device) for tensor in tensors)
