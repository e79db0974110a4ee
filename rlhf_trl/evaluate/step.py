"""Step `evaluate`: every policy and the reference on the same held-out prompts: rewards, KL, frontier, alarms.

Reads the adapters, checkpoints and the test views of `data/`; writes `evaluation/` (`docs/files.md` lists its files).
Under `accelerate launch` the prompts are spread over the processes, with the same result.

    rlhf-trl evaluate recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m rlhf_trl evaluate recipes/hh_gpt2.yaml
"""

import logging
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed

from rlhf_trl.evaluate import figures
from rlhf_trl.evaluate.measure import Measurements
from rlhf_trl.evaluate.results import (
    build_over_optimisation,
    build_pareto,
    conclude,
    describe_policies,
    summarise_adversarial,
)
from rlhf_trl.figures.style import save
from rlhf_trl.figures.training import plot_training
from rlhf_trl.models.base import Policies, below_path, start_path
from rlhf_trl.models.rewards import load_reward_model, measure_reward_model
from rlhf_trl.models.tokenizer import recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.stats.intervals import estimate_mean

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def evaluate(recipe: Recipe, run: RunDir) -> None:
    """Sample, score and measure; every number comes with a 95 % interval over prompts.

    UserError where a stage is not trained yet, or the launch shards the models."""
    _require(recipe, run)
    set_seed(recipe.seed)
    settings, state = recipe.evaluation, PartialState()
    with state.main_process_first():
        # Merged once, before the other processes read it: the reference, and what each adapter lies on.
        for policy in recipe.policies[:1]:
            start_path(recipe, run, policy)
        for stage in (*recipe.policies, settings.reward, settings.gold):
            if stage in recipe.stages:
                below_path(recipe, run, stage)
    tokenizer = recorded_tokenizer(recipe, run)
    policies = Policies(recipe, run, tokenizer) if recipe.policies else None
    judges = {
        key: load_reward_model(recipe, run, name, policies)
        for key, name in (("reward", settings.reward), ("gold", settings.gold))
        if name
    }
    metrics: Row = {
        "reward_stage": settings.reward, "gold_stage": settings.gold, "reward_model": None, "gold_model": None,
        "policies": {}, "checkpoints": {}, "dataset": {},
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
    steps = {name: read_json(run.training_stats(name))["summary"]["steps"] for name in recipe.policies}
    metrics |= {
        "decoding": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": settings.max_new_tokens,
                     "prompts": len(of.rows), "seed": recipe.seed},
        "dataset": {key: estimate_mean(scores).as_dict() for key, scores in of.dataset.items()},
        **describe_policies(records, steps),
    }  # fmt: skip
    pareto = build_pareto(recipe, records, draws) if of.judges else None
    over = build_over_optimisation(recipe, metrics, records, pareto)
    results |= {run.pareto: pareto} if pareto else {}
    results |= {run.over_optimisation: over, run.final_results: conclude(recipe, metrics, pareto, over)}
    return results


def _draw(recipe: Recipe, run: RunDir, results: Mapping[Path, Any]) -> None:
    stats = {name: read_json(run.training_stats(name)) for name in recipe.stages if run.training_stats(name).exists()}
    save(figures.plot_kl(results[run.metrics]), run.figure("kl_drift"))
    save(figures.plot_distributions(results[run.metrics]), run.figure("reward_distributions"))
    save(figures.plot_pareto(results.get(run.pareto, {"axes": {}})), run.figure("pareto"))
    save(figures.plot_over_optimisation(results[run.over_optimisation]), run.figure("over_optimisation"))
    save(plot_training(stats), run.figure("training_curves"))
    save(figures.plot_reward_kl_tradeoff(stats), run.figure("reward_kl_tradeoff"))
