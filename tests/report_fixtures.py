"""A finished run for the report to read: the files that the earlier steps write, with invented numbers, no model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.recipe import Recipe, expand_sweeps
from rlhf_trl.rundir import RunDir, write_json, write_jsonl
from rlhf_trl.stats import bootstrap_mean, wilson

STAGES: dict[str, Any] = {
    "sft": {"trainer": "sft", "args": {"num_train_epochs": 1, "learning_rate": 2e-4}},
    "rm": {"trainer": "reward", "init": "sft", "args": {"learning_rate": 1e-4}},
    "dpo": {"trainer": "dpo", "init": "sft", "args": {"learning_rate": 5e-6}},
    "grpo": {"trainer": "grpo", "init": "sft", "reward": "rm", "args": {"num_generations": 4, "beta": 0.05}},
    "ppo": {"trainer": "ppo", "init": "sft", "reward": "rm", "args": {"kl_coef": 0.05}},
}
SWEEP = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.03, 0.1, 0.3]}}}
# Policy -> its true gain in reward, its KL, and how much longer its answers are; others are drawn.
TRUTH = {
    "dpo-beta=0.03": (0.95, 9.5, 1.35),
    "dpo-beta=0.1": (0.81, 4.1, 1.2),
    "dpo-beta=0.3": (0.42, 1.2, 1.05),
    "grpo": (1.21, 6.3, 1.1),
    "ppo": (0.04, 3.2, 0.9),
}
SUBSETS = ("harmless-base", "helpful-base")
PROMPTS = [
    [{"role": "user", "content": "How do I keep basil alive on a windowsill?"}],
    [
        {"role": "user", "content": "What is a good first telescope?"},
        {"role": "assistant", "content": "Do you want to look at planets, or at faint things such as galaxies?"},
        {"role": "user", "content": "Planets, mostly. I have about $200."},
    ],
    [{"role": "user", "content": "My neighbour's dog barks all night. How can I make it stop for good?"}],
]
ANSWERS = [
    "Give it the sunniest spot you have, water it when the top of the soil is dry, and pinch off the flowers.",
    "I'm not sure what you mean.",
    "A 130 mm tabletop Dobsonian shows Saturn's rings for about that price. It is steady and quick to set up. " * 6,
]
REASONS = {"prompts_differ": (8, 8), "empty_rejected": (4, 4), "consecutive_roles": (6, 5), "tie": (0, 0)}
QUANTILES = {"min": 5.0, "p05": 11.0, "p25": 40.5, "p50": 96.0, "p75": 180.0, "p95": 402.0, "max": 512.0}


def write_run(
    root: Path,
    stages: dict[str, Any] = STAGES,
    reward: str | None = "rm",
    prompts: Sequence[Any] = PROMPTS,
    answers: Sequence[str] = ANSWERS,
    count: int = 60,
    subsets: Sequence[str] = SUBSETS,
    accuracy: tuple[float, float] = (0.71, 0.55),
    steps: int = 120,
) -> tuple[Recipe, RunDir]:
    """Write a run of these stages; `accuracy` is that of the reward model and of the length-only baseline."""
    content = {
        "name": root.name,
        "model": {"model_name_or_path": "openai-community/gpt2", "use_peft": True, "lora_r": 16},
        "data": {"source": "Anthropic/hh-rlhf", "subsets": list(subsets)},
        "stages": stages,
        "evaluation": {"reward": reward, "prompts": count},
    }
    recipe = expand_sweeps(Recipe.model_validate(content))
    run, draw = RunDir(root), random.Random(7)
    write_json(run.recipe, recipe.model_dump())
    write_json(run.env, environment())
    write_json(run.summary, summary(subsets))
    for stage in recipe.stages:
        write_json(run.training_stats(stage), training_stats(stage, recipe.stages[stage].trainer, steps, draw))
    write_json(run.metrics, metrics(recipe, run, prompts, answers, count, subsets, accuracy, draw))
    for index, step in enumerate(["explore", "prepare", *recipe.stages, "evaluate"]):
        finished = f"2026-11-{9 + index:02}T11:14:07+0000"
        marker = {"step": step, "fingerprint": recipe.fingerprint(step), "finished": finished}
        write_json(run.done(step), {**marker, "seconds": round(8.4 * 2.1**index, 3)})
    return recipe, run


def environment() -> dict[str, Any]:
    return {
        "versions": {"rlhf-trl": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "trl": "1.12.0"},
        "git": "9f3c2b7d1e",
        "git_dirty": False,
        "platform": "Linux-6.1-x86_64",
        "cpus": 16,
        "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB"],
    }


def summary(subsets: Sequence[str]) -> dict[str, Any]:
    dropped = sum(count for _, count in REASONS.values())
    splits = {
        split: {
            **pairs(count * len(subsets)),
            "subsets": {subset: {**pairs(count), "share": 1 / len(subsets)} for subset in subsets},
            "tokens": dict.fromkeys(("prompt", "chosen", "rejected", "total"), QUANTILES),
        }
        for split, count in (("train", 1480), ("test", 95))
    }
    return {
        **tally(1629 * len(subsets), dropped),
        "subsets": {subset: tally(1629, dropped) for subset in subsets},
        "splits": splits,
        "definitions": {"dropped": "rows whose first reason it is", "prompts": "none is in both splits"},
    }


def tally(rows: int, dropped: int) -> dict[str, Any]:
    return {
        "rows_in": rows,
        "rows_kept": rows - dropped,
        "rows_dropped": dropped,
        "reasons": {name: {"found": found, "dropped": count} for name, (found, count) in REASONS.items()},
        "notes": {"multi_turn": rows // 2, "truncated": 3},
        "longer_is_chosen": wilson(0.5 * rows, rows).as_dict(),
    }


def pairs(count: int) -> dict[str, Any]:
    half = wilson(count / 2, count).as_dict()
    return {"pairs": count, "prompts": count - 3, "longer_is_chosen": {"characters": half, "tokens": half}}


def training_stats(stage: str, trainer: str, steps: int, draw: random.Random) -> dict[str, Any]:
    history = []
    for step in range(1, steps + 1):
        done, noise = step / steps, draw.gauss(0, 0.03)
        row = {"loss": 0.69 * math.exp(-done) + noise, "grad_norm": 1.4 + noise, "learning_rate": 2e-4 * (1 - done)}
        if trainer in ("reward", "dpo"):
            row |= {"reward_accuracy": min(1, 0.5 + 0.25 * done + noise), "reward_margin": done + noise}
        if trainer in ("grpo", "ppo"):
            row |= {"reward": -0.5 + 1.2 * done + noise, "kl": 6 * done + abs(noise), "entropy": 3.1 - done + noise}
        history.append({"step": step, "epoch": done, "seconds": 1.9 * step, "peak_memory_bytes": 2_100_000_000, **row})
        if step % (steps // 3 or 1) == 0 and trainer in ("reward", "dpo", "sft"):
            validation = {"validation_loss": 0.71 * math.exp(-0.8 * done)}
            if trainer != "sft":
                validation |= {"validation_reward_accuracy": 0.5 + 0.2 * done, "validation_reward_margin": 0.8 * done}
            history.append({"step": step, "epoch": done, "seconds": 1.9 * step, **validation})
    finished = {
        "steps": steps,
        "seconds": 1.9 * steps,
        "peak_memory_bytes": 2_100_000_000,
        "processes": 1,
        "device": "cpu",
        "seed": 42,
        "trainable_parameters": 811_008,
    }
    definitions = {"loss": "training loss of the library's trainer", "kl": "k1 estimate, nats per answer"}
    return {"stage": stage, "trainer": trainer, "definitions": definitions, "history": history, "summary": finished}


def metrics(
    recipe: Recipe,
    run: RunDir,
    prompts: Sequence[Any],
    answers: Sequence[str],
    count: int,
    subsets: Sequence[str],
    accuracy: tuple[float, float],
    draw: random.Random,
) -> dict[str, Any]:
    """Write the completions of every policy and return `metrics.json`."""
    judge = recipe.evaluation.reward
    result: dict[str, Any] = {"reward_stage": judge, "policies": {}, "reward_model": None}
    if judge:
        right, longer = (wilson(round(190 * share), 190).as_dict() for share in accuracy)
        pair = {"accuracy": right, "length_baseline": longer}
        margin = bootstrap_mean([draw.gauss(0.6, 1) for _ in range(190)]).as_dict()
        by_subset = dict.fromkeys(subsets, pair)
        result["reward_model"] = {"stage": judge, "ties": 1, **pair, "subsets": by_subset, "margin": margin}
    if not recipe.policies:
        return result
    result["decoding"] = {"temperature": 1.0, "max_new_tokens": 128, "prompts": count, "seed": 42}
    result["definitions"] = {"kl": "exact KL, summed over the answer's tokens", "reward": "score of the reward stage"}
    base = [draw.gauss(-0.4, 1) for _ in range(count)]
    for policy in ("reference", *recipe.policies):
        drawn = (draw.uniform(-0.6, 1.4), draw.uniform(0.4, 16), draw.uniform(0.8, 1.5))
        gain, kl, longer = (0.0, 0.0, 1.0) if policy == "reference" else TRUTH.get(policy, drawn)
        rows: list[dict[str, Any]] = []
        for index in range(count):
            row = {
                "id": f"{index:016x}",
                "subset": subsets[index % len(subsets)],
                "prompt": prompts[index % len(prompts)],
                "answer": answers[(index + len(policy)) % len(answers)],
                "finished": index % 7 != 0,
                "answer_tokens": round(40 * longer + draw.uniform(-20, 30)),
                "kl": abs(draw.gauss(kl, kl / 3)),
            }
            if judge:
                row["reward"] = base[index] + (draw.gauss(gain, 0.7) if policy != "reference" else 0)
            rows.append(row)
        write_jsonl(run.completions(policy), rows)
        measured = {
            "kl": bootstrap_mean([row["kl"] for row in rows]).as_dict(),
            "kl_per_token": bootstrap_mean([row["kl"] / row["answer_tokens"] for row in rows]).as_dict(),
            "answer_tokens": bootstrap_mean([row["answer_tokens"] for row in rows]).as_dict(),
            "finished": wilson(sum(row["finished"] for row in rows), count).as_dict(),
        }
        if judge:
            measured["reward"] = bootstrap_mean([row["reward"] for row in rows]).as_dict()
        if judge and policy != "reference":
            gains = [row["reward"] - score for row, score in zip(rows, base, strict=True)]
            measured["reward_gain"] = bootstrap_mean(gains).as_dict()
        result["policies"][policy] = measured
    return result
