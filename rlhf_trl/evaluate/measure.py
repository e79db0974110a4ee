"""Measuring policies on held-out prompts: answers, KL to the reference, scores, best-of-n, adversarial prompts.

Runs models, with the prompts spread over the processes of a launch; reads the test views and checkpoints, and writes
nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_trl.evaluate.adversarial import load_adversarial
from rlhf_trl.models.base import prompt_room
from rlhf_trl.models.policies import Policies
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.sampling import (
    LOGITS_BYTES,
    SHORTEST,
    Completion,
    answer_batch,
    answer_logits,
    head_logits,
    measure_kl,
    sample,
    sorted_batches,
    spread,
)
from rlhf_trl.models.tokenizer import Messages
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import damage, list_checkpoints
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.intervals import wilson
from rlhf_trl.text.refusals import refuses, unsafe_patterns

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Measurements:
    """The prompts and models that all measurements of a run share."""

    def __init__(self, recipe: Recipe, run: RunDir, policies: Policies, judges: Mapping[str, RewardModel]):
        self.recipe, self.run, self.policies, self.judges = recipe, run, policies, judges
        self.settings, self.tokenizer = recipe.evaluation, policies.tokenizer
        self.room = prompt_room(policies.model, self.settings.max_new_tokens)
        self.rows = choose_prompts(run, self.settings.prompts, recipe.seed)
        self.prompts: list[Messages] = [row["prompt"] for row in self.rows]
        chosen: dict[str, str] = {}
        for pair in read_jsonl(run.pairs("test")):
            chosen.setdefault(pair["id"], pair["chosen"])
        everything = [True] * len(self.rows)
        answers = [chosen[row["id"]] for row in self.rows]
        self.chosen_refuses = [refuses(answer) for answer in answers]
        self.dataset = {key: self.score(key, self.prompts, answers, everything) for key in judges}
        self.reference: dict[str, list[float]] = {}

    def score(
        self, judge: str, prompts: Sequence[Messages], answers: Sequence[str], done: Sequence[bool]
    ) -> list[float]:
        """Score answers with the reward or the gold model, spread over the processes."""
        model, size = self.judges[judge], self.settings.score_batch_size

        def work(rows: Sequence[int]) -> list[float]:
            some = [prompts[row] for row in rows], [answers[row] for row in rows], [done[row] for row in rows]
            return model.score(*some, batch_size=size).tolist()

        scores = spread(sorted_batches(_lengths(prompts, answers), size, SHORTEST), work, f"{judge}: scores")
        if not np.isfinite(scores).all():
            name = {"reward": self.settings.reward, "gold": self.settings.gold}[judge]
            raise UserError(f"evaluation.{judge}", f"{name} gives a score that is not finite", "train it again")
        return scores

    def choose_checkpoints(self, stage: str) -> list[tuple[int, Path]]:
        """Choose the recipe's number of saved checkpoints, evenly spaced, before the final step."""
        if not self.settings.checkpoints:
            return []
        last = read_json(self.run.training_stats(stage))["summary"]["steps"]
        saved = {step: path for step, path in list_checkpoints(self.run.checkpoints(stage)).items() if step < last}
        whole = {step: path for step, path in saved.items() if not damage(path)}
        for step in saved.keys() - whole.keys():
            logger.warning("%s: passed over the damaged checkpoint of step %d", stage, step)
        count = self.settings.checkpoints
        wanted = [last * (index + 1) / (count + 1) for index in range(count)]
        chosen = {min(whole, key=lambda step: (abs(step - at), step)) for at in wanted} if whole else set()
        if len(chosen) < count:
            logger.warning("%s: %d checkpoints are asked for, and %d are there to evaluate", stage, count, len(chosen))
        return [(step, whole[step]) for step in sorted(chosen)]

    def measure_policy(self, name: str, checkpoint: Path | None = None, step: int | None = None) -> list[Row]:
        """Sample one answer to each prompt, measure its KL to the reference, and score it."""
        label = name if step is None else f"{name} at step {step}"
        with self.policies.use(name, checkpoint) as model:
            answers = self._sample(model, self.prompts, f"{label}: answers", keep_hidden=True)
            kls = self.measure_policy_kl(model, answers, f"{label}: KL", name == REFERENCE)
        records = [
            {"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "answer": answer.text,
             "finished": answer.finished, "answer_tokens": len(answer.ids), "chosen_refuses": refusal,
             **dict(zip(("kl", "kl_k1", "kl_k3", "entropy"), values, strict=True))}
            for row, answer, values, refusal in zip(self.rows, answers, kls, self.chosen_refuses, strict=True)
        ]  # fmt: skip
        for key in self.judges:
            texts, done = [answer.text for answer in answers], [answer.finished for answer in answers]
            scores = self.score(key, self.prompts, texts, done)
            start = self.reference.setdefault(key, scores)
            for record, score, base, target in zip(records, scores, start, self.dataset[key], strict=True):
                record |= {key: score, f"{key}_gain": score - base, f"{key}_over_chosen": score - target}
        return records

    def _sample(self, model: Any, prompts: Sequence[Messages], progress: str, **more: Any) -> list[Completion]:
        size = self.settings.generation_batch_size
        limits = (self.settings.max_new_tokens, size, self.recipe.seed)
        return sample(model, self.tokenizer, prompts, *limits, progress=progress, **more)

    @torch.no_grad()
    def measure_policy_kl(
        self, policy: Any, answers: Sequence[Completion], progress: str, same: bool
    ) -> list[list[float]]:
        """Measure the KL of a policy to the reference on its own answers.

        Returns:
            For each answer kl, k1 and k3 in nats, and entropy in nats per token.
        """
        vocabulary = policy.config.get_text_config().vocab_size
        longest = max(len(answer.ids) for answer in answers)
        size = max(1, min(self.settings.generation_batch_size, LOGITS_BYTES // (4 * vocabulary * longest)))

        def work(rows: Sequence[int]) -> list[list[float]]:
            prompts, chosen = [self.prompts[row] for row in rows], [answers[row] for row in rows]
            batch = answer_batch(self.tokenizer, prompts, chosen, policy.device)
            kept = all(answer.hidden is not None for answer in chosen)
            logits = head_logits(policy, chosen) if kept else answer_logits(policy, *batch)
            ref_logits = logits
            if not same:
                with self.policies.use(REFERENCE) as reference:
                    ref_logits = answer_logits(reference, *batch)
            kl = measure_kl(logits, ref_logits, batch[1], batch[3])
            tokens = batch[3].sum(1)
            return torch.stack([kl.kl, kl.k1, kl.k3, kl.entropy / tokens], dim=1).tolist()

        lengths = _lengths(self.prompts, [answer.text for answer in answers])
        return spread(sorted_batches(lengths, size, SHORTEST), work, progress)

    def draw_best_of_n(self, reference: Sequence[Row]) -> list[Row]:
        """Draw more answers of the reference to each prompt, and score them all; the first draw is its own answer."""
        count = self.settings.best_of_n - 1
        rows = [row for row in range(len(self.rows)) for _ in range(count)]
        prompts = [self.prompts[row] for row in rows]
        with self.policies.use(REFERENCE) as model:
            draws = [*range(1, count + 1)] * len(self.rows)
            answers = self._sample(model, prompts, "best of n: answers", draws=draws)
        texts, done = [answer.text for answer in answers], [answer.finished for answer in answers]
        drawn: list[Row] = [{"id": record["id"], "answers": [record["answer"]]} for record in reference]
        for row, text in zip(rows, texts, strict=True):
            drawn[row]["answers"].append(text)
        for key in self.judges:
            for entry, record in zip(drawn, reference, strict=True):
                entry[key] = [record[key]]
            for row, score in zip(rows, self.score(key, prompts, texts, done), strict=True):
                drawn[row][key].append(score)
        return drawn

    def answer_for_judge(self, name: str) -> list[Row]:
        """Answer the prompts with the second decoding, and score the answers."""
        with self.policies.use(name) as model:
            label = f"{name}: answers for the judge"
            answers = self._sample(model, self.prompts, label, decoding=self.settings.judge_decoding)
        texts, done = [answer.text for answer in answers], [answer.finished for answer in answers]
        scores = {key: self.score(key, self.prompts, texts, done) for key in self.judges}
        return [
            {"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "answer": answer.text,
             "finished": answer.finished, "answer_tokens": len(answer.ids),
             **{key: of[index] for key, of in scores.items()}}
            for index, (row, answer) in enumerate(zip(self.rows, answers, strict=True))
        ]  # fmt: skip

    def answer_adversarial(self) -> dict[Path, Any]:
        """Answer the adversarial prompts with every policy; count refusals and unsafe patterns by category."""
        categories, prompts = load_adversarial()
        rows: list[Row] = [{**prompt, "answers": {}} for prompt in prompts]
        questions = [row["prompt"] for row in rows]
        rates: Row = {}
        for name in (REFERENCE, *self.recipe.policies):
            with self.policies.use(name) as model:
                label, decoding = f"{name}: adversarial prompts", self.settings.judge_decoding
                answers = self._sample(model, questions, label, decoding=decoding, max_prompt_tokens=self.room)
            for row, answer in zip(rows, answers, strict=True):
                text = answer.text
                signs = {"refusal": refuses(text), "unsafe": unsafe_patterns(text)}
                row["answers"][name] = {"text": text, "finished": answer.finished, **signs}
            rates[name] = {}
            for category in ("all", *categories):
                found = [row["answers"][name] for row in rows if category in ("all", row["category"])]
                rates[name][category] = {
                    key: wilson(sum(bool(answer[key]) for answer in found), len(found)).as_dict()
                    for key in ("refusal", "unsafe", "finished")
                }
        return {
            self.run.adversarial_answers: rows,
            self.run.adversarial: {"categories": categories, "policies": rates},
        }


def _lengths(prompts: Sequence[Messages], answers: Sequence[str]) -> list[int]:
    """Characters of each conversation, by which batches are sorted."""
    return [sum(len(turn["content"]) for turn in prompt) + len(answer)
            for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip


def choose_prompts(run: RunDir, count: int, seed: int) -> list[Row]:
    """Choose held-out prompts by a seeded hash of each, so that their order in the file does not matter."""
    rows = read_jsonl(run.prompts("test"))
    rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['id']}".encode()).hexdigest())
    if len(rows) < count:
        logger.warning(
            "evaluation.prompts is %d, and there are %d held-out prompts: all of them are used", count, len(rows)
        )
    return rows[:count]
