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


@pytest.fixture
def launch(copy, tmp_path):
    """Train a stage with a profile in two processes, and return what was said and the adapter.

    SLURM is played by two programs: one names the nodes, and one starts the command on each, here all on this machine.
    """
    for name, text in (("scontrol", "echo 127.0.0.1; seq 99999"),
                       ("srun", 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!')):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def launch(stage, command, settings):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_LOG_LEVEL": "error",
                       "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                       "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "nodes"}  # fmt: skip
        recipe = str(copy.root.parent.parent / "small.yaml")
        options = [part for setting in settings for part in ("--set", f"stages.{stage}.{setting}")]
        words = command.replace("TRAIN", f"-m rlhf_trl train {recipe} {stage}").replace("STAGE", f"{recipe} {stage}")
        done = subprocess.run([*words.split(), "--runs", str(copy.root.parent), *options],
                              env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert read_json(copy.training_stats(stage))["summary"]["processes"] == 2
        return done.stderr, load_file(copy.adapter(stage) / "adapter_model.safetensors")

    return launch


PROFILE = f"{sys.executable} TRAIN --accelerate {{}} --processes 2"


@pytest.mark.parametrize(("stage", "command"), [
    ("dpo", PROFILE.format("ddp")), ("dpo", PROFILE.format("zero2")), ("rm", PROFILE.format("zero3")),
    ("dpo", "bash accelerate_configs/slurm.sh STAGE"),
], ids=["ddp", "zero2", "zero3", "slurm"])  # fmt: skip
def test_two_processes_train_what_one_does(copy, launch, stage, command):
    """The same rows in each update, so the same weights; the run itself checks that its processes agree.

    Adam divides a gradient by its size, so that rounding decides the step where a gradient is almost zero, and hides
    a gradient of the wrong scale. An epsilon above the gradients makes the steps proportional to them.
    """
    own = ("eval_strategy=no", "adam_epsilon=0.1", "learning_rate=0.1", "max_steps=-1", "num_train_epochs=0.15")
    settings = [*(f"args.{item}" for item in own), "global_batch_size=16"]
    _, adapter = launch(stage, command, settings)
    both = read_json(copy.training_stats(stage))["summary"]
    shutil.rmtree(copy.step(stage))
    train(small_recipe(copy.root.parent.parent, [f"stages.{stage}.{item}" for item in settings]), copy, stage)
    expected = load_file(copy.adapter(stage) / "adapter_model.safetensors")
    alone = read_json(copy.training_stats(stage))["summary"]
    updates = [(of["processes"], of["samples_per_step"], of["steps"]) for of in (both, alone)]
    assert updates == [(2, 16, 2), (1, 16, 2)]
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(adapter[name], tensor, atol=1e-5), name


def test_a_stage_goes_on_with_another_number_of_processes(copy, launch, caplog):
    own = ("eval_strategy=no", "adam_epsilon=0.1", "learning_rate=0.1", "max_steps=3", "save_strategy=steps",
           "save_steps=1")  # fmt: skip
    settings = [*(f"args.{item}" for item in own), "global_batch_size=16"]
    _, expected = launch("dpo", PROFILE.format("ddp"), settings)
    checkpoints = copy.checkpoints("dpo")
    for folder in (checkpoints / "checkpoint-3", checkpoints / "checkpoint-2", copy.adapter("dpo")):
        shutil.rmtree(folder)  # as if killed in the second step
    copy.done("dpo").unlink()
    with caplog.at_level("INFO", "rlhf_trl"):
        train(small_recipe(copy.root.parent.parent, [f"stages.dpo.{item}" for item in settings]), copy, "dpo")
    assert "checkpoint-1" in caplog.text
    for name, tensor in load_file(copy.adapter("dpo") / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


@pytest.mark.parametrize(("stage", "profile"), [("grpo", "ddp"), ("ppo", "zero2")])
def test_online_trainers_run_in_two_processes(copy, launch, stage, profile):
    """Through `accelerate launch` itself, which is what the README gives as the same thing; PPO also resumes."""
    command = f"accelerate launch --config_file {ROOT}/accelerate_configs/{profile}.yaml TRAIN"
    own = ["save_strategy=steps", "save_steps=1", *["total_episodes=64"] * (stage == "ppo")]  # two updates
    settings = [f"args.{item}" for item in own]
    shutil.rmtree(copy.step(stage))
    _, expected = launch(stage, command, settings)
    stats = read_json(copy.training_stats(stage))
    assert abs(stats["history"][0]["kl"]) < 1e-4
    assert all(tensor.isfinite().all() for tensor in expected.values())
    if stage == "grpo":
        return
    last = copy.checkpoints(stage) / f"checkpoint-{stats['summary']['steps']}"
    for file in last.glob("*.safetensors"):
        assert all("lora_" in name or ".score." in name for name in load_file(file)), file
    for folder in (last, copy.adapter(stage)):  # as if killed in the middle of the last step
        shutil.rmtree(folder)
    copy.done(stage).unlink()
    said, adapter = launch(stage, command, settings)
    assert "resuming from" in said, said[-1500:]
    for name, tensor in adapter.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_one_that_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"  # the recipe's bf16 decides
