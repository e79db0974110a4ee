"""What the histories of training runs say about stability, convergence and compute, and which of it means the same.

Pure functions from `training_stats.json` to the parts of `comparison_results.json`. Trainers log different quantities
under one name: a DPO loss is no GRPO loss, and GRPO's KL is per token where PPO's is per answer. Each number therefore
carries its meaning in words; only numbers with equal meanings stand beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rlhf_trl.dynamics import (
    area_until,
    describe_convergence,
    describe_stability,
    find_jumps,
    find_spikes,
    is_diverging,
    smooth,
)
from rlhf_trl.options import read_options
from rlhf_trl.recipe import Recipe

Row = dict[str, Any]
Stats = Mapping[str, Row]
# Share of the way from the lowest start to the runs' median best reward that counts as reached, where the recipe names
# no reward: the best of all runs may be one lucky row.
NEAR_BEST = 0.9
# A run is slow where its step takes this many times the median of the runs it is held against.
SLOW = 2.0
# Losses that training is to lower. Those of grpo and ppo are surrogates around 0, whose level says nothing.
FALLING = ("sft", "reward", "dpo")
# A gradient norm that ends this many times above its own median has left its course.
RUNAWAY = 10.0
# Options that change how a loss falls, but not what it is.
# fmt: off
SAME_LOSS = frozenset({
    "seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim",
    "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "total_episodes", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_mini_batches", "num_ppo_epochs", "local_rollout_forward_batch_size", "value_init", "disable_dropout",
    "logging_steps", "eval_steps", "save_steps", "eval_strategy", "save_strategy", "save_total_limit",
    "logging_strategy", "logging_first_step", "bf16", "tf32", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "dataloader_num_workers", "report_to", "run_name",
})
# fmt: on
SAMPLES = {
    "sft": "answers of the data",
    "reward": "pairs",
    "dpo": "pairs",
    "grpo": "sampled answers",
    "ppo": "sampled answers",
}  # fmt: skip
LONGEST = {"grpo": "max_completion_length", "ppo": "response_length"}
# What a trainer logs about its own health -> what it is.
SIGNS = {
    "clip_fraction": "share of answer tokens that the surrogate's clip holds",
    "explained_variance": "share of the returns' variance that the value model explains",
    "frac_reward_zero_std": "share of GRPO's groups whose answers all have one reward and teach nothing",
    "logps/chosen": "log-probability of the chosen answers under the policy, nats",
    "grad_norm": "norm of the gradient before clipping",
}


def describe_meanings(recipe: Recipe, stage: str, stats: Row) -> dict[str, str | None]:
    """Say in words what the stage's loss, reward, KL, samples and seconds are; None for what it does not log."""
    trainer, args, summary = stats["trainer"], recipe.args_of(stage), stats["summary"]
    given = ", ".join(f"{key} {value}" for key, value in sorted(args.items()) if key not in SAME_LOSS)
    devices = f"{summary['processes']} {'process' if summary['processes'] == 1 else 'processes'}"
    threads = f", threads of each: {summary['cpu_threads']}" if summary["device"] == "cpu" else ""
    meanings: dict[str, str | None] = {
        "loss": f"loss of the {trainer} trainer" + (f" with {given}" if given else ""),
        "reward": None,
        "kl": None,
        "samples": SAMPLES[trainer],
        "seconds": f"{devices} on {summary['device']}{threads}",
    }
    if trainer in LONGEST:
        options = read_options(trainer)
        warmth, longest = (args.get(key, options[key].default) for key in ("temperature", LONGEST[trainer]))
        sampled = f"answers to training prompts sampled at temperature {warmth:g}, up to {longest} tokens"
        meanings["reward"] = f"mean score by {recipe.stages[stage].reward} of {sampled}"
        kind = args.get("kl_estimator", options["kl_estimator"].default) if trainer == "ppo" else "k3"
        meanings["kl"] = f"{stats['definitions']['kl']}; {kind}, {sampled}"
    return meanings


def measure_stability(stats: Row, meanings: Row) -> Row:
    """Describe loss and reward, the jumps of the KL, and what else the trainer logs about itself."""
    found: Row = {}
    for key, better in (("loss", "lower"), ("reward", "higher")):
        steps, values = column(stats, key) if meanings[key] else ([], [])
        found[key] = (values and {
            **describe_stability(values, better),  # type: ignore[arg-type]
            "spikes": find_spikes(steps, values),
            "diverging": is_diverging(values, better),  # type: ignore[arg-type]
        }) or None  # fmt: skip
    steps, values = column(stats, "kl")
    found["kl"] = {"jumps": find_jumps(steps, values), "highest": max(values), "last": values[-1]} if values else None
    found["signs"] = {}
    for key in SIGNS:
        rows = [row.get(key, row["log"].get(key)) for row in stats["history"]]
        known = [value for value in rows if value is not None]
        if known:
            found["signs"][key] = {"first": known[0], "last": known[-1]}
    return found


def measure_efficiency(recipe: Recipe, stage: str, all_stats: Stats) -> Row:
    """Measure speed, memory, and compute on one scale: seconds of a device, those of the stages it builds on
    included."""
    stats = all_stats[stage]
    summary, history = stats["summary"], stats["history"]
    seconds, steps = summary["seconds"], summary["steps"]
    samples = summary["samples_per_step"] * steps
    tokens = max((row["tokens"] for row in history if "tokens" in row), default=None)
    generated = generated_tokens(recipe, stage, stats)
    return {
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "samples": samples,
        "samples_per_step": summary["samples_per_step"],
        "samples_per_second": samples / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens and tokens / seconds,
        "generated_tokens": generated[-1] if generated else None,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "device_seconds": seconds * summary["processes"],
        "device_seconds_with_inputs": sum(
            all_stats[name]["summary"]["seconds"] * all_stats[name]["summary"]["processes"]
            for name in needed(recipe, stage)
        ),
        "inputs": needed(recipe, stage)[:-1],
    }


def needed(recipe: Recipe, stage: str) -> list[str]:
    """The stages that have to be trained to get this one, itself last."""
    found: list[str] = []
    for link in (recipe.stages[stage].init, recipe.stages[stage].reward):
        found += [name for name in (needed(recipe, link) if link else []) if name not in found]
    return [*found, stage]


def generated_tokens(recipe: Recipe, stage: str, stats: Row) -> list[float] | None:
    """Count the tokens that a run had sampled by each row of its history; None for a trainer that samples none."""
    if stats["trainer"] not in LONGEST:
        return None
    # A batch of answers serves `num_iterations` steps.
    answers = stats["summary"]["samples_per_step"] / recipe.args_of(stage).get("num_iterations", 1)
    rows = [{"step": 0}, *stats["history"]]
    return np.cumsum(
        [(b["step"] - a["step"]) * answers * b.get("answer_tokens", 0) for a, b in pairwise(rows)]
    ).tolist()


def measure_convergence(
    recipe: Recipe, all_stats: Stats, meanings: Mapping[str, Row], checkpoints: Mapping[str, Sequence[Row]]
) -> dict[str, Row]:
    """Measure when each run first reached a reward and kept it.

    Args:
        all_stats: of every stage of the recipe.
        meanings: of the stages to compare.
        checkpoints: the evaluated checkpoints of each policy, `metrics.json#/checkpoints`; may lack policies. Their
            reward means the same for every trainer, and is taken where there are any.
    """
    rows = {stage: _rewards(recipe, stage, all_stats[stage], checkpoints.get(stage, ())) for stage in meanings}
    words = {
        stage: "mean score on the held-out prompts, by checkpoint"
        if checkpoints.get(stage)
        else meanings[stage]["reward"]
        for stage in meanings
    }
    found: dict[str, Row] = {}
    for stage, (steps, seconds, tokens, values) in rows.items():
        if words[stage] is None or not values:
            found[stage] = {
                "meaning": None,
                "why_not": "it trains on no reward of sampled answers, and no checkpoint was evaluated",
            }
            continue
        alike = [smooth(rows[other][3]) for other in rows if words[other] == words[stage]]
        start, best = min(float(of[0]) for of in alike), float(np.median([of.max() for of in alike]))
        threshold = recipe.comparison.threshold
        threshold = start + NEAR_BEST * (best - start) if threshold is None else threshold
        hold = recipe.comparison.hold
        common = min(rows[other][1][-1] for other in rows if words[other] == words[stage])
        found[stage] = {
            "meaning": words[stage],
            "start": start,
            **describe_convergence(steps, seconds, tokens, values, start, threshold, hold),
            "area_common": area_until(seconds, values, start, common),
            "common_seconds": common,
        }
    return found


def _rewards(
    recipe: Recipe, stage: str, stats: Row, checkpoints: Sequence[Row]
) -> tuple[list[int], list[float], list[float] | None, list[float]]:
    """Step, seconds, sampled tokens and reward of each logged row or evaluated checkpoint."""
    history, generated = stats["history"], generated_tokens(recipe, stage, stats)
    if checkpoints and history:
        logged, steps = [row["step"] for row in history], [entry["step"] for entry in checkpoints]
        seconds = np.interp(steps, [0, *logged], [0.0, *(row["seconds"] for row in history)]).tolist()
        tokens = np.interp(steps, [0, *logged], [0.0, *generated]).tolist() if generated else None
        return steps, seconds, tokens, [entry["reward"]["mean"] for entry in checkpoints]
    rows = [index for index, row in enumerate(history) if "reward" in row]
    return (
        [history[index]["step"] for index in rows],
        [history[index]["seconds"] for index in rows],
        [generated[index] for index in rows] if generated else None,
        [history[index]["reward"] for index in rows],
    )


def find(stages: Mapping[str, Row], all_stats: Stats, furthest: float) -> dict[str, list[Row]]:
    """Name what stands out in each run: `spike`, `diverging`, `jump`, `slow`, `stopped`, `identical`.

    Args:
        stages: what was measured of each compared stage.
        furthest: KL, in nats per answer, beyond which a policy has left its reference (`evaluation.worst.kl`).
    """
    found: dict[str, list[Row]] = {name: [] for name in stages}
    for name, stage in stages.items():
        stability = stage["stability"]
        for key in ("loss", "reward"):
            of = stability[key]
            if of and of["diverging"] and (key == "reward" or stage["trainer"] in FALLING):
                found[name].append(_finding("diverging", key, f"its {key} ends worse than it began"))
            elif of and of["spikes"]:
                found[name].append(_finding("spike", key, f"its {key} leaps at {_steps(of['spikes'])}", of["spikes"]))
        _, norms = column(all_stats[name], "grad_norm")
        if len(norms) >= 6 and np.median(norms[-3:]) > RUNAWAY * np.median(norms):
            words = f"its gradient norm ends {RUNAWAY:g} times above its median or more"
            found[name].append(_finding("diverging", "grad_norm", words))
        far = _kl_per_answer(all_stats[name])
        if far is not None and far > furthest:
            words = f"its KL ends at {far:.0f} nats per answer, beyond evaluation.worst.kl ({furthest:g})"
            found[name].append(_finding("diverging", "kl", words))
        jumps = stability["kl"]["jumps"] if stability["kl"] else []
        if jumps:
            found[name].append(_finding("jump", "kl", f"its KL jumps at {_steps(jumps)}", jumps))
        reason = all_stats[name]["summary"]["stopped"]
        if reason:
            found[name].append(_finding("stopped", "kl", f"it was stopped: {reason}"))
        pace = _slowness(name, stages)
        if pace is not None and pace > SLOW:
            words = f"a step takes {pace:.1f} times the median of the other runs"
            found[name].append(_finding("slow", "seconds_per_step", words))
        same = [other for other in stages if other != name and _alike(all_stats[name], all_stats[other])]
        if same:
            found[name].append(_finding("identical", "history", f"its training is that of {', '.join(same)}"))
    return found


def _kl_per_answer(stats: Row) -> float | None:
    """The last logged KL in nats per answer: GRPO's is per token. None where the trainer logs none."""
    rows = [row for row in stats["history"] if "kl" in row]
    if not rows:
        return None
    return float(rows[-1]["kl"] * (rows[-1]["answer_tokens"] if stats["trainer"] == "grpo" else 1))


def _finding(word: str, quantity: str, says: str, steps: Sequence[int] = ()) -> Row:
    return {"finding": word, "quantity": quantity, "says": says, "steps": list(steps)}


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    return f"step{'s' if len(steps) > 1 else ''} {shown}" + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def _slowness(name: str, stages: Mapping[str, Row]) -> float | None:
    """Seconds of a step over the median of the others on the same devices: of its own trainer, or else of all."""
    own = stages[name]
    others = [of for other, of in stages.items()
              if other != name and of["meanings"]["seconds"] == own["meanings"]["seconds"]]  # fmt: skip
    others = [of for of in others if of["trainer"] == own["trainer"]] or others
    pace = own["efficiency"]["seconds_per_step"]
    return pace / float(np.median([of["efficiency"]["seconds_per_step"] for of in others])) if others else None


def _alike(one: Row, other: Row) -> bool:
    """Whether two runs logged the same, step for step, but for time and memory."""
    measured = ("seconds", "peak_memory_bytes", "log")
    plain = [[{k: v for k, v in row.items() if k not in measured} for row in of["history"]] for of in (one, other)]
    return one["trainer"] == other["trainer"] and bool(plain[0]) and plain[0] == plain[1]


def column(stats: Row, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a quantity was logged, and its values."""
    rows = [row for row in stats["history"] if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]
