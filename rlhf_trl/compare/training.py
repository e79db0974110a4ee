"""What the histories of training runs say about stability, convergence and compute, and which of it means the same.

Trainers log different quantities under one name: a DPO loss is no GRPO loss, and GRPO's KL is per token where PPO's is
per answer. Each number therefore carries its meaning in words; only numbers with equal meanings stand beside each
other. Pure functions from `training_stats.json` to the parts of `comparison_results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from rlhf_trl.compare.dynamics import (
    Better,
    area_until,
    describe_convergence,
    describe_stability,
    find_jumps,
    find_spikes,
    is_diverging,
    smooth,
)
from rlhf_trl.recipe.library import read_options
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE

Row = dict[str, Any]
Stats = Mapping[str, Row]
# Share of the way from the lowest start to the runs' median best reward that counts as reached, where the recipe names
# no reward: the best of all runs may be one lucky row.
NEAR_BEST = 0.9
# A run is slow where a sample takes this many times the median of the others of its trainer; without any, of all those
# on the same devices, of which only an order of magnitude says something.
SLOW, SLOW_AMONG_OTHERS = 2.0, 10.0
# In shorter histories noise alone makes jumps.
FEWEST_FOR_JUMPS = 20
# Losses that training is to lower. Those of grpo and ppo are surrogates around 0, whose level says nothing.
FALLING = ("sft", "reward", "dpo")
# A gradient norm that ends this many times above its own median has left its course.
RUNAWAY = 10.0
SAMPLES = {"sft": "answers of the data", "reward": "pairs", "dpo": "pairs", "grpo": "sampled answers",
           "ppo": "sampled answers"}  # fmt: skip
LONGEST = {"grpo": "max_completion_length", "ppo": "response_length"}
# Other options that say which answers are sampled, and what is their reward.
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "reward_weights")
DIRECTIONS: tuple[tuple[str, Better], ...] = (("loss", "lower"), ("reward", "higher"))
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))


def describe_meanings(recipe: Recipe, stage: str, stats: Row) -> dict[str, str | None]:
    """Say in words what the stage's loss, reward, KL, seconds and pace are; None for what it does not log."""
    trainer, args, count = stats["trainer"], recipe.args_of(stage), stats["summary"]["processes"]
    given = _options(args, [key for key in sorted(args) if key not in TERMS["same_loss"]])
    meanings: dict[str, str | None] = {
        "loss": f"loss of the {trainer} trainer" + (f" with {given}" if given else ""),
        "reward": None,
        "kl": None,
        "seconds": describe_device(stats),
        "pace": f"{SAMPLES[trainer]}, {count} process{'' if count == 1 else 'es'} on {describe_device(stats)}",
    }
    if trainer in LONGEST:
        options = read_options(trainer)
        warmth, longest = (args.get(key, options[key].default) for key in ("temperature", LONGEST[trainer]))
        sampled = f"answers to training prompts sampled at temperature {warmth:g}, up to {longest} tokens"
        others = _options(args, [key for key in SAMPLING if key in args])
        sampled += f", {others}" if others else ""
        if trainer == "ppo" and args.get("stop_token") != "eos":  # GRPO's answers always end there
            sampled += ", not ended by their end token"
        start = recipe.stages[stage].init or "the base model"
        meanings["reward"] = f"mean score by {recipe.stages[stage].reward} of {sampled}, from {start} on"
        kind = args.get("kl_estimator", options["kl_estimator"].default) if trainer == "ppo" else "k3"
        meanings["kl"] = f"{stats['definitions']['kl']}; {kind}, {sampled}"
    return meanings


def describe_device(stats: Row) -> str:
    """Say what one process of a run trained on."""
    device, threads = stats["summary"]["device"], stats["summary"]["cpu_threads"]
    return f"the CPU, with {threads} thread{'' if threads == 1 else 's'} a process" if device == "cpu" else str(device)


def _options(args: Row, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {args[key]}" for key in keys)


def measure_stability(stats: Row, meanings: Row) -> Row:
    """Describe loss and reward, the jumps of the KL, and what else the trainer logs about itself."""
    summary, history = stats["summary"], stats["history"]
    # A logged value is a mean over the steps since the last one: the more samples, the less noise.
    logged = max(1, len(column(stats, "loss")[0]))
    found: Row = {"samples_per_value": round(summary["samples_per_step"] * summary["steps"] / logged), "signs": {}}
    for key, better in DIRECTIONS:
        steps, values = column(stats, key) if meanings[key] else ([], [])
        events = values and {"spikes": find_spikes(steps, values), "diverging": is_diverging(values, better)}
        found[key] = {**describe_stability(values, better), **events} if events else None
    steps, values = column(stats, "kl")
    found["kl"] = {"jumps": find_jumps(steps, values), "highest": max(values), "last": values[-1]} if values else None
    for key in TERMS["signs"]:
        known = [value for row in history if (value := row.get(key, row["log"].get(key))) is not None]
        if known:
            found["signs"][key] = {"first": known[0], "last": known[-1]}
    return found


def measure_efficiency(recipe: Recipe, stage: str, all_stats: Stats) -> Row:
    """Measure speed, memory, and compute on one scale: seconds of a device, with the stages it builds on."""
    summary = all_stats[stage]["summary"]
    seconds, steps = summary["seconds"], summary["steps"]
    samples = summary["samples_per_step"] * steps
    counted = [row for row in all_stats[stage]["history"] if "tokens" in row]
    generated = generated_tokens(recipe, stage, all_stats[stage])
    inputs = needed(recipe, stage)
    spent = {name: all_stats[name]["summary"]["seconds"] * all_stats[name]["summary"]["processes"] for name in inputs}
    return {
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "samples": samples,
        "samples_per_step": summary["samples_per_step"],
        "samples_per_second": samples / seconds,
        "tokens_per_second": counted[-1]["tokens"] / counted[-1]["seconds"] if counted else None,
        "generated_tokens": generated and generated["total"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "device_seconds": spent[stage],
        "device_seconds_with_inputs": sum(spent.values()),
        "inputs": inputs[:-1],
        "devices": sorted({describe_device(all_stats[name]) for name in inputs}),
    }


def needed(recipe: Recipe, stage: str) -> list[str]:
    """The stages that have to be trained to get this one, itself last."""
    return [*recipe.parents(stage), stage]


def generated_tokens(recipe: Recipe, stage: str, stats: Row) -> Row | None:
    """Count the tokens that a run had sampled: `steps` and `tokens` at each row that logs an answer's length, and
    `total`, with the steps after the last of them at its length; None for a trainer that samples none."""
    rows = [row for row in stats["history"] if "answer_tokens" in row]
    if stats["trainer"] not in LONGEST or not rows:
        return None
    # A batch of answers serves `num_iterations` steps.
    answers = stats["summary"]["samples_per_step"] / recipe.args_of(stage).get("num_iterations", 1)
    steps, lengths = [0, *(row["step"] for row in rows)], [row["answer_tokens"] for row in rows]
    tokens = np.cumsum(
        [0.0, *(answers * (b - a) * each for (a, b), each in zip(pairwise(steps), lengths, strict=True))]
    )
    tail = (stats["summary"]["steps"] - steps[-1]) * answers * lengths[-1]
    return {"steps": steps, "tokens": tokens.tolist(), "total": float(tokens[-1] + tail)}


def measure_convergence(recipe: Recipe, all_stats: Stats, meanings: Mapping[str, Row], metrics: Row) -> dict[str, Row]:
    """Measure when each run first reached a reward and kept it.

    Args:
        all_stats: of every stage of the recipe.
        meanings: of the stages to compare.
        metrics: content of `metrics.json`. The reward of an evaluated checkpoint means the same for every trainer, and
            is taken where there are any.
    """
    series = {stage: _rewards(recipe, stage, all_stats[stage], metrics, meanings[stage]) for stage in meanings}
    found: dict[str, Row] = {}
    for stage, own in series.items():
        if own is None:
            reason = "it trains on no reward of sampled answers, and no checkpoint was evaluated by a reward model"
            found[stage] = {"meaning": None, "why_not": reason}
            continue
        alike = [of for of in series.values() if of and of["meaning"] == own["meaning"]]
        threshold, seconds = recipe.comparison.threshold, own["costs"]["seconds"]
        if threshold is None:
            lowest, best = min(of["start"] for of in alike), np.median([smooth(of["values"]).max() for of in alike])
            threshold = lowest + NEAR_BEST * (float(best) - lowest)
        common = min(of["costs"]["seconds"][-1] for of in alike)
        result = describe_convergence(own["costs"], own["values"], threshold, recipe.comparison.hold)
        found[stage] = {
            "meaning": own["meaning"],
            "start": own["start"],
            **result,
            "rate": (result["final"] - own["start"]) / seconds[-1],
            "area": area_until(seconds, own["values"], own["start"], common),
            "area_seconds": common,
        }
    return found


def _rewards(recipe: Recipe, stage: str, stats: Row, metrics: Row, meanings: Row) -> Row | None:
    """The rewards of a run, of its evaluated checkpoints or as logged, with what they mean, steps, seconds and sampled
    tokens, and what it started from; None without any."""
    history, generated = stats["history"], generated_tokens(recipe, stage, stats)
    checkpoints = [entry for entry in metrics["checkpoints"].get(stage, ()) if "reward" in entry]
    if checkpoints:
        steps, values = ([entry["step"] for entry in checkpoints], [entry["reward"]["mean"] for entry in checkpoints])
        start = metrics["policies"][REFERENCE]["reward"]["mean"]
        meaning = "mean score on the held-out prompts, by checkpoint"
    else:
        (steps, values), meaning = column(stats, "reward"), meanings["reward"]
        if not values or meaning is None:
            return None
        start = values[0]
    seconds = np.interp(steps, [0, *(row["step"] for row in history)], [0.0, *(row["seconds"] for row in history)])
    tokens = np.interp(steps, generated["steps"], generated["tokens"]).tolist() if generated else None
    costs = {"steps": steps, "seconds": seconds.tolist(), "tokens": tokens}
    return {"meaning": meaning, "costs": costs, "values": values, "start": start}


def find(stages: Mapping[str, Row], all_stats: Stats, furthest: float) -> dict[str, list[Row]]:
    """Name what stands out in each run: `spike`, `diverging`, `jump`, `slow`, `stopped`, `identical`.

    Args:
        stages: what was measured of each compared stage.
        furthest: KL, in nats per answer, beyond which a policy has left its reference (`evaluation.worst.kl`).
    """
    return {name: [{"finding": word, "quantity": quantity, "says": says, "steps": list(steps)}
                   for word, quantity, says, steps in _findings(name, stages, all_stats, furthest)]
            for name in stages}  # fmt: skip


def _findings(
    name: str, stages: Mapping[str, Row], all_stats: Stats, furthest: float
) -> list[tuple[str, str, str, Sequence[int]]]:
    """`finding`, `quantity`, `says` and `steps` of what stands out in one run."""
    stage, stats = stages[name], all_stats[name]
    found: list[tuple[str, str, str, Sequence[int]]] = []
    for key in ("loss", "reward"):
        of = stage["stability"][key]
        if of and of["diverging"] and (key == "reward" or stage["trainer"] in FALLING):
            found.append(("diverging", key, f"its {key} ends worse than it began", ()))
        elif of and of["spikes"]:
            found.append(("spike", key, f"its {key} leaps at {_steps(of['spikes'])}", of["spikes"]))
    _, norms = column(stats, "grad_norm")
    if len(norms) >= 6 and np.median(norms[-3:]) > RUNAWAY * np.median(norms):
        words = f"its gradient norm ends {RUNAWAY:g} times above its median or more"
        found.append(("diverging", "grad_norm", words, ()))
    far = _kl_per_answer(stage, stats)
    if far is not None and far > furthest:
        words = f"its KL ends at {far:.0f} nats per answer, beyond evaluation.worst.kl ({furthest:g})"
        found.append(("diverging", "kl", words, ()))
    jumps = stage["stability"]["kl"]["jumps"] if stage["stability"]["kl"] else []
    if jumps and len(column(stats, "kl")[0]) >= FEWEST_FOR_JUMPS:
        found.append(("jump", "kl", f"its KL jumps at {_steps(jumps)}", jumps))
    if stats["summary"]["stopped"]:
        found.append(("stopped", "kl", f"it was stopped: {stats['summary']['stopped']}", ()))
    slow = _slowness(name, stages)
    if slow:
        found.append(("slow", "samples_per_second", slow, ()))
    same = [other for other in stages if other != name and _same_history(stats, all_stats[other])]
    if same:
        found.append(("identical", "history", f"its training is that of {', '.join(same)}", ()))
    return found


def _kl_per_answer(stage: Row, stats: Row) -> float | None:
    """The policy's KL in nats per answer: as evaluated, or else the median of the last three logged, of which GRPO's
    are per token. None without either."""
    if stage["quality"]:
        return float(stage["quality"]["kl"]["mean"])
    rows = [row for row in stats["history"] if "kl" in row][-3:]
    kls = [row["kl"] * (row["answer_tokens"] if stats["trainer"] == "grpo" else 1) for row in rows]
    return float(np.median(kls)) if kls else None


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:5])
    return f"step{'s' if len(steps) > 1 else ''} {shown}" + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def _slowness(name: str, stages: Mapping[str, Row]) -> str | None:
    """Say how slow a run is beside those that do the same on the same devices, if it is."""
    own, device = stages[name], stages[name]["meanings"]["seconds"]
    others = [of for other, of in stages.items() if other != name and of["meanings"]["seconds"] == device]
    same = [of for of in others if of["trainer"] == own["trainer"]
            and of["meanings"]["pace"] == own["meanings"]["pace"]]  # fmt: skip
    if not others:
        return None
    whose, limit = (f"other {own['trainer']} runs", SLOW) if same else ("other runs", SLOW_AMONG_OTHERS)
    usual = float(np.median([of["efficiency"]["samples_per_second"] for of in same or others]))
    times = usual / own["efficiency"]["samples_per_second"]
    return f"a sample takes {times:.1f} times the median of the {whose}" if times > limit else None


def _same_history(one: Row, other: Row) -> bool:
    """Whether two runs logged the same, step for step, but for time and memory."""
    measured = ("seconds", "peak_memory_bytes", "log")
    plain = [[{k: v for k, v in row.items() if k not in measured} for row in of["history"]] for of in (one, other)]
    return one["trainer"] == other["trainer"] and bool(plain[0]) and plain[0] == plain[1]


def column(stats: Row, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a quantity was logged, and its values."""
    rows = [row for row in stats["history"] if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]
