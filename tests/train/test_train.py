"""Training: each trainer learns through its adapter alone, scores what it trained on, resumes, and refuses what
cannot work."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, NO_PPO, RECIPE, ROOT, reset_accelerate, small_recipe
from peft import PeftModel
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_trl.models.base import start_path
from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.models.tokenizer import encode, recorded_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states
from rlhf_trl.train import step as train_module
from rlhf_trl.train.callbacks import Health, History, Interrupt
from rlhf_trl.train.step import build_stage_config, build_trainer, train

ALIGNED = ("rm", "dpo", "grpo", *(["ppo"] if not NO_PPO else []))


@pytest.fixture
def build(trained, tmp_path):
    """Build the trainer of a stage of the trained run, with checkpoints elsewhere."""
    recipe, run = trained
    return lambda stage: build_trainer(recipe, run, stage, build_stage_config(recipe, RunDir(tmp_path), stage))


@pytest.fixture(scope="module")
def texts(trained):
    """Prompts and chosen answers of held-out pairs, and whether the answer is taken as finished."""
    pairs = read_jsonl(trained[1].pairs("test"))[:6]
    return [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs], [True] * 3 + [False] * 3


def test_a_stage_has_names_in_a_tracker_unless_its_args_give_others(trained, tmp_path):
    recipes = (trained[0], small_recipe(tmp_path, ["stages.dpo.args.project=mine"]))
    configs = [build_stage_config(recipe, RunDir(tmp_path), "dpo") for recipe in recipes]
    assert [(of.run_name, of.project) for of in configs] == [("small/dpo", "rlhf-trl"), ("small/dpo", "mine")]


def test_of_several_gpus_without_a_launcher_one_is_used_and_the_profile_named(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState._shared_state", {})
    config = build_stage_config(trained[0], RunDir(tmp_path), "dpo")
    with caplog.at_level("WARNING", "rlhf_trl"):
        train_module.check_gpus()
    assert (config.n_gpu, config.train_batch_size) == (1, config.per_device_train_batch_size)
    assert "2 GPUs are visible and one is used" in caplog.text and "--accelerate ddp" in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 are more than the 2 GPU"):
        train_module.check_gpus()


@pytest.mark.parametrize("stage", ["rm", "dpo", "grpo"])
def test_training_changes_the_adapter_and_not_the_base(trained, build, stage):
    train_module.set_seed(3)
    trainer = build(stage)
    model = trainer.model
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainer.train()
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapters = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == adapters
    frozen = {name: param for name, param in after.items() if name not in adapters and "original_module" not in name}
    for name, tensor in load_file(trained[1].model("sft") / "model.safetensors").items():
        suffix = "." + name.removeprefix("model.")
        same = [p for key, p in frozen.items() if key.replace(".base_layer", "").endswith(suffix)]
        assert all(torch.equal(param, tensor) for param in same)
        assert same or "lm_head" in name


@pytest.mark.parametrize("trainer", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("half", [None, "first"])
def test_the_columns_from_token_ids_are_those_from_texts(trained, trainer, half):
    recipe, run = trained
    fast, slow = (train_module.load_view(run, "train", trainer, half, tokenizer)
                  for tokenizer in (None, recorded_tokenizer(recipe, run)))  # fmt: skip
    assert len(fast) > 0 and fast.column_names == slow.column_names and fast[:] == slow[:]


def test_the_prompts_of_ppo_and_of_grpo_are_those_of_their_view(trained):
    recipe, run = trained
    prompts = [row["prompt"] for row in read_jsonl(run.prompts("train"))]
    ids = [encode(recorded_tokenizer(recipe, run), prompt)[0] for prompt in prompts]
    assert train_module.load_view(run, "train", "ppo").to_dict() == {"input_ids": ids}
    assert train_module.load_view(run, "train", "grpo").to_dict() == {"prompt": prompts}


def test_a_run_without_token_ids_is_of_another_version(tmp_path):
    with pytest.raises(UserError, match="another version has prepared this run"):
        train_module.load_view(RunDir(tmp_path), "train", "dpo")


def test_what_a_stage_leaves_behind(trained):
    recipe, run = trained
    stats = {stage: read_json(run.training_stats(stage)) for stage in ALIGNED}
    for stage in ALIGNED:
        names = {path.name for path in run.adapter(stage).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                         "chat_template.jinja"}  # fmt: skip
        history = stats[stage]["history"]
        assert stats[stage]["summary"]["steps"] == len({row["step"] for row in history})
        assert history[-1].keys() >= {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "peak_memory_bytes"}
        assert run.training_curves(stage).stat().st_size > 5000
        assert run.is_done(recipe, stage)
    reward = stats["rm"]["history"]
    assert {"reward_accuracy", "reward_margin"} <= reward[0].keys()
    assert any({"validation_loss", "validation_reward_accuracy"} <= row.keys() for row in reward)
    # A fresh adapter starts at the reference.
    assert stats["dpo"]["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert stats["grpo"]["history"][0].keys() >= {"equal_groups", "entropy", "answer_tokens"}  # `health` watches them
    for stage, unit in [("grpo", "token"), ("ppo", "answer")][: len(ALIGNED) - 2]:
        assert abs(stats[stage]["history"][0]["kl"]) < 1e-4
        assert f"nats per {unit}" in stats[stage]["definitions"]["kl"]


def test_reward_is_the_same_on_every_path(trained, build, texts):
    """Reward training, scoring and GRPO's reward function see the same tokens and give the same score; PPO's rewards
    are held against this one in `test_the_update_is_the_one_of_the_paper`."""
    tokenizer, (prompts, answers, finished) = recorded_tokenizer(*trained), texts
    model = load_reward_model(*trained, "rm")
    one, many = (model.score(*texts, size) for size in (1, 16))
    assert torch.allclose(one, many, atol=1e-4)
    assert build("rm").eval_dataset[0]["chosen_ids"] == list(chain(*encode(tokenizer, prompts[0], answers[0])))
    ids = [encode(tokenizer, *pair)[1] for pair in zip(prompts, answers, finished, strict=True)]
    (reward,) = build("grpo").reward_funcs
    assert torch.allclose(torch.tensor(reward(prompts=prompts, completion_ids=ids)), one, atol=1e-4)
    # The end token is seen: the same answer, unfinished, scores otherwise.
    assert not torch.allclose(model.score(prompts, answers, [False] * 6), model.score(prompts, answers, [True] * 6))


def test_a_saved_reward_model_scores_as_it_did_when_it_was_trained(copy, texts, monkeypatch):
    built, (prompts, answers, _) = [], texts
    monkeypatch.setattr(train_module, "build_trainer", lambda *args: built.append(build_trainer(*args)) or built[-1])
    copy.train("rm", "max_steps=1", "eval_strategy=no")
    recipe = small_recipe(copy.folder)
    tokenizer, loaded = recorded_tokenizer(recipe, copy), load_reward_model(recipe, copy, "rm")
    for prompt, answer in zip(prompts[:3], answers, strict=False):
        ids = torch.tensor([list(chain(*encode(tokenizer, prompt, answer)))])
        with torch.no_grad():
            expected = built[0].model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert loaded.score([prompt], [answer], [True]).item() == pytest.approx(expected, abs=1e-5)
    file = copy.weights("rm")
    save_file({key: value for key, value in load_file(file).items() if "score" not in key}, file)
    with pytest.raises(UserError, match="no reward head"):
        load_reward_model(recipe, copy, "rm")


def test_the_reward_head_of_a_bfloat16_base_is_trained_in_float32(copy, texts):
    overrides = ("model.dtype=bfloat16", "stages.rm.args.bf16=true", "stages.rm.args.max_steps=2")
    recipe = small_recipe(copy.folder, overrides)
    for step in ("prepare", "sft"):
        copy.mark_done(recipe, step, 0.0)
    train(recipe, copy, "rm")
    (head,) = [t for key, t in load_file(copy.weights("rm")).items() if "score" in key]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    scores = load_reward_model(recipe, copy, "rm").score(*texts)
    assert not torch.equal(scores, scores.bfloat16().float())


# at the reference: 1 - 0, and (0 - 1 / (2 beta))^2
@pytest.mark.parametrize(("loss_type", "expected"), [("hinge", 1.0), ("ipo", 25.0)])
def test_dpo_losses(copy, loss_type, expected):
    copy.train("dpo", f"loss_type={loss_type}", "max_steps=1")
    assert read_json(copy.training_stats("dpo"))["history"][0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_whole_model_is_trained_by_a_key_of_its_stage(copy):
    copy_of = small_recipe(copy.folder, ("stages.dpo.model={use_peft: false}", "stages.dpo.args.max_steps=1"))
    train(copy_of, copy, "dpo")
    assert (copy.model("dpo") / "model.safetensors").exists() and not copy.adapter("dpo").exists()


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_the_reference_of_a_whole_model_is_loaded_as_the_model_is(trained, tmp_path, stage):
    recipe = small_recipe(tmp_path, [f"stages.{stage}.model={{use_peft: false, dtype: bfloat16}}"])
    config = build_stage_config(recipe, RunDir(tmp_path), stage)
    trainer = build_trainer(recipe, trained[1], stage, config)
    assert trainer.ref_model.dtype == trainer.model.dtype == torch.bfloat16
    assert config.model_init_kwargs["revision"] == "main"


def test_every_trainer_with_an_adapter_learns_on_a_base_in_four_bit(copy):
    four = ("load_in_4bit=true", "bnb_4bit_quant_type=nf4", "use_bnb_nested_quant=true")
    whole = "stages.sft.model={use_peft: false, load_in_4bit: false}"
    more = f"  more:\n    trainer: sft\n    init: sft\n    args: {COMMON}\n      max_steps: 1\n  dpo:"
    fewer = ("rm.args.max_steps=1", "dpo.args.max_steps=1", "grpo.args.max_steps=1", "ppo.args.total_episodes=16")
    overrides = (*(f"model.{key}" for key in four), whole, *(f"stages.{key}" for key in fewer))
    recipe = small_recipe(copy.folder, overrides, RECIPE.replace("  dpo:", more))
    copy.mark_done(recipe, "sft", 0.0)
    for stage in ("more", *ALIGNED):
        train(recipe, copy, stage)
        reset_accelerate()
        last = read_json(copy.training_stats(stage))["history"][-1]
        assert last["grad_norm"] > 0 and copy.weights(stage).exists()
    saved = load_file(copy.weights("rm"))
    assert [tensor.dtype for key, tensor in saved.items() if "score" in key] == [torch.float32]


@pytest.mark.skipif(bool(NO_PPO), reason="this TRL has no PPO")
def test_ppo_is_not_trained_on_sharded_parameters(build, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="use ddp or zero2"):
        build("ppo")


def test_a_stage_on_a_lora_sft_starts_from_the_merged_model(tmp_path, trained):
    text = RECIPE.replace("    model: {use_peft: false}\n", "")
    recipe = small_recipe(tmp_path, ("stages.sft.args.max_steps=1", "stages.dpo.args.max_steps=1"), text)
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained[1].data, run.data)
    shutil.copytree(trained[1].base, run.base)
    train(recipe, run, "sft")
    train(recipe, run, "dpo")
    assert start_path(recipe, run, "dpo") == str(run.model("sft"))
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(run.model("sft"))(ids).logits
    base = AutoModelForCausalLM.from_pretrained(run.base)
    adapted = PeftModel.from_pretrained(base, run.adapter("sft"))(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_a_diverging_run_stops_and_saves_nothing(copy, stage):
    with pytest.raises(UserError, match="not finite"):
        copy.train(stage, "learning_rate=1e38")
    assert not copy.adapter(stage).exists()
    assert not copy.done(stage).exists()


def test_a_stop_saves_a_checkpoint_though_the_last_one_was_better(copy, monkeypatch):
    def stop(self, args, state, control, **_):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Interrupt, "on_step_begin", stop)
    with pytest.raises(SystemExit):
        copy.train("dpo", "eval_strategy=steps", "eval_steps=1", "save_strategy=best", "metric_for_best_model=loss",
                   "learning_rate=1e-12")  # fmt: skip
    assert {path.name for path in copy.checkpoints("dpo").iterdir()} >= {"checkpoint-1", "checkpoint-2"}


def test_fp16_may_leave_out_steps_whose_gradient_overflows():
    model, health = torch.nn.Linear(1, 1), Health()
    model.weight.grad = torch.full((1, 1), math.inf)
    state = SimpleNamespace(global_step=1)
    for fp16, most in ((False, 0), (True, 16)):
        args = SimpleNamespace(fp16=fp16, output_dir="checkpoints")
        for _ in range(most):
            health.on_pre_optimizer_step(args, state, None, model)
            health.on_log(args, state, None, {"grad_norm": math.nan, "loss": 0.7})
        with pytest.raises(UserError, match="the gradient is not finite"):
            for _ in range(99):
                health.on_pre_optimizer_step(args, state, None, model)
        health.overflows = 0


def test_too_few_prompts_are_refused_with_both_numbers(copy):
    path, tokens = copy.prompts("train"), copy.tokens("train")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    parquet.write_table(parquet.read_table(tokens).slice(0, 1), tokens)
    copy.mark_done(small_recipe(copy.folder), "prepare", 0.0)
    for stage, needed in (("grpo", "the 2 of one rollout"), ("ppo", "one PPO batch of 16")):
        with pytest.raises(UserError, match=rf"^data: 1 training prompts .*{needed}"):
            copy.train(stage)
    shutil.rmtree(copy.step("rm"))
    with pytest.raises(UserError, match="run `rlhf-trl train RECIPE rm` first"):
        copy.train("grpo")


def test_the_history_is_written_when_a_checkpoint_is_due_and_otherwise_seldom(tmp_path, monkeypatch):
    history, clock, writes = History(tmp_path / "stats.json", "dpo", "dpo"), [0.0], []
    monkeypatch.setattr("rlhf_trl.train.callbacks.time.perf_counter", lambda: clock[0])

    def write(path, stats):
        writes.append(len(stats["history"]))
        clock[0] += 0.5

    monkeypatch.setattr("rlhf_trl.train.callbacks.write_json", write)
    state = SimpleNamespace(global_step=0, max_steps=100, epoch=0.0, is_world_process_zero=True)
    history.on_train_begin(None, state, None)
    assert writes == [0]  # `status` sees at once that training has begun
    for step in range(1, 101):  # a step a second, half a second for a write: one in ten steps may write
        state.global_step, clock[0] = step, clock[0] + 1
        control = SimpleNamespace(should_save=step in (50, 51))
        history.on_step_end(None, state, control)
        history.on_log(None, state, control, logs={"loss": 1.0})
    history.on_train_end(None, state, None)
    assert {49, 50, 51, 100} <= set(writes)
    assert len(writes) <= 2 + 100 / 10 + 4


def test_use_kernels_reaches_the_model(trained, tmp_path, monkeypatch, installed):
    asked = []
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda _, use, *__: asked.append(use))
    recipe = small_recipe(tmp_path, ["stages.dpo.args.model_init_kwargs={use_kernels: true}"])
    build_trainer(recipe, trained[1], "dpo", build_stage_config(recipe, RunDir(tmp_path), "dpo"))
    assert asked == [True]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_batches_hold_rows_of_similar_length(trained, tmp_path, stage):
    """`group_by_length` finds the lengths of the views, through the library's removal of columns."""
    recipe = small_recipe(tmp_path, [f"stages.{stage}.args.train_sampling_strategy=group_by_length"])
    trainer = build_trainer(recipe, trained[1], stage, build_stage_config(recipe, RunDir(tmp_path), stage))
    lengths = trainer.train_dataset["length"]

    def slots(order):
        return sum(8 * max(lengths[index] for index in order[at : at + 8]) for at in range(0, len(order), 8))

    grouped = [index for batch in trainer.get_train_dataloader().batch_sampler for index in batch]
    assert sorted(grouped) == list(range(len(trainer.train_dataset)))
    assert slots(grouped) < 0.9 * slots(range(len(grouped)))
    held_out = trainer.get_eval_dataloader()
    assert sum(len(batch["input_ids"]) for batch in held_out) >= len(trainer.eval_dataset)


# --- interruption


def saving(stage):
    """Options for six steps, or for four of PPO, which are longer, with a checkpoint after each."""
    return "save_strategy=steps", "save_steps=1", "total_episodes=64" if stage == "ppo" else "max_steps=6"


@pytest.mark.parametrize(
    ("stage", "number"), [("dpo", signal.SIGKILL), ("grpo", signal.SIGKILL), ("ppo", signal.SIGTERM)]
)
def test_an_interrupted_run_goes_on_to_the_same_weights(copy, stage, number, caplog):
    """A process is ended in the middle; this one trains once without an end, and then takes up what that one left."""
    options, last = saving(stage), 4 if stage == "ppo" else 6
    overrides = [f"stages.{stage}.args.{option}" for option in options]
    recipe = small_recipe(copy.folder, overrides)
    copy.train(stage, *options)
    expected = copy.weights(stage).read_bytes()
    shutil.rmtree(copy.adapter(stage))  # as if killed after its last checkpoint
    copy.done(stage).unlink()
    copy.train(stage, *options)
    assert copy.weights(stage).read_bytes() == expected
    shutil.rmtree(copy.step(stage))

    command = [sys.executable, "-m", "rlhf_trl", "train", str(copy.folder / "small.yaml"), stage, "--runs",
               str(copy.root.parent), *(part for item in overrides for part in ("--set", item))]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        deadline = time.monotonic() + 600  # a busy machine takes minutes
        while not (copy.checkpoints(stage) / "checkpoint-2").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        state = next(state for state in step_states(recipe, copy) if state.step == stage)
        assert state.state == "running" and f"process {process.pid} " in state.holder
        assert state.progress.max_steps == last and state.progress.step >= 1 and "loss" in state.progress.values
        process.send_signal(number)
    state = next(state for state in step_states(recipe, copy) if state.step == stage)
    assert state.state == "stopped" and state.checkpoint >= 2 and state.seconds_left > 0
    assert (state.holder is None) == (number == signal.SIGTERM)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert not copy.adapter(stage).exists()

    with caplog.at_level("INFO", "rlhf_trl"):
        copy.train(stage, *options)
    assert f"resuming from {copy.checkpoints(stage)}" in caplog.text
    assert copy.weights(stage).read_bytes() == expected
    steps = [row["step"] for row in read_json(copy.training_stats(stage))["history"]]
    assert steps == sorted(set(steps)) and steps[-1] == last


def test_the_best_checkpoint_is_found_by_a_run_that_was_killed_after_it(copy):
    best = ("save_strategy=steps", "save_steps=1", "eval_strategy=steps", "eval_steps=1", "max_steps=2",
            "load_best_model_at_end=true", "metric_for_best_model=eval_loss", "greater_is_better=true")  # fmt: skip
    copy.train("dpo", *best)
    expected, saved = copy.weights("dpo").read_bytes(), copy.checkpoints("dpo")
    first, last = (load_file(saved / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2))
    final = load_file(copy.weights("dpo"))
    assert all(torch.equal(final[key], first[key]) for key in final)
    assert not all(torch.equal(final[key], last[key]) for key in final)
    for folder in (copy.adapter("dpo"), saved / "checkpoint-2"):
        shutil.rmtree(folder)
    copy.done("dpo").unlink()
    copy.train("dpo", *best)
    assert copy.weights("dpo").read_bytes() == expected


def test_a_checkpoint_that_cannot_be_finished_does_not_appear(copy, monkeypatch):
    real = torch.save

    def full_disk(value, path, *args, **kwargs):
        if "optimizer" in str(path) and "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        copy.train("dpo", *saving("dpo"))
    assert [path.name for path in copy.checkpoints("dpo").glob("checkpoint-*")] == ["checkpoint-1"]


# --- health


def test_a_reward_model_at_chance_is_said_when_its_stage_ends(copy, trained):
    found = {entry["what"]: entry for entry in read_json(trained[1].training_stats("rm"))["health"]}
    assert found.keys() <= {"over_chance", "over_length"}
    overrides = ["stages.rm.health={over_chance: {below: 1.0, then: stop}}", "stages.rm.args.max_steps=1"]
    recipe = small_recipe(copy.folder, overrides)
    copy.done("rm").unlink()
    with pytest.raises(UserError, match=r"stages.rm.health.over_chance: the accuracy on held-out pairs"):
        train(recipe, copy, "rm")
    assert not copy.done("rm").exists()
