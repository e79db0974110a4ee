"""Step `train STAGE`: one library trainer, configured by the recipe's block, on the views that `prepare` wrote.

Reads `data/` and the directories of the stages that `init` and `reward` name; writes `<stage>/adapter/` (or `model/`
where the stage is fine-tuned whole), `checkpoints/`, `training_stats.json` and `training_curves.png`.

    rlhf-trl train recipes/demo.yaml dpo
    accelerate launch --config_file accelerate_configs/ddp.yaml -m rlhf_trl train recipes/hh_gpt2.yaml dpo
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from rlhf_trl.figures.training import plot_training
from rlhf_trl.models.base import load_causal, load_classifier, recorded_tokenizer, start_path
from rlhf_trl.models.rewards import load_reward_model, score_completions
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import last_valid_checkpoint
from rlhf_trl.run.environment import environment
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.callbacks import Health, History, Interrupt, peak_memory
from rlhf_trl.train.trainers import kind_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What an adapter folder holds; the library also leaves a pickle of the arguments and a card without results.
NOT_SHARED = ("training_args.bin", "README.md")


def train(recipe: Recipe, run: RunDir, stage: str) -> None:
    """Train one stage, from its newest whole checkpoint if it was interrupted.

    Raises:
        UserError: an earlier step is missing, the data are too few, or the run diverged or changed nothing.
    """
    started = time.perf_counter()
    _require_inputs(recipe, run, stage)
    trainer_word = recipe.stages[stage].trainer
    config = _build_stage_config(recipe, run, stage)
    set_seed(config.seed)  # before any weight is made: DPO and GRPO do not seed the start of a LoRA themselves
    resume = _prepare_directory(recipe, run, stage)
    history, health, interrupt = History(run.training_stats(stage), stage, trainer_word), Health(), Interrupt()
    trainer = build_trainer(recipe, run, stage, config)
    for callback in (history, health, interrupt):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if interrupt.signal:
        _stop_interrupted(trainer, interrupt.signal, stage)
    _finish(recipe, run, stage, trainer, history, health)
    if PartialState().is_main_process:
        run.mark_done(recipe, stage, time.perf_counter() - started)
    # A process that leaves early aborts, and the launcher then kills the one that is still saving.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def build_config(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Construct a library's config class; its own checks have the last word.

    Raises:
        UserError: the class refuses the values.
    """
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(where, " ".join(str(error).split()), f"see the options of {cls.__name__}") from error


def build_configs(recipe: Recipe, run: RunDir) -> None:
    """Construct the config of every stage, so that what only the libraries find is found before the first step.

    Raises:
        RecipeError: with every stage's problem.
    """
    problems: list[Problem] = []
    for stage in recipe.stages:
        try:
            _build_stage_config(recipe, run, stage)
            build_config(ModelConfig, recipe.model_block(stage), "model")
        except UserError as error:
            problems += error.problems
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _build_stage_config(recipe: Recipe, run: RunDir, stage: str) -> Any:
    word = recipe.stages[stage].trainer
    values = {**recipe.args_of(stage), **_own_settings(run, stage, word)}
    return build_config(kind_of(word).config, values, f"stages.{stage}.args")


def _own_settings(run: RunDir, stage: str, trainer: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(run.checkpoints(stage)),
        "use_cpu": not torch.accelerator.is_available(),
        # The default turns a NaN loss into 0.0 in the logs (huggingface/trl#6702).
        "logging_nan_inf_filter": False,
    }
    if trainer == "ppo":
        settings["num_sample_generations"] = 0  # its table reads answers as markup: `[/b]` ends the run
    return settings


def _require_inputs(recipe: Recipe, run: RunDir, stage: str) -> None:
    run.require(recipe, "prepare", "prepare RECIPE")
    for link in (recipe.stages[stage].init, recipe.stages[stage].reward):
        if link is not None:
            run.require(recipe, link, f"train RECIPE {link}")


def _prepare_directory(recipe: Recipe, run: RunDir, stage: str) -> Path | None:
    """Give the stage a clean directory, or find the checkpoint to go on from."""
    state = PartialState()
    fingerprint = recipe.fingerprint(stage)
    marker = run.started(stage)
    resume = None
    if state.is_main_process:
        unfinished = (
            marker.exists() and read_json(marker)["fingerprint"] == fingerprint and not run.done(stage).exists()
        )
        if not unfinished:
            run.replace(stage)
            write_json(marker, {"fingerprint": fingerprint})
    state.wait_for_everyone()
    if run.checkpoints(stage).exists():
        resume, rejected = last_valid_checkpoint(run.checkpoints(stage))
        for reason in rejected:
            logger.warning("passed over an unusable checkpoint: %s", reason)
        if resume:
            logger.info("resuming from %s", resume)
    return resume


def build_trainer(recipe: Recipe, run: RunDir, stage: str, config: Any) -> Any:
    """Build the library's trainer of a stage, with its model, its data and, where it has one, its reward."""
    word = recipe.stages[stage].trainer
    kind = kind_of(word)
    tokenizer = recorded_tokenizer(recipe, run, stage)
    model_config = ModelConfig(**recipe.model_block(stage), lora_task_type=kind.task_type)
    with PartialState().main_process_first():
        path = start_path(recipe, run, stage)
    rows = run.prompts if word in ("grpo", "ppo") else run.pairs
    train_data = _load_view(rows("train"), kind.view, tokenizer, recipe.half_of(stage))
    test_data = _load_view(rows("test"), kind.view, tokenizer)
    shared = {
        "args": config,
        "train_dataset": train_data,
        "eval_dataset": test_data,
        "processing_class": tokenizer,
    }
    if word == "ppo":
        from rlhf_trl.train.ppo.models import build_ppo_models

        return kind.trainer(**shared, **build_ppo_models(recipe, run, stage, config, tokenizer, kind.view))
    load = load_classifier if word == "reward" else load_causal
    shared |= {"model": load(path, model_config, tokenizer), "peft_config": get_peft_config(model_config)}
    if word == "grpo":
        _require_prompts(config, len(train_data))
        shared["reward_funcs"] = build_reward_function(recipe, run, str(recipe.stages[stage].reward), tokenizer)
    return kind.trainer(**shared)


def _load_view(
    path: Path,
    view: Callable[[Any, Any], dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    half: str | None = None,
) -> Dataset:
    with PartialState().main_process_first():
        rows = Dataset.from_json(str(path))
        if half:
            rows = rows.filter(lambda row: row["half"] == half, desc=f"The {half} half of {path.name}")
        return rows.map(
            lambda row: view(tokenizer, row), remove_columns=rows.column_names, desc=f"Encoding {path.name}"
        )


def _require_prompts(config: Any, prompts: int) -> None:
    """GRPO samples whole groups and silently trains nothing when there are too few prompts for one rollout."""
    needed = config.generation_batch_size // config.num_generations
    if prompts < needed:
        raise UserError("data", f"{prompts} training prompts are fewer than the {needed} of one rollout",
                        "lower the batch size or gradient_accumulation_steps, or use more data")  # fmt: skip


def build_reward_function(
    recipe: Recipe, run: RunDir, stage: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[float]]:
    """Build GRPO's reward function: the reward model's score of exactly the text that reward training saw."""
    reward_model = load_reward_model(recipe, run, stage)

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return score_completions(reward_model, tokenizer, prompts, completion_ids).tolist()

    return reward


# --- the end of a run
# --------------------------------------------------------------------------------------------------


def _stop_interrupted(trainer: Any, number: int, stage: str) -> None:
    trainer.accelerator.wait_for_everyone()
    if PartialState().is_main_process:
        logger.warning("stopped by %s after step %d; a checkpoint is saved. The same command goes on from there.",
                       signal.Signals(number).name, trainer.state.global_step)  # fmt: skip
    raise SystemExit(128 + number)


def _finish(recipe: Recipe, run: RunDir, stage: str, trainer: Any, history: History, health: Health) -> None:
    """Save what was trained, check that training did something, and write the statistics."""
    steps = trainer.state.global_step
    if steps == 0:
        raise UserError(
            f"stages.{stage}", "training ended after 0 steps", "use more data, more epochs, or smaller batches"
        )
    changed = health.count_changed(trainer.model)
    # Resumed at the last step: no update is expected.
    if changed == 0 and health.first_step == 0:
        raise UserError(
            f"stages.{stage}", "training changed no weight", "raise learning_rate, or check that the data differ"
        )
    health.require_agreement(trainer.model)
    uses_peft = bool(recipe.model_block(stage).get("use_peft"))
    target = run.adapter(stage) if uses_peft else run.model(stage)
    staging = target.with_name(f".{target.name}.staging")
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if not PartialState().is_main_process:
        return
    for name in NOT_SHARED:
        (staging / name).unlink(missing_ok=True)
    _check_saved(staging, recipe.stages[stage].trainer == "reward")
    shutil.rmtree(target, ignore_errors=True)
    staging.replace(target)
    trainable = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad)
    device = PartialState().device
    history.finish({
        "steps": steps,
        "seconds": round(history.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "processes": PartialState().num_processes,
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seed": trainer.args.seed,
        "rows": len(trainer.train_dataset),
        "samples_per_step": _samples_per_step(trainer.args, recipe.stages[stage].trainer),
        "trainable_parameters": trainable,
        "stopped": getattr(trainer, "stopped", None),
        "environment": environment(),
    })  # fmt: skip
    plot_training(history.stats, run.training_curves(stage))


def _samples_per_step(args: Any, word: str) -> int:
    """Count the samples of one step over all processes: pairs, answers of the data, or sampled answers."""
    if word == "ppo":
        return int(args.batch_size)
    return int(args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def _check_saved(folder: Path, needs_head: bool) -> None:
    """Refuse a saved adapter or model with no tensor, an empty or not finite one, or without its reward head."""
    count, heads = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(key)
                if tensor.numel() == 0 or not tensor.float().isfinite().all():
                    raise UserError(
                        str(folder), f"the tensor {key} is empty or not finite", "lower learning_rate and train again"
                    )
                count += 1
                heads += "score" in key
    if count == 0 or (needs_head and heads == 0):
        missing = "weights" if count == 0 else "reward head"
        raise UserError(
            str(folder), f"the {missing} were not saved", "report this together with the accelerate config"
        )
