"""Exports: what others load is what the run trained, and says where it comes from and how good it is."""

import json
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from adapter_fixtures import ADAPTER, COMMIT, CONFIG, ID, as_rewardbench, change_json, logits, write_base, write_run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf_trl
from rlhf_trl.adapters import export as adapter_export
from rlhf_trl.adapters.check import check_adapter
from rlhf_trl.adapters.evidence import Base, without_paths
from rlhf_trl.adapters.export import combine, export, write_tokenizer
from rlhf_trl.adapters.verify import loading_lines, verify
from rlhf_trl.models.base import start_path
from rlhf_trl.models.rewards import load_reward_model, score_completions
from rlhf_trl.models.tokenizer import encode, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir

PROMPT = [{"role": "user", "content": "How do I care for cats?"}]
VERIFIED = {"rows": 1, "outputs": 1, "largest": 1.0, "difference": 0}


@pytest.fixture
def pair(gpt2_run, tmp_path):
    """Copies of two adapters that lie on each other."""
    return [shutil.copytree(gpt2_run[2].adapter(stage), tmp_path / stage) for stage in ("sft", "dpo")]


# --- combined adapters


def test_the_combined_adapter_is_the_merged_parent_with_the_policy_on_it(gpt2_run, policy_export):
    base, recipe, run = gpt2_run
    expected = logits(start_path(recipe, run, "dpo"), run.adapter("dpo"))
    torch.testing.assert_close(logits(base, policy_export), expected, atol=1e-5, rtol=0)
    for other in (logits(base), logits(base, run.adapter("dpo"))):  # both adapters do something
        assert (other - expected).abs().max() > 1e-2


FEWER = {"target_modules": ["c_attn", "attn.c_proj"]}  # and none of the MLP


@pytest.mark.parametrize(
    ("architecture", "lower", "upper"),
    [
        ("llama", {}, {}),
        ("gpt2", {}, {}),
        ("gpt2", {"use_rslora": True}, {"alpha_pattern": {"c_attn": 3}}),
        ("gpt2", FEWER, {"target_modules": r".*\.(c_attn|c_fc|c_proj)"}),
    ],
)
def test_ranks_are_concatenated_and_scalings_folded_in(gpt2_run, pair, tmp_path, architecture, lower, upper):
    base = gpt2_run[0]
    if architecture == "llama":
        base = write_base(tmp_path / "base", "llama")
        run = write_run(tmp_path, base, parent=True)[1]
        pair = [run.adapter("sft"), run.adapter("dpo")]
    for folder, settings in zip(pair, (lower, upper), strict=True):
        change_json(folder, CONFIG, **settings)
    if lower is FEWER:
        content = load_file(pair[0] / ADAPTER)
        save_file({key: value for key, value in content.items() if ".mlp." not in key}, pair[0] / ADAPTER)
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), pair[0]).merge_and_unload()
    expected = logits(start, pair[1])
    tensors, config = combine(base, pair)
    assert config.r == config.lora_alpha == 4 + 8
    assert {tensor.shape["lora_B" in key] for key, tensor in tensors.items()} == {12}
    config.save_pretrained(tmp_path / "both")
    save_file(tensors, tmp_path / "both" / ADAPTER)
    torch.testing.assert_close(logits(base, tmp_path / "both"), expected, atol=1e-5, rtol=0)


INEXACT = {"use_dora": True, "bias": "all", "lora_bias": True, "target_parameters": ["experts"],
           "exclude_modules": ["c_fc"], "init_lora_weights": "pissa", "layers_to_transform": [0],
           "modules_to_save": ["wte"]}  # fmt: skip


def test_what_cannot_be_combined_exactly_is_refused(gpt2_run, pair):
    for key, value in INEXACT.items():
        change_json(pair[0], CONFIG, **{key: value})
        with pytest.raises(UserError, match=f"cannot be combined exactly.*its setting {key} is"):
            combine(gpt2_run[0], pair)
        change_json(pair[0], CONFIG, **{key: LoraConfig().to_dict()[key]})
    for stage, name in ((0, "lm_head.lora_A.weight"), (1, "transformer.wte.lora_embedding_A"), (0, "score.weight")):
        content = load_file(pair[stage] / ADAPTER)
        save_file({**content, f"base_model.model.{name}": torch.ones(2, 2)}, pair[stage] / ADAPTER)
        with pytest.raises(UserError, match=r"adapts (the output layer|an embedding)"):
            combine(gpt2_run[0], pair)
        save_file(content, pair[stage] / ADAPTER)


def test_an_adapter_is_written_as_plain_lora(tmp_path):
    """Others than PEFT and vLLM know no rsLoRA. PEFT saves the output layer of the base, too, if LoRA lies on it."""
    base, own, out = write_base(tmp_path / "base", "llama"), tmp_path / "own", tmp_path / "out"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False,
                        target_modules=["q_proj", "lm_head"])  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(own)
    assert [key for key in load_file(own / ADAPTER) if ".base_layer." in key]
    out.mkdir()
    adapter_export._write_adapter([own], Base(base, ID, COMMIT, None), out)
    assert check_adapter(out, base) == []
    settings = read_json(out / CONFIG)
    assert (settings["lora_alpha"], settings["use_rslora"]) == (16, False)
    torch.testing.assert_close(logits(base, out), logits(base, own))
    assert (logits(base, own) - logits(base)).abs().max() > 1e-2


# --- the export


def test_an_export_is_verified_names_its_public_base_and_no_path(gpt2_run, policy_export, reward_export):
    for folder, kind, rows, step in ((policy_export, "policy", 4, "evaluate"), (reward_export, "reward", 8, "errors")):
        found = read_json(folder / "lineage.json")["verification"]
        assert found["rows"] == rows
        assert found["difference"] < 1e-5
        outputs = [value for row in read_json(folder / "probe.json")["rows"] for value in row["outputs"]]
        assert len({round(value, 4) for value in outputs}) > rows / 2
        config = read_json(folder / CONFIG)
        assert (config["base_model_name_or_path"], config["revision"]) == (ID, COMMIT)
        for file in folder.iterdir():
            if file.suffix in (".json", ".md", ".jinja"):
                text = file.read_text()
                assert str(gpt2_run[0].parent) not in text, file
                assert "/tmp" not in text, file
        card = (folder / "README.md").read_text()
        assert loading_lines(kind, False) in re.search("```python\n(.*?)```", card, re.S)[1]
        assert ID in card
        assert f"Not measured: the step '{step}' was not run" in card


def test_an_export_that_differs_from_the_run_is_refused(gpt2_run, tmp_path, monkeypatch):
    write = adapter_export._write_adapter
    # The parent is forgotten.
    monkeypatch.setattr(adapter_export, "_write_adapter", lambda adapters, *more: write(adapters[1:], *more))
    with pytest.raises(UserError, match="the outputs of the export differ"):
        export(gpt2_run[2], "dpo", tmp_path / "out", ID, COMMIT)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_number_does_not_pass(gpt2_run, policy_export, tmp_path, monkeypatch):
    folder = shutil.copytree(policy_export, tmp_path / "adapter")
    probe = read_json(folder / "probe.json")
    outputs = {"peft": [list(row["outputs"]) for row in probe["rows"]]}
    probe["rows"][1]["outputs"][2] = float("nan")
    (folder / "probe.json").write_text(json.dumps(probe))

    def answer(program, kind, folder, result, **_):  # as the fresh process does
        write_json(Path(result), {"packages": [], "outputs": outputs})

    monkeypatch.setattr("rlhf_trl.adapters.verify.run_isolated", answer)
    with pytest.raises(UserError, match="differ from the adapter's by up to nan"):
        verify(folder, "policy", gpt2_run[0], ID, COMMIT)


def test_the_files_are_the_same_every_time(gpt2_run, policy_export, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_export, "verify", lambda *_: VERIFIED)
    export(gpt2_run[2], "dpo", tmp_path / "again", ID, COMMIT)
    for name in (ADAPTER, CONFIG, "probe.json", "evidence.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (policy_export / name).read_bytes(), name


def test_the_lineage_says_where_the_adapter_comes_from(gpt2_run, reward_export, policy_export):
    lineage = read_json(policy_export / "lineage.json")
    assert lineage["combined"] == ["sft", "dpo"]
    assert [(parent["stage"], parent["relation"]) for parent in lineage["parents"]] == [("sft", "init")]
    assert lineage["base"]["weights"] == read_json(reward_export / "lineage.json")["base"]["weights"]
    assert lineage["fingerprint"] == gpt2_run[1].fingerprint("dpo")
    assert lineage["recipe"]["model"]["model_name_or_path"] == "local:base"
    assert without_paths(["mine.jsonl", "Anthropic/hh-rlhf"]) == ["local:mine.jsonl", "Anthropic/hh-rlhf"]
    assert lineage["seed"] == 5
    assert set(lineage["files"]) == {path.name for path in policy_export.iterdir()} - {"lineage.json"}
    assert lineage["trained_with"]["versions"]["peft"]


def test_mistakes_are_named(gpt2_run, tmp_path, monkeypatch):
    run, out = gpt2_run[2], tmp_path / "out"
    (tmp_path / "mine.txt").write_text("mine")
    for arguments, problem in (
        ((run, "nobody", out, ID), "there is no stage 'nobody'"),
        ((run, "dpo", out, "no id"), "is not the id of a model"),
        ((run, "dpo", tmp_path, ID), "there already"),
        ((RunDir(tmp_path), "dpo", out, ID), "is no run: recipe"),
    ):
        with pytest.raises(UserError, match=problem):
            export(*arguments)
    monkeypatch.setattr("rlhf_trl.adapters.evidence.SMALL", 1000)
    with pytest.raises(UserError, match="has no public id that is known"):
        export(run, "dpo", out)


def test_a_place_on_this_machine_does_not_leave_it(gpt2_run, tmp_path, monkeypatch):
    gather, root = adapter_export.gather, str(gpt2_run[2].root.resolve())
    monkeypatch.setattr(adapter_export, "gather", lambda *given: {**gather(*given), "sources": {"policy": root}})
    monkeypatch.setattr(adapter_export, "verify", lambda *_: VERIFIED)
    with pytest.raises(UserError, match="the export would name a place on this machine"):
        export(gpt2_run[2], "dpo", tmp_path / "out", ID)


def test_a_parent_that_was_trained_again_is_noticed(gpt2_run, tmp_path):
    run = RunDir(shutil.copytree(gpt2_run[2].root, tmp_path / "run"))
    marker = read_json(run.done("sft"))
    for change, problem in (
        ({"finished": "2099-01-01T00:00:00+0000"}, "its parent 'sft' was trained again afterwards"),
        ({"fingerprint": "0" * 64}, "the step 'sft' was made with other settings"),
    ):
        write_json(run.done("sft"), marker | change)
        with pytest.raises(UserError, match=problem):
            export(run, "dpo", tmp_path / "out", ID)


# --- a base that is shipped: the stage `sft` was fine-tuned whole


@pytest.fixture(scope="module")
def shipped(trained, tmp_path_factory):
    """Exports of the small recipe, whose parent no adapter can express."""
    recipe, run = trained
    folder = tmp_path_factory.mktemp("shipped")
    copy = RunDir(shutil.copytree(run.root, folder / "run"))
    copy.write_provenance(recipe)
    for stage in ("grpo", "rm"):
        export(copy, stage, folder / stage)
    return folder


def test_a_parent_that_was_fine_tuned_whole_is_shipped(shipped, trained):
    run, folder = trained[1], shipped / "grpo"
    assert read_json(folder / CONFIG)["base_model_name_or_path"] == "./base"
    assert read_json(folder / "base" / "config.json")["rope_theta"] == 10000  # which transformers 4 reads
    torch.testing.assert_close(logits(folder / "base", folder), logits(run.model("sft"), run.adapter("grpo")))
    policy = rlhf_trl.load_policy(folder)
    assert policy.answer(PROMPT, max_new_tokens=8) == policy.answer(PROMPT, max_new_tokens=8)
    with pytest.raises(UserError, match="is of a policy, not of a reward model"):
        rlhf_trl.load_reward_model(folder)
    lineage = read_json(folder / "lineage.json")
    assert lineage["base"]["stage"] == "sft"
    assert [parent["stage"] for parent in lineage["parents"]] == ["sft", "rm"]
    assert "`sft` fine-tuned it whole" in (folder / "README.md").read_text()
    assert set_up_tokenizer(str(folder / "base"), {}).chat_template  # which lies beside the base
    with pytest.raises(UserError, match="has no adapter"):
        export(RunDir(shipped / "run"), "sft", shipped / "sft")


# --- one score, whoever computes it


def pairs_of(run):
    rows = read_jsonl(run.pairs("test"))[:12]
    return [row["prompt"] for row in rows], [row["chosen"] for row in rows]


def test_every_way_to_a_score_gives_the_same(shipped, trained, monkeypatch):
    recipe, run = trained
    folder = shipped / "rm"
    prompts, answers = pairs_of(run)
    model = rlhf_trl.load_reward_model(folder)
    scores = model.score(prompts, answers, [True] * 12, batch_size=5)
    assert scores.std() > 1e-3

    def same(other, name):
        torch.testing.assert_close(torch.as_tensor(other).cpu(), scores, atol=1e-4, rtol=0, msg=name)

    for size in (1, 12):
        same(model.score(prompts, answers, [True] * 12, batch_size=size), f"batches of {size}")
    in_run = load_reward_model(recipe, run, "rm")
    same(in_run.score(prompts, answers, [True] * 12), "the run's own, as `errors` uses it")
    rows = [encode(model.tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = [answer for _, answer in rows]
    same(score_completions(in_run, model.tokenizer, prompts, ids), "the rewards of GRPO and PPO")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")  # which says that there is one score
    texts = ["".join(map(tokenizer.decode, row)) for row in rows]
    monkeypatch.chdir(folder)  # where `./base` is
    same(as_rewardbench(".", prompts, answers), "RewardBench, in the folder")
    ways = {
        "peft": PeftModel.from_pretrained(base, folder).eval(),
        "transformers": AutoModelForSequenceClassification.from_pretrained(".").eval(),
    }
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
        for name, way in ways.items():
            with torch.no_grad():
                same(way(**batch).logits[:, 0], f"{name}, padded on the {side}")


@pytest.mark.parametrize("behind", ["", "\n", "<end>"])
@pytest.mark.parametrize("begin", [False, True])
def test_a_plain_call_of_an_exported_tokenizer_gives_the_tokens_that_are_scored(gpt2_run, tmp_path, behind, begin):
    """Of a tokenizer like Llama's, which adds a beginning, with a template that may write one, and more at the end."""
    run = gpt2_run[2]
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|x|>"]})
    tokenizer.bos_token, tokenizer.add_bos_token = tokenizer.pad_token, True
    assert len(tokenizer("a").input_ids) == len(tokenizer("a", add_special_tokens=False).input_ids) + 1
    more = f"{{% if not add_generation_prompt %}}{{{{ {behind!r} }}}}{{% endif %}}\n"
    tokenizer.chat_template = ("{{ bos_token }}" if begin else "\n") + tokenizer.chat_template + more
    prompts, answers = pairs_of(run)
    pairs = list(zip(prompts, answers, strict=True))
    expected = [list(chain(*encode(tokenizer, *pair))) for pair in pairs]
    for _ in range(2):  # an export, and a merge of it
        write_tokenizer(tokenizer, "reward", tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    settings = read_json(tmp_path / "tokenizer_config.json")  # transformers 4 takes no list under the new name
    assert settings["additional_special_tokens"] == tokenizer.extra_special_tokens == ["<|x|>"]
    assert "extra_special_tokens" not in settings
    talks = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in pairs]
    assert tokenizer(tokenizer.apply_chat_template(talks, tokenize=False)).input_ids == expected
    tokenizer = set_up_tokenizer(str(tmp_path), {})
    assert list(chain(*encode(tokenizer, *pairs[0]))) == expected[0]
