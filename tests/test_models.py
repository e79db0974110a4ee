"""Tokenizer set-up, the one text encoding, sampling and KL."""

import gzip
import json
import math
import time

import pytest
import torch
from conftest import shared, small_recipe
from transformers import AutoTokenizer

from rlhf_trl.models import Policies, encode, load_tokenizer, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.recipe import UserError
from rlhf_trl.rundir import RunDir, read_jsonl
from rlhf_trl.sampling import answer_logits, sample, token_kl

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


def test_token_kl_in_closed_form():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.3, 0.5])
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    logits, ref = p.log().expand(2, 3, 3) + 7.0, q.log().expand(2, 3, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert token_kl(logits, ref, mask).tolist() == pytest.approx([2 * exact, 3 * exact], rel=1e-5)
    assert token_kl(logits, logits, mask).tolist() == [0.0, 0.0]


def test_sequence_kl_of_two_enumerated_policies():
    """The estimate, averaged over every sequence with its probability, is the KL of the sequence distributions."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3), torch.randn(2, 3, 3)  # logits of token 1, and of token 2 given token 1
    exact = mean = 0.0
    for a in range(3):
        for b in range(3):
            logits = torch.stack([first[0], second[0, a]])[None]
            ref = torch.stack([first[1], second[1, a]])[None]
            log_p = logits.log_softmax(-1)[0, [0, 1], [a, b]].sum()
            log_q = ref.log_softmax(-1)[0, [0, 1], [a, b]].sum()
            exact += (log_p.exp() * (log_p - log_q)).item()
            mean += log_p.exp().item() * token_kl(logits, ref, torch.ones(1, 2)).item()
    assert mean == pytest.approx(exact, abs=1e-6)


def test_answer_logits_do_not_depend_on_padding(trained):
    recipe, run = trained
    tokenizer = recorded_tokenizer(recipe, run)
    policies = Policies(recipe, run, ["dpo", "grpo"], tokenizer)
    rows = [encode(tokenizer, PROMPT, "Yes."), encode(tokenizer, PROMPT[:1], "No, that is not so.")]
    with torch.no_grad(), policies.use("dpo") as model:
        start = tokenizer.pad({"input_ids": [row[0] for row in rows]}, return_tensors="pt")
        width = max(len(row[1]) for row in rows)
        answer = torch.tensor([row[1] + [0] * (width - len(row[1])) for row in rows])
        mask = torch.tensor([[1] * len(row[1]) + [0] * (width - len(row[1])) for row in rows])
        batch = answer_logits(model, start["input_ids"], answer, start["attention_mask"], mask)
        for index, (prompt, ids) in enumerate(rows):
            alone = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(batch[index, : len(ids)], alone, atol=1e-4)


def test_policies_share_one_base(trained):
    recipe, run = trained
    policies = Policies(recipe, run, recipe.policies, recorded_tokenizer(recipe, run))
    ids = torch.arange(2, 12)[None]
    outputs = {}
    for name in ("reference", *recipe.policies, "reference"):
        with torch.no_grad(), policies.use(name) as model:
            outputs.setdefault(name, []).append(model(ids).logits)
    assert torch.equal(*outputs["reference"])
    assert all(not torch.equal(outputs[name][0], outputs["reference"][0]) for name in recipe.policies)
    embeddings = [
        param for name, param in policies.base.named_parameters() if "embed_tokens" in name and "lora" not in name
    ]
    assert len(embeddings) == 1


def test_sampling_repeats_and_ends(trained):
    recipe, run = trained
    tokenizer = recorded_tokenizer(recipe, run)
    policies = Policies(recipe, run, ["dpo"], tokenizer)
    prompts = [row["prompt"] for row in read_jsonl(run.prompts("test"))[:6]]
    with policies.use("dpo") as model:
        first, second = (sample(model, tokenizer, prompts, 12, 4, seed=1) for _ in range(2))
        other = sample(model, tokenizer, prompts, 12, 4, seed=2)
    assert first == second != other
    for answer in first:
        assert answer.finished == (answer.ids[-1] == tokenizer.eos_token_id)
        assert answer.finished or len(answer.ids) == 12
        assert tokenizer.eos_token_id not in answer.ids[:-1]


def test_the_demo_data_and_model_come_out_the_same(tmp_path):
    from rlhf_trl.data import demo

    before = demo.FILE.read_bytes()
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in demo.build_rows())
    assert gzip.decompress(before).decode() == text
    demo.build_tiny(tmp_path / "a")
    demo.build_tiny(tmp_path / "b")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_base_path_of_the_tiny_model_is_built_once(tmp_path):
    recipe = small_recipe(tmp_path)
    run = RunDir(tmp_path / "run")
    load_tokenizer(recipe, run)
    stamp = (run.base / "model.safetensors").stat().st_mtime_ns
    load_tokenizer(recipe, run)
    assert (run.base / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in run.root.iterdir()] == ["base"]
