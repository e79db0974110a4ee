"""Tokenizer set-up and the one text encoding."""

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor

import demo_text
import pytest
from conftest import shared, small_recipe
from transformers import AutoTokenizer

from rlhf_trl.models import tiny
from rlhf_trl.models.base import base_path, encode, load_tokenizer, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.layout import RunDir

PROMPT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": " Hi! "},
    {"role": "user", "content": "Why?"},
]


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
    recipe, run = trained
    fresh, recorded = load_tokenizer(recipe, run), recorded_tokenizer(recipe, run)
    assert encode(fresh, PROMPT, "Because.") == encode(recorded, PROMPT, "Because.")
    assert (recorded.pad_token_id, recorded.padding_side) == (fresh.pad_token_id, "left")


def chat_tokenizer(folder, trained, **changes):
    tokenizer = AutoTokenizer.from_pretrained(trained[1].base)
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_template_that_writes_the_date_is_frozen(tmp_path, trained):
    template = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ date_string }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = set_up_tokenizer(chat_tokenizer(tmp_path, trained, chat_template=template), {})
    start, answer = encode(tokenizer, PROMPT, "Because.")
    assert tokenizer.decode(start).startswith("26 Jul 2024")
    # what the template writes after the end token is not part of the answer: the policy stops before it
    assert tokenizer.decode(answer) == "Because.<|endoftext|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path, trained):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = set_up_tokenizer(chat_tokenizer(tmp_path, trained, chat_template=template), {})
    with pytest.raises(UserError, match="prefix-preserving"):
        encode(tokenizer, PROMPT, "Because.")


def test_a_tokenizer_that_pads_with_its_end_token_gets_another(tmp_path, trained):
    tokenizer = set_up_tokenizer(chat_tokenizer(tmp_path, trained, pad_token="<|endoftext|>"), {})
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)


def test_a_missing_model_is_named_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^nobody/no-such-model: the model cannot be loaded"):
        set_up_tokenizer("nobody/no-such-model", {})
    assert time.monotonic() - start < 5


# --- KL --------------------------------------------------------------------------------------------------------------


def test_the_demo_data_and_model_come_out_the_same(tmp_path):
    before = demo_text.FILE.read_bytes()
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in demo_text.build_rows())
    assert gzip.decompress(before).decode() == text
    tiny.build_tiny(tmp_path / "a")
    tiny.build_tiny(tmp_path / "b")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_base_path_of_the_tiny_model_is_built_once(tmp_path):
    recipe = small_recipe(tmp_path)
    run = RunDir(tmp_path / "run")
    load_tokenizer(recipe, run)
    stamp = (run.base / "model.safetensors").stat().st_mtime_ns
    load_tokenizer(recipe, run)
    assert (run.base / "model.safetensors").stat().st_mtime_ns == stamp
    assert {path.name for path in run.root.iterdir()} == {"base", ".locks"}


def test_two_that_need_the_same_model_at_once_build_it_once(tmp_path, monkeypatch):
    built = []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)
        (folder / "config.json").touch()

    monkeypatch.setattr(tiny, "build_tiny", build)
    run = RunDir(tmp_path / "run")
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda _: base_path({"model_name_or_path": "builtin:tiny"}, run), range(2))]
    assert found == [str(run.base)] * 2 and len(built) == 1
