"""What the libraries say of a recipe before its first step: the configs, the modules of the model, the trainers.

Nothing is trained and no weight is read. A model's modules are built on the meta device, from its config; each trainer
is built with the recipe's options, but on a stand-in of a few hundred weights.
"""

import dataclasses
import functools
import inspect
import json
import logging
import re
import tempfile
from importlib.metadata import metadata
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import HfDeepSpeedConfig
from trl import ModelConfig, get_peft_config

from rlhf_trl.models.tokenizer import ABSENT, TINY, tiny_config
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.library import suggest, value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import first_line
from rlhf_trl.train.step import build_config, build_stage_config, classes_of

logger = logging.getLogger(__name__)
# One row of each trainer's dataset, in the stand-in's token ids: padding, end, a word.
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"input_ids": [2, 1], "labels": [2, 1]},
    "reward": {"chosen_ids": [2, 1], "rejected_ids": [2, 2]},
    "dpo": {"prompt_ids": [2], "chosen_ids": [2, 1], "rejected_ids": [1]},
    "grpo": {"prompt": [{"role": "user", "content": "a"}]},
    "ppo": {"input_ids": [2]},
}
BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size")
SHARDING = ("deepspeed", "fsdp", "fsdp_config")
AUTO = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_CLS": transformers.AutoModelForSequenceClassification}
# Key of `model` -> what its names are names of.
NAMES = {"lora_target_modules": "modules", "lora_target_parameters": "parameters"}
ALTERNATIVES = re.compile(r"\w{3,}(?=\|)|(?<=\|)\w{3,}")  # the words of a pattern such as .*(q_proj|v_proj)
# Whatever the libraries raise here, they would raise hours later.
FAULTS = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
RAISED = (UserError, ImportError, OSError, RuntimeError, *FAULTS)
REMEDIES = {
    "optim": "install what it names, or choose another; its arguments go into optim_args",
    "lr_scheduler_type": "give its arguments in lr_scheduler_kwargs, or choose another",
    "deepspeed": "leave it out, and launch with --accelerate zero2 or zero3",
    "metric_for_best_model": "choose one of the metrics there are",
}


def check_stages(recipe: Recipe, run: RunDir, processes: int) -> None:
    """Build what every stage is built from, for that many processes; a RecipeError has every stage's problem."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    problems: list[Problem] = []
    blocks: dict[str, list[str]] = {}  # model block -> the stages that it holds for
    for stage in recipe.stages:
        block = recipe.model_block(recipe.root(stage)) | recipe.model_block(stage)
        blocks.setdefault(json.dumps(block, sort_keys=True), []).append(stage)
    if recipe.evaluation.backend == "vllm" and not torch.cuda.is_available():
        problem, remedy = "vLLM needs a GPU, and this machine has none", "set evaluation.backend: transformers"
        problems.append(Problem("evaluation.backend", problem, remedy))
    checks = [functools.partial(_check_modules, recipe, stages, json.loads(block)) for block, stages in blocks.items()]
    checks += [functools.partial(_check_keywords, recipe, stage) for stage in recipe.stages]
    checks += [functools.partial(_rehearse, recipe, run, stage, processes) for stage in recipe.stages]
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise RecipeError(dict.fromkeys(problems))


def _task(recipe: Recipe, stage: str) -> str:
    return "SEQ_CLS" if recipe.stages[stage].trainer == "reward" else "CAUSAL_LM"


# --- the modules of the model


def _check_modules(recipe: Recipe, stages: list[str], block: dict[str, Any]) -> None:
    """Check that what a model block names is in the model: all of it, as PEFT passes over a name that is not."""

    def place(key: str) -> str:
        return f"stages.{stages[0]}.model.{key}" if key in recipe.stages[stages[0]].model else f"model.{key}"

    wanted = build_config(ModelConfig, block, "model")
    config = read_config(place("model_name_or_path"), wanted)
    if config is None:
        return
    attention = wanted.attn_implementation
    models, names = {}, {"modules": [""], "parameters": [""]}
    for task in sorted({_task(recipe, stage) for stage in stages}):
        try:
            with torch.device("meta"):
                models[task] = AUTO[task].from_config(config, trust_remote_code=False, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            key = "attn_implementation" if attention else "model_name_or_path"
            raise UserError(place(key), first_line(error), "choose another one, or install what it names") from error
        names["modules"] += [name for name, _ in models[task].named_modules()]
        names["parameters"] += [name for name, _ in models[task].named_parameters()]
    if not wanted.use_peft:
        return
    for key, kind in NAMES.items():
        given = getattr(wanted, key)
        whole = isinstance(given, list)
        for text in given if whole else ALTERNATIVES.findall(given or ""):
            if not any(f".{name}".endswith(f".{text}") if whole else text in name for name in names[kind]):
                raise UserError(place(key), f"{text!r} matches nothing in the model", _near(text, names[kind]))
    for task, model in models.items():
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        tied = {name for name, module in model.named_modules() if module in ends} if task == "CAUSAL_LM" else set()
        try:
            adapted = get_peft_model(model, get_peft_config(dataclasses.replace(wanted, lora_task_type=task)))
        except (ValueError, TypeError) as error:
            target = str(wanted.lora_target_modules)
            remedy = _near(target, names["modules"])
            if any(name.endswith(f".{target}") for name in names["modules"]):
                # ModelConfig turns a list of one name into a text, and PEFT takes a text for a pattern.
                remedy = f"a single name is a pattern of whole names: write '.*{target}'"
            raise UserError(place("lora_target_modules"), first_line(error), remedy) from error
        tied &= {*adapted.targeted_module_names} if config.get_text_config().tie_word_embeddings else set()
        if tied:  # merging would change both
            problem = f"{min(tied)} is one matrix with the other end of the model: LoRA would change one alone"
            raise UserError(place("lora_target_modules"), problem, "leave it out")


def _near(text: str, names: list[str]) -> str:
    parts = sorted({part for name in names if not (part := name.rpartition(".")[2]).isdigit()} - {""})
    return suggest(text, parts, f"the names there are: {', '.join(parts)}")


def read_config(place: str, wanted: ModelConfig) -> PretrainedConfig | None:
    """The config of the base model; None, said in a line, where the Hub cannot be reached."""
    name = str(wanted.model_name_or_path)
    if name == TINY:
        return tiny_config()
    try:
        return transformers.AutoConfig.from_pretrained(name, revision=wanted.model_revision, trust_remote_code=False)
    except ABSENT as error:
        unknown = isinstance(error.__cause__, HFValidationError | RepositoryNotFoundError)
        if not isinstance(error, ValueError) and not unknown:
            logger.warning("the config of %s is not at hand: its modules are not checked", name)
            return None
        remedy = "check the name and your access to it; a model that brings code of its own cannot be loaded"
        raise UserError(place, first_line(error), remedy) from error


# --- the trainers


def _check_keywords(recipe: Recipe, stage: str) -> None:
    """Check the keywords that a library passes over, or meets at its first step."""
    old, new = "gradient_checkpointing", "activation_checkpointing"  # of transformers
    enable = vars(PreTrainedModel).get(f"{new}_enable", PreTrainedModel.gradient_checkpointing_enable)
    words = {**inspect.signature(checkpoint).parameters, **inspect.signature(enable).parameters}
    memory = {word for word, of in words.items() if of.default is not of.empty and not word.endswith("_kwargs")}
    known = {f"{old}_kwargs": memory, f"{new}_kwargs": memory,
             "generation_kwargs": {*vars(transformers.GenerationConfig())}}  # fmt: skip
    args = recipe.args_of(stage)
    for key in known.keys() & args.keys():
        for word in args[key] if isinstance(args[key], dict) and not args.get("use_vllm") else ():  # vLLM has others
            if word not in known[key]:
                remedy = suggest(word, known[key], f"the keywords there are: {', '.join(sorted(known[key]))}")
                raise UserError(f"stages.{stage}.args.{key}.{word}", f"there is no keyword {word!r}", remedy)


def _rehearse(recipe: Recipe, run: RunDir, stage: str, processes: int) -> None:
    """Build the trainer, the optimizer and the scheduler of a stage; measure once where a metric chooses the best.

    The libraries check sizes for the processes that are running, so this one takes the batch of all of them, and none
    of what shards over them.
    """
    spec, task, args = recipe.stages[stage], _task(recipe, stage), f"stages.{stage}.args"
    key = ""
    default, given = functools.partial(value_of, spec.trainer), recipe.args_of(stage, processes)
    whole = {name: default(given, name) * processes for name in BATCHES}
    try:
        if sharding := default(given, "deepspeed"):
            HfDeepSpeedConfig(sharding)
        alone = {name: default({}, name) for name in SHARDING}
        config = build_stage_config(recipe, run, stage, processes, **whole, **alone)
        with tempfile.TemporaryDirectory() as folder:
            config.output_dir, config.dataset_num_proc = folder, None
            config.dataloader_num_workers, config.dataloader_prefetch_factor = 0, None
            config.dataloader_persistent_workers = False
            trainer = _build_trainer(spec.trainer, task, config, recipe.model_block(stage))
            key = "optim"
            trainer.create_optimizer()
            key = "lr_scheduler_type"
            trainer.create_scheduler(100)
            if config.metric_for_best_model and spec.trainer != "ppo":
                key = "metric_for_best_model"
                trainer.callback_handler.callbacks.clear()
                trainer._determine_best_metric(trainer.evaluate(), None)
    except RAISED as error:
        text = error.problems[0].problem if isinstance(error, UserError) else " ".join(str(error).split())
        named = [key] if key else [name for name, value in spec.args.items() if _names(name, value, text)][:1]
        extra = next((of for of in metadata("rlhf-trl").get_all("Provides-Extra", []) if of in text.lower()), None)
        brings = f'pip install "rlhf-trl[{extra}]"' if extra else "install it"
        remedy = f"{brings if 'install' in text else 'change the option'}, or leave the option out"
        raise UserError(".".join([args, *named]), text[:600], REMEDIES.get("".join(named), remedy)) from error


def _build_trainer(word: str, task: str, config: Any, block: dict[str, Any]) -> Any:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AUTO[task].from_config(LlamaConfig(vocab_size=3, num_labels=1, pad_token_id=0, bos_token_id=1,
                                               eos_token_id=1, **shape))  # fmt: skip
    model.save_pretrained(config.output_dir)
    model.config._name_or_path = config.output_dir  # where a trainer without an adapter finds its reference
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    data = datasets.Dataset.from_list([ROWS[word]] * 2 * config.train_batch_size)
    common = {"model": model, "args": config, "train_dataset": data, "eval_dataset": data}
    if word == "ppo":  # its trainer asks for a run's reward model; the base class has the same options
        return transformers.Trainer(**common)
    anything = {"lora_target_modules": "all-linear", "lora_target_parameters": None}
    common["peft_config"] = get_peft_config(ModelConfig(**{**block, **anything, "lora_task_type": task}))
    if word == "grpo":
        config.use_vllm = False  # it would start an engine
        common["reward_funcs"] = lambda prompts, **_: [0.0] * len(prompts)
    return classes_of(word)[0](processing_class=tokenizer, **common)


def _names(option: str, value: Any, text: str) -> bool:
    """Whether a message names an option, or a text that it is set to."""
    values = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    words = [option, *(item for item in values if len(item) > 3)]
    return any(re.search(rf"\b{re.escape(word).replace('_', '[_ ]')}\b", text, re.IGNORECASE) for word in words)
