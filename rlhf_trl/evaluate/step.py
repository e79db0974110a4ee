"""Step `evaluate`: every policy and the reference on the same held-out prompts: rewards, KL, frontier, alarms.

Reads the adapters, checkpoints and the test views of `data/`; writes `evaluation/` (`docs/files.md` lists its files).
Under `accelerate launch` the prompts are spread over the processes, with the same result.

    rlhf-trl evaluate recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m rlhf_trl evaluate recipes/hh_gpt2.yaml
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import set_seed

from rlhf_trl.evaluate import figures
from rlhf_trl.evaluate.adversarial import summarise_adversarial
from rlhf_trl.evaluate.alarms import measure_text
from rlhf_trl.evaluate.measure import Measurements
from rlhf_trl.evaluate.trade_off import build_over_optimisation, build_pareto
from rlhf_trl.figures.style import save
from rlhf_trl.figures.training import plot_training
from rlhf_trl.models.base import Policies, start_path
from rlhf_trl.models.rewards import load_reward_model, measure_reward_model
from rlhf_trl.models.tokenizer import recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.stats.intervals import estimate_mean, estimate_ratio, wilson

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HISTOGRAM_BINS = 30
DEFINITIONS = {
    "reward": "score of the reward model for the answer",
    "reward_gain": "reward minus the reference's reward on the same prompt",
    "reward_over_chosen": "reward minus that of the dataset's chosen answer to the same prompt",
    "gold": "score of the gold reward model, which no policy was trained with",
    "gold_gain": "gold score minus the reference's on the same prompt",
    "gold_over_chosen": "gold score minus that of the dataset's chosen answer to the same prompt",
    "kl": "exact KL(policy || reference) over the vocabulary, summed over the answer's tokens, nats per answer",
    "kl_k1": "the same, estimated from the sampled tokens: log policy - log reference, nats per answer",
    "kl_k3": "the same, estimated from the sampled tokens: r - 1 - log r with r = reference / policy, nats per answer",
    "kl_per_token": "kl of all answers divided by their tokens, nats per token",
    "entropy": "entropy of the policy at the positions of all answers divided by their tokens, nats per token",
    "answer_tokens": "tokens of the answer, its end token included",
    "finished": "share of answers that ended by themselves before max_new_tokens",
}

Row = dict[str, Any]


def evaluate(recipe: Recipe, run: RunDir) -> None:
    """Sample, score and measure; every number comes with a 95 % interval over prompts.

    Raises:
        UserError: a stage is not trained yet, or the launch shards the models.
    """
    _require(recipe, run)
    set_seed(recipe.seed)
    settings, state = recipe.evaluation, PartialState()
    with state.main_process_first():
        for stage in (*recipe.policies, settings.reward, settings.gold):
            if stage in recipe.stages:
                start_path(recipe, run, stage)  # merged once, before the other processes read it
    tokenizer = recorded_tokenizer(recipe, run)
    policies = Policies(recipe, run, tokenizer) if recipe.policies else None
    judges = {
        key: load_reward_model(recipe, run, name, policies)
        for key, name in (("reward", settings.reward), ("gold", settings.gold))
        if name
    }
    metrics: Row = {
        "reward_stage": settings.reward, "gold_stage": settings.gold, "reward_model": None, "gold_model": None,
        "policies": {}, "checkpoints": {}, "dataset": {}, "histogram_edges": {},
    }  # fmt: skip
    for key, judge in judges.items():
        measured = measure_reward_model(judge, read_jsonl(run.pairs("test")), settings.score_batch_size)
        metrics[f"{key}_model"] = {"stage": metrics[f"{key}_stage"], **measured}
    results: dict[Path, Any] = {run.metrics: metrics}
    if policies:
        results |= measure_policies(recipe, run, Measurements(recipe, run, policies, judges), metrics)
    if state.is_main_process:
        for path, result in results.items():
            (write_jsonl if path.suffix == ".jsonl" else write_json)(path, result)
        if policies:
            _draw(recipe, run, results)
            for alarm in results[run.over_optimisation]["alarms"]:
                if alarm["raised"]:
                    logger.warning("%s: alarm %s: %s", alarm["policy"], alarm["alarm"], alarm["says"])
        shutil.rmtree(run.unfinished, ignore_errors=True)
    state.wait_for_everyone()
    state.destroy_process_group()


def _require(recipe: Recipe, run: RunDir) -> None:
    run.require(recipe, "prepare", "prepare RECIPE")
    for stage in dict.fromkeys((*recipe.policies, recipe.evaluation.reward, recipe.evaluation.gold)):
        if stage in recipe.stages:
            run.require(recipe, stage, f"train RECIPE {stage}")
            check_weights(run.adapter(stage) if recipe.model_block(stage).get("use_peft") else run.model(stage))
    if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & {k for k, v in os.environ.items() if v == "true"}:
        raise UserError("--accelerate", "evaluation holds whole models in every process", "launch it with ddp")


def measure_policies(recipe: Recipe, run: RunDir, of: Measurements, metrics: Row) -> dict[Path, Any]:
    """Measure every policy and checkpoint; fill `metrics` and give the content of the step's other files."""
    settings, names = recipe.evaluation, (REFERENCE, *recipe.policies)
    reference = of.keep(REFERENCE, "answers", partial(of.measure_policy, REFERENCE, None))
    records: dict[tuple[str, int | None], list[Row]] = {(REFERENCE, None): reference}
    for name in recipe.policies:
        for step, folder in (*of.choose_checkpoints(name), (None, None)):
            what = "answers" if step is None else f"answers at step {step}"
            records[name, step] = of.keep(name, what, partial(of.measure_policy, name, reference, folder, step))
    draws: list[Row] = []
    if of.judges and settings.best_of_n > 1:
        draws = of.keep(REFERENCE, "answers for best-of-n", partial(of.draw_best_of_n, reference))
    results: dict[Path, Any] = {run.completions(name, step): rows for (name, step), rows in records.items()}
    if draws:
        results[run.best_of_n] = draws
    if settings.judge_decoding:
        results |= {run.judge_answers(name): of.keep(name, "answers for the judge", partial(of.answer_for_judge, name))
                    for name in names}  # fmt: skip
    if settings.adversarial:
        answers = {name: of.keep(name, "answers to adversarial prompts", partial(of.answer_adversarial, name))
                   for name in names}  # fmt: skip
        results[run.adversarial_answers], results[run.adversarial] = summarise_adversarial(answers)
    metrics["decoding"] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": settings.max_new_tokens,
                           "prompts": len(of.rows), "seed": recipe.seed}  # fmt: skip
    metrics["definitions"] = DEFINITIONS
    metrics["dataset"] = {key: estimate_mean(scores).as_dict() for key, scores in of.dataset.items()}
    edges = {
        key: np.histogram_bin_edges([row[key] for rows in records.values() for row in rows], bins=HISTOGRAM_BINS)
        for key in of.judges
    }
    metrics["histogram_edges"] = {key: places.tolist() for key, places in edges.items()}
    for (name, at), rows in records.items():
        summary = summarise(rows, edges)
        if at is None:
            metrics["policies"][name] = summary
        else:
            metrics["checkpoints"].setdefault(name, []).append({"step": at, **summary})
    for name, entries in metrics["checkpoints"].items():
        steps = read_json(run.training_stats(name))["summary"]["steps"]
        entries.append({"step": steps, **metrics["policies"][name]})
    pareto = build_pareto(recipe, records, draws) if of.judges else None
    over = build_over_optimisation(recipe, metrics, records, pareto)
    results |= {run.pareto: pareto} if pareto else {}
    results |= {run.over_optimisation: over, run.final_results: conclude(recipe, metrics, pareto, over)}
    return results


def summarise(records: Sequence[Row], edges: Mapping[str, np.ndarray]) -> Row:
    """Turn the records of one policy into estimates, score distributions and the state of its texts."""
    columns = {key: [row[key] for row in records] for key in records[0] if key in DEFINITIONS and key != "finished"}
    tokens = columns["answer_tokens"]
    entropies = [row["entropy"] * row["answer_tokens"] for row in records]
    return {
        **{key: estimate_mean(values).as_dict() for key, values in columns.items()},
        "kl_per_token": estimate_ratio(columns["kl"], tokens).as_dict(),
        "entropy": estimate_ratio(entropies, tokens).as_dict(),
        "finished": wilson(sum(row["finished"] for row in records), len(records)).as_dict(),
        "distributions": {
            key: {"counts": np.histogram(columns[key], bins=places)[0].tolist(),
                  "quantiles": {str(level): float(np.quantile(columns[key], level)) for level in QUANTILES}}
            for key, places in edges.items()
        },
        "health": measure_text(records),
    }  # fmt: skip


def conclude(recipe: Recipe, metrics: Row, pareto: Row | None, over: Row) -> Row:
    """Gather the main numbers of each policy."""
    keys = ("kl", "reward_gain", "gold_gain", "answer_tokens", "finished")
    policies = {
        name: {
            "trainer": recipe.stages[name].trainer,
            **{key: metrics["policies"][name][key] for key in keys if key in metrics["policies"][name]},
            "alarms": [alarm["alarm"] for alarm in over["alarms"] if alarm["policy"] == name and alarm["raised"]],
            "on_front": {axis: point["on_front"] for axis, frontier in (pareto["axes"] if pareto else {}).items()
                         for point in frontier["points"] if (point["policy"], point["step"]) == (name, None)},
        }
        for name in recipe.policies
    }  # fmt: skip
    return {"reward_stage": metrics["reward_stage"], "gold_stage": metrics["gold_stage"], "policies": policies}


def _draw(recipe: Recipe, run: RunDir, results: Mapping[Path, Any]) -> None:
    stats = {
        stage: read_json(run.training_stats(stage)) for stage in recipe.stages if run.training_stats(stage).exists()
    }
    drawn = {
        "kl_drift": figures.plot_kl(results[run.metrics]),
        "reward_distributions": figures.plot_distributions(results[run.metrics]),
        "pareto": figures.plot_pareto(results.get(run.pareto, {"axes": {}})),
        "over_optimisation": figures.plot_over_optimisation(results[run.over_optimisation]),
        "training_curves": plot_training(stats),
        "reward_kl_tradeoff": figures.plot_reward_kl_tradeoff(stats),
    }
    for name, figure in drawn.items():
        save(figure, run.figure(name))
