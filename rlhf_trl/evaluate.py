"""Step `evaluate`: every policy and the reference on the same held-out prompts, and the reward model on held-out
pairs.

Reads the adapters and the test views of `data/`; writes `evaluation/completions-<policy>.jsonl` and
`evaluation/metrics.json`.

    rlhf-trl evaluate recipes/demo.yaml
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_trl.models import Policies, RewardModel, encode, load_reward_model, pad_right, recorded_tokenizer
from rlhf_trl.recipe import Recipe
from rlhf_trl.rundir import RunDir, read_jsonl, write_json, write_jsonl
from rlhf_trl.sampling import Completion, answer_logits, sample, token_kl
from rlhf_trl.stats import bootstrap_mean, wilson

logger = logging.getLogger(__name__)

REFERENCE = "reference"
# Rows of a full-vocabulary forward pass at a time; bounds memory at 2 * rows * answer tokens * vocabulary * 4 bytes.
KL_BATCH = 8


def evaluate(recipe: Recipe, run: RunDir) -> None:
    """Sample, score and measure; every number comes with a 95 % interval over prompts.

    Raises:
        UserError: a stage is not trained yet.
    """
    run.require(recipe, "prepare", "prepare RECIPE")
    settings = recipe.evaluation
    for stage in (*recipe.policies, settings.reward):
        if stage:
            run.require(recipe, stage, f"train RECIPE {stage}")
    set_seed(recipe.seed)
    tokenizer = recorded_tokenizer(recipe, run)
    rewards = load_reward_model(recipe, run, settings.reward) if settings.reward else None
    metrics: dict[str, Any] = {"reward_stage": settings.reward, "policies": {}, "reward_model": None}
    if rewards:
        metrics["reward_model"] = measure_reward_model(recipe, run, rewards)
    if recipe.policies:
        rows = choose_prompts(run, settings.prompts, recipe.seed)
        metrics["decoding"] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": settings.max_new_tokens,
                               "prompts": len(rows), "seed": recipe.seed}  # fmt: skip
        metrics["definitions"] = DEFINITIONS
        metrics["policies"] = measure_policies(recipe, run, tokenizer, rewards, rows)
    write_json(run.metrics, metrics)


DEFINITIONS = {
    "reward": "score of the reward stage for the answer",
    "reward_gain": "reward minus the reference's reward on the same prompt",
    "kl": "exact KL(policy || reference) over the vocabulary, summed over the answer's tokens, nats per answer",
    "kl_per_token": "kl divided by the answer's tokens, nats per token",
    "answer_tokens": "tokens of the answer, its end token included",
    "finished": "share of answers that ended by themselves before max_new_tokens",
}


def choose_prompts(run: RunDir, count: int, seed: int) -> list[dict[str, Any]]:
    """Choose held-out prompts by a seeded hash of each, so that their order in the file does not matter."""
    rows = read_jsonl(run.prompts("test"))
    rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['id']}".encode()).hexdigest())
    if len(rows) < count:
        logger.warning(
            "evaluation.prompts is %d, and there are %d held-out prompts: all of them are used", count, len(rows)
        )
    return rows[:count]


def measure_policies(
    recipe: Recipe,
    run: RunDir,
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardModel | None,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Measure the reference and every policy on the same prompts, all of them adapters on one base."""
    policies = Policies(recipe, run, recipe.policies, tokenizer)
    settings, prompts = recipe.evaluation, [row["prompt"] for row in rows]
    measured: dict[str, Any] = {}
    reference_scores = None
    for name in (REFERENCE, *recipe.policies):
        with policies.use(name) as model:
            limits = (settings.max_new_tokens, settings.generation_batch_size)
            answers = sample(model, tokenizer, prompts, *limits, recipe.seed, progress=f"{name}: answers")
        kl = [0.0] * len(rows) if name == REFERENCE else measure_kl(policies, name, prompts, answers)
        records = [
            {"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "answer": answer.text,
             "finished": answer.finished, "answer_tokens": len(answer.ids), "kl": value}
            for row, answer, value in zip(rows, answers, kl, strict=True)
        ]  # fmt: skip
        if rewards:
            scores = rewards.score(
                prompts, [a.text for a in answers], [a.finished for a in answers], settings.score_batch_size
            )
            for record, score, start in zip(
                records, scores.tolist(), reference_scores or scores.tolist(), strict=True
            ):
                record |= {"reward": score, "reward_gain": score - start}
        write_jsonl(run.completions(name), records)
        measured[name] = summarise(records, recipe.seed)
        if name == REFERENCE and rewards:
            reference_scores = [record["reward"] for record in records]
    return measured


def summarise(records: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Turn the records of one policy into estimates."""
    means: dict[str, Any] = {
        key: bootstrap_mean([row[key] for row in records], seed).as_dict()
        for key in ("kl", "answer_tokens", "reward", "reward_gain")
        if key in records[0]
    }
    return {
        **means,
        "kl_per_token": bootstrap_mean([row["kl"] / row["answer_tokens"] for row in records], seed).as_dict(),
        "finished": wilson(sum(row["finished"] for row in records), len(records)).as_dict(),
    }


@torch.no_grad()
def measure_kl(policies: Policies, name: str, prompts: Sequence[Any], answers: Sequence[Completion]) -> list[float]:
    """Measure the exact KL of a policy to the reference on its own answers, nats per answer, in the order of the
    prompts."""
    tokenizer = policies.tokenizer
    kl = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(answers[index].ids))
    with policies.use(name) as policy:
        for start in tqdm(range(0, len(order), KL_BATCH), desc=f"{name}: KL", leave=False):
            rows = order[start : start + KL_BATCH]
            prompt = tokenizer.pad(
                {"input_ids": [encode(tokenizer, prompts[row])[0] for row in rows]}, return_tensors="pt"
            )
            answer_ids, answer_mask = pad_right([answers[row].ids for row in rows], tokenizer.pad_token_id)
            batch = [tensor.to(policy.device) for tensor in
                     (prompt["input_ids"], answer_ids, prompt["attention_mask"], answer_mask)]  # fmt: skip
            logits = answer_logits(policy, *batch)
            with policies.use(REFERENCE) as reference:
                ref_logits = answer_logits(reference, *batch)
            for row, value in zip(rows, token_kl(logits, ref_logits, batch[3]).tolist(), strict=True):
                kl[row] = value
    return kl


def measure_reward_model(recipe: Recipe, run: RunDir, rewards: RewardModel) -> dict[str, Any]:
    """Measure accuracy on the held-out pairs, ties half, beside "the longer answer is chosen" on the same pairs, by
    subset."""
    pairs = read_jsonl(run.pairs("test"))
    prompts, finished = [pair["prompt"] for pair in pairs], [True] * len(pairs)
    batch = recipe.evaluation.score_batch_size
    chosen, rejected = (
        rewards.score(prompts, [pair[side] for pair in pairs], finished, batch) for side in ("chosen", "rejected")
    )
    right = ((chosen > rejected).double() + 0.5 * (chosen == rejected)).tolist()
    longer = [_longer(pair) for pair in pairs]
    subsets = sorted({pair["subset"] for pair in pairs})
    result: dict[str, Any] = {
        "stage": recipe.evaluation.reward,
        "ties": int((chosen == rejected).sum()),
        "subsets": {},
    }
    for subset in ("all", *subsets):
        rows = [index for index, pair in enumerate(pairs) if subset in ("all", pair["subset"])]
        entry = {
            "accuracy": wilson(sum(right[row] for row in rows), len(rows)).as_dict(),
            "length_baseline": wilson(sum(longer[row] for row in rows), len(rows)).as_dict(),
            "over_baseline": bootstrap_mean([right[row] - longer[row] for row in rows], recipe.seed).as_dict(),
        }
        if subset == "all":
            result |= entry
        else:
            result["subsets"][subset] = entry
    result["margin"] = bootstrap_mean((chosen - rejected).tolist(), recipe.seed).as_dict()
    return result


def _longer(pair: dict[str, Any]) -> float:
    chosen, rejected = len(pair["chosen"]), len(pair["rejected"])
    return 0.5 if chosen == rejected else float(chosen > rejected)
