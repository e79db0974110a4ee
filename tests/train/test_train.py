"""Training: each trainer learns through its adapter alone, scores what it trained on, resumes, and refuses what
cannot work."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RECIPE, ROOT, small_recipe
from safetensors.torch import load_file

from rlhf_trl.models.base import encode, recorded_tokenizer
from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import last_valid_checkpoint
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import StepState, step_states
from rlhf_trl.train import step as train_module
from rlhf_trl.train.callbacks import History
from rlhf_trl.train.step import build_config, build_reward_function, build_trainer, train
from rlhf_trl.train.trainers import kind_of


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run that a test may change, and a loader of the recipe with overrides."""
    recipe, run = trained
    target = RunDir(tmp_path / "runs" / recipe.name)
    shutil.copytree(run.root, target.root)

    def load(*overrides):
        loaded = small_recipe(tmp_path, overrides)
        for step in ("prepare", "sft", "rm"):  # the paths of the copy are new; what it holds is not
            marker = read_json(target.done(step))
            assert marker["fingerprint"] == loaded.fingerprint(step)
        return loaded

    return target, load


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config_of(recipe, run, stage):
    word = recipe.stages[stage].trainer
    values = {**recipe.args_of(stage), **train_module._own_settings(run, stage, word)}
    return build_config(kind_of(word).config, values, stage)


@pytest.mark.parametrize("stage", ["rm", "dpo", "grpo", "ppo"])
def test_training_changes_the_adapter_and_not_the_base(copy, stage):
    run, load = copy
    recipe = load()
    train_module.set_seed(3)
    trainer = build_trainer(recipe, run, stage, config_of(recipe, run, stage))
    model = trainer.policy_model if stage == "ppo" else trainer.model
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainer.train()
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapters = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == {name for name in adapters if ".reward." not in name}  # PPO's, on the same base
    base = load_file(run.model("sft") / "model.safetensors")
    frozen = {name: param for name, param in after.items() if name not in adapters and "original_module" not in name}
    for name, tensor in base.items():
        suffix = "." + name.removeprefix("model.")
        same = [p for key, p in frozen.items() if key.replace(".base_layer", "").endswith(suffix)]
        assert all(torch.equal(param, tensor) for param in same)
        assert same or "lm_head" in name


def test_what_a_stage_leaves_behind(trained):
    recipe, run = trained
    for stage in ("rm", "dpo", "grpo", "ppo"):
        names = {path.name for path in run.adapter(stage).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                         "chat_template.jinja"}  # fmt: skip
        stats = read_json(run.training_stats(stage))
        assert stats["summary"]["steps"] == len({row["step"] for row in stats["history"]})
        assert {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "peak_memory_bytes"} <= stats["history"][
            -1
        ].keys()
        assert run.training_curves(stage).stat().st_size > 5000
        assert run.is_done(recipe, stage)
    reward = read_json(run.training_stats("rm"))["history"]
    assert {"reward_accuracy", "reward_margin"} <= reward[0].keys()
    assert any({"validation_loss", "validation_reward_accuracy"} <= row.keys() for row in reward)
    assert any(key.endswith("score.weight") for key in load_file(run.adapter("rm") / "adapter_model.safetensors"))


def test_fresh_adapters_start_at_the_reference(trained):
    _, run = trained
    first = {stage: read_json(run.training_stats(stage))["history"][0] for stage in ("dpo", "grpo", "ppo")}
    assert first["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["grpo"]["kl"] == 0.0
    assert abs(first["ppo"]["kl"]) < 1e-4
    assert "nats per answer" in read_json(run.training_stats("ppo"))["definitions"]["kl"]
    assert "nats per token" in read_json(run.training_stats("grpo"))["definitions"]["kl"]


def test_reward_is_the_same_on_every_path(trained):
    """Reward training, scoring, GRPO's reward function and PPO's `get_reward` see the same tokens and give the same
    score."""
    from trl.experimental.utils import get_reward

    recipe, run = trained
    tokenizer = recorded_tokenizer(recipe, run)
    pairs = read_jsonl(run.pairs("test"))[:6]
    prompts, answers = [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs]
    finished = [True, True, True, False, False, False]
    model = load_reward_model(recipe, run, "rm")
    one, many = model.score(prompts, answers, finished, 1), model.score(prompts, answers, finished, 16)
    assert torch.allclose(one, many, atol=1e-4)
    # reward training
    config = config_of(recipe, RunDir(run.root.parent / "parity"), "rm")
    trainer = build_trainer(recipe, run, "rm", config)
    row = trainer.eval_dataset[0]
    assert row["chosen_ids"] == list(chain(*encode(tokenizer, prompts[0], answers[0])))
    # GRPO
    ids = [encode(tokenizer, *pair, done)[1] for *pair, done in zip(prompts, answers, finished, strict=True)]
    scores = build_reward_function(recipe, run, "rm", tokenizer)(prompts=prompts, completion_ids=ids)
    assert torch.allclose(torch.tensor(scores), one, atol=1e-4)
    # PPO: prompts padded on the left, answers on the right
    config = config_of(recipe, RunDir(run.root.parent / "parity"), "ppo")
    ppo = build_trainer(recipe, run, "ppo", config)
    starts = tokenizer.pad(
        {"input_ids": [encode(tokenizer, prompt)[0] for prompt in prompts]}, return_tensors="pt"
    ).input_ids
    width = max(map(len, ids))
    ends = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    ppo.shared.context_length = starts.shape[1]
    whole = torch.cat([starts, ends], 1)
    _, rewards, _ = get_reward(ppo.reward_model, whole, tokenizer.pad_token_id, starts.shape[1])
    assert torch.allclose(rewards, one, atol=1e-4)
    # The end token is seen: the same answer, unfinished, scores otherwise.
    assert not torch.allclose(model.score(prompts, answers, [False] * 6), model.score(prompts, answers, [True] * 6))


def test_reward_model_scores_the_same_in_a_fresh_process(copy, monkeypatch):
    run, load = copy
    recipe = load()
    built = []
    monkeypatch.setattr(train_module, "build_trainer", lambda *args: built.append(build_trainer(*args)) or built[-1])
    run.done("rm").unlink()
    train(recipe, run, "rm")
    tokenizer = recorded_tokenizer(recipe, run)
    pairs = read_jsonl(run.pairs("test"))[:4]
    ids = [list(chain(*encode(tokenizer, pair["prompt"], pair["chosen"]))) for pair in pairs]
    model = built[0].model.eval()
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits.item() for row in ids
        ]
    code = f"""
import json, sys
from pathlib import Path
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import read_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.models.rewards import load_reward_model
run = RunDir(Path({str(run.root)!r})); pairs = read_jsonl(run.pairs("test"))[:4]
model = load_reward_model(load_recipe(Path({str(run.root.parent.parent / "small.yaml")!r})), run, "rm")
print(json.dumps(model.score([p["prompt"] for p in pairs], [p["chosen"] for p in pairs], [True] * 4).tolist()))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert json.loads(output.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_a_reward_adapter_without_its_head_is_refused(copy):
    from safetensors.torch import save_file

    run, load = copy
    file = run.adapter("rm") / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "score" not in key}, file)
    with pytest.raises(UserError, match="no reward head"):
        load_reward_model(load(), run, "rm")


def test_the_reward_head_of_a_bfloat16_base_is_trained_in_float32(copy):
    run, _ = copy
    overrides = ("model.dtype=bfloat16", "stages.rm.args.bf16=true", "stages.rm.args.max_steps=2")
    recipe = small_recipe(run.root.parent.parent, overrides)
    for step in ("prepare", "sft"):
        run.mark_done(recipe, step, 0.0)
    train(recipe, run, "rm")
    (head,) = [t for key, t in load_file(run.adapter("rm") / "adapter_model.safetensors").items() if "score" in key]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    pairs = read_jsonl(run.pairs("test"))[:8]
    prompts, answers = [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs]
    model = load_reward_model(recipe, run, "rm")
    one, many = (model.score(prompts, answers, [True] * 8, size) for size in (1, 8))
    assert torch.allclose(one, many, atol=2e-2)  # the backbone is bfloat16
    assert not torch.equal(one, one.bfloat16().float())


@pytest.mark.parametrize("stage", ["dpo", "grpo", "ppo"])
def test_the_same_seed_gives_the_same_adapter(trained, copy, stage):
    _, first = trained
    run, load = copy
    train(load(), run, stage)
    assert sha(run.adapter(stage) / "adapter_model.safetensors") == sha(
        first.adapter(stage) / "adapter_model.safetensors"
    )
    assert list((run.root / "replaced").glob(f"{stage}-*"))  # the finished stage is kept


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_dpo_losses(copy, loss_type):
    run, load = copy
    recipe = load(f"stages.dpo.args.loss_type={loss_type}", "stages.dpo.args.max_steps=1")
    train(recipe, run, "dpo")
    expected = {"hinge": 1.0, "ipo": 25.0}[loss_type]  # at the reference: 1 - 0, and (0 - 1 / (2 beta))^2
    assert read_json(run.training_stats("dpo"))["history"][0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_whole_model_and_four_bit_take_the_same_keys(copy):
    run, load = copy
    recipe = load("stages.dpo.model.use_peft=false", "stages.dpo.args.max_steps=1")
    train(recipe, run, "dpo")
    assert not run.adapter("dpo").exists()
    assert (run.model("dpo") / "model.safetensors").exists()
    recipe = load("stages.dpo.model={load_in_4bit: true}", "stages.dpo.args.max_steps=1")
    train(recipe, run, "dpo")
    assert (run.adapter("dpo") / "adapter_model.safetensors").exists()


def test_a_stage_on_a_lora_sft_starts_from_the_merged_model(tmp_path, trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlhf_trl.models.base import start_path

    _, source = trained
    text = RECIPE.replace("    model: {use_peft: false}\n", "")
    recipe = small_recipe(tmp_path, ("stages.sft.args.max_steps=2", "stages.dpo.args.max_steps=1"), text)
    run = RunDir(tmp_path / "run")
    shutil.copytree(source.data, run.data)
    shutil.copytree(source.base, run.base)
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
    run, load = copy
    shutil.rmtree(run.step("ppo"))
    recipe = load(f"stages.{stage}.args.learning_rate=1e38") if stage == "ppo" else load()
    if stage == "rm":
        recipe = small_recipe(run.root.parent.parent, ("stages.rm.args.learning_rate=1e38",))
    with pytest.raises(UserError, match="not finite"):
        train(recipe, run, stage)
    assert not run.adapter(stage).exists()
    assert not run.is_done(recipe, stage)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_too_few_prompts_are_refused_with_both_numbers(copy, stage):
    run, load = copy
    rows = read_jsonl(run.prompts("train"))[:1]
    run.prompts("train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"^data: 1 training prompts"):
        train(load(), run, stage)


def test_a_stage_needs_its_inputs(copy):
    run, _ = copy
    shutil.rmtree(run.step("rm"))
    with pytest.raises(UserError, match="run `rlhf-trl train RECIPE rm` first"):
        train(small_recipe(run.root.parent.parent), run, "grpo")


def test_the_statistics_are_there_from_the_first_moment_on(tmp_path):
    state = SimpleNamespace(global_step=0, max_steps=7, is_world_process_zero=True)
    History(tmp_path / "stats.json", "dpo", "dpo").on_train_begin(None, state, None)
    stats = read_json(tmp_path / "stats.json")
    assert (stats["max_steps"], stats["history"]) == (7, [])


# --- interruption
# ------------------------------------------------------------------------------------------------------


def saving(stage: str) -> tuple[str, ...]:
    """Options for six steps with a checkpoint after each."""
    length = "total_episodes=96" if stage == "ppo" else "max_steps=6"
    return tuple(f"stages.{stage}.args.{item}" for item in ("save_strategy=steps", "save_steps=1", length))


def start(run: RunDir, stage: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhf_trl", "train", str(run.root.parent.parent / "small.yaml"), stage,
               "--runs", str(run.root.parent)]  # fmt: skip
    for item in saving(stage):
        command += ["--set", item]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def state_of(recipe: Recipe, run: RunDir, stage: str) -> StepState:
    return next(state for state in step_states(recipe, run) if state.step == stage)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("dpo", signal.SIGKILL),
        ("grpo", signal.SIGKILL),
        ("ppo", signal.SIGKILL),
        ("dpo", signal.SIGTERM),
        ("ppo", signal.SIGTERM),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(copy, stage, number):
    run, load = copy
    load()
    straight = start(run, stage)
    straight.communicate()
    assert straight.returncode == 0
    expected = sha(run.adapter(stage) / "adapter_model.safetensors")
    shutil.rmtree(run.step(stage))

    recipe = small_recipe(run.root.parent.parent, saving(stage))
    process = start(run, stage)
    wait_for(run.checkpoints(stage) / "checkpoint-2")
    state = state_of(recipe, run, stage)
    assert state.state == "running" and f"process {process.pid} " in state.holder
    assert state.progress.max_steps == 6 and state.progress.step >= 1 and "loss" in state.progress.values
    process.send_signal(number)
    process.communicate()
    state = state_of(recipe, run, stage)
    assert state.state == "stopped" and state.checkpoint >= 2 and state.seconds_left > 0
    assert (state.holder is None) == (number == signal.SIGTERM)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert not run.adapter(stage).exists()
    again = start(run, stage)
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert "resuming from" in stderr
    assert sha(run.adapter(stage) / "adapter_model.safetensors") == expected
    steps = [row["step"] for row in read_json(run.training_stats(stage))["history"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_run_killed_after_its_last_checkpoint_finishes(copy, stage):
    run, _ = copy
    recipe = small_recipe(run.root.parent.parent, saving(stage))
    train(recipe, run, stage)
    expected = sha(run.adapter(stage) / "adapter_model.safetensors")
    shutil.rmtree(run.adapter(stage))
    run.done(stage).unlink()
    train(recipe, run, stage)
    assert sha(run.adapter(stage) / "adapter_model.safetensors") == expected


@pytest.fixture
def checkpoints(tmp_path):
    from rlhf_trl.run.checkpoints import seal

    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / name).write_bytes(os.urandom(300))
        seal(folder)
    return tmp_path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: _truncate(folder / "optimizer.pt"), "optimizer.pt is damaged"),
        (lambda folder: _flip(folder / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest"),
        (lambda folder: _truncate(folder / "manifest.json"), "no manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "no manifest"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "no manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(checkpoints, damage, reason):
    damage(checkpoints / "checkpoint-10")
    found, rejected = last_valid_checkpoint(checkpoints)
    assert found == checkpoints / "checkpoint-9"
    assert len(rejected) == 1
    assert reason in rejected[0]


def test_a_checkpoint_that_cannot_be_finished_does_not_appear(copy, monkeypatch):
    run, _ = copy
    real = torch.save

    def full_disk(value, path, *args, **kwargs):
        if "optimizer" in str(path) and "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    recipe = small_recipe(run.root.parent.parent, saving("dpo"))
    with pytest.raises(OSError, match="No space left"):
        train(recipe, run, "dpo")
    names = [path.name for path in run.checkpoints("dpo").glob("checkpoint-*")]
    assert names == ["checkpoint-1"]
    assert last_valid_checkpoint(run.checkpoints("dpo"))[0].name == "checkpoint-1"


def test_a_changed_setting_does_not_resume_the_old_checkpoints(copy):
    run, _ = copy
    recipe = small_recipe(run.root.parent.parent, ("stages.dpo.args.beta=0.3", "stages.dpo.args.max_steps=1"))
    shutil.rmtree(run.step("dpo"))
    stale = run.checkpoints("dpo") / "checkpoint-1"
    stale.mkdir(parents=True)
    write_json(run.started("dpo"), {"fingerprint": "another"})
    train(recipe, run, "dpo")
    assert not stale.exists()
