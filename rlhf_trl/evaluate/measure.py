"""Measuring policies on held-out prompts: answers, KL to the reference, scores, best-of-n, adversarial prompts.

Runs models, with the prompts spread over the processes of a launch. Reads the test views and checkpoints. Keeps what
was measured in `.evaluation/` until the step has ended, so that a killed one goes on.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from rlhf_trl.evaluate.engine import Engine, require_same
from rlhf_trl.evaluate.results import load_adversarial
from rlhf_trl.models.base import Policies, prompt_room
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
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.library import value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import damage, list_checkpoints
from rlhf_trl.run.files import read_json, read_jsonl, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.refusals import refuses, unsafe_patterns

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Scores = dict[str, list[float]]  # `reward`, `gold` -> a score of each answer


class Measurements:
    """The prompts and models that all measurements of a run share."""

    def __init__(self, recipe: Recipe, run: RunDir, policies: Policies, judges: Mapping[str, RewardModel]):
        self.recipe, self.run, self.policies, self.judges = recipe, run, policies, judges
        self.settings, self.tokenizer = recipe.evaluation, policies.tokenizer
        self.room = prompt_room(policies.model, self.settings.max_new_tokens)
        self.engine: Engine | None = None
        if self.settings.backend == "vllm":
            self.room = min(self.room or recipe.data.max_length, recipe.data.max_length)
            self.engine = Engine(policies, self.room + self.settings.max_new_tokens)
        self.rows = choose_prompts(run, self.settings.prompts, recipe.seed)
        self.prompts: list[Messages] = [row["prompt"] for row in self.rows]
        chosen: dict[str, str] = {}
        for pair in read_jsonl(run.pairs("test")):
            chosen.setdefault(pair["id"], pair["chosen"])
        answers = [chosen[row["id"]] for row in self.rows]
        self.chosen_refuses = [refuses(answer) for answer in answers]
        self.dataset = self.score(self.prompts, answers, [True] * len(answers))

    def keep(self, name: str, what: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows that an interrupted evaluation with the same settings saved, or else call `measure`.

        A file's name holds the fingerprint of what it depends on, and the hash of its content.
        """
        recipe, start = self.recipe, self.recipe.stages[self.recipe.policies[0]].init
        own = {stage for stage in recipe.stages if stage in (name, self.settings.reward, self.settings.gold)}
        own |= {parent for stage in own for parent in recipe.parents(stage)}
        alone = {key: stage for key, stage in recipe.stages.items() if key in own}
        depends = recipe.model_copy(update={"stages": alone}).fingerprint("evaluate")
        reference = f"{self.policies.block} {start and recipe.identify(start)}"
        key = hashlib.sha256(f"{name} {what} {depends} {reference}".encode()).hexdigest()[:32]
        for path in self.run.unfinished.glob(f"{key}-*.jsonl"):
            if hash_file(path) == path.stem.removeprefix(f"{key}-"):
                logger.info("%s: the %s were kept by an evaluation that was interrupted", name, what)
                return read_jsonl(path)
        rows = measure()
        if PartialState().is_main_process:
            path = self.run.unfinished / f"{key}.jsonl"
            write_jsonl(path, rows)
            path.replace(path.with_stem(f"{key}-{hash_file(path)}"))
        return rows

    def score(self, prompts: Sequence[Messages], answers: Sequence[str], done: Sequence[bool]) -> Scores:
        """Score answers with the reward and the gold model, spread over the processes."""
        size = self.settings.score_batch_size
        batches = sorted_batches(_lengths(prompts, answers), size, SHORTEST)
        scores = {}
        for key, model in self.judges.items():

            def work(rows: Sequence[int], model: RewardModel = model) -> list[float]:
                some = [prompts[row] for row in rows], [answers[row] for row in rows], [done[row] for row in rows]
                return model.score(*some, batch_size=size).tolist()

            scores[key] = spread(batches, work, f"{key}: scores")
            _require_finite(scores[key], f"evaluation.{key}", "the reward model gives a score")
        return scores

    def choose_checkpoints(self, stage: str) -> list[tuple[int, Path]]:
        """Choose the recipe's number of saved checkpoints, evenly spaced, before the final step."""
        count = self.settings.checkpoints
        if not count:
            return []
        last, whole = read_json(self.run.training_stats(stage))["summary"]["steps"], dict[int, Path]()
        option = partial(value_of, self.recipe.stages[stage].trainer, self.recipe.args_of(stage))
        every = option("save_steps") if option("save_strategy") == "steps" else 1
        for step, path in list_checkpoints(self.run.checkpoints(stage)).items():
            if every > 1 and step % every:  # of an interruption, without which it would not be there
                continue
            if step < last and damage(path):
                logger.warning("%s: passed over the damaged checkpoint of step %d", stage, step)
            elif step < last:
                whole[step] = path
        wanted = [last * (index + 1) / (count + 1) for index in range(count)]
        chosen = {min(whole, key=lambda step: (abs(step - at), step)) for at in wanted} if whole else set()
        if len(chosen) < count:
            logger.warning("%s: %d checkpoints are asked for, and %d are there to evaluate", stage, count, len(chosen))
        return [(step, whole[step]) for step in sorted(chosen)]

    def measure_policy(
        self, name: str, reference: Sequence[Row] | None, checkpoint: Path | None = None, step: int | None = None
    ) -> list[Row]:
        """Sample one answer to each prompt, measure its KL to the reference, and score it.

        Args:
            reference: the reference's records, in the same order; None for the reference itself.
        """
        label = name if step is None else f"{name} at step {step}"
        with self.policies.use(name, checkpoint) as model:
            what = f"{label}: answers"
            answers = self._sample(name, model, self.prompts, what, checkpoint=checkpoint, keep_hidden=True)
            kls = self.measure_policy_kl(model, answers, f"{label}: KL", reference is None)
        _require_finite(kls, name, "the policy has a KL or an entropy")
        if self.engine:
            require_same(label, answers, [values[4] for values in kls], [values[1] for values in kls])
        records = self._records(answers)
        for record, refusal, values in zip(records, self.chosen_refuses, kls, strict=True):
            record |= dict(zip(("kl", "kl_k1", "kl_k3", "entropy"), values[:4], strict=True), chosen_refuses=refusal)
        for key, scores in self.score(self.prompts, *_texts(answers)).items():
            start = scores if reference is None else [record[key] for record in reference]
            for record, score, base, target in zip(records, scores, start, self.dataset[key], strict=True):
                record |= {key: score, f"{key}_gain": score - base, f"{key}_over_chosen": score - target}
        return records

    def _sample(
        self,
        name: str,
        model: Any,
        prompts: Sequence[Messages],
        progress: str,
        checkpoint: Path | None = None,
        keep_hidden: bool = False,
        **more: Any,
    ) -> list[Completion]:
        length, seed = self.settings.max_new_tokens, self.recipe.seed
        if self.engine:
            adapter = None if name == REFERENCE else checkpoint or self.run.adapter(name)
            return self.engine.generate(adapter, prompts, length, seed, progress, **more)
        more |= {"progress": progress, "keep_hidden": keep_hidden}
        return sample(model, self.tokenizer, prompts, length, self.settings.generation_batch_size, seed, **more)

    @torch.no_grad()
    def measure_policy_kl(
        self, policy: Any, answers: Sequence[Completion], progress: str, same: bool
    ) -> list[list[float]]:
        """Measure the KL of a policy to the reference on its own answers.

        Returns:
            For each answer kl, k1 and k3 in nats, entropy in nats per token, and the log-probability in nats.
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
            return torch.stack([kl.kl, kl.k1, kl.k3, kl.entropy / batch[3].sum(1), kl.log_prob], dim=1).tolist()

        lengths = _lengths(self.prompts, [answer.text for answer in answers])
        return spread(sorted_batches(lengths, size, SHORTEST), work, progress)

    def draw_best_of_n(self, reference: Sequence[Row]) -> list[Row]:
        """Draw more answers of the reference to each prompt, and score them all; the first draw is its own answer."""
        count = self.settings.best_of_n - 1
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        with self.policies.use(REFERENCE) as model:
            draws = [*range(1, count + 1)] * len(self.rows)
            answers = self._sample(REFERENCE, model, prompts, "best of n: answers", draws=draws)
        scores = self.score(prompts, *_texts(answers))
        drawn: list[Row] = []
        for index, record in enumerate(reference):
            own = slice(index * count, (index + 1) * count)
            texts = [record["answer"], *(answer.text for answer in answers[own])]
            drawn.append({"id": record["id"], "answers": texts,
                          **{key: [record[key], *values[own]] for key, values in scores.items()}})  # fmt: skip
        return drawn

    def answer_for_judge(self, name: str) -> list[Row]:
        """Answer the prompts with the second decoding, and score the answers."""
        with self.policies.use(name) as model:
            label = f"{name}: answers for the judge"
            answers = self._sample(name, model, self.prompts, label, decoding=self.settings.judge_decoding)
        records = self._records(answers)
        for key, scores in self.score(self.prompts, *_texts(answers)).items():
            for record, score in zip(records, scores, strict=True):
                record[key] = score
        return records

    def _records(self, answers: Sequence[Completion]) -> list[Row]:
        return [{"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "answer": answer.text,
                 "finished": answer.finished, "answer_tokens": len(answer.ids)}
                for row, answer in zip(self.rows, answers, strict=True)]  # fmt: skip

    def answer_adversarial(self, name: str) -> list[Row]:
        """Answer the adversarial prompts, and look for refusals and unsafe patterns."""
        questions = [prompt["prompt"] for prompt in load_adversarial()[1]]
        with self.policies.use(name) as model:
            label, decoding = f"{name}: adversarial prompts", self.settings.judge_decoding
            answers = self._sample(name, model, questions, label, decoding=decoding, max_prompt_tokens=self.room)
        return [{"text": answer.text, "finished": answer.finished, "refusal": refuses(answer.text),
                 "unsafe": unsafe_patterns(answer.text)} for answer in answers]  # fmt: skip


def _texts(answers: Sequence[Completion]) -> tuple[list[str], list[bool]]:
    """The texts, as the data has them without space around, and which of them ended by themselves."""
    return [answer.text.strip() for answer in answers], [answer.finished for answer in answers]


def _require_finite(values: Sequence[Any], place: str, what: str) -> None:
    if not np.isfinite(values).all():
        raise UserError(place, f"{what} that is not finite", "set evaluation.dtype: float32, or train it again")


def _lengths(prompts: Sequence[Messages], answers: Sequence[str]) -> list[int]:
    """Characters of each conversation, by which batches are sorted."""
    return [sum(len(turn["content"]) for turn in prompt) + len(answer)
            for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip


def choose_prompts(run: RunDir, count: int, seed: int) -> list[Row]:
    """Choose held-out prompts by a seeded hash of each, so that their order in the file does not matter."""
    rows = read_jsonl(run.prompts("test"))
    rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['id']}".encode()).hexdigest())
    if len(rows) < count:
        logger.warning("evaluation.prompts is %d, and there are %d held-out prompts: all of them are used",
                       count, len(rows))  # fmt: skip
    return rows[:count]
