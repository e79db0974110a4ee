"""Command `plan`: what each stage will need of a device's memory, and what its training comes to. Nothing is trained.

The real architecture is built with one and with two layers, on tensors that have a size and no content, and takes one
forward and backward pass with the stage's batch; what a layer adds is the same for the rest.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import ModelConfig, get_peft_config
from trl.trainer.utils import selective_log_softmax

from rlhf_trl.models.base import shares_base
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.library import BATCH, value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Stage
from rlhf_trl.run.files import read_json
from rlhf_trl.run.launch import zero_stage
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.check import AUTO, read_config
from rlhf_trl.train.step import build_stage_config

# Bytes of optimizer state for a trained parameter, by what the optimizer's name holds; others keep two float32 values.
OPTIMIZER_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0.1, "sgd": 4, "lion": 4, "rmsprop": 4, "adagrad": 4}
# Bytes of a parameter in NF4 or FP4 with its constants (with double quantisation 0.52), or in 8 bit.
QUANTISED = {"load_in_4bit": 0.5625, "load_in_8bit": 1.0}
CONTEXT = 0.6e9  # bytes that a CUDA context takes beside torch's tensors; as is commonly reported, not measured here
LOGITS_CHUNK = 256  # tokens of TRL's `chunked_nll`
ROLES = {"ppo": 3}  # adapters on the base: policy, value and reward model


@dataclass(frozen=True)
class Need:
    """Bytes of one device at the peak of a stage."""

    weights: float  # of the base, and of a reward model or reference beside it
    trained: float  # weights that are trained: the adapters, or the whole base
    gradients: float
    optimizer: float
    activations: float  # of the update, with its logits
    rollout: float  # key-value cache and logits of what is sampled; never beside the activations
    process: float  # what is no tensor: libraries, or the CUDA context

    @property
    def total(self) -> float:
        held = self.weights + self.trained + self.gradients + self.optimizer
        return held + max(self.activations, self.rollout) + self.process


@dataclass(frozen=True)
class Setting:
    """What the memory of a stage depends on, and what a user can turn."""

    config: Any  # the stage's config, as its trainer gets it
    model: ModelConfig
    tokens: int  # data.max_length
    zero: int = 0  # ZeRO stage of the profile, 0 to 3; FSDP shards as stage 3
    processes: int = 1

    @property
    def answer(self) -> int:
        """Tokens that a rollout adds to a prompt."""
        names = ("max_completion_length", "response_length")
        return next((tokens for name in names if (tokens := getattr(self.config, name, None))), 0)

    def with_args(self, **args: Any) -> Setting:
        config = copy.copy(self.config)
        vars(config).update(args)
        return replace(self, config=config)


# --- counting


class Peak(TorchDispatchMode):
    """Follow the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.highest = 0.0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.highest = max(self.highest, self.now)
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _build(config: Any, setting: Setting, trainer: str, layers: int) -> Any:
    """Build a stage's model with this many layers, on the meta device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    task = "SEQ_CLS" if trainer == "reward" else "CAUSAL_LM"
    if task == "SEQ_CLS":
        config.num_labels, config.pad_token_id = 1, 0
    wanted = setting.model
    with torch.device("meta"):
        model = AUTO[task].from_config(config, dtype=_dtype(wanted), attn_implementation=wanted.attn_implementation)
        lora = get_peft_config(replace(wanted, lora_task_type=task))
        return get_peft_model(model, lora) if lora else model


def _dtype(model: ModelConfig) -> torch.dtype:
    return getattr(torch, str(model.dtype), torch.float32)


def _static(model: Any, setting: Setting, trainer: str) -> list[float]:
    """Bytes of frozen weights, trained weights, gradients and optimizer on one device."""
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad) * ROLES.get(trainer, 1)
    frozen = sum(param.numel() * param.element_size() for param in model.parameters() if not param.requires_grad)
    for key, size in QUANTISED.items():
        if getattr(setting.model, key):
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
            head = model.get_output_embeddings()
            numbers = sum(layer.weight.numel() for layer in layers if layer is not head)
            frozen -= numbers * (_dtype(setting.model).itemsize - size)
    size = 4 if setting.model.use_peft else _dtype(setting.model).itemsize
    state = next((b for word, b in OPTIMIZER_BYTES.items() if word in setting.config.optim), 8)
    updated = trained * (2 / 3 if trainer == "ppo" else 1)  # its reward model is not trained
    parts = (frozen, trained * size, updated * size, updated * state)
    whole = (4, 3, 2, 0)[setting.zero]  # so many parts are on every device
    return [part if place < whole else part / setting.processes for place, part in enumerate(parts)]


def _pass(model: Any, setting: Setting, trainer: str) -> float:
    """Bytes that one forward and backward pass adds at its peak, without gradients of weights."""
    args, peak = setting.config, Peak()
    rows = args.per_device_train_batch_size * (2 if trainer in ("reward", "dpo") else 1)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    with FakeTensorMode(), peak:
        made: dict[int, Any] = {}
        model._apply(lambda old: made.setdefault(id(old), torch.empty(old.shape, dtype=old.dtype)))
        made.clear()
        model.train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids = torch.zeros(rows, setting.tokens + setting.answer, dtype=torch.long)
        before = peak.now
        with autocast:
            outputs = [_forward(model, ids, setting, trainer) for _ in range(2 if trainer == "ppo" else 1)]
            if trainer == "dpo" or (trainer == "grpo" and args.beta):
                with torch.no_grad():  # the reference
                    _forward(model, ids, setting, trainer)
        sum(output.sum() for output in outputs).backward()
        trained = sum(param.numel() * param.element_size() for param in model.parameters() if param.requires_grad)
        return peak.highest - before - trained


def _forward(model: Any, ids: Any, setting: Setting, trainer: str) -> Any:
    if trainer == "reward":
        return model(input_ids=ids, use_cache=False).logits.float()
    kept = {"sft": LOGITS_CHUNK // len(ids) + 1, "dpo": ids.shape[1]}.get(trainer, setting.answer)
    if getattr(setting.config, "loss_type", None) == "nll":
        kept = ids.shape[1]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return selective_log_softmax(logits.float() if trainer in ("sft", "ppo") else logits, ids[:, -kept:])


def _rollout(config: Any, setting: Setting, trainer: str) -> float:
    """Bytes of the key-value cache of the rows that are sampled at once, and of their logits in float32."""
    args, text = setting.config, config.get_text_config()
    if not setting.answer or getattr(args, "use_vllm", False):
        return 0.0
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    kept = 3  # the last position's logits, scaled and as probabilities
    if trainer == "ppo":
        rows, kept = min(rows, args.local_rollout_forward_batch_size), 2 * setting.answer
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = 2 if args.bf16 else _dtype(setting.model).itemsize
    cache = (setting.tokens + setting.answer) * text.num_hidden_layers * 2 * heads * size * itemsize
    return rows * (cache + kept * 4 * text.vocab_size)


def estimate(config: Any, setting: Setting, trainer: str, process: float, rewards: Setting | None = None) -> Need:
    """Estimate the peak of one device in bytes.

    Args:
        config: the transformers config of the base.
        process: bytes that are no tensors.
        rewards: the setting of a reward model that is loaded beside the policy.
    """

    def measure(layers: int) -> Any:
        model = _build(config, setting, trainer, layers)
        frozen, trained, *training = _static(model, setting, trainer)
        if not setting.model.use_peft and (trainer == "dpo" or (trainer == "grpo" and setting.config.beta)):
            frozen += trained  # a reference of its own
        if rewards:
            frozen += sum(_static(_build(config, rewards, "reward", layers), rewards, "reward")[:2])
        return np.array([frozen, trained, *training, _pass(model, setting, trainer)])

    one, two = measure(1), measure(2)
    whole = one + (two - one) * (config.get_text_config().num_hidden_layers - 1)
    names = ("weights", "trained", "gradients", "optimizer", "activations")
    parts = dict(zip(names, whole.tolist(), strict=True))
    return Need(**parts, rollout=_rollout(config, setting, trainer), process=process)


# --- what would help


def _changes(setting: Setting, spec: Stage) -> Iterator[tuple[str, Setting]]:
    """The settings that lower the memory, each by itself, and how a recipe or a command says them."""
    args, model = setting.config, setting.model
    if not args.gradient_checkpointing:
        yield "gradient_checkpointing: true", setting.with_args(gradient_checkpointing=True)
    if (batch := args.per_device_train_batch_size) > 1:
        doubled = "" if spec.global_batch_size else ", and gradient_accumulation_steps doubled"
        text = f"per_device_train_batch_size: {batch // 2}{doubled}"
        steps = args.gradient_accumulation_steps * 2
        yield text, setting.with_args(per_device_train_batch_size=batch // 2, gradient_accumulation_steps=steps)
    if model.dtype in (None, "float32"):
        yield "model.dtype: bfloat16", replace(setting, model=replace(model, dtype="bfloat16"))
    if not model.use_peft:
        yield "model.use_peft: true", replace(setting, model=replace(model, use_peft=True))
    elif not (model.load_in_4bit or model.load_in_8bit) and setting.zero != 3:
        yield "model.load_in_4bit: true", replace(setting, model=replace(model, load_in_4bit=True))
    yield f"data.max_length: {setting.tokens // 2}", replace(setting, tokens=setting.tokens // 2)
    if setting.processes > 1 and setting.zero != 3 and spec.trainer != "ppo":
        yield "--accelerate fsdp2", replace(setting, zero=3)


# --- the plan


def plan(recipe: Recipe, run: RunDir, profile: Path | None, processes: int, size: str | None) -> list[dict[str, Any]]:
    """Describe every stage: bytes on a device, whether they fit, what helps most, steps, tokens, seconds.

    `size` is the memory of a device, such as 24GB; without it this machine's: its smallest GPU, or all its memory.
    UserError where it is no size, or the config of a base model is not at hand.
    """
    try:
        memory = size and convert_file_size_to_int(size)
    except ValueError as error:
        raise UserError("--memory", f"{size!r} is no size", "give a number and a unit, such as 24GB") from error
    on_gpu = memory is not None or torch.cuda.is_available()
    process = CONTEXT if on_gpu else float(psutil.Process().memory_info().rss)
    if memory is None and torch.cuda.is_available():
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    memory = memory or float(psutil.virtual_memory().total)
    zero = zero_stage(profile) if profile else 0

    described = []
    warnings.simplefilter("ignore")  # the libraries' on deprecated names and on a model that is never used
    for stage, spec in recipe.stages.items():
        start = ModelConfig(**recipe.model_block(recipe.root(stage)))
        config = read_config(f"stages.{stage}", start)
        if config is None:
            problem = f"the config of {start.model_name_or_path} is not at hand"
            raise UserError(f"stages.{stage}", problem, "download the model once, or give a folder")
        model = ModelConfig(**recipe.model_block(stage))
        setting = Setting(_config(recipe, run, stage, processes), model, recipe.data.max_length, zero, processes)
        rewards = None
        if spec.reward and not (spec.trainer == "ppo" and shares_base(recipe, stage, spec.reward, evaluation=False)):
            rewards = replace(setting, model=ModelConfig(**recipe.model_block(spec.reward)), zero=0)
        need = estimate(config, setting, spec.trainer, process, rewards)
        after = {text: estimate(config, changed, spec.trainer, process, rewards).total
                 for text, changed in _changes(setting, spec)}  # fmt: skip
        best = min(after, key=after.__getitem__)
        described.append({
            "stage": stage,
            "trainer": spec.trainer,
            "bytes": {**vars(need), "total": need.total},
            "memory": memory,
            "fits": need.total <= memory,
            "helps_most": best,
            "bytes_then": after[best],
            **_length(recipe, run, stage, setting),
        })  # fmt: skip
    return described


def _config(recipe: Recipe, run: RunDir, stage: str, processes: int) -> Any:
    """The config of one of so many processes; GRPO's checks its rollout for those that are running, which is one."""
    args, other = recipe.args_of(stage, processes), {}
    if recipe.stages[stage].trainer == "grpo" and not {"generation_batch_size", "steps_per_generation"} & {*args}:
        other = {"generation_batch_size": processes * math.prod(value_of("grpo", args, key) for key in BATCH)}
    return build_stage_config(recipe, run, stage, processes, **other)


def _length(recipe: Recipe, run: RunDir, stage: str, setting: Setting) -> dict[str, Any]:
    """Steps, tokens at most, and what was measured; None: not known before `prepare` or before training."""
    config, trainer = setting.config, recipe.stages[stage].trainer
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * setting.processes
    online = trainer in ("grpo", "ppo")
    summary = read_json(run.summary) if run.is_done(recipe, "prepare") else None
    rows = summary and summary["splits"]["train"]["prompts" if online else "pairs"]
    if rows and recipe.half_of(stage):
        rows //= 2
    samples = rows and rows * getattr(config, "num_generations", 1) * config.num_train_epochs
    if trainer == "ppo" and config.total_episodes:
        samples = config.total_episodes
    steps = config.max_steps if config.max_steps > 0 else samples and math.ceil(samples / batch)
    tokens = setting.tokens + setting.answer
    sides = 2 if trainer in ("reward", "dpo") else 1
    measured = read_json(run.training_stats(stage))["summary"] if run.is_done(recipe, stage) else {}
    return {"steps": steps, "tokens": steps and steps * batch * sides * tokens, "seconds": measured.get("seconds"),
            "measured_bytes": measured.get("peak_memory_bytes")}  # fmt: skip
