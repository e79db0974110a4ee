"""A finished run for the report to read: the files that the earlier steps write, with invented numbers, no model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from evaluation_fixtures import JUDGES, comparison, error_analysis, invent, invent_winrate

from rlhf_trl.compare.step import build
from rlhf_trl.recipe.recipe import Recipe, expand_sweeps
from rlhf_trl.run.documents import seal_outputs
from rlhf_trl.run.files import read_json, write_json, write_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.intervals import wilson

STAGES: dict[str, Any] = {
    "sft": {"trainer": "sft", "args": {"num_train_epochs": 1, "learning_rate": 2e-4}},
    "rm": {"trainer": "reward", "init": "sft", "args": {"learning_rate": 1e-4}},
    "dpo": {"trainer": "dpo", "init": "sft", "args": {"learning_rate": 5e-6}},
    "grpo": {"trainer": "grpo", "init": "sft", "reward": "rm", "args": {"num_generations": 4, "beta": 0.05}},
    "ppo": {"trainer": "ppo", "init": "sft", "reward": "rm", "args": {"kl_coef": 0.05}},
}
GOLD = {"gold": {"trainer": "reward", "init": "sft", "half": "second", "args": {"learning_rate": 1e-4}}}
SWEEP = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.03, 0.1, 0.3]}}}
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


def recipe_of(stages: dict[str, Any], **rest: Any) -> Recipe:
    model = {"model_name_or_path": "openai-community/gpt2", "use_peft": True, "lora_r": 16}
    return expand_sweeps(Recipe.model_validate({"name": "a-run", "model": model, "stages": stages, **rest}))


def write_run(root, stages=STAGES, reward="rm", evaluation=None, prompts=PROMPTS, answers=ANSWERS, count=60,
              subsets=SUBSETS, accuracy=(0.71, 0.55), steps=120, judge=None):  # fmt: skip
    """Write a run of these stages, judged by one of `JUDGES`; `accuracy` is that of the reward model and of the
    length-only baseline."""
    recipe = recipe_of(
        stages,
        name=root.name,
        data={"source": "Anthropic/hh-rlhf", "subsets": list(subsets)},
        evaluation={"reward": reward, "prompts": count, **(evaluation or {})},
        judge=JUDGES[judge] if judge else None,
    )
    run, draw = RunDir(root), random.Random(7)
    write_json(run.recipe, recipe.model_dump())
    write_json(run.env, {**environment(), "plan": recipe.plan, "sources": recipe.sources})
    write_json(run.summary, summary(subsets))
    for stage in recipe.stages:
        write_json(run.training_stats(stage), training_stats(stage, recipe.stages[stage].trainer, steps, draw))
    write_evaluation(run, invent(recipe, prompts, answers, count, subsets, accuracy))
    if judge:
        result = invent_winrate(recipe, run, judge)
        write_json(run.winrate, {**result, "evaluation": recipe.fingerprint("evaluate")})
        if result["status"] == "complete" and result["judge"]["kind"] == "openai":
            write_jsonl(run.judge_replies(result["judge"]["id"].replace("/", "-")), [])
    for stage in recipe.reward_stages:
        write_json(run.error_analysis(stage), error_analysis(stage))
        write_jsonl(run.error_examples(stage), error_examples(prompts, answers))
    if recipe.reward_stages:
        write_json(run.reward_comparison, comparison(recipe.reward_stages))
    write_json(run.comparison, build(recipe, run))
    for index, step in enumerate(recipe.plan[:-1]):
        if step == "judge" and read_json(run.winrate)["status"] != "complete":
            continue
        finished = f"2026-11-{9 + index:02}T11:14:07+0000"
        marker = {"step": step, "fingerprint": recipe.fingerprint(step), "finished": finished, "outputs": {}}
        marker |= {"sealed": seal_outputs({})}
        write_json(run.done(step), {**marker, "seconds": round(8.4 * 2.1**index, 3)})
    return recipe, run


def follow(document: Any, pointer: str) -> Any:
    """Follow a JSON Pointer as RFC 6901 says, with nothing of the package's own code."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def error_examples(prompts: Sequence[Any], answers: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for kind in ("confident_error", "near_tie"):
        for rank, prompt in enumerate(prompts):
            scores = {"chosen_score": -0.4, "rejected_score": 0.9 - 0.1 * rank, "margin": -1.3 + 0.1 * rank}
            texts = {"prompt": prompt, "chosen": answers[rank % len(answers)], "rejected": answers[0]}
            rows.append({"kind": kind, "rank": rank + 1, "prompt_id": f"prompt-{rank}", **texts, **scores})
    return rows


def write_evaluation(run: RunDir, found: dict[str, Any]) -> None:
    for name in ("metrics", "pareto", "over_optimisation", "adversarial"):
        if found.get(name):
            write_json(run.evaluation / f"{name}.json", found[name])
    if "adversarial_answers" in found:
        write_jsonl(run.adversarial_answers, found["adversarial_answers"])
    for (policy, step), rows in found["completions"].items():
        write_jsonl(run.completions(policy, step), rows)


def environment() -> dict[str, Any]:
    versions = {"rlhf-trl": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "trl": "1.12.0"}
    machine = {"platform": "Linux-6.1-x86_64", "cpus": 16, "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB"]}
    return {"versions": versions, "git": "9f3c2b7d1e", "git_dirty": False, **machine}


def summary(subsets: Sequence[str]) -> dict[str, Any]:
    dropped, splits = sum(count for _, count in REASONS.values()), {}
    for split, count in (("train", 1480), ("test", 95)):
        own = {subset: {**pairs(count), "share": 1 / len(subsets)} for subset in subsets}
        tokens = dict.fromkeys(("prompt", "chosen", "rejected", "total"), QUANTILES)
        splits[split] = {**pairs(count * len(subsets)), "subsets": own, "tokens": tokens}
    of_subsets = {subset: tally(1629, dropped) for subset in subsets}
    definitions = {"dropped": "rows whose first reason it is", "prompts": "none is in both splits"}
    all_of = tally(1629 * len(subsets), dropped)
    return {**all_of, "subsets": of_subsets, "splits": splits, "definitions": definitions}


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
            kl = (6 if trainer == "ppo" else 0.12) * done + abs(noise) * (1 if trainer == "ppo" else 0.03)
            row |= {"reward": -0.5 + 1.2 * done**0.5 + draw.gauss(0, 0.06), "kl": kl, "entropy": 3.1 - done + noise}
            row |= {"answer_tokens": 60.0, "tokens": 9_600 * step}
        about = {"step": step, "epoch": done, "seconds": 1.9 * step, "peak_memory_bytes": 2_100_000_000, "log": {}}
        history.append({**about, **row})
        if step % (steps // 3 or 1) == 0 and trainer in ("reward", "dpo", "sft"):
            validation = {"validation_loss": 0.71 * math.exp(-0.8 * done)}
            if trainer != "sft":
                validation |= {"validation_reward_accuracy": 0.5 + 0.2 * done, "validation_reward_margin": 0.8 * done}
            history.append({**about, **validation})
    finished = {
        "steps": steps, "rows": 8 * steps, "seconds": 1.9 * steps, "peak_memory_bytes": 2_100_000_000, "processes": 1,
        "cpu_threads": 8, "device": "cpu", "samples_per_step": 64, "stopped": None, "seed": 42,
        "trainable_parameters": 811_008,
    }  # fmt: skip
    kl = {"grpo": "k3 estimate, mean over answer tokens, nats per token", "ppo": "k1 estimate, nats per answer"}
    definitions = {"loss": "training loss of the library's trainer", "kl": kl.get(trainer, "not logged")}
    return {"stage": stage, "trainer": trainer, "definitions": definitions, "history": history, "summary": finished}
