"""Recipes: every mistake is named with place and remedy, all at once; sweeps and fingerprints keep their promise."""

import copy
import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, SequenceNode

from rlhf_trl.recipe.errors import Problem, UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe

GOOD = """\
name: good
seed: 1
model:
  model_name_or_path: builtin:tiny
  use_peft: true
  lora_dropout: 0.0
data:
  source: builtin:demo
  max_length: 128
  test_fraction: 0.2
stages:
  sft:
    trainer: sft
    model:
      lora_r: 4
    args:
      learning_rate: 3e-3
  rm:
    trainer: reward
    init: sft
    args:
      center_rewards_coefficient: 0.01
  dpo:
    trainer: dpo
    init: sft
    args:
      beta: 0.1
  grpo:
    trainer: grpo
    init: sft
    reward: rm
    args:
      num_generations: 4
      max_completion_length: 64
  ppo:
    trainer: ppo
    init: sft
    reward: rm
    args:
      gradient_accumulation_steps: 2
      num_mini_batches: 2
      kl_coef: 0.05
evaluation:
  reward: rm
  prompts: 20
  max_new_tokens: 64
"""
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
TOKEN = "hf_" + "aB3dE5gH" * 4


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def refuse(recipe_file):
    """Load a recipe that must be refused and return the problems, each place without the path of the file."""

    def load(text: str | bytes, *overrides: str, processes: int = 1) -> list[Problem]:
        path = recipe_file(text)
        with pytest.raises(UserError) as caught:
            load_recipe(path, overrides, processes)
        return [replace(p, place=p.place.replace(str(path), "")) for p in caught.value.problems]

    return load


@pytest.fixture
def accept(recipe_file):
    def load(text: str = GOOD, *overrides: str) -> Recipe:
        return load_recipe(recipe_file(text), overrides)

    return load


def change(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def add(after: str, line: str) -> str:
    """Put a line below another one, as deeply indented."""
    found = next(item for item in GOOD.splitlines() if item.strip() == after)
    return change(f"{found}\n", f"{found}\n{found[: len(found) - len(found.lstrip())]}{line}\n")


def first_difference(text: str) -> int:
    pairs = zip(text.splitlines(), [*GOOD.splitlines(), *[""] * 50], strict=False)
    return next(number for number, (new, old) in enumerate(pairs, 1) if new != old)


# --- one mistake, one message ----------------------------------------------------------------------------------------

IN_RM, IN_DPO, IN_GRPO, IN_PPO = "center_rewards_coefficient: 0.01", "beta: 0.1", "num_generations: 4", "kl_coef: 0.05"
# What is typed wrong, the place that the message names, and what its problem and remedy say.
MISTAKES = {
    # misspelt keys: in every own section, in model, in the args of every trainer
    "key-top": (change("seed: 1", "sede: 1"), "sede", "did you mean 'seed'"),
    "key-section": (change("evaluation:", "evalution:"), "evalution", "did you mean 'evaluation'"),
    "key-data": (change("test_fraction", "test_fractoin"), "data.test_fractoin", "did you mean 'test_fraction'"),
    "key-data-upper": (change("max_length: 128", "Max_Length: 128"), "data.Max_Length", "did you mean 'max_length'"),
    "key-evaluation": (change("prompts: 20", "promts: 20"), "evaluation.promts", "did you mean 'prompts'"),
    "key-stage": (change("trainer: dpo", "trainr: dpo"), "stages.dpo.trainr", "did you mean 'trainer'"),
    "key-model": (change("use_peft", "use_pfet"), "model.use_pfet", "did you mean 'use_peft'"),
    "key-stage-model": (change("lora_r: 4", "lora_rank: 4"), "stages.sft.model.lora_rank", "did you mean 'lora_r'"),
    "key-sft": (
        change("learning_rate", "learning-rate"),
        "stages.sft.args.learning-rate",
        "did you mean 'learning_rate'",
    ),
    "key-reward": (
        change("center_rewards_coefficient", "center_reward_coef"),
        "stages.rm.args.center_reward_coef",
        "did you mean 'center_rewards_coefficient'",
    ),
    "key-dpo": (change("beta:", "bta:"), "stages.dpo.args.bta", "did you mean 'beta'"),
    "key-grpo": (
        change("num_generations", "num_generation"),
        "stages.grpo.args.num_generation",
        "did you mean 'num_generations'",
    ),
    "key-ppo": (change("kl_coef:", "kl_coeff:"), "stages.ppo.args.kl_coeff", "did you mean 'kl_coef'"),
    "key-ppo-own": (add(IN_PPO, "entropy_coeff: 0.1"), "stages.ppo.args.entropy_coeff", "did you mean 'entropy_coef'"),
    # real keys in the wrong place
    "misplaced-option": (
        add(IN_DPO, "num_generations: 4"),
        "stages.dpo.args.num_generations",
        "it is an option of grpo",
    ),
    "misplaced-model": (add(IN_DPO, "dtype: float16"), "stages.dpo.args.dtype", "`model:` block"),
    "misplaced-link": (add(IN_PPO, "init: sft"), "stages.ppo.args.init", "beside `args:`"),
    "misplaced-args": (add("trainer: dpo", "beta: 0.1"), "stages.dpo.beta", "under `args:`"),
    "misplaced-in-model": (
        add("use_peft: true", "learning_rate: 1e-4"),
        "model.learning_rate",
        "belongs in the `args:`",
    ),
    # types
    "list-for-float": (
        change("learning_rate: 3e-3", "learning_rate: [1e-3, 2e-3]"),
        "stages.sft.args.learning_rate",
        "several values to compare go under `sweep:`",
    ),
    "bool-for-float": (change("beta: 0.1", "beta: true"), "stages.dpo.args.beta", "true is not of the type float"),
    "bool-for-float-default": (
        add(IN_DPO, "max_grad_norm: true"),
        "stages.dpo.args.max_grad_norm",
        "true is not of the type float",
    ),
    "bool-for-int-default": (
        change("gradient_accumulation_steps: 2", "gradient_accumulation_steps: true"),
        "stages.ppo.args.gradient_accumulation_steps",
        "true is not of the type int",
    ),
    "float-for-int": (
        add(IN_DPO, "per_device_train_batch_size: 2.5"),
        "stages.dpo.args.per_device_train_batch_size",
        "2.5 is not of the type int",
    ),
    "float-for-int-default": (
        add(IN_DPO, "per_device_train_batch_size: 8.0"),
        "stages.dpo.args.per_device_train_batch_size",
        "8.0 is not of the type int",
    ),
    "int-for-bool": (add(IN_DPO, "bf16: 1"), "stages.dpo.args.bf16", "write true or false"),
    "yes-for-bool": (add(IN_DPO, "bf16: yes"), "stages.dpo.args.bf16", "write true or false"),
    "text-for-number": (
        change("beta: 0.1", "beta: small"),
        "stages.dpo.args.beta",
        '"small" is not of the type float',
    ),
    "quoted-number": (change("beta: 0.1", 'beta: "0.1"'), "stages.dpo.args.beta", "without quotes"),
    "null-for-number": (change("beta: 0.1", "beta: null"), "stages.dpo.args.beta", "such as its default 0.1"),
    "no-value": (change("beta: 0.1", "beta:"), "stages.dpo.args.beta", "null is not of the type float"),
    "comma-text": (
        add("use_peft: true", "lora_target_modules: q_proj,v_proj"),
        "model.lora_target_modules",
        "write [q_proj,v_proj]",
    ),
    "number-in-list": (
        add("use_peft: true", "lora_target_modules: [1]"),
        "model.lora_target_modules",
        "list[str] or null",
    ),
    "number-name": (change("name: good", "name: 123"), "name", "put quotes around it"),
    "text-for-own-int": (change("prompts: 20", "prompts: many"), "evaluation.prompts", "give a whole number"),
    "percent": (change("test_fraction: 0.2", "test_fraction: 5%"), "data.test_fraction", "give a number"),
    "text-for-list": (add("source: builtin:demo", "subsets: helpful"), "data.subsets", "give a list"),
    "number-in-own-list": (add("source: builtin:demo", "subsets: [a, 1]"), "data.subsets.1", "quotes"),
    "args-list": (change("    args:\n      beta: 0.1", "    args: [beta]"), "stages.dpo.args", "`key: value` lines"),
    "args-text": (change("    args:\n      beta: 0.1", "    args: beta=1"), "stages.dpo.args", "`key: value` lines"),
    "args-null": (change("    args:\n      beta: 0.1", "    args:"), "stages.dpo.args", "is empty"),
    # ranges
    "negative": (
        change("learning_rate: 3e-3", "learning_rate: -1"),
        "stages.sft.args.learning_rate",
        "0 or more",
    ),
    "zero": (
        add(IN_DPO, "per_device_train_batch_size: 0"),
        "stages.dpo.args.per_device_train_batch_size",
        "0 is not above 0",
    ),
    "above-one": (add(IN_PPO, "gamma: 1.5"), "stages.ppo.args.gamma", "from 0 to 1"),
    "above-one-dropout": (change("lora_dropout: 0.0", "lora_dropout: 2"), "model.lora_dropout", "from 0 to 1"),
    "group-of-one": (
        change("num_generations: 4", "num_generations: 1"),
        "stages.grpo.args.num_generations",
        "2 or more",
    ),
    "group-null": (
        change("num_generations: 4", "num_generations: null"),
        "stages.grpo.args.num_generations",
        "2 or more",
    ),
    "dpo-beta-zero": (change("beta: 0.1", "beta: 0.0"), "stages.dpo.args.beta", "positive number"),
    "own-range": (change("test_fraction: 0.2", "test_fraction: 1"), "data.test_fraction", "less than 1"),
    "own-range-low": (change("max_length: 128", "max_length: 8"), "data.max_length", "greater than or equal to 16"),
    "seed-range": (change("seed: 1", "seed: -1"), "seed", "greater than or equal to 0"),
    "infinite": (change("beta: 0.1", "beta: 1e400"), "stages.dpo.args.beta", "finite number"),
    "nan": (change("beta: 0.1", "beta: .nan"), "stages.dpo.args.beta", "finite number"),
    "nan-inside": (
        add(IN_DPO, "lr_scheduler_kwargs: {num_cycles: .nan}"),
        "stages.dpo.args.lr_scheduler_kwargs.num_cycles",
        "finite number",
    ),
    "long-number": (change("beta: 0.1", f"beta: {'9' * 5000}"), "stages.dpo.args.beta", "give a number"),
    # choices
    "trainer": (change("trainer: dpo", "trainer: dop"), "stages.dpo.trainer", "did you mean 'dpo'"),
    "trainer-upper": (change("trainer: dpo", "trainer: DPO"), "stages.dpo.trainer", "did you mean 'dpo'"),
    "loss-dpo": (add(IN_DPO, "loss_type: sigmiod"), "stages.dpo.args.loss_type", "did you mean 'sigmoid'"),
    "loss-list": (add(IN_DPO, "loss_type: [sigmoid, hing]"), "stages.dpo.args.loss_type", "did you mean 'hinge'"),
    "loss-grpo": (add(IN_GRPO, "loss_type: dr_gpro"), "stages.grpo.args.loss_type", "did you mean 'dr_grpo'"),
    "scale-rewards": (add(IN_GRPO, "scale_rewards: non"), "stages.grpo.args.scale_rewards", "did you mean 'none'"),
    "scheduler": (
        add(IN_DPO, "lr_scheduler_type: cosin"),
        "stages.dpo.args.lr_scheduler_type",
        "did you mean 'cosine'",
    ),
    "truncation": (
        add(IN_DPO, "truncation_mode: keep_strat"),
        "stages.dpo.args.truncation_mode",
        "did you mean 'keep_start'",
    ),
    "kl-estimator": (add(IN_PPO, "kl_estimator: k2"), "stages.ppo.args.kl_estimator", "choose one of: k1, k3"),
    "stop-token": (add(IN_PPO, "stop_token: pad"), "stages.ppo.args.stop_token", "choose one of: eos"),
    "save-strategy": (add(IN_DPO, "save_strategy: epochs"), "stages.dpo.args.save_strategy", "did you mean 'epoch'"),
    "save-false": (add(IN_DPO, "save_strategy: false"), "stages.dpo.args.save_strategy", "no, steps, epoch, best"),
    "dtype": (add("use_peft: true", "dtype: float61"), "model.dtype", "did you mean 'float16'"),
    "optim": (add(IN_DPO, "optim: adamw"), "stages.dpo.args.optim", "did you mean 'adamw_torch'"),
    "log-level": (add(IN_DPO, "log_level: warn"), "stages.dpo.args.log_level", "did you mean 'warning'"),
    "builtin-model": (
        change("builtin:tiny", "builtin:tinny"),
        "model.model_name_or_path",
        "did you mean 'builtin:tiny'",
    ),
    "builtin-data": (change("builtin:demo", "builtin:dmo"), "data.source", "did you mean 'builtin:demo'"),
    "home": (change("source: builtin:demo", "source: ~/pairs.jsonl"), "data.source", "write the whole path"),
    # names
    "name-path": (change("name: good", "name: ../good"), "name", "holds only letters"),
    "name-dots": (change("name: good", "name: .."), "name", "starts with a letter or digit"),
    "name-unicode": (change("name: good", "name: gøød"), "name", "holds only letters"),
    "name-null": (change("name: good", "name:"), "name", "add `name: my-run`"),
    "stage-reserved": (change("  dpo:", "  evaluate:"), "stages.evaluate", "call the stage evaluate_stage"),
    "stage-file": (change("  dpo:", "  report.html:"), "stages.report.html", "call the stage"),
    "stage-space": (change("  dpo:", "  d po:"), "stages.d po", "holds only letters"),
    "stage-number": (change("  dpo:", "  1:"), "stages.1", "put quotes around it"),
    # links
    "link-misspelt": (change("dpo\n    init: sft", "dpo\n    init: stf"), "stages.dpo.init", "did you mean 'sft'"),
    "link-self": (change("dpo\n    init: sft", "dpo\n    init: dpo"), "stages.dpo.init", "name an earlier stage"),
    "link-later": (change("dpo\n    init: sft", "dpo\n    init: grpo"), "stages.dpo.init", "move 'grpo' above 'dpo'"),
    "link-number": (change("dpo\n    init: sft", "dpo\n    init: 5"), "stages.dpo.init", "give a text"),
    "init-reward": (change("dpo\n    init: sft", "dpo\n    init: rm"), "stages.dpo.init", "start from an sft stage"),
    "reward-not-one": (
        change("reward: rm\n    args:\n      num", "reward: sft\n    args:\n      num"),
        "stages.grpo.reward",
        "did you mean 'rm'",
    ),
    "evaluation-reward": (change("  reward: rm\n  prompts", "  reward: sft\n  prompts"), "evaluation.reward", "'rm'"),
    "gold-unknown": (change("  prompts: 20", "  gold: golden"), "evaluation.gold", "the stages are"),
    "gold-itself": (change("  prompts: 20", "  gold: rm"), "evaluation.gold", "half: second"),
    "gold-whole": (
        change("  prompts: 20", "  gold: gold", change("  dpo:\n", "  gold: {trainer: reward}\n  dpo:\n")),
        "stages.gold.half",
        "add `half: second`",
    ),
    "gold-alone": (
        change("  reward: rm\n  prompts", "  gold: rm\n  prompts"),
        "evaluation.gold",
        "name the reward model there",
    ),
    "half-word": (add("trainer: dpo", "half: frist"), "stages.dpo.half", "did you mean 'first'"),
    "half-of-prompts": (add("trainer: grpo", "half: first"), "stages.grpo.half", "remove the key"),
    "checkpoints-not-kept": (
        change("  prompts: 20", "  checkpoints: 2", add("beta: 0.1", 'save_strategy: "no"')),
        "stages.dpo.args.save_strategy",
        "set save_strategy: steps",
    ),
    "checkpoints-too-few": (
        change("  prompts: 20", "  checkpoints: 2", add("beta: 0.1", "save_total_limit: 2")),
        "stages.dpo.args.save_total_limit",
        "3 or more",
    ),
    "alarm-misspelt": (
        change("  prompts: 20", "  alarms: {lenght_ratio: 2.0}"),
        "evaluation.alarms.lenght_ratio",
        "did you mean 'length_ratio'",
    ),
    "evaluation-dtype": (change("  prompts: 20", "  dtype: fp16"), "evaluation.dtype", "bfloat16, float16"),
    "judge-kind": (change("evaluation:", "judge: {kind: opnai}\nevaluation:"), "judge.kind", "did you mean 'openai'"),
    "judge-key": (change("evaluation:", "judge: {max_cots: 1.0}\nevaluation:"), "judge.max_cots", "'max_cost'"),
    "judge-price": (
        change("evaluation:", "judge: {price: {inputs: 1.0}}\nevaluation:"),
        "judge.price.inputs",
        "did you mean 'input'",
    ),
    "judge-gold": (change("evaluation:", "judge: {kind: reward}\nevaluation:"), "judge.kind", "set evaluation.gold"),
    "samples-none": (change("evaluation:", "samples: {per_model: 0}\nevaluation:"), "samples.per_model", "greater"),
    "errors-key": (change("evaluation:", "errors: {pair: 5}\nevaluation:"), "errors.pair", "did you mean 'pairs'"),
    "dpo-with-reward": (add("trainer: dpo", "reward: rm"), "stages.dpo.reward", "remove the key"),
    "other-start": (change("ppo\n    init: sft", "ppo\n    init: dpo"), "stages.ppo.init", "the same `init`"),
    "init-and-base": (
        change("dpo\n    init: sft\n", "dpo\n    init: sft\n    model: {model_name_or_path: x/y}\n"),
        "stages.dpo.init",
        "leave out one",
    ),
    # sizes
    "group-divides": (
        change("num_generations: 4", "num_generations: 3"),
        "stages.grpo.args.num_generations",
        "use num_generations: 2",
    ),
    "group-evaluation": (
        add(IN_GRPO, "{}: 6\n      eval_strategy: steps".format("per_device_eval_batch_size")),
        "stages.grpo.args.per_device_eval_batch_size",
        "a multiple of 4",
    ),
    "rollout-batch": (
        add(IN_GRPO, "generation_batch_size: 12"),
        "stages.grpo.args.generation_batch_size",
        "a multiple of 8",
    ),
    "mini-batches": (
        change("num_mini_batches: 2", "num_mini_batches: 3"),
        "stages.ppo.args.num_mini_batches",
        "set gradient_accumulation_steps to 3",
    ),
    "whiten": (
        add(IN_PPO, "whiten_rewards: true\n      per_device_train_batch_size: 4"),
        "stages.ppo.args.whiten_rewards",
        "at least 8 answers, not 4",
    ),
    "exo": (add(IN_DPO, "loss_type: exo_pair"), "stages.dpo.args.label_smoothing", "0.001"),
    "cut": (add(IN_DPO, "max_length: 64"), "stages.dpo.args.max_length", "set it to 128"),
    "positions": (change("max_length: 128", "max_length: 600"), "data.max_length", "512 or less"),
    "positions-answer": (
        change("max_completion_length: 64", "max_completion_length: 400"),
        "stages.grpo.args.max_completion_length",
        "set it to 384 or less",
    ),
    "positions-evaluation": (
        change("max_new_tokens: 64", "max_new_tokens: 400"),
        "evaluation.max_new_tokens",
        "set it to 384 or less",
    ),
    "quantised": (
        add("trainer: sft", "model: {use_peft: false, load_in_4bit: true}").replace(
            "    model:\n      lora_r: 4\n", ""
        ),
        "stages.sft.model.load_in_4bit",
        "use_peft: true",
    ),
    "both-quantised": (
        change("      lora_r: 4", "      load_in_8bit: true\n      load_in_4bit: true"),
        "stages.sft.model.load_in_8bit",
        "choose one",
    ),
    # options that the project sets
    "output-dir": (add(IN_DPO, "output_dir: out"), "stages.dpo.args.output_dir", "`--runs`"),
    "hub-token": (add(IN_DPO, "hub_token: mine"), "stages.dpo.args.hub_token", "environment"),
    "model-init": (add(IN_DPO, "model_init_kwargs: {}"), "stages.dpo.args.model_init_kwargs", "`model:` block"),
    "remote-code": (add("use_peft: true", "trust_remote_code: true"), "model.trust_remote_code", "not run"),
    "computed": (add(IN_PPO, "mini_batch_size: 4"), "stages.ppo.args.mini_batch_size", "per_device_train_batch_size"),
    "use-cpu": (add(IN_DPO, "use_cpu: true"), "stages.dpo.args.use_cpu", "CUDA_VISIBLE_DEVICES"),
    "env": (GOOD + "env: {LD_PRELOAD: x.so}\n", "env", "the keys here are"),
    # sweeps
    "sweep-unknown": (add("trainer: dpo", "sweep: {bta: [0.1]}"), "stages.dpo.sweep.bta", "did you mean 'beta'"),
    "sweep-value": (add("trainer: dpo", "sweep: {beta: [0.1, x]}"), "stages.dpo.sweep.beta.1", "type float"),
    "sweep-negative": (add("trainer: dpo", "sweep: {beta: [0.1, -1]}"), "stages.dpo.sweep.beta.1", "0 or more"),
    "sweep-scalar": (add("trainer: dpo", "sweep: {beta: 0.1}"), "stages.dpo.sweep.beta", "give a list"),
    "sweep-list": (add("trainer: dpo", "sweep: {beta: [[0.1]]}"), "stages.dpo.sweep.beta.0", "single values"),
    "sweep-empty": (add("trainer: dpo", "sweep: {beta: []}"), "stages.dpo.sweep.beta", "at least one value"),
    "sweep-twice": (add("trainer: dpo", "sweep: {beta: [0.1, 0.10]}"), "stages.dpo.sweep", "each value once"),
    "sweep-path": (add("trainer: dpo", "sweep: {run_name: [../x]}"), "stages.dpo.sweep", "values of letters"),
    "sweep-many": (
        add("trainer: dpo", f"sweep: {{seed: {list(range(50))}, data_seed: {list(range(50))}}}"),
        "stages.dpo.sweep",
        "2500 stages, more than 100",
    ),
    "sweep-owned": (add("trainer: dpo", "sweep: {output_dir: [a]}"), "stages.dpo.sweep.output_dir", "--runs"),
    "sweep-size": (
        add("trainer: grpo", "sweep: {num_generations: [4, 3]}"),
        "stages.grpo.args.num_generations",
        "3 does",
    ),
    # YAML that is well formed but not a recipe
    "duplicate": (add(IN_DPO, "beta: 0.2"), "stages.dpo.args.beta", "stands twice, first on line 27"),
    "duplicate-stage": (change("  ppo:", "  grpo:"), "stages.grpo", "stands twice, first on line 28"),
    "anchor": (change("model:\n      lora_r", "model: &x\n      lora_r"), "stages.sft.model", "write the values out"),
    "tag": (change("beta: 0.1", "beta: !!python/object/apply:os.getcwd []"), "stages.dpo.args.beta", "a plain value"),
    "no-space": (add("trainer: dpo", "sweep: {beta:0.1}"), "stages.dpo.sweep.beta:0.1", "a space after the colon"),
    "flow-comma": (add("trainer: dpo", "sweep: {beta: [0.1], seed}"), "stages.dpo.sweep.seed", "has no value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_line_its_key_and_the_remedy(case, refuse):
    text, key, says = MISTAKES[case]
    problems = refuse(text)
    place, problem, remedy = problems[0].place, problems[0].problem, problems[0].remedy
    assert len(problems) == 1, problems  # one mistake is told once, and nothing that only follows from it
    number, _, found = place.removeprefix(":").partition(": ")
    assert found == key
    assert says in f"{problem} -> {remedy}"
    assert int(number) == WHERE.get(case, first_difference(text))


# Lines where the message stands on another line than the first change of the text.
WHERE = {
    "exo": 26,  # the key that is missing: the line of its section
    "sweep-size": 34,
    "args-null": 26,
    "init-and-base": 25,
    "other-start": 37,
    "stage-space": 23,
    "both-quantised": 15,
    "flow-comma": 25,
    "duplicate-stage": 35,
}


def test_the_table_holds_what_the_acceptance_asks_for():
    assert len(MISTAKES) >= 100


def test_the_good_recipe_is_good(accept):
    assert list(accept().stages) == ["sft", "rm", "dpo", "grpo", "ppo"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_shipped_recipe_is_valid(path, processes):
    assert load_recipe(path, processes=processes).name


MISSING = {
    "name": ("name: good\n", "name", 0, "add `name: my-run`"),
    "trainer": ("    trainer: dpo\n", "stages.dpo.trainer", 23, "sft, reward, dpo, grpo, ppo"),
    "model-name": ("  model_name_or_path: builtin:tiny\n", "model.model_name_or_path", 3, "a Hub id, a folder"),
    "grpo-reward": (
        "    reward: rm\n    args:\n      num_generations: 4\n      max_completion_length: 64\n",
        "stages.grpo.reward",
        28,
        "add `reward: rm`",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_at_its_section(case, refuse):
    removed, key, line, says = MISSING[case]
    problems = [p for p in refuse(change(removed, "")) if p.place.endswith(key)]
    assert problems[0].place == (f":{line}: {key}" if line else f": {key}")
    assert says in problems[0].remedy


def test_a_circle_is_named_on_both_sides(refuse):
    problems = refuse(change("trainer: sft\n", "trainer: sft\n    init: dpo\n"))
    assert [p.place for p in problems] == [":14: stages.sft.init", ":26: stages.dpo.init"]
    assert all("wait for each other" in p.problem and "break the circle" in p.remedy for p in problems)


def test_dropout_that_a_trainer_turns_off_is_named_for_each_trainer(refuse):
    problems = refuse(change("lora_dropout: 0.0", "lora_dropout: 0.05"))
    assert {p.place for p in problems} == {":6: model.lora_dropout"}
    assert [p.problem.split()[0] for p in problems] == ["reward", "dpo", "ppo"]
    assert "disable_dropout: false in the args of dpo" in problems[1].remedy and "disable" not in problems[2].remedy


def test_a_batch_is_judged_for_the_number_of_processes(refuse, recipe_file):
    text = change("num_generations: 4", "num_generations: 4\n      per_device_train_batch_size: 2")
    load_recipe(recipe_file(text), processes=2)
    assert "batch 2 x 1 steps x 1 process)" in refuse(text)[0].problem
    assert "x 3 processes)" in refuse(text, processes=3)[0].problem


def test_positions_are_read_from_the_config_of_a_local_folder(tmp_path, refuse, accept):
    config = tmp_path / "config.json"
    text = change("builtin:tiny", str(tmp_path))
    config.write_text(json.dumps({"n_positions": 100}))
    assert refuse(text)[0] == Problem(
        ":9: data.max_length", "128 tokens are more than the 100 positions of the model", "set it to 100 or less"
    )
    config.write_text(json.dumps({"max_position_embeddings": 192, "n_positions": 10}))
    assert accept(text)
    for unusable in ("{", "[]", "{}", '{"n_positions": "many"}', "\udcff"):
        config.write_text(unusable, errors="surrogateescape")
        assert accept(text)


# --- files that are no recipe ----------------------------------------------------------------------------------------

UNREADABLE = {
    "empty": ("", "", "the recipe is empty"),
    "comment": ("# soon\n", "", "the recipe is empty"),
    "null": ("null\n", "", "not made of `key: value` lines"),
    "list": ("- name: good\n", "", "not made of `key: value` lines"),
    "text": ("good\n", "", "not made of `key: value` lines"),
    "tab": (change("  source:", "\tsource:"), ":8", "use spaces, not tabs"),
    "indent": (change("  rm:", "   rm:"), ":18", "the same number of spaces"),
    "colon": (change("name: good", "name:good"), ":2", "a space after the colon"),
    "quote": (change("name: good", 'name: "good'), ":47", "in what begins on line 1"),
    "bracket": (change("beta: 0.1", "loss_type: [sigmoid"), ":28", "close the bracket"),
    "two-documents": (GOOD + "---\nname: x\n", ":47", "remove the `---`"),
    "alias": (change("beta: 0.1", "beta: *x"), ":27", "found undefined alias"),
    "percent": (change("beta: 0.1", "beta: %x"), ":27", "put quotes around the text"),
    "control": (change("name: good", "name: go\x07od"), ":1", "remove the character"),
    "utf-16": (GOOD.encode("utf-16"), "", "not UTF-8"),
    "latin-1": (change("good", "gøød").encode("latin-1"), "", "not UTF-8"),
    "deep": (GOOD + "more: " + "[" * 900 + "]" * 900, "", "more than 20 deep"),
    "large": ("# " + "x" * 300_000 + "\n" + GOOD, "", "larger than"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_recipe_is_refused_with_the_line(case, refuse):
    text, line, says = UNREADABLE[case]
    (problem,) = refuse(text)
    assert problem.place == line
    assert says in f"{problem.problem} -> {problem.remedy}"


def test_line_ends_and_byte_order_marks_do_not_matter(accept, recipe_file):
    expected = accept().model_dump()
    for text in (GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, GOOD.rstrip("\n"), "---\n" + GOOD + "...\n"):
        assert load_recipe(recipe_file(text.encode())).model_dump() == expected


def test_yaml_is_version_1_2_and_dates_are_text(accept):
    recipe = accept(change("name: good", "name: 2026-11-22") + "")
    assert recipe.name == "2026-11-22"
    recipe = accept(add(IN_DPO, "save_strategy: no\n      learning_rate: 1e-6\n      run_name: off"))
    assert recipe.stages["dpo"].args == {"beta": 0.1, "save_strategy": "no", "learning_rate": 1e-6, "run_name": "off"}


def test_anchors_are_refused_before_they_grow_or_circle(refuse):
    pairs = itertools.pairwise("abcdefghi")
    laughs = "a: &a [x]\n" + "".join(f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in pairs)
    start = time.perf_counter()
    assert all("not read" in problem.problem for problem in refuse(laughs + GOOD))
    assert "not read" in refuse(change("beta: 0.1", "beta: &x [*x]"))[0].problem
    assert {p.place for p in refuse(change("    args:\n      beta: 0.1", "    args: &x {<<: *x}"))} == {
        ":26: stages.dpo.args"
    }
    merged = refuse(change("      beta: 0.1", "      <<: {beta: 0.1}"))
    assert merged == [Problem(":27: stages.dpo.args.<<", "merge keys (<<) are not read", "write the values out")]
    assert time.perf_counter() - start < 5


def test_a_path_that_cannot_be_read_is_named(tmp_path, recipe_file):
    path = recipe_file(GOOD)
    for place, says in {
        tmp_path / "recipe.yml": f"did you mean '{path}'",
        tmp_path / "none" / "recipe.yaml": "give the path of a YAML file",
        tmp_path: "Is a directory",
        path / "x": "Not a directory",
    }.items():
        with pytest.raises(UserError) as caught:
            load_recipe(place)
        assert caught.value.problems[0].place == str(place) and says in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(recipe_file):
    path = recipe_file(GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        load_recipe(path)


# --- all at once -----------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_in_one_go(refuse):
    text = GOOD
    wrong = {
        "seed: 1": ("seed: -1", "seed"),
        "lora_dropout: 0.0": ("lora_dropuot: 0.0", "model.lora_dropuot"),
        "max_length: 128": ("max_length: long", "data.max_length"),
        "test_fraction: 0.2": ("test_fractoin: 0.2", "data.test_fractoin"),
        "lora_r: 4": ("lora_r: 0", "stages.sft.model.lora_r"),
        "learning_rate: 3e-3": ("learning_rate: [3e-3]", "stages.sft.args.learning_rate"),
        "center_rewards_coefficient: 0.01": ("center: 0.01", "stages.rm.args.center"),
        "beta: 0.1": ("beta: true", "stages.dpo.args.beta"),
        "num_generations: 4": ("num_generations: 3", "stages.grpo.args.num_generations"),
        "reward: rm\n    args:\n      gradient": ("reward: mr\n    args:\n      gradient", "stages.ppo.reward"),
        "num_mini_batches: 2": ("num_mini_batches: 3", "stages.ppo.args.num_mini_batches"),
        "kl_coef: 0.05": ("kl_coef: 0.05\n      kl_coef: 0.1", "stages.ppo.args.kl_coef"),
        "  prompts: 20": ("  promts: 20", "evaluation.promts"),
        "max_new_tokens: 64": (f"max_new_tokens: {TOKEN}", "evaluation.max_new_tokens"),
    }
    for old, (new, _) in wrong.items():
        text = change(old, new, text)
    problems = refuse(text, "stages.dpp.args.beta=1", "model.lora_r=x")
    expected = {key for _, key in wrong.values()}
    assert {p.place.partition(": ")[2] or p.place for p in problems} == {
        *expected,
        "--set stages.dpp.args.beta",
        "--set model.lora_r",
    }
    assert len(problems) == len(wrong) + 2


def test_what_only_follows_from_a_mistake_is_not_told(refuse):
    # Each breaks a value that sizes, links or required keys depend on.
    for old, new in {
        "max_length: 128": "max_lenght: 500",
        "num_generations: 4": "num_generation: 3",
        "  model_name_or_path: builtin:tiny": "  model_name: builtin:tiny",
        "trainer: grpo": "trainer: gprp",
        "dpo\n    init: sft": "dpo\n    inti: sft",
        "model:\n  model_name_or_path: builtin:tiny\n  use_peft: true\n  lora_dropout: 0.0": "model: [gpt2]",
        "data:\n  source: builtin:demo\n  max_length: 128\n  test_fraction: 0.2": "data:",
    }.items():
        assert len(refuse(change(old, new))) == 1, new


def test_a_misspelt_key_beside_the_real_one_hides_no_mistake_of_that(refuse):
    problems = refuse(change("beta: 0.1", "beta: x", add(IN_DPO, "bta: 1")))
    assert [p.place.partition(": ")[2] for p in problems] == ["stages.dpo.args.beta", "stages.dpo.args.bta"]


def test_a_single_stage_with_an_unknown_trainer_hides_nothing_of_the_model(refuse):
    text = "name: x\nmodel: {model_name_or_path: builtin:tiny, lora_rr: 1}\nstages: {a: {trainer: foo}}\n"
    assert [p.place.partition(": ")[2] for p in refuse(text)] == ["stages.a.trainer", "model.lora_rr"]


# --- one letter wrong in any key of any shipped recipe ---------------------------------------------------------------


def keys_of(text: str) -> list[tuple[list[str], int]]:
    """The path and the position of every key that a recipe names itself (stages are named by the user)."""
    found: list[tuple[list[str], int]] = []

    def walk(node, path):
        for key, value in node.value if isinstance(node, MappingNode) else ():
            here = [*path, key.value]
            if here[:-1] != ["stages"]:
                found.append((here, key.start_mark.index))
            if len(here) < 4 and here[-1] != "sweep" and not isinstance(value, SequenceNode):
                walk(value, here)

    walk(YAML(typ="safe", pure=True).compose(text), [])
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_wrong_letter_in_any_key_is_refused_with_the_right_key(path, refuse):
    text, draw = path.read_text(), random.Random(5)
    found = keys_of(text)
    for keys, start in found:
        key = keys[-1]
        letter = draw.randrange(len(key))
        wrong = key[:letter] + ("z" if key[letter] != "z" else "q") + key[letter + 1 :]
        problems = refuse(text[:start] + wrong + text[start + len(key) :])
        place = f":{text.count(chr(10), 0, start) + 1}: {'.'.join([*keys[:-1], wrong])}"
        assert [p.remedy for p in problems if p.place == place] == [f"did you mean {key!r}?"], problems
    assert len(found) > 40


# --- access tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        add(IN_DPO, f"hub_token: {TOKEN}"),
        add(IN_DPO, f"{TOKEN}: 1"),
        change("name: good", f"name: {TOKEN}"),
        change("beta: 0.1", f"beta: {TOKEN}"),
        change("beta: 0.1", f"beta: [1, {{a: {TOKEN}}}]"),
        change("beta: 0.1", f"beta: {TOKEN}\n      beta: {TOKEN}"),
        change("builtin:demo", f"https://user:{TOKEN}@hub/x"),
        add("trainer: dpo", f"sweep: {{run_name: [{TOKEN}]}}"),
        change("init: sft\n    args:\n      beta", f"init: {TOKEN}\n    args:\n      beta"),
        change("name: good", "name: sk-proj-abcdefghijklmnop"),
        change("name: good", f"name: good: {TOKEN}"),
        f"{TOKEN}\n",
    ],
)
def test_an_access_token_is_refused_and_not_shown(text, refuse):
    shown = "\n".join(str(problem) for problem in refuse(text))
    assert TOKEN not in shown and "sk-proj" not in shown


@pytest.mark.parametrize(
    "override", [f"name={TOKEN}", f"{TOKEN}=1", TOKEN, f"model.x=[{TOKEN}", f"stages.{TOKEN}.x=1"]
)
def test_an_access_token_on_the_command_line_is_not_shown(override, refuse):
    problems = refuse(GOOD, override)
    assert TOKEN not in "\n".join(str(problem) for problem in problems)


def test_a_token_is_told_once_and_names_that_look_like_one_are_not_tokens(refuse, accept):
    (problem,) = refuse(change("beta: 0.1", f"beta: {TOKEN}"))
    assert "access token" in problem.problem and ".env.example" in problem.remedy
    for source in ("hf_preferences/pairs.jsonl", "me/hf_dataset", "data/task-sk-1", "risk-assessment-of-models"):
        assert accept(change("builtin:demo", source))


# --- overrides -------------------------------------------------------------------------------------------------------

BAD_SETS = {
    "stages.dpo.args.beta": ("stages.dpo.args.beta", "path.to.key=value"),
    "=0.3": ("", "path.to.key=value"),
    "stages..beta=1": ("stages..beta", "path.to.key=value"),
    "stages.dpo.args.bta=1": ("stages.dpo.args.bta", "did you mean 'beta'"),
    "stages.dpo.args.beta=x": ("stages.dpo.args.beta", "type float"),
    "stages.dpo.args.beta=": ("stages.dpo.args.beta", "null is not"),
    "stages.dpo.args.beta=[0.1, 0.2]": ("stages.dpo.args.beta", "under `sweep:`"),
    "stages.dpo.args.beta=.inf": ("stages.dpo.args.beta", "finite"),
    "stages.dpo.args.beta.x=1": ("stages.dpo.args.beta.x", "'beta' is a value, not a section"),
    "stages.dpo.beta=1": ("stages.dpo.beta", "under `args:`"),
    "stages.dpp.args.beta=1": ("stages.dpp.args.beta", "did you mean 'dpo'"),
    "stages.new.args.beta=1": ("stages.new.args.beta", "the stages are: sft, rm, dpo, grpo, ppo"),
    "dpo.beta=1": ("dpo.beta", "begin the key with stages.dpo.args."),
    "beta=1": ("beta", "the keys here are"),
    "stage.dpo.args.beta=1": ("stage.dpo.args.beta", "did you mean 'stages'"),
    "name=": ("name", "is empty"),
    "name=[": ("name", "put quotes around the value"),
    "name=../x": ("name", "holds only letters"),
    "seed=1.0": ("seed", "whole number"),
    "data.subsets.0=x": ("data.subsets.0", "give a list"),
    "stages=1": ("stages", "at least one stage"),
    "stages.dpo=": ("stages.dpo", "is empty"),
    "evaluation.reward=sft": ("evaluation.reward", "did you mean 'rm'"),
}


@pytest.mark.parametrize("override", BAD_SETS)
def test_a_bad_override_is_named_as_one(override, refuse):
    key, says = BAD_SETS[override]
    (problem,) = refuse(GOOD, override)
    assert problem.place == f"--set {key}"
    assert says in f"{problem.problem} -> {problem.remedy}"


def test_overrides_are_read_as_yaml_and_change_one_key(accept):
    recipe = accept(
        GOOD,
        "stages.dpo.args.beta=0.3",
        "stages.dpo.args.loss_type=[sigmoid, sft]",
        "data.subsets=[a]",
        "stages.dpo.args.bf16 = false",
        "stages.sft.model.lora_r=2",
        "evaluation.reward=null",
        "seed=7",
        "stages.dpo.sweep.seed=[1, 2]",
    )
    assert recipe.stages["dpo-seed=2"].args == {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "bf16": False, "seed": 2}
    assert recipe.data.subsets == ["a"] and recipe.seed == 7 and recipe.evaluation.reward is None
    assert recipe.model_block("sft")["lora_r"] == 2 and "lora_r" not in recipe.model


def test_an_override_reaches_a_stage_whose_name_holds_dots(accept):
    text = change("  dpo:\n", "  dpo-v1.5:\n")
    assert accept(text, "stages.dpo-v1.5.args.beta=0.3").stages["dpo-v1.5"].args["beta"] == 0.3


# --- without torch, and fast -----------------------------------------------------------------------------------------


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_validation_imports_none_of_the_libraries():
    loaded = run_python(
        "import sys, pathlib\n"
        "from rlhf_trl.recipe.load import load_recipe\n"
        "load_recipe(pathlib.Path('recipes/demo.yaml'), ['stages.dpo.sweep.beta=[0.1, 0.2]'])\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'scipy'} & set(sys.modules)))"
    )
    assert loaded.strip() == "[]"


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_expands_to_ordinary_stages_with_stable_names(accept):
    recipe = accept(add("trainer: dpo", "sweep: {beta: [0.03, 1e-1], seed: [1, 2]}"))
    names = ["dpo-beta=0.03-seed=1", "dpo-beta=0.03-seed=2", "dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"]
    assert recipe.policies == [*names, "grpo", "ppo"]
    assert list(recipe.stages) == ["sft", "rm", *names, "grpo", "ppo"]
    stage = recipe.stages["dpo-beta=0.1-seed=2"]
    assert stage.args == {"beta": 0.1, "seed": 2} and stage.sweep == {} and stage.init == "sft"
    assert recipe.args_of("dpo-beta=0.1-seed=2")["seed"] == 2 and recipe.args_of("grpo")["seed"] == recipe.seed


def test_a_swept_value_takes_the_place_of_the_one_in_args(accept):
    recipe = accept(add("trainer: dpo", "sweep: {beta: [0.3]}"))
    assert recipe.stages["dpo-beta=0.3"].args == {"beta": 0.3}


def test_a_link_names_one_stage_of_a_sweep(accept, refuse):
    swept = change("trainer: reward", "trainer: reward\n    sweep: {seed: [1, 2], learning_rate: [1e-4]}")
    problems = refuse(swept)
    places = [":32: stages.grpo.reward", ":39: stages.ppo.reward", ":45: evaluation.reward"]
    names = "rm-seed=1-learning_rate=0.0001, rm-seed=2-learning_rate=0.0001"
    assert [(p.place, p.remedy) for p in problems] == [(place, f"name one of: {names}") for place in places]
    linked = swept.replace("reward: rm", "reward: rm-seed=2-learning_rate=0.0001")
    assert accept(linked).stages["ppo"].reward == "rm-seed=2-learning_rate=0.0001"
    misspelt = swept.replace("reward: rm", "reward: rm-seed=2-learning_rate=0.001")
    assert {p.remedy for p in refuse(misspelt)} == {"did you mean 'rm-seed=2-learning_rate=0.0001'?"}


def test_a_link_to_a_swept_stage_is_judged_like_any_other(refuse):
    swept = add("trainer: dpo", "sweep: {beta: [0.1, 0.3]}")
    problems = refuse(change("  reward: rm\n  prompts", "  reward: dpo-beta=0.1\n  prompts", swept))
    assert problems[0].problem == "'dpo-beta=0.1' is not a reward stage: its trainer is dpo"
    itself = swept.replace("{beta: [0.1, 0.3]}\n    init: sft", "{beta: [0.1, 0.3]}\n    init: dpo-beta=0.1")
    assert "links to itself" in refuse(itself)[0].problem


def test_a_stage_that_a_sweep_would_write_over_is_refused(refuse):
    swept = add("trainer: dpo", "sweep: {beta: [0.1, 0.3]}")
    twin = change("  grpo:\n", "  dpo-beta=0.3: {trainer: dpo, init: sft}\n  grpo:\n", swept)
    assert refuse(twin)[0].place == ":29: stages.dpo-beta=0.3"


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprints(recipe: Recipe) -> dict[str, str]:
    return {step: recipe.fingerprint(step) for step in recipe.plan}


ALL = {"explore", "prepare", "sft", "rm", "dpo", "grpo", "ppo", "evaluate", "compare", "errors", "samples", "report"}
TRAINED = ALL - {"explore", "prepare"}
MEASURED = {"evaluate", "compare", "samples", "report"}
CHANGES = {
    "stages.dpo.args.beta=0.3": {"dpo", *MEASURED},
    "stages.dpo.args.seed=5": {"dpo", *MEASURED},
    "stages.dpo.half=first": {"dpo", *MEASURED},
    "stages.rm.args.learning_rate=1e-4": {"rm", "grpo", "ppo", "errors", *MEASURED},
    "evaluation.alarms.length_ratio=2.0": MEASURED,
    "errors.pairs=50": {"errors", "report"},
    "judge={prompts: 5}": {"compare", "report"},  # a step more, which these read
    "comparison.hold=5": {"compare", "report"},
    "samples.per_model=5": {"samples", "report"},
    "stages.sft.args.learning_rate=1e-4": TRAINED,
    "stages.sft.model.lora_r=8": TRAINED,
    "model.lora_alpha=8": TRAINED,
    "model.model_name_or_path=x/y": ALL,
    "data.max_length=100": ALL,
    "data.test_fraction=0.3": ALL,
    "seed=2": ALL,
    "evaluation.prompts=30": MEASURED,
    "name=other": {"report"},
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(override, accept):
    before, after = fingerprints(accept()), fingerprints(accept(GOOD, override))
    assert {step for step in before if before[step] != after[step]} == CHANGES[override]


def test_the_other_half_goes_to_all_that_learns_preferences(accept):
    text = change("  dpo:\n", "  gold: {trainer: reward, init: sft, half: second}\n  dpo:\n")
    gold = change("  prompts: 20", "  gold: gold", text)
    halves = {"sft": None, "rm": "first", "gold": "second", "dpo": "first", "grpo": None, "ppo": None}
    recipe = accept(gold)
    assert {stage: recipe.half_of(stage) for stage in recipe.stages} == halves
    without = accept(text)  # a half of its own, and nothing for the others to keep away from
    assert {stage: without.half_of(stage) for stage in without.stages} == {**dict.fromkeys(halves), "gold": "second"}
    before, after = fingerprints(without), fingerprints(recipe)
    assert {step for step in before if before[step] != after[step]} == {
        "rm",
        "dpo",
        "grpo",
        "ppo",
        "errors",
        *MEASURED,
    }


def test_a_reward_model_from_elsewhere_is_named_by_its_path(accept, tmp_path):
    recipe = accept(change("  prompts: 20", "  gold: someone/reward-model"))
    assert recipe.evaluation.gold == "someone/reward-model"
    (tmp_path / "config.json").write_text("{}")
    local = change("  prompts: 20", f"  gold: {tmp_path}/")
    before = accept(local).fingerprint("evaluate")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert accept(local).fingerprint("evaluate") != before


def test_each_fingerprint_of_a_long_chain_is_computed_once(monkeypatch):
    stages = {"p0": {"trainer": "sft"}}
    for number in range(1, 25):
        stages[f"rm{number}"] = {"trainer": "reward", "init": f"p{number - 1}"}
        stages[f"p{number}"] = {"trainer": "ppo", "init": f"p{number - 1}", "reward": f"rm{number}"}
    recipe = Recipe.model_validate({"name": "chain", "model": {"model_name_or_path": "x/y"}, "stages": stages})
    asked, dependencies = [], Recipe._dependencies
    monkeypatch.setattr(
        Recipe, "_dependencies", lambda self, step, *rest: asked.append(step) or dependencies(self, step, *rest)
    )
    assert len(recipe.fingerprint("report")) == 64
    assert len(asked) == len(set(asked))


def test_the_order_of_keys_and_comments_change_nothing(accept):
    raw = YAML(typ="safe", pure=True).load(GOOD)

    def turn(value):
        return {key: turn(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    turned = {key: turn(raw[key]) for key in reversed(raw)}
    turned["stages"] = {name: turn(raw["stages"][name]) for name in ("sft", "rm", "ppo", "dpo", "grpo")}
    expected = fingerprints(accept())
    assert fingerprints(accept(json.dumps(turned))) == expected
    assert fingerprints(accept(GOOD.replace("\n", "  # why\n"))) == expected


def test_a_policy_with_another_name_is_evaluated_again(accept):
    before, after = fingerprints(accept()), fingerprints(accept(change("  dpo:", "  dpo2:")))
    assert before["dpo"] == after["dpo2"]
    assert before["evaluate"] != after["evaluate"] and before["report"] != after["report"]


def test_fingerprints_do_not_depend_on_the_hash_seed(recipe_file):
    code = (
        "import pathlib; from rlhf_trl.recipe.load import load_recipe\n"
        f"r = load_recipe(pathlib.Path({str(recipe_file(GOOD))!r}))\n"
        "print([r.fingerprint(s) for s in ('prepare', *r.stages, 'evaluate', 'report')])"
    )
    assert run_python(code, PYTHONHASHSEED="0") == run_python(code, PYTHONHASHSEED="1")


def test_the_content_of_a_local_source_counts(tmp_path, accept):
    folder = tmp_path / "pairs"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "a" / "train.jsonl").write_text("1\n")
    (folder / "b" / "train.jsonl").write_text("2\n")
    text = change("builtin:demo", str(folder))

    def now():
        return fingerprints(accept(text))["dpo"]

    seen = [now()]
    (folder / "b" / "train.jsonl").write_text("3\n")
    seen.append(now())
    (folder / "b").rename(folder / "c")  # the folder's name is the subset's
    seen.append(now())
    (folder / "c" / "test.jsonl").write_text("")
    seen.append(now())
    assert len(set(seen)) == 4
    assert now() == seen[-1]


def test_a_source_that_changes_under_a_running_step_is_not_taken_for_what_was_read(tmp_path, accept):
    source = tmp_path / "pairs.jsonl"
    source.write_text("1\n")
    recipe = accept(change("builtin:demo", str(source)))
    before = recipe.fingerprint("prepare")
    source.write_text("2\n")
    assert recipe.fingerprint("prepare") == before
    assert accept(change("builtin:demo", str(source))).fingerprint("prepare") != before


def test_the_config_of_a_local_model_counts_and_of_its_weights_the_size(tmp_path, accept):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12")
    text = change("builtin:tiny", str(tmp_path))
    first = accept(text).fingerprint("prepare")
    weights.write_bytes(b"34")
    assert accept(text).fingerprint("prepare") == first
    weights.write_bytes(b"567")
    assert accept(text).fingerprint("prepare") != first


def test_a_source_that_is_no_path_is_its_own_name(accept):
    assert accept(change("builtin:demo", "x/" * 3000)).fingerprint("prepare")


# --- whatever is typed -----------------------------------------------------------------------------------------------

DEMO = (ROOT / "recipes" / "demo.yaml").read_text()
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2.5, 1e300, 10**30, "", "x", "no", "~", "../x", "rm", "dpo", "[", "a,b"]
    ),
    st.sampled_from(
        [[], {}, [[]], [None], {"": None}, [1, "x", {}], {"trainer": "dpo"}, {"beta": [0.1]}, "builtin:tiny"]
    ),
    st.text(max_size=8),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def load_or_refuse(path: Path, text: str, *overrides: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        assert error.problems and all(
            p.place.strip() and p.problem.strip() and p.remedy.strip() for p in error.problems
        )
    else:
        assert json.dumps(recipe.model_dump(), allow_nan=False)
        assert all(len(recipe.fingerprint(step)) == 64 for step in ("prepare", *recipe.stages, "evaluate", "report"))


@FUZZ
@given(st.data())
def test_a_recipe_with_letters_lost_or_added_is_read_or_refused(folder, data):
    text = DEMO
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.sampled_from([0, 0, 1, 2, 10])))
        piece = data.draw(
            st.one_of(
                st.sampled_from([*"{}[]:,-#&*!|>'\"%@`\t\n ?", "- ", ": ", "<<: ", "\n\n  "]), st.text(max_size=3)
            )
        )
        text = text[:start] + piece + text[end:]
    load_or_refuse(folder / "letters.yaml", text)


@FUZZ
@given(st.data())
def test_a_recipe_with_values_of_other_types_is_read_or_refused(folder, data):
    raw = copy.deepcopy(YAML(typ="safe", pure=True).load(DEMO))
    for _ in range(data.draw(st.integers(1, 3))):
        node, depth = raw, data.draw(st.integers(1, 4))
        while isinstance(node, dict) and node:
            key = data.draw(st.sampled_from(sorted(node)))
            depth -= 1
            if depth == 0 or not isinstance(node[key], dict) or not node[key]:
                node[key] = copy.deepcopy(data.draw(JUNK))
                break
            node = node[key]
    load_or_refuse(folder / "types.yaml", json.dumps(raw))


@FUZZ
@given(
    st.sampled_from(
        ["", "name", "data", "model", "stages", "stages.dpo", "stages.dpo.args", "stages.dpo.sweep", "evaluation"]
    ),
    st.one_of(st.text(max_size=6), st.sampled_from(["beta", "reward", "init", "max_length", "num_generations", "0"])),
    st.one_of(st.text(max_size=8), JUNK.map(lambda value: json.dumps(value))),
)
def test_any_override_is_taken_or_refused(folder, section, key, value):
    load_or_refuse(folder / "sets.yaml", DEMO, f"{section}.{key}={value}")
