"""Adapters that are trained further: the one that came in goes on, on its own base, and keeps its rank."""

import math
import shutil

import pytest
import torch
from adapter_fixtures import ID, change_json, change_tensors
from conftest import small_recipe, train_all
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_trl.adapters.export import export
from rlhf_trl.adapters.start import check_starts
from rlhf_trl.models.base import Policies, lay, shares_base
from rlhf_trl.models.tokenizer import recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.train.step import build_stage_config, build_trainer, train

IDS = torch.tensor([[5, 99, 300, 17, 42]])
ARGS = "max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 1, bf16: false"
TEXT = """
name: again
seed: 5
model: {model_name_or_path: BASE, use_peft: true, lora_r: 2, lora_target_modules: all-linear}
data: {source: builtin:demo, max_rows: 60, max_length: 96, test_fraction: 0.2}
stages:
  sft: {trainer: sft, init: POLICY, continue: true, args: {ARGS}}
  rm: {trainer: reward, init: REWARD, continue: true, args: {ARGS}}
  dpo: {trainer: dpo, init: sft, continue: true, args: {ARGS, save_strategy: steps, save_steps: 1}}
  grpo: {trainer: grpo, init: sft, continue: true, reward: rm, args: {ARGS, num_generations: 4, beta: 0.1,
    max_completion_length: 4}}
  top: {trainer: dpo, init: sft, args: {ARGS}}
evaluation: {max_new_tokens: 16}
""".replace("ARGS", ARGS)


def write(base, policy, reward):
    return TEXT.replace("BASE", str(base)).replace("POLICY", str(policy)).replace("REWARD", str(reward))


@torch.no_grad()
def logits(base, *adapters):
    model = AutoModelForCausalLM.from_pretrained(base)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def again(gpt2_run, policy_export, reward_export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    recipe = small_recipe(folder, text=write(gpt2_run[0], policy_export, reward_export))
    assert check_starts(recipe) == []
    run = RunDir(folder / "runs" / "again")
    train_all(recipe, run)
    run.write_provenance(recipe)
    return recipe, run


def test_the_adapter_itself_is_trained_and_the_reference_is_what_it_was(again, gpt2_run, policy_export, tmp_path):
    recipe, run = again
    assert read_json(run.training_stats("dpo"))["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for stage, start in (("sft", policy_export), ("dpo", run.adapter("sft")), ("grpo", run.adapter("sft"))):
        trainer = build_trainer(recipe, run, stage, build_stage_config(recipe, RunDir(tmp_path), stage))
        expected = logits(gpt2_run[0], start)
        model, trained = trainer.model.eval(), {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for adapter in ("default", "ref") if stage != "sft" else ("default",):
                model.set_adapter(adapter)
                torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        assert trained and all("lora_" in name and ".default." in name for name in trained)
        assert not (run.adapter(stage) / "ref").exists()
        assert (logits(gpt2_run[0], run.adapter(stage)) - expected).abs().max() > 1e-3


def test_evaluation_holds_a_continued_policy_against_its_merged_start(again, gpt2_run):
    recipe, run = again
    policies = Policies(recipe, run, recorded_tokenizer(recipe, run))
    assert not shares_base(recipe, "dpo", "dpo") and shares_base(recipe, "dpo", "top")
    start = run.adapter("sft")
    for name, adapters in ((REFERENCE, [start]), ("dpo", [run.adapter("dpo")]), ("top", [start, run.adapter("top")])):
        with policies.use(name) as model, torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, logits(gpt2_run[0], *adapters), atol=1e-4, rtol=0)


def test_an_export_keeps_the_rank_and_says_what_was_continued(again, gpt2_run, policy_export, tmp_path):
    run = again[1]
    for stage, rank in (("grpo", 12), ("rm", 10), ("top", 14)):
        lineage = export(run, stage, tmp_path / stage, ID)
        assert lineage["rank"] == rank and lineage["verification"]["difference"] < 1e-5
        assert lineage["combined"] == (["sft", "top"] if stage == "top" else [stage])
    lineage, card = read_json(tmp_path / "grpo" / "lineage.json"), (tmp_path / "grpo" / "README.md").read_text()
    assert lineage["continued"] == "sft" and "Continued from `sft`" in card
    outside = lineage["parents"][0]
    assert (outside["stage"], outside["lineage"]["stage"]) == (f"local:{policy_export.name}", "dpo")


def test_a_continued_stage_goes_on_from_its_checkpoint(again, tmp_path):
    recipe, copy = again[0], RunDir(shutil.copytree(again[1].root, tmp_path / "again"))
    weights = copy.adapter("dpo") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for path in (copy.adapter("dpo"), copy.checkpoints("dpo") / "checkpoint-2"):
        shutil.rmtree(path)
    copy.done("dpo").unlink()
    train(recipe, copy, "dpo")
    assert weights.read_bytes() == whole
    assert [row["step"] for row in read_json(copy.training_stats("dpo"))["history"]] == [1, 2]


def test_a_folder_that_cannot_be_started_from_is_named(again, gpt2_run, policy_export, tmp_path):
    folder, config = shutil.copytree(policy_export, tmp_path / "adapter"), "adapter_config.json"
    text = write(gpt2_run[0], folder, policy_export)
    recipe = small_recipe(tmp_path, text=text)
    (found,) = check_starts(recipe)
    assert found.place == "stages.rm.init" and "is of a policy, not of a reward model" in found.problem
    assert "lies on" in check_starts(small_recipe(tmp_path, ("model.model_name_or_path=a/b",), text))[0].problem
    moved = recipe.model_copy().hash_by(hash_file, {str(folder): "0"})
    with pytest.raises(UserError, match="has changed since"):
        build_trainer(moved, again[1], "sft", build_stage_config(moved, again[1], "sft"))
    for break_it, says in (
        (
            lambda: change_json(folder, "lineage.json", base={"id": ID, "revision": "", "weights": ""}),
            "weights of this",
        ),
        ((folder / "lineage.json").unlink, None),
        (lambda: change_json(folder, config, base_model_name_or_path=str(gpt2_run[0])), None),
        (lambda: change_json(folder, config, base_model_name_or_path=str(tmp_path / "gone")), "which is not"),
        (lambda: change_json(folder, config, r=3), "rank"),
        (lambda: change_json(folder, config, peft_type="IA3"), "peft_type"),
        (lambda: (folder / config).unlink(), "has no adapter_config.json"),
        (lambda: shutil.rmtree(folder), "is no folder"),
    ):
        break_it()
        found = check_starts(recipe, "sft")
        assert [one.place for one in found[:1]] == (["stages.sft.init"] if says else [])
        assert says is None or says in found[0].problem


def test_an_adapter_whose_names_the_base_does_not_know_is_no_silence(gpt2_run, tmp_path):
    def rename(content):
        for key in [*content]:
            content[key.replace("transformer", "model")] = content.pop(key)

    folder = shutil.copytree(gpt2_run[2].adapter("sft"), tmp_path / "adapter")
    change_tensors(folder, rename)
    with pytest.raises(UserError, match="Found missing adapter keys"):
        lay(AutoModelForCausalLM.from_pretrained(gpt2_run[0]), folder)
