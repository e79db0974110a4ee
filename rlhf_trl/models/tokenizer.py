"""The tokenizer, the text encoding that all share, and the base `builtin:tiny`; it loads neither peft nor trl.

One encoding (`encode`) serves reward training, preference optimisation, the rewards of online training and
evaluation, so that all score the same tokens.
"""

from __future__ import annotations

import datetime
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from httpx2 import TransportError
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import Patterns, damage, seal
from rlhf_trl.run.files import remove, staged
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import first_line

if TYPE_CHECKING:
    from transformers import LlamaConfig

Messages = list[dict[str, str]]
# What a model, or its tokenizer, that is not there makes the libraries raise; the last one is raised by a proxy, too.
ABSENT = (OSError, ValueError, TransportError)
TINY = "builtin:tiny"
DEMO = Path(__file__).parent.parent / "data" / "demo.jsonl.gz"
# What a model needs to be loaded, without its tokenizer.
MODEL: Patterns = (("config.json",), ("*.safetensors",))
CACHED_WORDS = 2**17  # whose tokens a tokenizer remembers, in about 20 MB; it makes `prepare` 8 % faster
HH_TEMPLATE = Path(__file__).parent / "hh.jinja"
# Byte-level BPE tokens of bytes that UTF-8 never contains: no text produces them, so one can be the padding token.
NON_UTF8_BYTE_TOKENS = ("ÿ", "þ", "ý", "ü", "û", "ú", "ù", "ø")
TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.+?)\1\s*\)""")
DAY = datetime.date(2024, 7, 26)  # that of Llama 3's template where it is not told the day


def load_tokenizer(recipe: Recipe, run: RunDir) -> PreTrainedTokenizerBase:
    """Set up the tokenizer of the recipe's base model; `prepare` records it in the run for every later step."""
    return set_up_tokenizer(base_path(recipe.model, run), recipe.model)


def recorded_tokenizer(recipe: Recipe, run: RunDir, stage: str | None = None) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer, or that of a reward stage which has a base of its own."""
    block = recipe.model_block(stage) if stage else recipe.model
    if block["model_name_or_path"] != recipe.model["model_name_or_path"]:
        return set_up_tokenizer(base_path(block, run), block)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run.tokenizer, padding_side="left")


def set_up_tokenizer(path: str, model: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it what every stage needs: padding on the left, a chat template with a fixed date, the
    end token of that template, and another token of the vocabulary to pad with, so that no end is masked. UserError
    where no token can end or pad a text, or a text would not have the same tokens everywhere.
    """
    from transformers import AutoTokenizer  # it imports torch, which the processes of `prepare` need not

    revision = model.get("model_revision", "main")
    if Path(path, "../adapter_config.json").is_file() and not Path(path, "tokenizer_config.json").exists():
        path = str(Path(path).parent)  # the base that an adapter ships, whose tokenizer lies beside it
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):  # mistral-common's, or one in Python
            problem = f"it is read by {type(tokenizer).__name__}, which lacks a chat template or the places of tokens"
            raise UserError(path, problem, "use a model with a tokenizer.json, and uninstall mistral-common")
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""  # the default one of several
    except ABSENT as error:
        raise unreachable(path, error) from error
    if tokenizer.eos_token is None:
        raise UserError(path, "the tokenizer has no end-of-sequence token", "use a model with one")
    tokenizer.clean_up_tokenization_spaces = False  # made for BERT; it takes spaces out of what a model has said
    if "two words" not in tokenizer.decode(tokenizer("two words", add_special_tokens=False).input_ids):
        remedy = "save it from PreTrainedTokenizerFast, and name that folder (huggingface/transformers#45488)"
        raise UserError(path, "the tokenizer loses the spaces of a text", remedy)
    if not template:
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # such models answer badly without it
        template = "{{ bos_token }}" * begins + HH_TEMPLATE.read_text(encoding="utf-8")
    tokenizer.chat_template = TODAY.sub(lambda call: repr(DAY.strftime(call[2])), template)
    if "strftime_now(" in tokenizer.chat_template:
        raise UserError("chat template", "it writes today's date", "use a model whose template does not")
    own, end = str(tokenizer.eos_token), _end_token(tokenizer)
    if end != own:  # the text of the template stays as it is
        tokenizer.chat_template = re.sub(r"\beos_token\b", lambda _: repr(own), tokenizer.chat_template)
        tokenizer.eos_token = end
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": _pad_token(tokenizer, path)})
    return tokenizer


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token on which the template ends an answer; the tokenizer's own where it ends on none.

    A chat model stops at that one, and its tokenizer may name another (Gemma, Phi-3).
    """
    try:
        _, answer = render(tokenizer, [[{"role": "user", "content": "0"}]], ["0"])
    except UserError:  # said where an answer has to be rendered
        return str(tokenizer.eos_token)
    _, said, end = answer.removesuffix(tokenizer.eos_token).rpartition("0")
    if not said:  # those of models that see pictures take no plain text
        raise UserError("chat template", "it leaves out what is said", "use a model whose template takes text")
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return end.strip() if end.strip() in special else str(tokenizer.eos_token)


def _pad_token(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    in_use = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    if tokenizer.pad_token is not None and tokenizer.pad_token not in in_use and tokenizer.pad_token in vocabulary:
        return tokenizer.pad_token
    added = sorted((index, token.content) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    spare = [token for _, token in added if token not in in_use and token not in tokenizer.chat_template]
    spare.sort(key=lambda token: "pad" not in token.lower())
    spare += [token for token in NON_UTF8_BYTE_TOKENS if token in vocabulary and len(tokenizer(token).input_ids) > 1]
    if not spare:
        raise UserError(path, "no token of the vocabulary can serve for padding", "use a tokenizer with a pad token")
    return spare[0]


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], *sides: Sequence[str]) -> list[str]:
    """Render each prompt up to where an answer begins, and then its answers, each up to its end-of-sequence token.
    UserError where the chat template refuses a conversation, or renders a prompt otherwise once an answer follows."""
    talks = [[*prompt, {"role": "assistant", "content": answer}]
             for prompt, *answers in zip(prompts, *sides, strict=True) for answer in answers]  # fmt: skip
    try:
        starts = tokenizer.apply_chat_template([*prompts], tokenize=False, add_generation_prompt=True)
        wholes = iter(tokenizer.apply_chat_template(talks, tokenize=False) if talks else [])
    except TemplateError as error:
        for one in (slice(at, at + 1) for at in range(len(prompts)) if len(prompts) > 1):
            render(tokenizer, prompts[one], *(side[one] for side in sides))  # raises for the first that it refuses
        problem = f"it refuses the conversation that ends on {prompts[0][-1]['content'][:60]!r}: {error}"
        remedy = "use a model whose template takes such conversations, or leave these rows out of the data"
        raise UserError("chat template", problem, remedy) from error
    texts = []
    for start in starts:
        texts.append(start)
        for whole in itertools.islice(wholes, len(sides)):
            if not whole.startswith(start):
                problem = "the prompt's text changes when an answer follows"
                raise UserError("chat template", problem, "use a prefix-preserving template")
            text, eos, rest = whole[len(start) :].rpartition(tokenizer.eos_token)
            texts.append(text + eos if eos else rest + tokenizer.eos_token)
    return texts


def encode_all(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], *sides: Sequence[str]
) -> Iterator[list[list[int]]]:
    """Encode prompts, each with its answers, as `render` writes them: no special token comes from elsewhere.

    Returns:
        For each prompt, the token ids of it (with the generation prompt) and of its answers (with the end token).
    """
    texts, step = render(tokenizer, prompts, *sides) if prompts else [], 1 + len(sides)
    *ids, newline, word, both = _tokenise(tokenizer, [*texts, "\n", "0", "\n0"])
    # Where it puts a space before every text, an answer has other tokens after its prompt.
    if sides and both != newline + word:
        wholes = _tokenise(tokenizer, [texts[at - at % step] + text for at, text in enumerate(texts)])
        for at, whole in enumerate(wholes):
            prompt = ids[at - at % step]
            if at % step and whole[: len(prompt)] == prompt:
                ids[at] = whole[len(prompt) :]
    return (ids[at : at + step] for at in range(0, len(ids), step))


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Do as `tokenizer(texts)` without offsets, masks and copies that are unused: it saves a sixth of `prepare`."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    if resize := getattr(backend.model, "_resize_cache", None):  # the 10,000 words of the default are soon full
        resize(CACHED_WORDS)
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str | None = None, finished: bool = True
) -> tuple[list[int], list[int]]:
    """Encode a prompt that ends on a user turn, and an answer: token ids of each, empty without an answer.

    An answer that is not `finished`, but cut at the length limit, has no end token.
    """
    prompt_ids, *answers = next(encode_all(tokenizer, [prompt], *([] if answer is None else [[answer]])))
    return prompt_ids, [] if answer is None else answers[0] if finished else answers[0][:-1]


def base_path(model: dict[str, Any], run: RunDir) -> str:
    """Where the base model of a `model` block lies; builds `builtin:tiny` on first use."""
    if model["model_name_or_path"] != TINY:
        return str(model["model_name_or_path"])
    return build_once(run, "base", run.base, build_tiny)


def build_once(run: RunDir, owner: str, path: Path, build: Callable[[Path], None]) -> str:
    """Return the folder of a model of the run, which `build` writes where it is missing or damaged."""
    if damage(path, MODEL, run.hashes.of):
        with run.model_lock(owner):  # stages that train side by side may start from the same one
            if damage(path, MODEL, run.hashes.of):
                for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                    remove(left)
                with staged(path) as folder:
                    build(folder)
                    seal(folder)
                    remove(path)
    run.hashes.save()
    return str(path)


def tiny_config(vocabulary: int = 1024, end: int = 0, pad: int = 1) -> LlamaConfig:
    """The shape of `builtin:tiny`, a small Llama; the token ids are those that its tokenizer comes to have."""
    from transformers import LlamaConfig  # a second and 90 MB of imports that encoding needs not

    return LlamaConfig(vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
                       bos_token_id=end, eos_token_id=end, pad_token_id=pad)  # fmt: skip


def build_tiny(folder: Path) -> None:
    """Build it untrained, about 0.9 M parameters, with a tokenizer fitted to the demo's text; always the same one."""
    import torch
    from transformers import AutoModelForCausalLM

    with gzip.open(DEMO, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row[side] for row in rows for side in ("chosen", "rejected") if isinstance(row.get(side), str)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end, pad = "<|endoftext|>", "<|pad|>"
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[end, pad], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad,
                                        model_max_length=512)  # fmt: skip
    config = tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unreachable(path: str, error: Exception) -> UserError:
    problem = f"the model cannot be loaded: {first_line(error)}"
    return UserError(path, problem, "check `model.model_name_or_path`, the network, and access")
