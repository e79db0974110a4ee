"""Exports: what others load is what the run trained, and says where it comes from and how good it is."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapter_fixtures import ADAPTER, COMMIT, ID, change_tensors, write_base, write_run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import chat_template_utils
from trl import ModelConfig

import rlhf_trl
from rlhf_trl.adapters import export as adapter_export
from rlhf_trl.adapters.combine import combine
from rlhf_trl.adapters.export import export
from rlhf_trl.adapters.verify import loading_lines
from rlhf_trl.models.base import encode, load_classifier, set_up_tokenizer, start_path
from rlhf_trl.models.rewards import RewardModel, load_reward_model, score_completions
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=torch.tensor([ids])).logits


IDS = [5, 99, 300, 17, 42, 800, 3]


# --- combined adapters
# -------------------------------------------------------------------------------------------------


def test_the_combined_adapter_is_the_merged_parent_with_the_policy_on_it(gpt2_run, policy_export):
    base, recipe, run = gpt2_run
    merged = AutoModelForCausalLM.from_pretrained(start_path(recipe, run, "dpo"))
    expected = logits(PeftModel.from_pretrained(merged, run.adapter("dpo")), IDS)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain, IDS)
    found = logits(PeftModel.from_pretrained(plain, policy_export), IDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (before - expected).abs().max() > 1e-2  # the adapters do something
    only_policy = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.adapter("dpo")), IDS
    )
    assert (only_policy - expected).abs().max() > 1e-2  # and so does the parent


def test_the_combined_adapter_of_a_llama_is_exact_too(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    recipe, run = write_run(tmp_path, base, parent=True)
    merged = AutoModelForCausalLM.from_pretrained(start_path(recipe, run, "dpo"))
    expected = logits(PeftModel.from_pretrained(merged, run.adapter("dpo")), IDS)
    tensors, config = combine([run.adapter("sft"), run.adapter("dpo")])
    config.save_pretrained(tmp_path / "both")
    save_file(tensors, tmp_path / "both" / ADAPTER)
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "both"), IDS), expected,
                               atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="needs SMOLLM2=path/to/SmolLM2-135M")
@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_smollm2_is_exported_exactly(tmp_path, parent, stage):
    _, run = write_run(tmp_path, Path(os.environ["SMOLLM2"]), parent)
    found = export(run, stage, tmp_path / "out", ID)["verification"]
    assert found["difference"] < 1e-5 * max(1, found["largest"])


def test_the_ranks_are_concatenated_and_the_scalings_folded_in(gpt2_run):
    _, _, run = gpt2_run
    tensors, config = combine([run.adapter("sft"), run.adapter("dpo")])
    assert (config.r, config.lora_alpha) == (4 + 8, 4 + 8)
    key = "base_model.model.transformer.h.0.attn.c_attn"
    parts = [torch_load(run.adapter(stage)) for stage in ("sft", "dpo")]
    delta = sum(
        scale * part[f"{key}.lora_B.weight"] @ part[f"{key}.lora_A.weight"]
        for scale, part in zip((6 / 4, 6 / 8), parts, strict=True)
    )
    torch.testing.assert_close(tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"], delta)


def torch_load(folder):
    return load_file(folder / ADAPTER)


def test_a_module_that_one_adapter_leaves_out_gets_zeros(gpt2_run, tmp_path):
    _, _, run = gpt2_run
    first, second = (shutil.copytree(run.adapter(stage), tmp_path / stage) for stage in ("sft", "dpo"))
    tensors = {key: value for key, value in torch_load(first).items() if ".mlp." not in key}
    save_file(tensors, first / ADAPTER)
    found, config = combine([first, second])
    key = "base_model.model.transformer.h.1.mlp.c_fc"
    own = torch_load(second)
    expected = 6 / 8 * own[f"{key}.lora_B.weight"] @ own[f"{key}.lora_A.weight"]
    assert found[f"{key}.lora_A.weight"].shape[0] == config.r == 12
    torch.testing.assert_close(found[f"{key}.lora_B.weight"] @ found[f"{key}.lora_A.weight"], expected)


def test_rank_stabilised_scaling_and_patterns_are_folded_in(gpt2_run, tmp_path):
    base, _, run = gpt2_run
    first, second = (shutil.copytree(run.adapter(stage), tmp_path / stage) for stage in ("sft", "dpo"))
    for folder, values in ((first, {"use_rslora": True}), (second, {"alpha_pattern": {"c_attn": 3}})):
        write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **values})
    lower = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first).merge_and_unload()
    expected = logits(PeftModel.from_pretrained(lower, second), IDS)
    tensors, config = combine([first, second])
    both = tmp_path / "both"
    config.save_pretrained(both)
    save_file(tensors, both / ADAPTER)
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), both), IDS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases of its base"),
        ({"lora_bias": True}, "LoRA layers have biases"),
        ({"target_parameters": ["experts"]}, "parameters, not modules"),
        ({"exclude_modules": ["c_fc"]}, "leaves modules out by name"),
        ({"init_lora_weights": "pissa"}, "changes the weights of its base"),
        ({"modules_to_save": ["wte"]}, "replaces a whole module of its base"),
    ],
)
def test_what_cannot_be_combined_exactly_is_refused(gpt2_run, tmp_path, values, reason):
    _, _, run = gpt2_run
    first = shutil.copytree(run.adapter("sft"), tmp_path / "sft")
    write_json(first / "adapter_config.json", {**read_json(first / "adapter_config.json"), **values})
    with pytest.raises(UserError, match=f"cannot be combined exactly.*{reason}"):
        combine([first, run.adapter("dpo")])


# --- the export
# --------------------------------------------------------------------------------------------------------


def test_a_fresh_process_verified_the_export(policy_export, reward_export):
    for folder, rows in ((policy_export, 4), (reward_export, 8)):
        found = read_json(folder / "lineage.json")["verification"]
        assert found["rows"] == rows
        assert found["difference"] < 1e-5
        outputs = [value for row in read_json(folder / "probe.json")["rows"] for value in row["outputs"]]
        assert len({round(value, 4) for value in outputs}) > rows / 2


def test_an_export_that_differs_from_the_run_is_refused(gpt2_run, tmp_path, monkeypatch):
    def wrong(adapters, base, folder):
        write(adapters[1:], base, folder)  # the parent is forgotten

    write = adapter_export._write_adapter
    monkeypatch.setattr(adapter_export, "_write_adapter", wrong)
    with pytest.raises(UserError, match="the outputs differ from the run's"):
        export(gpt2_run[2], "dpo", tmp_path / "out", ID, COMMIT)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_names_the_public_base_and_no_path(gpt2_run, policy_export, reward_export):
    for folder in (policy_export, reward_export):
        config = read_json(folder / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == (ID, COMMIT)
        for file in folder.iterdir():
            if file.suffix in (".json", ".md", ".jinja"):
                text = file.read_text()
                assert str(gpt2_run[0].parent) not in text, file
                assert "/tmp" not in text, file


def test_the_files_are_the_same_every_time(gpt2_run, policy_export, tmp_path):
    export(gpt2_run[2], "dpo", tmp_path / "again", ID, COMMIT)
    for name in ("adapter_model.safetensors", "adapter_config.json", "probe.json", "evidence.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (policy_export / name).read_bytes(), name


def test_the_lineage_says_where_the_adapter_comes_from(gpt2_run, reward_export, policy_export):
    recipe = gpt2_run[1]
    lineage = read_json(policy_export / "lineage.json")
    assert lineage["combined"] == ["sft", "dpo"]
    assert [(parent["stage"], parent["relation"]) for parent in lineage["parents"]] == [("sft", "init")]
    assert lineage["base"]["weights"] == read_json(reward_export / "lineage.json")["base"]["weights"]
    assert lineage["fingerprint"] == recipe.fingerprint("dpo")
    assert lineage["recipe"]["model"]["model_name_or_path"] == "local:base"
    assert lineage["seed"] == 5
    assert set(lineage["files"]) == {path.name for path in policy_export.iterdir()} - {"lineage.json"}
    assert lineage["trained_with"]["versions"]["peft"]


def test_a_run_without_evaluation_says_so_on_the_card(policy_export, reward_export):
    assert "Not measured: the step 'evaluate' was not run" in (policy_export / "README.md").read_text()
    assert "Not measured: the step 'errors' was not run" in (reward_export / "README.md").read_text()


def test_the_card_holds_the_lines_that_were_verified(policy_export, reward_export):
    for folder, kind in ((policy_export, "policy"), (reward_export, "reward")):
        code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
        assert loading_lines(kind, False) in code[1]
        assert ID in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stage": "nobody"}, "there is no stage 'nobody'"),
        ({"base_id": "no id"}, "is not the id of a model"),
    ],
)
def test_mistakes_are_named(gpt2_run, tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem):
        export(gpt2_run[2], **{"stage": "dpo", "out": tmp_path / "out", "base_id": ID, **changes})


def test_a_place_on_this_machine_does_not_leave_it(gpt2_run, tmp_path, monkeypatch):
    gather = adapter_export.gather
    root = str(gpt2_run[2].root.resolve())
    monkeypatch.setattr(adapter_export, "gather", lambda *given: {**gather(*given), "sources": {"policy": root}})
    monkeypatch.setattr(
        adapter_export, "verify", lambda *_: {"rows": 1, "outputs": 1, "largest": 1.0, "difference": 0}
    )
    with pytest.raises(UserError, match="the export would name a place on this machine"):
        export(gpt2_run[2], "dpo", tmp_path / "out", ID)


def test_a_parent_that_was_trained_again_is_noticed(gpt2_run, tmp_path):
    run = RunDir(shutil.copytree(gpt2_run[2].root, tmp_path / "run"))
    marker = read_json(run.done("sft"))
    write_json(run.done("sft"), {**marker, "finished": "2099-01-01T00:00:00+0000"})
    with pytest.raises(UserError, match="its parent 'sft' was trained again afterwards"):
        export(run, "dpo", tmp_path / "out", ID)
    write_json(run.done("sft"), {**marker, "fingerprint": "0" * 64})
    with pytest.raises(UserError, match="the step 'sft' was made with other settings"):
        export(run, "dpo", tmp_path / "out", ID)
    run.done("sft").unlink()
    with pytest.raises(UserError, match="the step 'sft' is not finished"):
        export(run, "dpo", tmp_path / "out", ID)


def test_what_is_there_is_not_written_over(gpt2_run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        export(gpt2_run[2], "dpo", tmp_path, ID)
    with pytest.raises(UserError, match="is no run: recipe"):
        export(RunDir(tmp_path), "dpo", tmp_path / "out", ID)


def test_a_large_base_is_not_shipped_unasked(gpt2_run, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_trl.adapters.base.SMALL", 1000)
    with pytest.raises(UserError, match="has no public id that is known"):
        export(gpt2_run[2], "dpo", tmp_path / "out")


def test_a_template_that_writes_todays_date_is_refused(gpt2_run, tmp_path):
    _, _, run = gpt2_run
    copy = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    template = copy.tokenizer / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    with pytest.raises(UserError, match="the template writes today's date"):
        export(copy, "rm", tmp_path / "out", ID)


# --- a base that is shipped: the stage `sft` was fine-tuned whole
# ------------------------------------------------------------


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
    run = trained[1]
    assert read_json(shipped / "grpo" / "adapter_config.json")["base_model_name_or_path"] == "./base"
    base = AutoModelForCausalLM.from_pretrained(shipped / "grpo" / "base")
    found = logits(PeftModel.from_pretrained(base, shipped / "grpo"), IDS)
    whole = AutoModelForCausalLM.from_pretrained(run.model("sft"))
    torch.testing.assert_close(found, logits(PeftModel.from_pretrained(whole, run.adapter("grpo")), IDS))
    lineage = read_json(shipped / "grpo" / "lineage.json")
    assert lineage["base"]["stage"] == "sft"
    assert [parent["stage"] for parent in lineage["parents"]] == ["sft", "rm"]
    assert "`sft` fine-tuned it whole" in (shipped / "grpo" / "README.md").read_text()
    with pytest.raises(UserError, match="has no adapter"):
        export(RunDir(shipped / "run"), "sft", shipped / "sft")


def test_a_policy_loads_and_answers(shipped):
    policy = rlhf_trl.load_policy(shipped / "grpo")
    prompt = [{"role": "user", "content": "How do I care for cats?"}]
    answer = policy.answer(prompt, max_new_tokens=8)
    assert answer == policy.answer(prompt, max_new_tokens=8)
    assert policy.lineage["stage"] == "grpo"
    with pytest.raises(UserError, match="is of a policy, not of a reward model"):
        rlhf_trl.load_reward_model(shipped / "grpo")


def test_a_reward_model_that_was_trained_again_is_noticed(shipped, tmp_path):
    run = RunDir(shutil.copytree(shipped / "run", tmp_path / "run"))
    marker = read_json(run.done("rm"))
    write_json(run.done("rm"), {**marker, "finished": "2099-01-01T00:00:00+0000"})
    with pytest.raises(UserError, match="its parent 'rm' was trained again afterwards"):
        export(run, "grpo", tmp_path / "out")


# --- acceptance 2: one score, whoever computes it
# ---------------------------------------------------------------------------


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
    ids = [encode(model.tokenizer, prompt, answer)[1] for prompt, answer in zip(prompts, answers, strict=True)]
    same(score_completions(in_run, model.tokenizer, prompts, ids), "the rewards of GRPO and PPO")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    one_score = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "dtype": torch.float32}
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", **one_score)
    texts = [
        "".join(tokenizer.decode(part) for part in encode(tokenizer, prompt, answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    monkeypatch.chdir(folder)  # where `./base` is
    ways = {
        "peft": PeftModel.from_pretrained(base, folder).eval(),
        "transformers": AutoModelForSequenceClassification.from_pretrained(".", **one_score).eval(),
    }
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
        for name, way in ways.items():
            with torch.no_grad():
                same(way(**batch).logits[:, 0], f"{name}, padded on the {side}")


def test_scores_do_not_depend_on_the_date(gpt2_run, tmp_path, monkeypatch):
    """A template like Llama's, which writes today's date unless one is given."""
    base, _, run = gpt2_run
    folder = shutil.copytree(base, tmp_path / "dated")
    template = (run.tokenizer / "chat_template.jinja").read_text()
    dated = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    (folder / "chat_template.jinja").write_text(dated + "{{ date_string }}" + template)
    tokenizer = set_up_tokenizer(str(folder), {})
    model = RewardModel(load_classifier(str(base), ModelConfig(), tokenizer).eval(), tokenizer)
    prompts, answers = pairs_of(run)
    scores, plain = [], set()
    for year in (2026, 2031):

        class Clock(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 1, 1)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        scores.append(model.score(prompts, answers, [True] * 12))
        plain.add(AutoTokenizer.from_pretrained(folder).apply_chat_template(prompts[0], tokenize=False))
    assert len(plain) == 2  # the template does write the date
    assert torch.equal(*scores)


def test_a_reward_adapter_without_its_head_is_refused(shipped, tmp_path):
    copy = shutil.copytree(shipped / "rm", tmp_path / "rm")
    change_tensors(copy, lambda tensors: tensors.pop("base_model.model.score.weight"))
    with pytest.raises(UserError, match="the reward head \\(score\\) is missing"):
        rlhf_trl.load_reward_model(copy)
