"""Step `train STAGE`: one library trainer, configured by the recipe's block, on the views that `prepare` wrote.

Reads `data/` and the directories of the stages that `init` and `reward` name; writes `<stage>/adapter/` (or `model/`
where the stage is fine-tuned whole), `checkpoints/`, `training_stats.json` and `training_curves.png`.

    rlhf-trl train recipes/demo.yaml dpo
    accelerate launch --config_file accelerate_configs/ddp.yaml -m rlhf_trl train recipes/hh_gpt2.yaml dpo
"""

import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import trl
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from rlhf_trl.models.base import (
    RewardHead,
    adapter_path,
    below_path,
    load_causal,
    load_classifier,
    load_to_continue,
    shares_base,
)
from rlhf_trl.models.rewards import RewardModel, load_reward_model, measure_reward_model, score_completions
from rlhf_trl.models.tokenizer import encode_all, recorded_tokenizer
from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import newest_checkpoint, require_launch
from rlhf_trl.run.documents import environment
from rlhf_trl.run.files import read_jsonl, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.run.trackers import name_projects, names_of
from rlhf_trl.train.callbacks import AtomicCheckpoints, Health, History, Interrupt, Watch, is_sharded, peak_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


def train(recipe: Recipe, run: RunDir, stage: str) -> None:
    """Train one stage, from its newest whole checkpoint if it was interrupted; UserError where an earlier step is
    missing, the data are too few, or the run diverged or changed nothing."""
    started = time.perf_counter()
    spec = recipe.stages[stage]
    run.require(recipe, "prepare", "prepare RECIPE")
    for link in filter(None, (spec.parent, spec.reward)):
        run.require(recipe, link, f"train RECIPE {link}")
    check_gpus()
    # Before PartialState, which begins the process group: this gives it `ddp_timeout`, and the processes without GPU.
    config = build_stage_config(recipe, run, stage, int(os.environ.get("WORLD_SIZE", "1")))
    process = PartialState()
    name_projects(config.report_to, config.project, run.tensorboard(stage))
    set_seed(config.seed)  # before any weight is made: DPO and GRPO do not seed the start of a LoRA themselves
    if process.is_main_process:
        run.begin(recipe, stage)
    process.wait_for_everyone()
    resume = newest_checkpoint(run.checkpoints(stage))
    if resume:
        logger.info("resuming from %s", resume)
    trainer = build_trainer(recipe, run, stage, config)
    if resume:
        sharding = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else "none"
        require_launch(resume, sharding, process.num_processes, spec.global_batch_size is not None)
    history, health, interrupt = History(run.training_stats(stage), stage, spec.trainer), Health(), Interrupt()
    watch = Watch(stage, spec, history)
    # The history is written before a checkpoint that a signal asks for.
    for callback in (interrupt, history, health, watch):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    steps = trainer.state.global_step
    if interrupt.signal:
        trainer.accelerator.wait_for_everyone()
        if process.is_main_process:
            logger.warning("stopped by %s after step %d; a checkpoint is saved. The same command goes on from there.",
                           signal.Signals(interrupt.signal).name, steps)  # fmt: skip
        raise SystemExit(128 + interrupt.signal)
    if steps == 0:
        raise UserError(f"stages.{stage}", "training ended after 0 steps", "use more data, or smaller batches")
    health.check_weights(trainer.model, stage)
    if spec.trainer == "reward":
        _judge_reward_model(trainer, run, watch)
    target = run.adapter(stage) if recipe.model_block(stage).get("use_peft") else run.model(stage)
    _save(trainer, target, needs_head=spec.trainer == "reward")
    if process.is_main_process:
        from rlhf_trl.figures.style import save  # matplotlib is half a second that `validate` need not spend
        from rlhf_trl.figures.training import plot_training

        history.stats["summary"] = _summarise(trainer, history.seconds)
        write_json(history.path, history.stats)
        save(plot_training({stage: history.stats}), run.training_curves(stage))
        run.mark_done(recipe, stage, history.before + time.perf_counter() - started)
    # A process that leaves early aborts, and the launcher then kills the one that is still saving.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _judge_reward_model(trainer: Any, run: RunDir, watch: Watch) -> None:
    """Hold the accuracy on the held-out pairs against chance and length, before a policy learns from this model."""
    if is_sharded(trainer.model):
        logger.info("the reward model is sharded: `evaluate` and `errors` measure its accuracy, not this stage")
        return
    model = RewardModel(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)
    measured = measure_reward_model(model, read_jsonl(run.pairs("test")), trainer.args.per_device_eval_batch_size)
    chance, length = measured["accuracy"]["low"] - 0.5, measured["length_rule"]["over_rule"]["low"]
    watch.judge({"over_chance": chance, "over_length": length}, trainer.state.global_step)


def check_gpus() -> None:
    """Say that a process without a launcher leaves the other GPUs alone; UserError where two would share one."""
    visible, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < visible < here:
        raise UserError("--processes", f"{here} are more than the {visible} GPU(s) here", f"give {visible} or less")
    if visible > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        logger.warning("%d GPUs are visible and one is used: to train on all of them, add --accelerate ddp", visible)


# --- trainer and config


class GroupsByLength:
    """Mixin for a `transformers.Trainer`: `train_sampling_strategy` finds the column `length` of the views.

    The library asks the dataset for it after it has removed the columns that the model does not take.
    """

    def _get_train_sampler(self: Any, train_dataset: Dataset | None = None) -> Any:
        return super()._get_train_sampler(self.train_dataset)  # type: ignore[misc]

    def _get_eval_sampler(self: Any, eval_dataset: Dataset) -> Any:
        return super()._get_eval_sampler(self.eval_dataset)  # type: ignore[misc]


class DPOTrainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Take the tokens as they are; unlike the other trainers, DPOTrainer has no test for that."""
        return dataset


CLASSES = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (DPOTrainer, trl.DPOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


def classes_of(trainer: str) -> tuple[Any, Any]:
    """The trainer class, with atomic checkpoints, and the config class of a recipe's word; not every TRL has PPO's."""
    if trainer == "ppo":
        from rlhf_trl.train.ppo.config import PPOConfig
        from rlhf_trl.train.ppo.trainer import PPOTrainer

        return PPOTrainer, PPOConfig
    library, config = CLASSES[trainer]
    mixins = (AtomicCheckpoints,) if trainer == "grpo" else (AtomicCheckpoints, GroupsByLength)
    return type(library.__name__, (*mixins, library), {}), config


def build_config(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Construct a library's config class, whose own checks have the last word (UserError where they refuse)."""
    try:
        return cls(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(where, " ".join(str(error).split()), f"see the options of {cls.__name__}") from error


def build_stage_config(recipe: Recipe, run: RunDir, stage: str, processes: int = 1, **other: Any) -> Any:
    """Construct the library's config of a stage's trainer: its `args`, those in `other`, and what is always set.

    `processes` are those that `global_batch_size` is spread over.
    """
    trainer = recipe.stages[stage].trainer
    # The library's default turns a NaN loss into 0.0 in the logs (huggingface/trl#6702).
    always = {"output_dir": str(run.checkpoints(stage)), "logging_nan_inf_filter": False}
    values = {**names_of(recipe, stage), **recipe.args_of(stage, processes), **other, **always}
    values.pop("model_init_kwargs", None)  # the stage loads its model itself
    values["use_cpu"] = not torch.accelerator.is_available()
    if trainer == "ppo":
        values["num_sample_generations"] = 0  # its table reads answers as markup: `[/b]` ends the run
    config = build_config(classes_of(trainer)[1], values, f"stages.{stage}.args")
    # With more, transformers would wrap the model in DataParallel, which TRL does not support.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def build_trainer(recipe: Recipe, run: RunDir, stage: str, config: Any) -> Any:
    """Build the library's trainer of a stage, with its data, its models and, where it has one, its reward."""
    spec, block, half = recipe.stages[stage], recipe.model_block(stage), recipe.half_of(stage)
    tokenizer = recorded_tokenizer(recipe, run, stage)
    with PartialState().main_process_first():
        path = below_path(recipe, run, stage)
    scorer: Any = None
    if spec.reward:
        on_base = spec.trainer == "ppo" and shares_base(recipe, stage, spec.reward, evaluation=False)
        scorer = run.adapter(spec.reward) if on_base else load_reward_model(recipe, run, spec.reward)
    own_base = block["model_name_or_path"] != recipe.model["model_name_or_path"]
    other = tokenizer if own_base else None
    train_data = load_view(run, "train", spec.trainer, half, other)
    test_data = load_view(run, "test", spec.trainer, tokenizer=other)
    task, load = ("SEQ_CLS", load_classifier) if spec.trainer == "reward" else ("CAUSAL_LM", load_causal)
    model_config, kernels = ModelConfig(**block, lora_task_type=task), spec.args.get("model_init_kwargs", {})
    models: dict[str, Any]
    if spec.trainer == "ppo":
        from rlhf_trl.train.ppo.models import build_ppo_models

        models = build_ppo_models(path, model_config, tokenizer, config, scorer, run, stage)
    elif spec.continue_ and spec.init:  # DPO and GRPO add a copy of the adapter, `ref`, as their reference
        adapter = adapter_path(recipe, run, spec.init)
        models = {"model": load_to_continue(load(path, model_config, tokenizer, **kernels), adapter, path, block)}
    else:
        model = load(path, model_config, tokenizer, **kernels)
        models = {"model": model, "peft_config": get_peft_config(model_config)}
    if spec.trainer in ("dpo", "grpo") and not model_config.use_peft:  # they load the reference by these
        asked = {key: getattr(model_config, key) for key in ("dtype", "attn_implementation")}
        config.model_init_kwargs = {**kernels, **asked, "revision": model_config.model_revision, "device_map": None}
    if spec.trainer == "grpo":

        def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
            """Score exactly the text that reward training saw."""
            return score_completions(scorer, tokenizer, prompts, completion_ids).tolist()

        models["reward_funcs"] = reward
        needed = config.generation_batch_size // config.num_generations  # with fewer, it silently trains nothing
        if len(train_data) < needed:
            problem = f"{len(train_data)} training prompts are fewer than the {needed} of one rollout"
            raise UserError("data", problem, "lower the batch size or gradient_accumulation_steps, or use more data")
    trainer = classes_of(spec.trainer)[0](
        args=config, train_dataset=train_data, eval_dataset=test_data, processing_class=tokenizer, **models
    )
    for head in filter(lambda module: isinstance(module, RewardHead), trainer.model.modules()):
        head.float()  # on a quantised base, TRL has made it bfloat16 with the adapter
    return trainer


# --- data


def load_view(
    run: RunDir, split: str, trainer: str, half: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Dataset:
    """Load `train` or `test`, or one half of it, as the dataset of a trainer, from the token ids that `prepare` wrote.

    GRPO takes the prompts as messages. A `tokenizer` other than the run's encodes the texts of the pairs. UserError
    where the token ids are missing.
    """
    with PartialState().main_process_first():
        if trainer == "grpo":
            return Dataset.from_json(str(run.prompts(split))).select_columns("prompt")
        path = run.pairs(split) if tokenizer else run.tokens(split)
        if not path.exists():
            remedy = f"delete {run.done('prepare')} and run `rlhf-trl prepare RECIPE`: it writes the same pairs again"
            raise UserError(str(path), "is missing: another version has prepared this run", remedy, Exit.DAMAGED)
        rows = Dataset.from_json(str(path)) if tokenizer else Dataset.from_parquet(str(path))
        if half:
            rows = rows.filter(lambda own: own == half, input_columns="half", desc=f"The {half} half of {path.name}")
        if trainer == "ppo":
            return (
                rows.filter(bool, input_columns="first").select_columns("prompt").rename_column("prompt", "input_ids")
            )
        return rows.map(lambda batch: to_examples(trainer, batch, tokenizer), batched=True,
                        remove_columns=rows.column_names, desc=f"Columns of {path.name}")  # fmt: skip


def to_examples(
    trainer: str, rows: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Turn columns of token ids, or of texts for `tokenizer`, into those of a trainer's dataset."""
    columns = [rows["prompt"], rows["chosen"], rows["rejected"]]
    encoded = encode_all(tokenizer, *columns) if tokenizer else zip(*columns, strict=True)
    examples = [_to_example(trainer, *ids) for ids in encoded]
    return {column: [example[column] for example in examples] for column in examples[0]}


def _to_example(trainer: str, prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    if trainer == "sft":  # the loss covers the tokens of the answer alone
        whole = prompt + chosen
        return {"input_ids": whole, "labels": [-100] * len(prompt) + chosen, "length": len(whole)}
    length = len(prompt) + max(len(chosen), len(rejected))
    if trainer == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "length": length}


# --- what is saved


def _save(trainer: Any, target: Path, needs_head: bool) -> None:
    """Save what was trained, and let it appear under its name only if it is whole and finite (else UserError)."""
    folder = target.with_name(f".{target.name}.staging")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if not PartialState().is_main_process:
        return
    for name in ("training_args.bin", "README.md"):  # a pickle of the arguments, and a card without results
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "ref", ignore_errors=True)  # what a continued adapter was, TRL's reference
    names = check_weights(folder)
    if not names or (needs_head and not any("score" in name for name in names)):
        missing = "reward head was" if names else "weights were"
        raise UserError(str(folder), f"the {missing} not saved", "report this together with the accelerate config")
    shutil.rmtree(target, ignore_errors=True)
    folder.replace(target)


def _summarise(trainer: Any, seconds: float) -> dict[str, Any]:
    args, device = trainer.args, PartialState().device
    # Over all processes: pairs, answers of the data, or sampled answers.
    samples = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "processes": PartialState().num_processes,
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seed": args.seed,
        "rows": len(trainer.train_dataset),
        "samples_per_step": int(getattr(args, "batch_size", samples)),
        "trainable_parameters": sum(param.numel() for param in trainer.model.parameters() if param.requires_grad),
        "stopped": getattr(trainer, "stopped", None),
        "environment": environment(),
    }
