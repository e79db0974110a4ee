"""The step `prepare`: what it keeps, drops, shortens and holds out."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_trl.data import preprocess, sources
from rlhf_trl.data.pair import Pair, Reason
from rlhf_trl.data.preprocess import prepare
from rlhf_trl.data.split import KEY, prompt_keys, split
from rlhf_trl.models.tokenizer import encode, render, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.words import prompt_id

TEXTS = [f"Question number {i}, how are you?" for i in range(60)]


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """A folder with a byte-level tokenizer: one token for each byte, no pad token and no template, like GPT-2."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(alphabet, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def with_template(byte_model, tmp_path):
    """The same with a chat template."""

    def write(template):
        tokenizer = AutoTokenizer.from_pretrained(byte_model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


@pytest.fixture(scope="session")
def tokenizer(byte_model):
    return set_up_tokenizer(byte_model, {})


def make_recipe(source, model, seed=0, **data):
    return Recipe(name="t", seed=seed, model={"model_name_or_path": str(model)}, data={"source": str(source), **data},
                  stages={"sft": {"trainer": "sft"}})  # fmt: skip


@pytest.fixture
def run_prepare(tmp_path, byte_model):
    """Run `prepare` on rows; returns the run directory."""

    def run(rows, seed=0, model=byte_model, **data):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        directory = RunDir(tmp_path / "run")
        directory.replace("prepare")
        prepare(make_recipe(source, model, seed, **{"max_dropped_fraction": 1.0, **data}), directory)
        return directory

    return run


def row(prompt="What is up?", chosen="The sky, I think.", rejected="Go away."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


GOOD = [row(text) for text in TEXTS]


def kept(run):
    return [pair for split_name in ("train", "test") for pair in read_jsonl(run.pairs(split_name))]


def dropped(run):
    return {item["row"]: item["reason"] for item in read_jsonl(run.quarantine)}


def check_accounts(run, rows_in):
    """Every row is in one place, and the counts say so."""
    summary = read_json(run.summary)
    reasons = {name: counts["dropped"] for name, counts in summary["reasons"].items() if counts["dropped"]}
    quarantine = read_jsonl(run.quarantine)
    assert sorted([item["row"] for item in quarantine] + [pair["row"] for pair in kept(run)]) == list(range(rows_in))
    assert Counter(item["reason"] for item in quarantine) == reasons
    assert summary["rows_in"] == summary["rows_kept"] + sum(reasons.values()) == rows_in
    assert summary["rows_kept"] == sum(part["pairs"] for part in summary["splits"].values())
    for key in ("rows_in", "rows_kept", "rows_dropped"):
        assert sum(part[key] for part in summary["subsets"].values()) == summary[key]
    assert all(counts["found"] >= counts["dropped"] for counts in summary["reasons"].values())
    return summary


# --- real rows -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("real"))
    prepare(make_recipe(shared("hh-rlhf"), shared("gpt2-tokenizer"), max_length=256), run)
    return run


def test_real_rows_are_accounted_for(real_run):
    summary = check_accounts(real_run, 3258)
    found = {
        subset: {name: counts["found"] for name, counts in part["reasons"].items() if counts["found"]}
        for subset, part in summary["subsets"].items()
    }
    for part in found.values():
        del part["too_long"]  # depends on the tokenizer
    assert found == {
        "harmless-base": {"prompts_differ": 3, "empty_chosen": 2, "consecutive_roles": 7},
        "helpful-base": {"prompts_differ": 8, "identical": 2, "empty_rejected": 4, "consecutive_roles": 6},
    }
    harmless, helpful = summary["subsets"]["harmless-base"], summary["subsets"]["helpful-base"]
    assert (harmless["notes"]["repeated_prompt"], helpful["notes"]["repeated_prompt"]) == (2, 0)
    assert (harmless["notes"]["multi_turn"], helpful["notes"]["multi_turn"]) == (1189, 1149)
    assert harmless["longer_is_chosen"]["mean"] == pytest.approx(0.4473, abs=5e-5)
    assert helpful["longer_is_chosen"]["mean"] == pytest.approx(0.5898, abs=5e-5)
    assert (harmless["longer_is_chosen"]["n"], helpful["longer_is_chosen"]["n"]) == (1632, 1626)


def test_real_rows_fit_and_are_split_evenly(real_run):
    summary = read_json(real_run.summary)
    tokenizer = set_up_tokenizer(str(real_run.tokenizer), {})
    for pair in random.Random(0).sample(kept(real_run), 300):
        for answer in (pair["chosen"], pair["rejected"]):
            assert sum(map(len, encode(tokenizer, pair["prompt"], answer))) <= 256
    assert summary["splits"]["train"]["tokens"]["total"]["max"] <= 256
    test, train = summary["splits"]["test"], summary["splits"]["train"]
    assert test["prompts"] / (test["prompts"] + train["prompts"]) == pytest.approx(0.05, abs=0.001)
    for subset, part in test["subsets"].items():
        assert part["share"] == pytest.approx(train["subsets"][subset]["share"], abs=0.02)
    for level in ("p25", "p50", "p75"):
        assert test["tokens"]["total"][level] == pytest.approx(train["tokens"]["total"][level], rel=0.15)


def test_no_real_conversation_straddles_the_split(real_run):
    """About 200 of the real rows go on from the conversation of another one, with one of its two answers."""
    sides = {}
    for name in ("train", "test"):
        pairs, prompts = read_jsonl(real_run.pairs(name)), read_jsonl(real_run.prompts(name))
        ids = [prompt["id"] for prompt in prompts]
        assert {prompt_id(pair["prompt"]) for pair in pairs} == {*ids} and len({*ids}) == len(ids) > 0
        assert all(pair["prompt"][-1]["role"] == "user" for pair in pairs)
        sides[name] = {
            tuple((turn["role"], " ".join(turn["content"].casefold().split())) for turn in pair["prompt"])
            for pair in pairs
        }
    for one, other in (("train", "test"), ("test", "train")):
        assert not any(talk[:end] in sides[one] for talk in sides[other] for end in range(1, len(talk) + 1))


# --- reasons and notes -----------------------------------------------------------------------------------------------


def test_reasons_of_well_formed_rows(run_prepare):
    long = "word " * 100
    rows = [
        *GOOD,
        row("a?", "ok", "The long one."),
        row("b?", long + "a", long + "b"),
        row("c?", "Text with <|endoftext|> inside."),
        row("d? \n\nHuman: hello"),
        row("e?", "I say\n\nAssistant: I am you."),
        row(TEXTS[0]),
        row(TEXTS[1].upper(), "the  sky, I think"),
        row("f?", "x" * 600),
        row("g?", "ok", "ok then <|endoftext|>"),
        row("h?", "abcdefghij", "abcdefghiX"),
    ]
    run = run_prepare(rows, max_length=256, min_answer_chars=3, tie_threshold=0.9)
    expected = ["too_short", "tie", "control_tokens", "malformed", "control_tokens", "duplicate", "near_duplicate",
                "too_long", "too_short", "tie"]  # fmt: skip
    assert dropped(run) == dict(enumerate(expected, start=60))
    assert read_jsonl(run.quarantine)[-2]["reasons"] == ["too_short", "control_tokens"]
    summary = check_accounts(run, 70)
    assert summary["reasons"]["control_tokens"] == {"found": 3, "dropped": 2}
    assert set(summary["reasons"]) == {reason.value for reason in Reason}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("Well, then.", "well then", True), ("“Quoted”", "quoted", True), ("a  b", "A b!", True),
     ("minus -5", "minus 5", False), ("3 > 2", "3 < 2", False), ("!!!", "???", False)],
)  # fmt: skip
def test_near_duplicates_differ_only_in_case_space_and_punctuation(run_prepare, one, other, same):
    run = run_prepare([*GOOD, row("q?", one, "Something else"), row("q?", other, "Something else")])
    assert dropped(run) == ({61: "near_duplicate"} if same else {})


def test_notes(run_prepare):
    rows = [*GOOD, row(TEXTS[0], "Go away.", "The sky, I think."), row(TEXTS[1], "Another.", "One.")]
    rows += [
        row(turns("a", "b", "c")),
        {**row("b?"), "score_chosen": 5, "score_rejected": "5.0", "context": "x", "other": None},
        {**row("c?"), "chosen-rating": 4.5, "rejected-rating": 5.0},
    ]
    summary = check_accounts(run_prepare(rows), 65)
    assert summary["columns_not_read"] == {"context": 1}
    assert summary["notes"] == {"score_not_higher": 2, "contradictory": 1, "multi_turn": 1, "repeated_prompt": 2,
                                "truncated": 0, "turns_dropped": 0}  # fmt: skip


def test_quarantine_holds_what_utf8_and_json_cannot(run_prepare):
    bad = [row(chosen="\ud800 lone"), {**row(), "chosen": None, "score": float("inf")}, "just text",
           {**row(), "chosen": 1}]  # fmt: skip
    run = run_prepare([*GOOD, *bad])
    items = read_jsonl(run.quarantine)
    assert [item["reason"] for item in items] == ["invalid_unicode", "null_field", "malformed", "not_text"]
    assert items[0]["raw"]["chosen"] == "\ud800 lone"
    assert items[2]["raw"] == "just text"
    check_accounts(run, 64)


def test_too_many_dropped_rows_stop_the_step_after_the_quarantine_is_written(run_prepare, tmp_path):
    with pytest.raises(UserError, match=r"20 of 80 rows are dropped \(25\.0%, more than the 20\.0%") as error:
        run_prepare(GOOD + [row(chosen="")] * 20, max_dropped_fraction=0.2)
    assert "empty_chosen 20" in str(error.value)
    run = RunDir(tmp_path / "run")
    assert len(read_jsonl(run.quarantine)) == 20
    assert not run.summary.exists()
    run_prepare(GOOD + [row(chosen="")] * 20, max_dropped_fraction=0.25)


def test_summary_describes_both_splits(run_prepare):
    run = run_prepare([{**item, "subset": "ab"[index % 2]} for index, item in enumerate(GOOD)], test_fraction=0.2)
    summary = check_accounts(run, 60)
    assert {name: part["pairs"] for name, part in summary["splits"].items()} == {"train": 48, "test": 12}
    assert {name: part["share"] for name, part in summary["splits"]["test"]["subsets"].items()} == {"a": 0.5, "b": 0.5}
    assert summary["splits"]["test"]["longer_is_chosen"]["tokens"]["mean"] == 1.0
    assert summary["tokenizer"]["pad_token"] != summary["tokenizer"]["eos_token"] == "<|endoftext|>"
    assert "Human:" in summary["tokenizer"]["chat_template"]
    assert summary["splits"]["train"]["tokens"]["chosen"]["max"] == len(b" The sky, I think.") + 1


# --- length ----------------------------------------------------------------------------------------------------------


def turns(*texts, system=None):
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def fit(tokenizer, pair, max_length):
    (fitted,) = preprocess.fit(tokenizer, [pair], max_length)
    return fitted


def length(tokenizer, pair):
    return max(sum(map(len, encode(tokenizer, pair.prompt, answer))) for answer in (pair.chosen, pair.rejected))


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_whole_oldest_turns_go_first(tokenizer, system):
    texts = [f"turn {index}" for index in range(9)]
    pair = Pair(turns(*texts, system=system), "yes", "no")
    assert fit(tokenizer, pair, length(tokenizer, pair))[0] == pair
    limit = length(tokenizer, Pair(turns(*texts[4:], system=system), "yes", "no"))
    for spare in (0, 5):
        shorter, tokens = fit(tokenizer, pair, limit + spare)
        assert shorter.prompt == turns(*texts[4:], system=system)
        assert tokens == [*encode(tokenizer, shorter.prompt, "yes"), encode(tokenizer, shorter.prompt, "no")[1]]
        assert len(tokens[0]) + max(map(len, tokens[1:])) == limit
    assert fit(tokenizer, pair, limit - 1)[0].prompt == turns(*texts[6:], system=system)


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_beginning_of_the_last_question_goes_next(tokenizer, system):
    pair = Pair(turns("x", "y", "abcdefghij klmnop", system=system), "yes", "no")
    limit = length(tokenizer, Pair(turns("abcdefghij klmnop", system=system), "yes", "no"))
    assert fit(tokenizer, pair, limit - 3)[0].prompt == turns("defghij klmnop", system=system)
    assert fit(tokenizer, pair, limit - 10)[0].prompt == turns("klmnop", system=system)
    assert fit(tokenizer, pair, limit - 16)[0].prompt == turns("p", system=system)
    assert fit(tokenizer, pair, limit - 17) is None
    assert fit(tokenizer, pair, 5) is None


def test_cut_follows_the_tokens_of_a_real_tokenizer():
    gpt2 = set_up_tokenizer(str(shared("gpt2-tokenizer")), {})
    text = "Considerations regarding internationalisation, naïve façades and 日本語 🙂🙂. " * 6
    text = text.strip()
    pair = Pair(turns("old", "older", text), "A short answer.", "No.")
    for limit in range(20, length(gpt2, pair)):
        fitted = fit(gpt2, pair, limit)
        assert fitted is not None
        assert length(gpt2, fitted[0]) <= limit
        assert length(gpt2, fitted[0]) >= limit - 12  # nothing more is cut than has to be
        assert text.endswith(fitted[0].prompt[0]["content"])


def test_template_that_refuses_a_conversation_is_the_users_error(run_prepare, with_template):
    rows = [*GOOD, row(turns("hello", system="Be kind."))]
    with pytest.raises(UserError, match="refuses the conversation that ends on 'hello': no system"):
        run_prepare(rows, model=with_template(TEMPLATES["strict"]))


TEMPLATES = {
    "hh": None,
    "strict": "{% for m in messages %}"
              "{{ raise_exception('no system') if m.role == 'system' else m.content }}{% endfor %}",
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("template", ["hh", "chatml"])
def test_the_token_ids_are_those_of_the_views(run_prepare, with_template, monkeypatch, template):
    """Row by row, also of a shortened prompt and of a text without a secret; the first of a prompt is in its view."""
    monkeypatch.setenv("OTHER_API_KEY", "tell-nobody")
    rows = [*GOOD, row(TEXTS[0], "Other.", "Another."), row(turns("x " * 80, "so", "y " * 9)), row("é ü? " * 99),
            row("tell-nobody? ", "It is tell-nobody.")]  # fmt: skip
    run = run_prepare(rows, model=with_template(TEMPLATES[template]), max_length=128, test_fraction=0.3)
    tokenizer = set_up_tokenizer(str(run.tokenizer), {})
    notes = read_json(run.summary)["notes"]
    assert notes["truncated"] == notes["turns_dropped"] == 1
    for name in ("train", "test"):
        pairs, ids = read_jsonl(run.pairs(name)), parquet.read_table(run.tokens(name)).to_pylist()
        assert [item["half"] for item in ids] == [pair["half"] for pair in pairs]
        for pair, item in zip(pairs, ids, strict=True):
            for side in ("chosen", "rejected"):
                assert encode(tokenizer, pair["prompt"], pair[side]) == (item["prompt"], item[side])
        prompts = [encode(tokenizer, prompt["prompt"])[0] for prompt in read_jsonl(run.prompts(name))]
        assert [item["prompt"] for item in ids if item["first"]] == prompts
        texts = render(tokenizer, [pair["prompt"] for pair in pairs])
        assert [item["prompt"] for item in ids] == tokenizer(texts, add_special_tokens=False).input_ids
    assert sum("<secret>" in pair["chosen"] for pair in kept(run)) == 1


@pytest.mark.parametrize("cut", [False, True])
def test_answers_that_reach_no_model_as_they_are_are_dropped(run_prepare, with_template, tmp_path, cut):
    """A template may keep only what comes after a model's thinking, and a tokenizer take two answers for one."""
    kept = "m.content.split('</think>')[-1]" if cut else "m.content"
    model = AutoTokenizer.from_pretrained(with_template(TEMPLATES["chatml"].replace("m.content", kept)))
    model.backend_tokenizer.normalizer = normalizers.Lowercase()
    model.save_pretrained(tmp_path / "model")
    rows = [*GOOD, row("a?", "Well.</think>So."), row("b?", "Yes, indeed.", "YES, INDEED.")]
    found = dropped(run_prepare(rows, model=str(tmp_path / "model")))
    assert found == {61: "identical"} | ({60: "control_tokens"} if cut else {})


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_does_not_depend_on_the_order(run_prepare):
    rows = [row(text, f"The sky, {i}." * (i % 7 + 1)) for i, text in enumerate(TEXTS)]
    first = {prompt["id"] for prompt in read_jsonl(run_prepare(rows, test_fraction=0.2).prompts("test"))}
    random.Random(1).shuffle(rows)
    again = {prompt["id"] for prompt in read_jsonl(run_prepare(rows, test_fraction=0.2).prompts("test"))}
    other = {prompt["id"] for prompt in read_jsonl(run_prepare(rows, test_fraction=0.2, seed=1).prompts("test"))}
    assert first == again != other
    assert len(first) == 12


def test_split_needs_two_conversations(run_prepare):
    with pytest.raises(UserError, match=r"2 usable rows with 1 separate"):
        run_prepare([row(), row(chosen="Something else.")])
    run = run_prepare([row("a?"), row("b?")], test_fraction=0.01)
    assert len(read_jsonl(run.pairs("train"))) == len(read_jsonl(run.pairs("test"))) == 1


MAIN = """
import sys, hashlib, pathlib
from rlhf_trl.data.explore import explore
from rlhf_trl.data.preprocess import prepare
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
run = RunDir(pathlib.Path(sys.argv[1]))
recipe = Recipe(name="t", model={"model_name_or_path": sys.argv[2]}, stages={"sft": {"trainer": "sft"}},
                data={"source": "builtin:demo", "max_length": 400, "test_fraction": 0.1, "max_rows": 300})
explore(recipe, run)
prepare(recipe, run)
for file in sorted(path for path in run.root.rglob("*") if path.is_file()):
    print(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
assert not {"trl", "peft", "accelerate"} & set(sys.modules)
"""


def test_outputs_are_the_same_for_any_hash_seed_and_need_no_trainer(tmp_path, byte_model):
    running = [
        subprocess.Popen([sys.executable, "-c", MAIN, str(tmp_path / seed), byte_model], stdout=subprocess.PIPE,
                         text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "01"
    ]  # fmt: skip
    outputs = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) >= 13


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_processes_writes_the_same_files(run_prepare, monkeypatch, processes):
    rows = [*GOOD, row(TEXTS[0]), row("a?", chosen=""), row(turns("x " * 80, "so", "y " * 80)), row(TEXTS[1].upper())]
    monkeypatch.setattr(sources, "CHUNK", 7)
    monkeypatch.setattr(preprocess, "ROW_GROUP", 3)
    alone = contents(run_prepare(rows, max_length=128).data)
    monkeypatch.setattr(sources, "ALONE", 2)
    monkeypatch.setattr("os.cpu_count", lambda: processes)
    assert contents(run_prepare(rows, max_length=128).data) == alone


def test_prepare_never_loses_a_row(tmp_path):
    import fuzz

    tally = fuzz.Tally("rows", seed=1)
    fuzz.rows(tally, 500, tmp_path)
    assert not tally.faults and tally.inputs == 500


conversations = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=2, max_size=40)


@settings(max_examples=200, deadline=None)
@given(talks=conversations, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5),
       order=st.randoms(use_true_random=False))  # fmt: skip
def test_split_keeps_together_what_belongs_together(talks, fraction, seed, order):
    """A conversation is a path of questions; its beginnings may be conversations of their own."""
    roots = {talk[0] for talk in talks if [talk[0]] in talks}
    keys = {tuple(talk): prompt_keys(turns(*[part for turn in talk for part in (turn, "so")][:-1])) for talk in talks}
    rows = [(*keys[tuple(talk)], keys[tuple(talk)][-1]) for talk in talks]

    def held_out(order):
        keys = np.array([key for i in order for key in rows[i]], KEY)
        counts, lengths = ([len(items[i]) for i in order] for items in (rows, talks))
        test = split(keys, np.array(counts), np.zeros(len(order), int), np.array(lengths), fraction, seed).held_out
        return {tuple(talks[i]) for i, test in zip(order, test, strict=True) if test}

    try:
        test = held_out(range(len(rows)))
    except UserError:
        assert len(roots) <= 1
        return
    train = {tuple(talk) for talk in talks} - test
    assert test
    assert train
    assert not any(one[: len(other)] == other or other[: len(one)] == one for one in train for other in test)
    assert test == held_out(order.sample(range(len(rows)), len(rows)))
