"""Reward models for scoring: any text, whatever the policy that wrote it.

The text is rendered with the reward model's own template and tokenizer. A reward adapter on the base of the policies
is switched on there; any other reward model is loaded for itself.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import ModelConfig

from rlhf_trl.models import base
from rlhf_trl.models.base import Policies, RewardHead
from rlhf_trl.models.tokenizer import Messages, encode, encode_all, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.stats.pairs import correct, gap, length_rule, measure_accuracy
from rlhf_trl.text.words import prompt_id


@dataclass
class RewardModel:
    """A model with a scalar head, the tokenizer that renders text for it, and what follows an end token there."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    after: Sequence[int] = ()

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Messages], answers: Sequence[str], finished: Sequence[bool], batch_size: int = 16
    ) -> Tensor:
        """Score answers in float32, (N,), each rendered with the model's own template (UserError as there)."""
        texts = zip(prompts, answers, finished, strict=True)
        ids = [[*chain(*encode(self.tokenizer, *text)), *(self.after if text[2] else ())] for text in texts]
        return self.score_ids(ids, batch_size)

    @torch.no_grad()
    def score_ids(self, ids: Sequence[list[int]], batch_size: int = 16) -> Tensor:
        """Score token ids of whole conversations in float32, (N,).

        Batches are sorted by length and padded on the right, so that neither their size nor their order matters.
        """
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        scores = torch.empty(len(ids))
        device = self.model.eval().device
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, mask = base.pad_right([ids[row] for row in rows], self.tokenizer.pad_token_id)
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            scores[rows] = logits.squeeze(-1).float().cpu()
        return scores


def score_pairs(
    reward: RewardModel, pairs: Sequence[Mapping[str, Any]], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score the chosen and the rejected answer of labelled pairs, (N, 2), and count the tokens of the prompt, the
    chosen and the rejected answer, with its end token, (N, 3).
    """
    prompts, finished = [pair["prompt"] for pair in pairs], [True] * len(pairs)
    answers = {side: [pair[side] for pair in pairs] for side in ("chosen", "rejected")}
    scores = [reward.score(prompts, texts, finished, batch_size).double().numpy() for texts in answers.values()]
    encoded = encode_all(reward.tokenizer, prompts, *answers.values())
    return np.column_stack(scores), np.array([list(map(len, ids)) for ids in encoded]).reshape(-1, 3)


def measure_reward_model(reward: RewardModel, pairs: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Measure the accuracy on labelled pairs, beside that of a rule of length, and by subset (`stats.pairs`)."""
    scores, tokens = score_pairs(reward, pairs, batch_size)
    prompts = np.array([prompt_id(pair["prompt"]) for pair in pairs])
    subsets = np.array([pair["subset"] for pair in pairs])
    parts = {subset: subsets == subset for subset in np.unique(subsets).tolist()}
    return {
        **measure_accuracy(scores, tokens[:, 1:], prompts),
        "length_rule": length_rule(correct(gap(scores)), tokens[:, 1:], prompts),
        "subsets": {key: measure_accuracy(scores[at], tokens[at, 1:], prompts[at]) for key, at in parts.items()},
    }


def score_completions(
    reward: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    completions: Sequence[Sequence[int]],
) -> Tensor:
    """Score sampled tokens of the policy by their text, with the end token of an answer that ended by itself.

    UserError where a score is not finite."""
    answers = [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
    finished = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in completions]
    scores = reward.score(prompts, answers, finished)
    if not scores.isfinite().all():
        raise UserError("reward", "the reward model gives a score that is not finite", "train it again")
    return scores


class SharedClassifier(torch.nn.Module):
    """A sequence classifier made of a reward adapter on the base of the policies, and its head, (1, H).

    `use` yields the base with the adapter of a name switched on."""

    def __init__(self, use: Callable[[str], AbstractContextManager[Any]], name: str, head: Tensor):
        super().__init__()
        self._use, self._name = use, name  # the base is not a part of this module
        self.score = RewardHead(head.shape[1], 1, bias=False)
        self.score.weight = torch.nn.Parameter(head.float(), requires_grad=False)
        with use(name) as model:
            self.score.to(model.device)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SequenceClassifierOutput:
        """Score sequences that are padded on the right: (B, T), (B, T) -> logits (B, 1)."""
        with self._use(self._name) as model:
            backbone = model.get_base_model().base_model
            hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        last = attention_mask.sum(1) - 1
        return SequenceClassifierOutput(logits=self.score(hidden[torch.arange(len(hidden)), last]))


@base.unsharded()
def load_reward_model(recipe: Recipe, run: RunDir, name: str, policies: Policies | None = None) -> RewardModel:
    """Load the model of a reward stage, or one by its Hub id or path, for scoring.

    Args:
        name: a reward stage; a text with a slash is a Hub id or a path.
        policies: whose base the adapter may lie on, if it fits there, instead of on one of its own.

    UserError where there is no reward head, a weight is not finite, or the model has more outputs or cannot be loaded.
    """
    if name not in recipe.stages:
        config = ModelConfig(model_name_or_path=name, dtype=recipe.evaluation.dtype or "auto")
        tokenizer = set_up_tokenizer(name, {"model_name_or_path": name})
        model: Any = base.load_weights(AutoModelForSequenceClassification, name, config)
        if model.config.num_labels != 1:
            problem = f"the model has {model.config.num_labels} outputs, and a reward model has one"
            raise UserError(name, problem, "name a reward model in evaluation")
        base.set_padding(model, tokenizer, name)
        talk = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
        known = len([*chain(*encode(tokenizer, talk[:1], "0"))])
        whole = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False).input_ids
        return _freeze(model, tokenizer, whole[known:])  # it was trained on all that its template writes
    tokenizer = recorded_tokenizer(recipe, run, name)
    config = ModelConfig(**recipe.model_block(name))
    if policies is not None and recipe.evaluation.dtype:
        config.dtype = recipe.evaluation.dtype
    folder = run.adapter(name) if config.use_peft else run.model(name)
    if not any("score." in tensor for tensor in check_weights(folder)):
        raise UserError(str(folder), "the model has no reward head (`score`)", f"train {name!r} again")
    if not config.use_peft:
        return _freeze(base.load_classifier(str(folder), config, tokenizer), tokenizer)
    if policies is not None and base.shares_base(recipe, recipe.policies[0], name):
        head: Any = policies.add(name, folder)
        return RewardModel(SharedClassifier(policies.use, name, head), tokenizer)
    model = base.load_classifier(base.below_path(recipe, run, name), config, tokenizer)
    return _freeze(base.lay(model, folder), tokenizer)


def _freeze(model: Any, tokenizer: PreTrainedTokenizerBase, after: Sequence[int] = ()) -> RewardModel:
    return RewardModel(model.requires_grad_(False).to(PartialState().device).eval(), tokenizer, after)
