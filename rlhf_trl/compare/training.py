"""What the histories of training runs say about stability, convergence and compute, and which of it means the same.

Trainers log different quantities under one name: a DPO loss is no GRPO loss, and GRPO's KL is per token where PPO's is
per answer. Each number therefore carries its meaning in words; only numbers with equal meanings stand beside each
other. Functions from `training_stats.json` to the parts of `comparison_results.json`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from ruamel.yaml import YAML

from rlhf_trl.recipe.library import read_options
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE

Row = dict[str, Any]
Stats = Mapping[str, Row]
Better = Literal["higher", "lower"]
# Share of the way from the lowest start to the runs' median best reward that counts as reached, where the recipe names
# no reward: the best of all runs may be one lucky row.
NEAR_BEST = 0.9
# In median absolute changes from row to row, which hardly feel the events. Of runs of independent normal noise with 50
# to 500 rows 0.3 to 0.5 % have a spike; of spikes of 8 standard deviations 94 to 98 % are found.
SPIKE = 5.25
# Likewise; such noise counts as diverging in 0.7 % of runs of 6 rows, and next to none of 20 or more.
WORSE = 6.0
# A spike is at least this part of the curve's range.
VISIBLE = 0.05
# Numbers that are equal but for their last digits differ by less, as a share of the largest.
ROUNDING = 1e-9
# Losses that training is to lower. Those of grpo and ppo are surrogates around 0, whose level says nothing.
FALLING = ("sft", "reward", "dpo")
SAMPLES = {"sft": "answers of the data", "reward": "pairs", "dpo": "pairs", "grpo": "sampled answers",
           "ppo": "sampled answers"}  # fmt: skip
LONGEST = {"grpo": "max_completion_length", "ppo": "response_length"}
# Other options that say which answers are sampled, and what is their reward.
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "reward_weights")
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))


# --- what a number means ---------------------------------------------------------------------------------------------


def describe_meanings(recipe: Recipe, stage: str, stats: Row) -> dict[str, str | None]:
    """Say in words what the stage's loss, reward and KL are, and on what it trained; None for what it does not log."""
    trainer, args = stats["trainer"], recipe.args_of(stage)
    given = _options(args, [key for key in sorted(args) if key not in TERMS["same_loss"]])
    loss = f"loss of the {trainer} trainer" + (f" with {given}" if given else "")
    meanings: dict[str, str | None] = {"loss": loss, "reward": None, "kl": None, "device": describe_device(stats)}
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


# --- stability -------------------------------------------------------------------------------------------------------


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Take the running median of 5 rows, of 3 next to the ends, and the ends as they are, (N,) -> (N,).

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    curve = np.array(values, dtype=np.float64)
    if curve.size == 0 or not np.isfinite(curve).all():
        raise ValueError("a curve needs at least one value, and finite ones")
    smoothed = curve.copy()
    for half in (1, 2):
        if curve.size > 2 * half:
            smoothed[half:-half] = np.median(sliding_window_view(curve, 2 * half + 1), axis=1)
    return smoothed


def describe_curve(steps: Sequence[int], values: Sequence[float], better: Better) -> Row:
    """Describe how steadily a run went, in the unit of the values (`terms.yaml`); None where there are too few rows.

    Of independent normal noise, on any slow trend, `noise_variance` is 0.89 of the variance and `oscillation` 2/3.
    `spikes` are never the first and the last row, and two side by side, but not three. `diverging`: it ends worse than
    it started, and worse than its smoothed best by more than can be noise. Start and end are the medians of the first
    and the last fifth of the rows, 3 at least; False with fewer than 6 rows.
    """
    smoothed = smooth(values)
    curve = np.array(values, dtype=np.float64)
    apart, changes = curve - smoothed, np.diff(curve)
    usual = max(float(np.median(np.abs(changes))) if changes.size else 0.0, ROUNDING * float(np.abs(curve).max()))
    turns, noise = np.diff(np.sign(changes)), apart[1:-1]
    spikes = (np.abs(apart) > SPIKE * usual) & (np.abs(apart) > VISIBLE * np.ptp(curve))
    sign = 1 if better == "higher" else -1
    progress, few = sign * smoothed, max(3, math.ceil(0.2 * curve.size))
    start, end = (sign * np.median(part) for part in (curve[:few], curve[-few:]))
    return {
        "variance": float(curve.var(ddof=1)) if curve.size > 1 else None,
        "noise_variance": float(noise.var(ddof=1)) if noise.size > 1 else None,
        "oscillation": float((np.abs(turns) == 2).mean()) if turns.size else None,
        "drawdown": float((np.maximum.accumulate(progress) - progress).max()),
        "final_minus_best": float(progress[-1] - progress.max()),
        "spikes": [step for step, spike in zip(steps, spikes.tolist(), strict=True) if spike],
        "diverging": bool(curve.size >= 6 and end < start and progress.max() - end > WORSE * usual),
    }


def measure_stability(stats: Row, meanings: Row) -> Row:
    """Describe loss, reward and KL; None for what the stage does not log."""
    directions: dict[str, Better] = {"loss": "lower", "reward": "higher"}
    summary, found = stats["summary"], dict[str, Any].fromkeys(directions)
    for key, better in directions.items():
        steps, values = column(stats, key) if meanings[key] else ([], [])
        if values:
            # A logged value is a mean over the steps since the last one: the more samples, the less noise.
            samples = round(summary["samples_per_step"] * summary["steps"] / len(values))
            found[key] = {"samples_per_value": samples, **describe_curve(steps, values, better)}
    _, kls = column(stats, "kl")
    return {**found, "kl": {"highest": max(kls), "last": kls[-1]} if kls else None}


def find(stats: Row, stability: Row) -> list[str]:
    """Say what stands out in a run: a loss or reward that diverged or leapt, and why it was stopped."""
    found = []
    for key in ("loss", "reward"):
        of = stability[key]
        if of and of["diverging"] and (key == "reward" or stats["trainer"] in FALLING):
            found.append(f"its {key} ends worse than it began")
        elif of and of["spikes"]:
            more = f" and {len(of['spikes']) - 5} more" if len(of["spikes"]) > 5 else ""
            found.append(f"its {key} leaps at step {', '.join(map(str, of['spikes'][:5]))}{more}")
    stopped = stats["summary"]["stopped"]
    return [*found, f"it was stopped: {stopped}"] if stopped else found


# --- compute ---------------------------------------------------------------------------------------------------------


def measure_efficiency(recipe: Recipe, stage: str, all_stats: Stats) -> Row:
    """Measure speed, memory, and compute on one scale: seconds of a device, with the stages it builds on."""
    stats = all_stats[stage]
    summary, counted = stats["summary"], [row for row in stats["history"] if "tokens" in row]
    generated, inputs = sampled_tokens(recipe, stage, stats), needed(recipe, stage)
    spent = {name: all_stats[name]["summary"]["seconds"] * all_stats[name]["summary"]["processes"] for name in inputs}
    return {
        "seconds": summary["seconds"],
        "seconds_per_step": summary["seconds"] / summary["steps"],
        "samples": SAMPLES[stats["trainer"]],
        "samples_per_step": summary["samples_per_step"],
        "samples_per_second": summary["samples_per_step"] * summary["steps"] / summary["seconds"],
        "tokens_per_second": counted[-1]["tokens"] / counted[-1]["seconds"] if counted else None,
        "generated_tokens": generated and generated[1][-1],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "device_seconds": spent[stage],
        "device_seconds_with_inputs": sum(spent.values()),
        "devices": sorted({describe_device(all_stats[name]) for name in inputs}),
    }


def needed(recipe: Recipe, stage: str) -> list[str]:
    """The stages that have to be trained to get this one, itself last."""
    return [*recipe.parents(stage), stage]


def sampled_tokens(recipe: Recipe, stage: str, stats: Row) -> tuple[list[int], list[float]] | None:
    """Count the tokens of all answers sampled up to each of some steps, from 0 to the last; None for a trainer that
    samples none. Steps have the length that the next row logs, those after the last row its own."""
    rows = [row for row in stats["history"] if "answer_tokens" in row]
    if stats["trainer"] not in LONGEST or not rows:
        return None
    # A batch of answers serves `num_iterations` steps.
    answers = stats["summary"]["samples_per_step"] / recipe.args_of(stage).get("num_iterations", 1)
    steps = [0, *(row["step"] for row in rows), stats["summary"]["steps"]]
    lengths = [row["answer_tokens"] for row in [*rows, rows[-1]]]
    return steps, [0.0, *np.cumsum(np.diff(steps) * answers * lengths).tolist()]


# --- convergence -----------------------------------------------------------------------------------------------------


def measure_convergence(recipe: Recipe, all_stats: Stats, meanings: Mapping[str, Row], metrics: Row) -> dict[str, Row]:
    """Measure when each run of `meanings` first reached a reward and kept it. The reward of evaluated checkpoints, in
    `metrics.json`, means the same for every trainer, and is taken where there are any."""
    series = {stage: _rewards(recipe, stage, all_stats[stage], metrics, meanings[stage]) for stage in meanings}
    found: dict[str, Row] = {}
    for stage, own in series.items():
        if own is None:
            reason = "it trains on no reward of sampled answers, and no checkpoint was evaluated by a reward model"
            found[stage] = {"meaning": None, "why_not": reason}
            continue
        alike = [of for of in series.values() if of and of["meaning"] == own["meaning"]]
        threshold = recipe.comparison.threshold
        if threshold is None:
            lowest, best = min(of["start"] for of in alike), np.median([smooth(of["values"]).max() for of in alike])
            threshold = lowest + NEAR_BEST * max(float(best) - lowest, 0.0)  # evaluated rewards may all be lower
        result = reach(own["costs"], own["values"], threshold, recipe.comparison.hold)
        seconds = own["costs"]["seconds"][-1]  # 0 where nothing was logged
        rate = (result["final"] - own["start"]) / seconds if seconds else None
        found[stage] = {"meaning": own["meaning"], "start": own["start"], **result, "rate": rate}
    return found


def reach(costs: Mapping[str, Sequence[float] | None], values: Sequence[float], threshold: float, hold: int) -> Row:
    """Tell what a run took until its smoothed reward was at a threshold for `hold` rows; one number a row everywhere.

    Args:
        costs: `steps`, `seconds` and `tokens`, rising; None where the method samples no tokens.

    Returns:
        `threshold`, `hold`, `final` (the last smoothed reward), `reached`, and each of the costs at the first of those
        rows; where the threshold was not reached, at the last row from which it could have been held.
    """
    smoothed = smooth(values)
    enough, latest = (smoothed >= threshold).tolist(), len(smoothed) - hold
    row = next((first for first in range(latest + 1) if all(enough[first : first + hold])), None)
    at = latest if row is None else row
    took = {name: None if of is None else of[at] if at >= 0 else 0 for name, of in costs.items()}
    known = {"threshold": threshold, "hold": hold, "final": float(smoothed[-1]), "reached": row is not None}
    return {**known, **took}


def _rewards(recipe: Recipe, stage: str, stats: Row, metrics: Row, meanings: Row) -> Row | None:
    """The rewards of a run, of its evaluated checkpoints or as logged, with what they mean, steps, seconds and sampled
    tokens, and what it started from; None without any."""
    history, generated = stats["history"], sampled_tokens(recipe, stage, stats)
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
    tokens = np.interp(steps, *generated).tolist() if generated else None
    costs = {"steps": steps, "seconds": seconds.tolist(), "tokens": tokens}
    return {"meaning": meaning, "costs": costs, "values": values, "start": start}


def column(stats: Row, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a quantity was logged, and its values."""
    rows = [row for row in stats["history"] if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]
