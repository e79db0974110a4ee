"""Tokenizer set-up, the one text encoding, and the tiny base."""

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from string import ascii_letters

import demo_text
import pytest
import torch
from conftest import PROMPT, shared, small_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from trl import ModelConfig

from rlhf_trl.models import tokenizer as tokenizers
from rlhf_trl.models.base import load_causal, positions, prompt_room
from rlhf_trl.models.tokenizer import base_path, encode, load_tokenizer, recorded_tokenizer, render, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.layout import RunDir

DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ date_string }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = DATED[DATED.index("{% for") :].replace("{{ eos_token }}", "<|pad|>")
COUNTING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def changed(tmp_path, trained):
    """Set up the run's tokenizer again, with other attributes."""

    def changed(begins=False, **changes):
        tokenizer = AutoTokenizer.from_pretrained(trained[1].base)
        if begins:
            special = [("<|endoftext|>", 0)]
            processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
            tokenizer.backend_tokenizer.post_processor = processor
        for key, value in changes.items():
            setattr(tokenizer, key, value)
        tokenizer.save_pretrained(tmp_path)
        return set_up_tokenizer(str(tmp_path), {})

    return changed


def test_gpt2_gets_a_padding_token_that_no_text_holds():
    tokenizer = set_up_tokenizer(str(shared("gpt2-tokenizer")), {})
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < 50257 == len(tokenizer)
    assert tokenizer.padding_side == "left"
    start, answer = encode(tokenizer, PROMPT, " Because. ")
    assert tokenizer.decode(start) == "\n\nHuman: Hello.\n\nAssistant: Hi!<|endoftext|>\n\nHuman: Why?\n\nAssistant:"
    assert tokenizer.decode(answer) == " Because.<|endoftext|>"
    assert encode(tokenizer, PROMPT, "Because.", finished=False)[1] == answer[:-1]
    assert encode(tokenizer, PROMPT) == (start, [])
    together = tokenizer(tokenizer.decode(start + answer), add_special_tokens=False).input_ids
    assert together == start + answer


def test_a_recorded_tokenizer_is_the_same(trained):
    fresh, recorded = load_tokenizer(*trained), recorded_tokenizer(*trained)
    assert encode(fresh, PROMPT, "Because.") == encode(recorded, PROMPT, "Because.")
    assert (recorded.pad_token_id, recorded.padding_side) == (fresh.pad_token_id, "left")


def test_templates(changed):
    tokenizer = changed(chat_template=DATED)
    start, answer = encode(tokenizer, PROMPT, "Because.")
    assert tokenizer.decode(start).startswith("26 Jul 2024")
    # what the template writes after the end token is not part of the answer: the policy stops before it
    assert tokenizer.decode(answer) == "Because.<|endoftext|>"
    named = changed(chat_template='{%- set today = strftime_now("%d %B %Y") %}{{ today }}' + COUNTING)  # SmolLM3's
    assert named.decode(encode(named, PROMPT)[0]).startswith("26 July 2024")
    with pytest.raises(UserError, match="writes today's date"):
        changed(chat_template="{{ strftime_now(form) }}" + COUNTING)
    counting = changed(chat_template=COUNTING)
    assert counting.decode(encode(counting, PROMPT)[0]).startswith("3Hello.")  # enough to talk to a policy
    with pytest.raises(UserError, match="the prompt's text changes"):
        encode(counting, PROMPT, "Because.")
    with pytest.raises(UserError, match="leaves out what is said"):
        changed(chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content.text }}{% endfor %}")


ALSO = TURNS + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"  # ends the text, too, as Phi-3's


@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        ({"pad_token": "<|endoftext|>"}, "\n\nHuman: ", "<|endoftext|>"),
        ({"begins": True}, "<|endoftext|>\n\nHuman: ", "<|endoftext|>"),
        ({"chat_template": TURNS}, "<user>", "<|pad|>"),
        ({"chat_template": ALSO}, "<user>", "<|pad|>"),
        ({"chat_template": {"default": TURNS, "tool_use": COUNTING}}, "<user>", "<|pad|>"),
    ],
)
def test_an_encoding_begins_and_ends_as_the_model_was_trained(changes, start, end, changed):
    tokenizer = changed(**changes)
    prompt, answer = map(tokenizer.decode, encode(tokenizer, PROMPT, "Because."))
    assert prompt.startswith(start) and answer.strip() == f"Because.{end}" and tokenizer.eos_token == end
    assert tokenizer.pad_token not in (None, end)


def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(tmp_path):
    """Also where a tokenizer puts a space before every text, as Llama 2's does."""
    spaced = Tokenizer(models.BPE({char: index for index, char in enumerate(f"▁\n<>.!?{ascii_letters}")}, []))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaced.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = DATED[DATED.index("{% for") :]
    tokenizer.save_pretrained(tmp_path)
    tokenizer = set_up_tokenizer(str(tmp_path), {})
    whole = tokenizer("".join(render(tokenizer, [PROMPT], ["Because."])), add_special_tokens=False).input_ids
    start, answer = encode(tokenizer, PROMPT, "Because.")
    assert start + answer == whole and tokenizer.convert_ids_to_tokens(answer)[:2] == ["B", "e"]


def test_a_tokenizer_that_cannot_serve_is_refused(trained, tmp_path):
    spaceless = AutoTokenizer.from_pretrained(trained[1].base)
    spaceless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    for tokenizer, problem in ((ByT5Tokenizer(), "lacks a chat template"), (spaceless, "loses the spaces")):
        tokenizer.save_pretrained(tmp_path / problem)
        with pytest.raises(UserError, match=problem):
            set_up_tokenizer(str(tmp_path / problem), {})


def test_a_tokenizer_that_has_more_tokens_than_the_model_is_named(changed, trained):
    tokenizer = changed(pad_token="<new>")
    with pytest.raises(UserError, match="the tokenizer has '<new>', token 1024; the model has 1024"):
        load_causal(str(trained[1].base), ModelConfig(), tokenizer)


def test_a_missing_model_is_named_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^nobody/no-such-model:"):
        set_up_tokenizer("nobody/no-such-model", {})
    assert time.monotonic() - start < 5


def test_the_demo_data_and_model_come_out_the_same(tmp_path):
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in demo_text.build_rows())
    assert gzip.decompress(demo_text.FILE.read_bytes()).decode() == text
    tokenizers.build_tiny(tmp_path / "a")
    tokenizers.build_tiny(tmp_path / "b")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_tiny_base_is_built_once(tmp_path, monkeypatch):
    recipe, run = small_recipe(tmp_path), RunDir(tmp_path / "run")
    load_tokenizer(recipe, run)
    stamp = (run.base / "model.safetensors").stat().st_mtime_ns
    load_tokenizer(recipe, run)
    assert (run.base / "model.safetensors").stat().st_mtime_ns == stamp
    assert {path.name for path in run.root.iterdir()} <= {"base", ".locks", ".hashes.json"}
    built = []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()

    monkeypatch.setattr(tokenizers, "build_tiny", build)
    other = RunDir(tmp_path / "other")
    (other.root / ".base.7.tmp").mkdir(parents=True)  # left by a process that was killed
    with ThreadPoolExecutor(2) as pool:  # two that need it at once
        paths = [*pool.map(lambda _: base_path({"model_name_or_path": "builtin:tiny"}, other), range(2))]
    assert paths == [str(other.base)] * 2 and len(built) == 1
    assert not [*other.root.glob(".base.*")]


def test_the_positions_of_a_model_are_known():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    assert (positions(bloom), prompt_room(bloom, 8)) == (None, None)  # ALiBi: no limit
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    assert (positions(gpt2), prompt_room(gpt2, 6)) == (16, 10)
    with pytest.raises(UserError, match="16 tokens leave no room for a prompt"):
        prompt_room(gpt2, 16)


def test_a_gradient_through_four_bit_weights_is_right_after_a_pass_without_one(trained):
    config = ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load_causal(str(trained[1].base), config, recorded_tokenizer(*trained))
    embedding, ids, gradients = model.get_input_embeddings().weight, torch.arange(12)[None], []
    for _ in range(2):
        embedding.grad = None
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(embedding.grad)
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3
