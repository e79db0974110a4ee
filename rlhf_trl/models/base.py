"""Tokenizer, text encoding, base model and reward head: what every step that loads weights starts with.

One text encoding (`encode`) serves reward training, preference optimisation, the rewards of online training and
evaluation, so that all score the same tokens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import first_line

Messages = list[dict[str, str]]

TINY = "builtin:tiny"
# What a model needs to be loaded, without its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
HH_TEMPLATE = Path(__file__).parent / "hh.jinja"
# Bytes that no UTF-8 text holds: in a byte-level BPE their tokens never come out of text, so one can serve as padding.
NON_UTF8_BYTE_TOKENS = ("ÿ", "þ", "ý", "ü", "û", "ú", "ù", "ø")


def load_tokenizer(recipe: Recipe, run: RunDir) -> PreTrainedTokenizerBase:
    """Set up the tokenizer of the recipe's base model; `prepare` records it in the run for every later step."""
    return set_up_tokenizer(base_path(recipe.model, run), recipe.model)


def recorded_tokenizer(recipe: Recipe, run: RunDir, stage: str | None = None) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, or that of a reward stage which has a base of its own."""
    block = recipe.model_block(stage) if stage else recipe.model
    if block["model_name_or_path"] != recipe.model["model_name_or_path"]:
        return set_up_tokenizer(base_path(block, run), block)
    return AutoTokenizer.from_pretrained(run.tokenizer, padding_side="left")


def set_up_tokenizer(path: str, model: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it what every stage needs.

    That is: a padding token that differs from the end-of-sequence token (else the end of an answer is masked and can
    be neither learned nor scored) and lies inside the vocabulary (so that the embedding is not resized and adapters
    fit the public base); padding on the left; a chat template that does not depend on the date.

    Raises:
        UserError: there is no end-of-sequence token, or no token to pad with.
    """
    revision = model.get("model_revision", "main")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreachable(path, error) from error
    if tokenizer.eos_token is None:
        raise UserError(path, "the tokenizer has no end-of-sequence token", "use a model with one")
    template = tokenizer.chat_template or HH_TEMPLATE.read_text(encoding="utf-8")
    date = '{%- set date_string = "26 Jul 2024" -%}' if "strftime_now" in template else ""
    tokenizer.chat_template = date + template
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": _pad_token(tokenizer, path)})
    return tokenizer


def _pad_token(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    in_use = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    if tokenizer.pad_token is not None and tokenizer.pad_token not in in_use and tokenizer.pad_token in vocabulary:
        return tokenizer.pad_token
    added = sorted((index, token.content) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    spare = [token for _, token in added if token not in in_use and token not in tokenizer.chat_template]
    named = [token for token in spare if "pad" in token.lower()]
    bytes_ = [token for token in NON_UTF8_BYTE_TOKENS if token in vocabulary and len(tokenizer(token).input_ids) > 1]
    for token in (*named, *spare, *bytes_):
        return token
    raise UserError(path, "no token of the vocabulary can serve for padding", "use a tokenizer with a pad token")


def render(tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str | None) -> tuple[str, str]:
    """Render a conversation: the prompt up to where the answer begins, and the answer up to its end-of-sequence token.

    Raises:
        UserError: the chat template renders a prompt differently once an answer follows.
    """
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if answer is None:
        return start, ""
    answered = [*prompt, {"role": "assistant", "content": answer.strip()}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(start):
        problem = "the prompt's text changes when an answer follows"
        raise UserError("chat template", problem, "use a prefix-preserving template")
    text, eos, _ = whole[len(start) :].rpartition(tokenizer.eos_token)
    return start, text + eos if eos else whole[len(start) :] + tokenizer.eos_token


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str | None = None, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Encode a prompt and an answer as the policy sees them.

    Args:
        prompt: messages that end on a user turn.
        finished: whether the answer ended by itself; one cut at the length limit is scored without the end token.

    Returns:
        Token ids of the prompt (with the generation prompt) and of the answer (with its end token; empty without an
        answer).
    """
    start, rest = render(tokenizer, prompt, answer)
    prompt_ids = tokenizer(start, add_special_tokens=False, verbose=False).input_ids
    answer_ids = tokenizer(rest, add_special_tokens=False, verbose=False).input_ids if rest else []
    return prompt_ids, answer_ids if finished else answer_ids[:-1]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: ids and mask, both (B, T)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.long(), (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def fetch(name: str, revision: str | None) -> Path:
    """Find a model of the Hub in the local cache, or fetch it; the folder's name is the commit.

    Raises:
        UserError: it can be had neither here nor there.
    """
    patterns = [*MODEL_FILES, "*.jinja", "token*.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        problem = f"the base cannot be reached: {first_line(error)}"
        raise UserError(name, problem, "check the name, the network, and access") from error


def base_path(model: dict[str, Any], run: RunDir) -> str:
    """Where the base model of a `model` block lies; builds `builtin:tiny` on first use."""
    if model["model_name_or_path"] != TINY:
        return str(model["model_name_or_path"])
    if not run.base.exists():
        with run.model_lock("base"):
            if not run.base.exists():
                from rlhf_trl.models.tiny import build_tiny

                with staged(run.base) as folder:
                    build_tiny(folder)
    return str(run.base)


def start_path(recipe: Recipe, run: RunDir, stage: str) -> str:
    """Where the model that a stage starts from lies: its `init` stage's, or the base.

    The adapter of the `init` stage is merged into a full-precision base once, next to that adapter: a folder that
    every loader understands (4-bit, ZeRO-3), and the exact reference of what is trained on it.
    """
    init = recipe.stages[stage].init
    if init is None:
        return base_path(recipe.model_block(stage), run)
    path = run.model(init)
    if not path.exists():
        with run.model_lock(init):  # stages that train side by side may start from the same one
            if not path.exists():
                config = ModelConfig(**recipe.model_block(init))
                start = start_path(recipe, run, init)
                base = load_weights(transformers.AutoModelForCausalLM, start, config, quantize=False)
                merged = PeftModel.from_pretrained(base, run.adapter(init)).merge_and_unload()
                with staged(path) as folder:
                    merged.save_pretrained(folder)
                    recorded_tokenizer(recipe, run).save_pretrained(folder)
    return str(path)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class RewardHead(torch.nn.Linear):
    """A scalar head that is kept and applied in float32, whatever the base's precision.

    In bfloat16 its updates would round away, and scores that differ by less than 1 in 256 would tie. PEFT widens the
    LoRA weights by itself, but not the modules that it saves whole.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)


def load_causal(path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a language model as the recipe's `model` block says (dtype, attention, quantisation)."""
    model = load_weights(transformers.AutoModelForCausalLM, path, config)
    model.config.pad_token_id = tokenizer.pad_token_id
    # Contiguous: on the CPU, torch would multiply a slice of positions row by row, with a copy of the vocabulary's
    # weights for each row (1.7 GB for 32 rows and a vocabulary of 49,152).
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    # Not the model's own settings: some stop at several tokens, where the policy is trained and scored with the one
    # that its template writes; some penalise repetition, and then nothing samples from the model's distribution.
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    return model


def load_classifier(path: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the same weights under a head with one output; the head is random until an adapter brings its own."""
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)  # it reports the head, which no language model has, as a fault
    try:
        model = load_weights(transformers.AutoModelForSequenceClassification, path, config, num_labels=1)
    finally:
        report.setLevel(level)
    model.config.pad_token_id = tokenizer.pad_token_id
    with contextlib.ExitStack() as stack:
        if is_deepspeed_zero3_enabled():  # it has sharded the weight while loading
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([model.score.weight]))
        weight = model.score.weight.detach().float().clone()
    head = RewardHead(weight.shape[1], 1, bias=False, device=weight.device)
    head.weight = torch.nn.Parameter(weight)
    model.score = head
    return model


def load_weights(auto: Any, path: str, config: ModelConfig, quantize: bool = True, **more: Any) -> PreTrainedModel:
    """Load a model of a transformers Auto class as a `model` block says, without running code that comes with it."""
    quantization = get_quantization_config(config) if quantize else None
    if quantization is not None:
        more |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    more |= {"revision": config.model_revision, "dtype": dtype, "attn_implementation": config.attn_implementation}
    try:
        # Without trust_remote_code=False, a model that brings code has the user asked whether to run it.
        return auto.from_pretrained(path, trust_remote_code=False, **more)
    except OSError as error:
        raise _unreachable(path, error) from error


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Return how many tokens a model reads at most; None where it sets no limit, as with ALiBi or a state space."""
    config, name = model.config.get_text_config(), "max_position_embeddings"
    limit: int | None = config.to_dict().get(config.attribute_map.get(name, name))
    return limit


def prompt_room(model: PreTrainedModel | PeftModel, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have before an answer of `max_new_tokens`; None where there is no limit.

    Raises:
        UserError: none is left for a prompt.
    """
    limit = positions(model)
    if limit is not None and limit <= max_new_tokens:
        problem = f"{max_new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
        raise UserError("max_new_tokens", problem, f"give less than {limit}")
    return limit and limit - max_new_tokens


def _unreachable(path: str, error: Exception) -> UserError:
    problem = f"the model cannot be loaded: {first_line(error)}"
    return UserError(path, problem, "check `model.model_name_or_path`, the network, and access")
