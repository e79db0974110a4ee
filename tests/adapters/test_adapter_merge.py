"""Merged adapters: the same outputs, the reward head kept, and no quantised base."""

import shutil

import pytest
import torch
from adapter_fixtures import as_rewardbench, change_json, logits
from peft import LoraModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trl import load_reward_model
from rlhf_trl.adapters.export import merge
from rlhf_trl.adapters.score import score_file
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl


def test_a_merged_policy_answers_as_the_adapter_does(gpt2_run, policy_export, tmp_path):
    base, folder = gpt2_run[0], tmp_path / "merged"
    assert merge(policy_export, folder, base)["difference"] < 1e-4
    expected = logits(base, policy_export)  # in float32
    torch.testing.assert_close(logits(folder), expected, atol=1e-4, rtol=0)
    assert (logits(base) - expected).abs().max() > 1e-2
    assert read_json(folder / "lineage.json")["adapter"]["stage"] == "dpo"
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_merged_reward_model_keeps_its_head_and_rewardbench_gets_the_same_scores(gpt2_run, reward_export, tmp_path):
    base, _, run = gpt2_run
    folder = tmp_path / "merged"
    merge(reward_export, folder, base)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert tokenizer.padding_side == "right"
    for file in folder.glob("*.json*"):
        assert not [path for path in (base.parent, reward_export) if str(path) in file.read_text()], file
    settings = read_json(folder / "tokenizer_config.json")  # names that transformers 4 knows, too
    assert (settings["tokenizer_class"], len(settings["model_input_names"])) == ("PreTrainedTokenizerFast", 2)
    rows = read_json(reward_export / "probe.json")["rows"]
    batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(**batch).logits
    torch.testing.assert_close(scores, torch.tensor([row["outputs"] for row in rows]), atol=1e-5, rtol=0)
    rows = read_jsonl(run.pairs("test"))[:6]
    scored = score_file(load_reward_model(reward_export, base), run.pairs("test"))
    for side in ("chosen", "rejected"):
        found = as_rewardbench(folder, [row["prompt"] for row in rows], [row[side] for row in rows])
        torch.testing.assert_close(found, torch.tensor([row[side] for row in scored[:6]]), atol=1e-5, rtol=0)


def quantise(base, folder):
    shutil.copytree(base, folder)
    change_json(folder, "config.json", quantization_config={"load_in_4bit": True})


def shift(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.transformer.ln_f.weight.data += 0.5
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (quantise, "the base is quantised"),
        (shift, "not those that the adapter was exported for"),
        (lambda base, folder: None, "there is no model here"),
    ],
)
def test_a_base_that_does_not_serve_is_refused(gpt2_run, policy_export, tmp_path, write, problem):
    write(gpt2_run[0], tmp_path / "base")
    with pytest.raises(UserError, match=problem):
        merge(policy_export, tmp_path / "merged", tmp_path / "base")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_the_outputs_is_refused(gpt2_run, policy_export, tmp_path, monkeypatch):
    merged = LoraModel.merge_and_unload

    def wrong(self):
        model = merged(self)
        model.transformer.h[0].attn.c_attn.weight.data *= 1.1
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(UserError, match="the outputs of the merged model differ"):
        merge(policy_export, tmp_path / "merged", gpt2_run[0])
    assert not (tmp_path / "merged").exists()


def test_others_adapters_are_merged_too_but_no_hostile_one_and_over_nothing(gpt2_run, policy_export, tmp_path):
    copy = shutil.copytree(policy_export, tmp_path / "adapter")
    base = shutil.copytree(gpt2_run[0], tmp_path / "base")
    change_json(base, "config.json", quantization_config=None)
    for name in ("lineage.json", "probe.json", "evidence.json"):
        (copy / name).unlink()
    assert merge(copy, tmp_path / "merged", base)["difference"] < 1e-4
    with pytest.raises(UserError, match="there already"):
        merge(copy, tmp_path, gpt2_run[0])
    change_json(copy, "adapter_config.json", auto_mapping={"parent_library": "evil"})
    with pytest.raises(UserError, match="makes the loader import code"):
        merge(copy, tmp_path / "other", gpt2_run[0])
