"""Evaluation: the numbers in metrics.json are what a plain computation gives, and a whole recipe ends in a report."""

import shutil

import pytest
import torch
from conftest import ROOT, reset_accelerate, shared, small_recipe, train_all

from rlhf_trl.evaluate import evaluate
from rlhf_trl.models import load_reward_model
from rlhf_trl.recipe import UserError, load_recipe
from rlhf_trl.report import report
from rlhf_trl.rundir import RunDir, read_json, read_jsonl


@pytest.fixture
def evaluated(trained, tmp_path):
    recipe, source = trained
    run = RunDir(tmp_path / "run")
    shutil.copytree(source.root, run.root)
    evaluate(recipe, run)
    return recipe, run, read_json(run.metrics)


def test_every_policy_is_measured_on_the_same_prompts(evaluated):
    recipe, run, metrics = evaluated
    assert list(metrics["policies"]) == sorted(["reference", *recipe.policies])
    rows = {name: read_jsonl(run.completions(name)) for name in metrics["policies"]}
    assert len({tuple(row["id"] for row in answers) for answers in rows.values()}) == 1
    assert metrics["policies"]["reference"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 12}
    for name in recipe.policies:
        entry, answers = metrics["policies"][name], rows[name]
        assert entry["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in answers) / 12)
        assert all(row["kl"] >= 0 for row in answers)
        assert entry["kl"]["low"] <= entry["kl"]["mean"] <= entry["kl"]["high"]
        gains = [row["reward"] - start["reward"] for row, start in zip(answers, rows["reference"], strict=True)]
        assert entry["reward_gain"]["mean"] == pytest.approx(sum(gains) / 12)
        assert [row["reward_gain"] for row in answers] == pytest.approx(gains)


def test_scores_and_accuracy_are_those_of_the_reward_model(evaluated):
    recipe, run, metrics = evaluated
    model = load_reward_model(recipe, run, "rm")
    answers = read_jsonl(run.completions("dpo"))
    scores = model.score(
        [a["prompt"] for a in answers], [a["answer"] for a in answers], [a["finished"] for a in answers]
    )
    assert [row["reward"] for row in answers] == pytest.approx(scores.tolist(), abs=1e-4)
    pairs = read_jsonl(run.pairs("test"))
    side = {s: model.score([p["prompt"] for p in pairs], [p[s] for p in pairs], [True] * len(pairs), 1)
            for s in ("chosen", "rejected")}  # fmt: skip
    accuracy = (side["chosen"] > side["rejected"]).double().mean().item()
    found = metrics["reward_model"]
    assert found["accuracy"]["mean"] == pytest.approx(accuracy)
    assert found["accuracy"]["n"] == len(pairs) == sum(entry["accuracy"]["n"] for entry in found["subsets"].values())
    longer = sum((len(p["chosen"]) > len(p["rejected"])) + (len(p["chosen"]) == len(p["rejected"])) / 2 for p in pairs)
    assert found["length_baseline"]["mean"] == pytest.approx(longer / len(pairs))


def test_evaluation_repeats(evaluated):
    recipe, run, metrics = evaluated
    evaluate(recipe, run)
    assert read_json(run.metrics) == metrics


def test_evaluation_needs_every_stage(trained, tmp_path):
    recipe, source = trained
    run = RunDir(tmp_path / "run")
    shutil.copytree(source.root, run.root)
    run.done("ppo").unlink()
    with pytest.raises(UserError, match="train RECIPE ppo"):
        evaluate(recipe, run)


# --- whole recipes ---------------------------------------------------------------------------------------------------


def quick(recipe) -> list[str]:
    """Overrides that make every stage of a recipe a step or two on a few short rows."""
    values = ["evaluation.prompts=4", "evaluation.max_new_tokens=8", "data.max_length=160", "data.test_fraction=0.2"]
    for name, stage in recipe.stages.items():
        args = f"stages.{name}.args"
        values += [f"{args}.per_device_train_batch_size=4", f"{args}.gradient_accumulation_steps=2",
                   f"{args}.eval_strategy=no", f"{args}.save_strategy=no", f"{args}.warmup_steps=0",
                   f"{args}.logging_steps=1"]  # fmt: skip
        values.append(f"{args}.total_episodes=8" if stage.trainer == "ppo" else f"{args}.max_steps=1")
        if stage.trainer == "grpo":
            values += [f"{args}.max_completion_length=8", f"{args}.num_generations=4"]
        if stage.trainer == "ppo":
            values += [f"{args}.response_length=8", f"{args}.num_ppo_epochs=1"]
        if stage.trainer in ("sft", "reward", "dpo"):
            values.append(f"{args}.max_length=1024")
    return values


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_from_pairs_to_report(path, tmp_path):
    overrides = [
        "model.model_name_or_path=builtin:tiny",
        "data.source=builtin:demo",
        "data.subsets=[]",
        "data.max_rows=120",
    ]
    recipe = load_recipe(path, [*overrides, *quick(load_recipe(path))])
    run_whole(recipe, RunDir(tmp_path / "run"))


def run_whole(recipe, run):
    run.write_provenance(recipe)
    train_all(recipe, run)
    evaluate(recipe, run)
    run.mark_done(recipe, "evaluate", 0.0)
    reset_accelerate()
    report(recipe, run)
    assert run.report.stat().st_size > 20_000
    assert set(read_json(run.metrics)["policies"]) == {"reference", *recipe.policies}


def test_gpt2_on_real_hh_text(tmp_path):
    """The assignment's setting: GPT-2's tokenizer, a small random GPT-2, Anthropic's pairs, every stage of hh_gpt2."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = tmp_path / "gpt2"
    AutoTokenizer.from_pretrained(shared("gpt2-tokenizer")).save_pretrained(model)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2)).save_pretrained(model)
    path = ROOT / "recipes" / "hh_gpt2.yaml"
    overrides = [f"model.model_name_or_path={model}", f"data.source={shared('hh-rlhf')}", "data.max_rows=120"]
    recipe = load_recipe(path, [*overrides, *quick(load_recipe(path))])
    run = RunDir(tmp_path / "run")
    run_whole(recipe, run)
    summary = read_json(run.summary)
    assert summary["rows_in"] == 120
    saved = read_json(run.adapter("dpo") / "tokenizer_config.json")
    assert (saved["pad_token"], saved["eos_token"]) == ("ÿ", "<|endoftext|>")


def test_a_policy_recipe_without_reward_model(tmp_path, trained):
    recipe = small_recipe(tmp_path, text=DPO_ONLY)
    run_whole(recipe, RunDir(tmp_path / "run"))
    metrics = read_json(tmp_path / "run" / "evaluation" / "metrics.json")
    assert metrics["reward_model"] is None
    assert "reward" not in metrics["policies"]["dpo"]


DPO_ONLY = """
name: only
model: {model_name_or_path: builtin:tiny, use_peft: true, lora_dropout: 0.0, lora_target_modules: all-linear}
data: {source: builtin:demo, max_rows: 120, max_length: 192, test_fraction: 0.2}
stages:
  dpo:
    trainer: dpo
    args: {bf16: false, gradient_checkpointing: false, max_steps: 1, learning_rate: 1e-3, save_strategy: "no"}
evaluation: {prompts: 4, max_new_tokens: 8}
"""
