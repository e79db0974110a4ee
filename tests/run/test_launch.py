"""Training in two processes: the profiles that ship, on the CPU with gloo, give what one process gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_recipe
from safetensors.torch import load_file

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.train.step import train


@pytest.fixture
def copy(trained, tmp_path):
    recipe, run = trained
    target = RunDir(tmp_path / "runs" / recipe.name)
    shutil.copytree(run.root, target.root)
    small_recipe(tmp_path)
    return target


def launch(run: RunDir, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_LOG_LEVEL": "error"}
    recipe = str(run.root.parent.parent / "small.yaml")
    command = [word.replace("RECIPE", recipe) for word in arguments]
    return subprocess.run([sys.executable, "-m", *command, "--runs", str(run.root.parent)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=400, check=False)  # fmt: skip


def adapter(run: RunDir, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run.adapter(stage) / "adapter_model.safetensors")


@pytest.mark.parametrize(("profile", "stage"), [("ddp", "rm"), ("zero2", "dpo"), ("zero3", "rm")])
def test_two_processes_train_what_one_does(copy, profile, stage):
    """The same rows in each update, so the same weights; the run itself checks that its processes agree.

    Adam divides a gradient by its size, so that rounding decides the step where a gradient is almost zero, and hides
    a gradient of the wrong scale. An epsilon above the gradients makes the steps proportional to them.
    """
    args = f"stages.{stage}.args"
    settings = (f"{args}.eval_strategy=no", f"{args}.adam_epsilon=0.1", f"{args}.learning_rate=0.1")
    options = [word for setting in settings for word in ("--set", setting)]
    done = launch(copy, "rlhf_trl", "train", "RECIPE", stage, "--accelerate", profile, "--processes", "2", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(copy.training_stats(stage))["summary"]["processes"] == 2
    found = adapter(copy, stage)
    recipe = small_recipe(copy.root.parent.parent, (*settings, f"{args}.per_device_train_batch_size=16"))
    train(recipe, copy, stage)
    expected = adapter(copy, stage)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@pytest.mark.parametrize(("stage", "profile"), [("grpo", "ddp"), ("ppo", "zero2")])
def test_online_trainers_run_in_two_processes(copy, stage, profile):
    """Through `accelerate launch` itself, which is what the README gives as the same thing; every step is saved."""
    config = str(ROOT / "accelerate_configs" / f"{profile}.yaml")
    shutil.rmtree(copy.step(stage))
    args = f"stages.{stage}.args"
    saving = ("--set", f"{args}.save_strategy=steps", "--set", f"{args}.save_steps=1")
    if stage == "ppo":
        saving += ("--set", f"{args}.total_episodes=64")  # two updates
    command = ("accelerate.commands.launch", "--config_file", config, "-m", "rlhf_trl", "train", "RECIPE", stage)
    done = launch(copy, *command, *saving)
    assert done.returncode == 0, done.stderr[-3000:]
    stats = read_json(copy.training_stats(stage))
    assert stats["summary"]["processes"] == 2
    assert abs(stats["history"][0]["kl"]) < 1e-4
    expected = adapter(copy, stage)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    last = stats["summary"]["steps"]
    if stage == "ppo":
        for file in (copy.checkpoints(stage) / f"checkpoint-{last}").glob("*.safetensors"):
            assert all("lora_" in name or ".score." in name for name in load_file(file)), file
    # as if killed in the middle of the last step
    shutil.rmtree(copy.checkpoints(stage) / f"checkpoint-{last}")
    shutil.rmtree(copy.adapter(stage))
    copy.done(stage).unlink()
    done = launch(copy, *command, *saving)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr, done.stderr[-1500:]
    for name, tensor in adapter(copy, stage).items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_ppo_refuses_sharded_parameters(copy, monkeypatch):
    shutil.rmtree(copy.step("ppo"))
    monkeypatch.setattr("rlhf_trl.train.ppo.models.is_deepspeed_zero3_enabled", lambda: True)  # as in its processes
    with pytest.raises(UserError, match="use ddp or zero2"):
        train(small_recipe(copy.root.parent.parent), copy, "ppo")


def test_fewer_processes_than_asked_for_are_refused(copy):
    options = ("--cpu", "--num_processes", "2", "-m")
    done = launch(copy, "accelerate.commands.launch", *options, "rlhf_trl", "train", "RECIPE", "dpo")
    assert done.returncode != 0
    assert "2 processes were asked for" in done.stderr
    assert "--config_file accelerate_configs/ddp.yaml" in done.stderr


def test_a_second_run_of_a_stage_is_refused(copy):
    with copy.lock("dpo"):
        shutil.rmtree(copy.step("dpo"))
        done = launch(copy, "rlhf_trl", "train", "RECIPE", "dpo")
    assert done.returncode == 7
    assert f"held by process {os.getpid()}" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_one_that_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"  # the recipe's bf16 decides
