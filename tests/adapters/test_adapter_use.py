"""Using adapters: `chat`, `score`, the load functions and the commands."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from adapter_fixtures import change_json, write_base
from conftest import ROOT

import rlhf_trl
from rlhf_trl.adapters.score import score_file, summarise
from rlhf_trl.cli.adapters import chat
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_jsonl, write_jsonl

PROMPT = [{"role": "user", "content": "How do I care for cats?"}]


@pytest.fixture(scope="module")
def reward_model(gpt2_run, reward_export):
    return rlhf_trl.load_reward_model(reward_export, gpt2_run[0])


@pytest.fixture(scope="module")
def policy(gpt2_run, policy_export):
    return rlhf_trl.load_policy(policy_export, gpt2_run[0])


@pytest.fixture
def printed(call):
    """Run a command that ends with a status; return what it prints and its messages."""

    def printed(*arguments, status=0):
        found, output, messages = call(*arguments)
        assert found == status, messages
        return output, messages

    return printed


def test_importing_the_package_loads_no_torch():
    code = "import sys, rlhf_trl as r; print('torch' in sys.modules, hasattr(r, 'x'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert callable(rlhf_trl.load_policy)


def test_what_cannot_be_loaded_is_named(gpt2_run, policy_export, tmp_path, monkeypatch):
    def refuse(error):
        def raises(*_, **__):
            raise error

        return raises

    with pytest.raises(UserError, match="it does not fit this base"):
        rlhf_trl.load_policy(policy_export, write_base(tmp_path / "other", "llama"))
    with pytest.raises(UserError, match="owner/base: the base cannot be reached"):
        rlhf_trl.load_policy(policy_export)
    monkeypatch.setattr("rlhf_trl.models.base.snapshot_download", refuse(httpx2.ProxyError("403 Forbidden")))
    with pytest.raises(UserError, match="owner/base: the base cannot be reached: 403 Forbidden"):
        rlhf_trl.load_policy(policy_export)
    monkeypatch.setattr("rlhf_trl.adapters.load.PeftModel.from_pretrained", refuse(KeyError()))
    with pytest.raises(UserError, match="the adapter cannot be laid on its base: KeyError"):
        rlhf_trl.load_policy(policy_export, gpt2_run[0])


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("base/config.json", {"model_type": "nobody"}),
        ("base/config.json", {"n_head": 7}),
        ("base/config.json", {"n_embd": 48}),
        ("base/config.json", {"n_inner": "x"}),
        ("base/generation_config.json", {"eos_token_id": "x", "temperature": []}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer_config.json", {"eos_token": None, "pad_token": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}),
    ],
)
def test_files_that_the_libraries_cannot_use_are_no_traceback(gpt2_run, policy_export, tmp_path, file, values):
    folder = shutil.copytree(policy_export, tmp_path / "adapter")
    (folder / "lineage.json").unlink()
    (folder / "base").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(gpt2_run[0] / name, folder / "base" / name)
    change_json(folder, "adapter_config.json", base_model_name_or_path="./base", revision=None)
    change_json(folder, file, **values)
    with contextlib.suppress(UserError):
        rlhf_trl.load_policy(folder).answer(PROMPT, max_new_tokens=2)


# --- chat


def test_a_conversation_remembers_its_turns_and_cannot_act_on_the_terminal(monkeypatch, capsys):
    asked = []

    class Hostile:
        def answer(self, talk, *how):
            asked.append(len(talk))
            return "\x1b]0;owned\x07 \u202edone"

    monkeypatch.setattr("rlhf_trl.adapters.load.load_policy", lambda *_, **__: Hostile())
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\nTwo?\n/new\nOne?\n/exit\nnever\n"))
    chat(Path("mine"))
    assert asked == [1, 3, 1]
    assert capsys.readouterr().out == "mine> ⟨U+001B⟩]0;owned⟨U+0007⟩ ⟨U+202E⟩done\n" * 3


def test_a_prompt_loses_its_beginning_where_it_is_too_long_and_an_answer_leaves_room_for_one(policy):
    assert isinstance(policy.answer([{"role": "user", "content": "word " * 400}], max_new_tokens=8), str)
    with pytest.raises(UserError, match="128 tokens leave no room for a prompt: the model has 128 positions"):
        policy.answer(PROMPT, max_new_tokens=128)
    assert isinstance(policy.answer(PROMPT, max_new_tokens=127), str)


# --- score


def test_a_file_of_every_shape_is_scored_line_by_line(gpt2_run, reward_model, tmp_path):
    row = read_jsonl(gpt2_run[2].pairs("test"))[0]
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")},
        {"prompt": row["prompt"], "completion": row["chosen"]},
        {side: f"\n\nHuman: Why?\n\nAssistant: {side}" for side in ("chosen", "rejected")},
        {"prompt": "Why?", "completion": "chosen"},
        {"completion": "\n\nHuman: Why?\n\nAssistant: chosen"},
        {"prompt": "Why?"},
        {"prompt": "Why?", "chosen": "same", "rejected": "same"},
        {"prompt": "Why?", "completion": " "},
        {"prompt": "", "completion": "Because."},
        {"prompt": "Why?", "completion": 7},
        {"prompt": "Why?", "completion": "word " * 400},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = score_file(reward_model, tmp_path / "rows.jsonl", batch_size=2)
    assert [row["line"] for row in found] == list(range(1, 12))
    expected = reward_model.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]], [True, True])
    torch.testing.assert_close(torch.tensor([found[0]["chosen"], found[0]["rejected"]]), expected)
    assert found[0]["margin"] == pytest.approx(found[0]["chosen"] - found[0]["rejected"])
    assert found[1]["score"] == pytest.approx(found[0]["chosen"], abs=1e-5)
    assert found[3]["score"] == found[4]["score"] == pytest.approx(found[2]["chosen"], abs=1e-5)
    reasons = [row["why_not"].partition(":")[0] for row in found[5:]]
    assert reasons == ["missing_field", "identical", "empty_chosen", "empty_prompt", "not_text", "too_long"]
    assert "5 of 11 rows scored" in summarise(found)


def test_the_summary_counts_a_tie_as_half():
    rows = [{"line": number, "margin": margin} for number, margin in enumerate((1.0, 2.0, 0.0, -1.0), start=1)]
    assert summarise(rows) == "4 of 4 rows scored; the chosen answer has the higher score in 62.5% [21.9%, 90.8%]"
    assert summarise([{"line": 1, "why_not": "tie"}]) == "0 of 1 rows scored"


@pytest.mark.parametrize(
    ("content", "problem"), [(b"{\n", "rows.jsonl:1: the line is not JSON"), (b"\xff", "cannot be read")]
)
def test_a_file_that_is_none_is_named(reward_model, tmp_path, content, problem):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        score_file(reward_model, tmp_path / "rows.jsonl")


# --- the commands


def test_the_commands_on_adapters(gpt2_run, policy_export, reward_export, tmp_path, printed):
    base, _, run = gpt2_run
    assert printed("adapter", "check", policy_export)[0] == f"{policy_export}: no problem found\n"
    folder = shutil.copytree(policy_export, tmp_path / "adapter")
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert printed("adapter", "check", folder, status=1)[0].startswith("adapter_model.bin: a pickle")
    output, _ = printed("adapter", "export", run.root, "sft", tmp_path / "out" / "sft", "--base-id", "owner/base")
    assert "equal the adapter's within" in output
    assert "it is what the policies of its run start from" in (tmp_path / "out" / "sft" / "README.md").read_text()
    listed = printed("adapter", "list", tmp_path / "out")[0]
    assert listed.splitlines()[1].split()[:4] == ["sft", "run", "sft", "sft"]
    assert "no export" in printed("adapter", "list", run.root / "data")[0]
    printed("adapter", "merge", policy_export, tmp_path / "merged", "--base", base)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "Because."}, {"prompt": "Why?"}])
    output, messages = printed("score", reward_export, tmp_path / "rows.jsonl", "--base", base)
    first, second = map(json.loads, output.splitlines())
    assert set(first) == {"line", "score"} and second == {"line": 2, "why_not": "missing_field"}
    assert "1 of 2 rows scored" in messages


# --- answer, and the models of a run


def test_a_batch_gives_the_answers_of_each_alone(policy):
    prompts = [PROMPT, [{"role": "user", "content": "Why? " * 9}], [{"role": "user", "content": "Tell me."}]]
    alone = [policy.answer(prompt, max_new_tokens=6, seed=3) for prompt in prompts]
    assert policy.answer_all(prompts, max_new_tokens=6, seed=3, batch_size=2) == alone


def test_the_models_of_a_run_answer_and_score_as_their_exports(gpt2_run, policy, reward_model, tmp_path, printed):
    run = gpt2_run[2]
    in_run = rlhf_trl.load_policy(run.root, stage="dpo")
    assert in_run.answer(PROMPT, 6, 0.0) == policy.answer(PROMPT, 6, 0.0)
    found = rlhf_trl.load_reward_model(run.root, stage="rm").score([PROMPT], ["Because."], [True])
    torch.testing.assert_close(found, reward_model.score([PROMPT], ["Because."], [True]), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="there is no stage 'nobody'"):
        rlhf_trl.load_policy(run.root, stage="nobody")
    write_jsonl(tmp_path / "prompts.jsonl", ["Why?"])
    out = tmp_path / "answers.jsonl"
    command = ("answer", run.root, tmp_path / "prompts.jsonl", "--stage", "dpo", "--base-only", "--out", out)
    _, messages = printed(*command, "--max-new-tokens", "1024", status=2)  # more than the model has positions
    assert "no room for a prompt" in messages
    printed(*command)
    (row,) = read_jsonl(out)
    assert row["model"] == "dpo-base"
    with policy.without_adapter():
        assert policy.answer(PROMPT, 6, 0.0)
