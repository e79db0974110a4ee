"""Base model and reward head, and the policies of a run: adapters on one base that are switched on and off.

The reference is the base with every adapter off. Reward adapters that were trained on the same base lie on it, too.
A continued adapter lies on the model below its reference, and is loaded with that, one at a time.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as zero
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from rlhf_trl.models.tokenizer import ABSENT, base_path, build_once, recorded_tokenizer, unreachable
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import source_hash
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.run.safetensors import check_weights
from rlhf_trl.text.display import first_line

logger = logging.getLogger(__name__)
# What a model needs to be loaded, without its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
# What decides which weights a `model` block loads; the rest of it describes the adapter.
BASE_KEYS = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code",
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
)  # fmt: skip


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: ids and mask, both (B, T)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.long(), (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def fetch(name: str, revision: str | None) -> Path:
    """Find a model of the Hub in the local cache, or fetch it (else UserError); the folder's name is the commit."""
    patterns = [*MODEL_FILES, "*.jinja", "*token*", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except ABSENT as error:
        problem = f"the base cannot be reached: {first_line(error)}"
        raise UserError(name, problem, "check the name, the network, and access") from error


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Load models whole in this process, whatever ZeRO-3 or FSDP does with the one that is trained."""
    everywhere = mock.patch.dict(os.environ, FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    with mock.patch.object(zero, "_hf_deepspeed_config_weak_ref", None), everywhere:
        yield


@unsharded()
def start_path(recipe: Recipe, run: RunDir, stage: str) -> str:
    """Where the model that a stage starts from lies: its `init` stage's, or the base.

    The adapter of the `init` stage is merged into a full-precision base once, next to that adapter. Every loader
    understands that folder (4-bit, ZeRO-3), and it is the exact reference of what is trained on it. A damaged one is
    merged again. So it is with the adapter of a folder outside the run, under `starts/`.
    """
    spec = recipe.stages[stage]
    if spec.init is None:
        return base_path(recipe.model_block(stage), run)
    init, block = spec.init, recipe.model_block(spec.parent) if spec.parent else recipe.model
    merged = run.model(init) if spec.parent else run.start(recipe.sources[init][:16])
    if spec.parent and not run.adapter(init).exists():
        return str(merged)

    def merge(folder: Path) -> None:
        adapter = adapter_path(recipe, run, init)
        start = below_path(recipe, run, init)
        base = load_weights(transformers.AutoModelForCausalLM, start, ModelConfig(**block), quantize=False)
        lay(base, adapter).merge_and_unload().save_pretrained(folder)
        recorded_tokenizer(recipe, run).save_pretrained(folder)

    return build_once(run, spec.parent or merged.name, merged, merge)


def below_path(recipe: Recipe, run: RunDir, stage: str) -> str:
    """Where the model lies that the adapter of a stage, or of a folder outside the run, is laid on.

    That is the start of the stage, unless it continues an adapter: then the model below that one.
    """
    maker = recipe.maker(stage)
    return start_path(recipe, run, maker) if maker in recipe.stages else base_path(recipe.model, run)


def adapter_path(recipe: Recipe, run: RunDir, init: str) -> Path:
    """The folder of the adapter of an `init`; UserError where one outside the run has changed since it was read."""
    if init in recipe.stages:
        return run.adapter(init)
    if source_hash(init, run.hashes.of) != recipe.sources[init]:
        problem = "the adapter has changed since the run read it, or is gone"
        raise UserError(init, problem, "put it back, or train again from the new one")
    return Path(init)


def lay(model: PreTrainedModel, folder: Path, **more: Any) -> PeftModel:
    """Lay a saved adapter on its base; UserError where a tensor is not finite, or missing: PEFT only warns."""
    check_weights(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, folder, **more)
        except UserWarning as warning:
            raise UserError(str(folder), first_line(warning)[:200], "train it with these versions") from warning


def load_to_continue(model: PreTrainedModel, folder: Path, path: str, block: dict[str, Any]) -> PeftModel:
    """Lay a saved adapter on the base from `path` to train it further; say which keys of `block` it overrules."""
    # As TRL lays a new one: with ZeRO-3 all parameters have to be of one dtype.
    widen = not is_deepspeed_zero3_enabled()
    adapted = lay(model, folder, is_trainable=True, autocast_adapter_dtype=widen)
    config: Any = adapted.peft_config["default"]
    config.base_model_name_or_path = path
    own = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
           "lora_target_modules": config.target_modules}  # fmt: skip
    for key, value in own.items():
        asked = set(block[key]) if isinstance(block.get(key), list) else block.get(key)
        if asked not in (None, "all-linear", value):
            logger.warning("%s: the continued adapter has its own, %s", key, value)
    return adapted


# --- loading


class RewardHead(torch.nn.Linear):
    """A scalar head that is kept and applied in float32, whatever the base's precision.

    In bfloat16 its updates would round away, and scores that differ by less than 1 in 256 would tie.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)


def load_causal(path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, **more: Any) -> PreTrainedModel:
    """Load a language model as the recipe's `model` block says (dtype, attention, quantisation)."""
    model = load_weights(transformers.AutoModelForCausalLM, path, config, **more)
    set_padding(model, tokenizer, path)
    # Contiguous: on the CPU, torch multiplies a slice of positions row by row, each with a copy of the head's weights.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    # Not the model's own settings: some stop at other tokens than the template's, some penalise repetition.
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    return model


def load_classifier(
    path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, **more: Any
) -> PreTrainedModel:
    """Load the same weights under a head with one output; the head is random until an adapter brings its own."""
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)  # it reports the head, which no language model has, as a fault
    try:
        model = load_weights(transformers.AutoModelForSequenceClassification, path, config, num_labels=1, **more)
    finally:
        report.setLevel(level)
    set_padding(model, tokenizer, path)
    with contextlib.ExitStack() as stack:
        if is_deepspeed_zero3_enabled():  # it has sharded the weight while loading
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([model.score.weight]))
        weight = model.score.weight.detach().float().clone()
    head = RewardHead(weight.shape[1], 1, bias=False, device=weight.device)
    head.weight = torch.nn.Parameter(weight)
    model.score = head
    return model


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a model the padding token of its tokenizer; UserError where it has no weights for that, or for the end."""
    last, size = max(tokenizer.pad_token_id, tokenizer.eos_token_id), model.config.get_text_config().vocab_size
    if last >= size:
        problem = f"the tokenizer has {tokenizer.convert_ids_to_tokens(last)!r}, token {last}; the model has {size}"
        raise UserError(path, problem, "take it out of the tokenizer, or save the model with resized embeddings")
    model.config.pad_token_id = tokenizer.pad_token_id


def load_weights(auto: Any, path: str, config: ModelConfig, quantize: bool = True, **more: Any) -> PreTrainedModel:
    """Load a model of a transformers Auto class as a `model` block says, without running code that comes with it."""
    quantization = get_quantization_config(config) if quantize else None
    if quantization is not None:
        more |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    more |= {"revision": config.model_revision, "dtype": dtype, "attn_implementation": config.attn_implementation}
    try:
        # Without trust_remote_code=False, a model that brings code has the user asked whether to run it.
        model = auto.from_pretrained(path, trust_remote_code=False, **more)
    except ABSENT as error:
        raise unreachable(path, error) from error
    for layer in model.modules() if quantization is not None else ():
        # bitsandbytes packs a 4-bit weight at its first pass without a gradient, on a CPU with AVX512-BF16; whatever
        # is trained on the packed weight gets a wrong gradient, as its product has none.
        layer.support_avx512bf16_for_cpu = False
    return model


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Return how many tokens a model reads at most; None where it sets no limit, as with ALiBi or a state space."""
    config, name = model.config.get_text_config(), "max_position_embeddings"
    limit: int | None = config.to_dict().get(config.attribute_map.get(name, name))
    return limit


def prompt_room(model: PreTrainedModel | PeftModel, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have before an answer of `max_new_tokens`; None where there is no limit, and
    UserError where none is left."""
    limit = positions(model)
    if limit is not None and limit <= max_new_tokens:
        problem = f"{max_new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
        raise UserError("max_new_tokens", problem, f"give less than {limit}")
    return limit and limit - max_new_tokens


# --- adapters on one base


def base_block(recipe: Recipe, stage: str, evaluation: bool = True) -> dict[str, Any]:
    """The keys of a stage's `model` block that its base is loaded with; in evaluation's precision, or its own."""
    block = {key: value for key, value in recipe.model_block(stage).items() if key in BASE_KEYS}
    return block | ({"dtype": recipe.evaluation.dtype} if evaluation and recipe.evaluation.dtype else {})


def shares_base(recipe: Recipe, first: str, stage: str, evaluation: bool = True) -> bool:
    """Whether `stage` is an adapter on the base that `first` is loaded on; `evaluation` as of `base_block`."""
    same = recipe.stages[first].init == recipe.below(stage)
    same &= base_block(recipe, first, evaluation) == base_block(recipe, stage, evaluation)
    return same and bool(recipe.model_block(stage).get("use_peft"))


def adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a saved adapter without its head, for use on a language model."""
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type = config.modules_to_save = None
    config.inference_mode = True
    return config


def load_adapter(model: PeftModel, name: str, folder: Path, widen: bool = False) -> Tensor | None:
    """Load a saved adapter onto a base, under a name that may be there already; `widen` keeps it in float32.

    Returns the weight of its reward head, (1, H), if it has one; the head itself stays with the caller. UserError
    where the adapter holds tensors that are not finite, or that the base has no place for.
    """
    check_weights(folder)
    if name not in model.peft_config:
        model.add_adapter(name, adapter_config(folder), autocast_adapter_dtype=widen)
    weights = load_file(folder / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight", None)
    left = set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys
    if left:
        raise UserError(str(folder), f"the adapter does not fit its base: {left[0]}", "train the stage again")
    return head


class Policies:
    """One base, the adapters that lie on it, and, one at a time, the policies that were fine-tuned whole."""

    def __init__(self, recipe: Recipe, run: RunDir, tokenizer: PreTrainedTokenizerBase):
        self.recipe, self.run, self.tokenizer = recipe, run, tokenizer
        self.block = base_block(recipe, recipe.policies[0])
        self.model: Any = self._load(start_path(recipe, run, recipe.policies[0]))

    def _load(self, path: str) -> Any:
        return load_causal(path, ModelConfig(**self.block), self.tokenizer).to(PartialState().device).eval()

    def add(self, name: str, folder: Path) -> Tensor | None:
        """Load an adapter onto the base: as `load_adapter`."""
        if not isinstance(self.model, PeftModel):
            config = adapter_config(folder)
            self.model = get_peft_model(self.model, config, adapter_name=name, autocast_adapter_dtype=False)
        head = load_adapter(self.model, name, folder)
        self.model.to(PartialState().device).eval()
        return head

    @contextlib.contextmanager
    def use(self, name: str, checkpoint: Path | None = None) -> Iterator[Any]:
        """Yield the model of a policy, of one of its checkpoints, or of the `reference`."""
        adapted = isinstance(self.model, PeftModel)
        if name == REFERENCE:
            with self.model.disable_adapter() if adapted else contextlib.nullcontext():
                yield self.model
            return
        if name in self.recipe.stages and not self.recipe.model_block(name).get("use_peft"):
            yield self._load(str(checkpoint or self.run.model(name)))
            return
        if name in self.recipe.stages and self.recipe.stages[name].continue_:  # its adapter lies below the reference
            base = self._load(below_path(self.recipe, self.run, name))
            folder = checkpoint or self.run.adapter(name)
            yield lay(base, folder, autocast_adapter_dtype=False).eval()
            return
        key = name if checkpoint is None else f"{name}-{checkpoint.name}"
        if not adapted or key not in self.model.peft_config:
            self.add(key, checkpoint or self.run.adapter(name))
        self.model.set_adapter(key)
        yield self.model
