"""The demo learns: the acceptance of the whole pipeline, run as a user runs it. Also the README's other promises."""

import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.launch import shipped
from rlhf_trl.run.layout import RunDir

README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "rlhf_trl", *arguments], cwd=cwd, capture_output=True, text=True,
                          check=False, timeout=1500, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = command("run", "demo", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, RunDir(folder / "runs" / "demo")


def test_the_demo_learns(demo):
    _, run = demo
    metrics = read_json(run.metrics)
    accuracy, baseline = (metrics["reward_model"][key] for key in ("accuracy", "length_baseline"))
    assert accuracy["mean"] >= 0.80
    assert accuracy["low"] > baseline["high"]
    for name in ("ppo", "grpo", "dpo"):
        policy = metrics["policies"][name]
        assert policy["reward_gain"]["low"] > 0, name
        assert 0.05 < policy["kl"]["mean"] < 30, name
        assert policy["gold_gain"]["low"] > 0, name
    assert [alarm for alarm in read_json(run.over_optimisation)["alarms"] if alarm["raised"]] == []
    assert all(rate["win_rate"]["low"] > 0.5 for rate in read_json(run.winrate)["win_rates"])
    assert len(read_jsonl(run.samples / "reference.jsonl")) == 20
    assert "<script" not in run.report.read_text(encoding="utf-8")


def test_a_second_run_does_nothing_and_an_edit_little(demo):
    folder, run = demo
    stamps = {path: path.stat().st_mtime_ns for path in run.root.rglob("done.json")}
    start = time.monotonic()
    done = command("run", "demo", cwd=folder)
    assert done.returncode == 0
    assert time.monotonic() - start < 10
    assert "14 steps, 14 done already" in done.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    done = command("run", "demo", "--set", "stages.dpo.args.beta=0.2", "--set", "evaluation.prompts=100", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"=== (\w+)", done.stdout) == ["dpo", "evaluate", "judge", "compare", "samples", "report"]


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    path = tmp_path / "readme.yaml"
    path.write_text(text)
    assert "dpo-beta=0.05" in load_recipe(path).stages


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^    ((?:rlhf-trl|accelerate launch) .*?)(?:\s+#.*|\s{3,}.*)?$", README, re.M)))
)
def test_commands_of_the_readme_are_real(line):
    """The recipe and the profile that a command names exist and are valid, with its overrides; the parser takes its
    words."""
    words = shlex.split(line)
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        words = ["rlhf-trl", *words[words.index("rlhf_trl") + 1 :]]
    if words[1] in ("adapter", "chat", "score"):
        done = command(*words[1 : 3 if words[1] == "adapter" else 2], "--help", cwd=ROOT)
        assert done.returncode == 0
        assert all(word in done.stdout for word in words if word.startswith("--"))
        return
    words = ["demo" if word == "RECIPE" else "dpo" if word == "STAGE" else word for word in words]
    done = command(words[1], "--help", cwd=ROOT)
    assert done.returncode == 0
    for word in words[3:]:
        if word.startswith("--"):
            assert word in done.stdout
    overrides = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    if not words[2].startswith("runs/"):  # a run instead of a recipe
        load_recipe(shipped("recipes", words[2]), overrides)
    if "--accelerate" in words:
        assert shipped("accelerate_configs", words[words.index("--accelerate") + 1]).exists()


def test_the_tree_in_the_readme_is_the_tree():
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"(?m)^    (\w+)/", tree))
    assert named == {path.parent.name for path in (ROOT / "rlhf_trl").glob("*/__init__.py")}


def test_keys_of_the_argument_table_exist():
    from rlhf_trl.recipe.library import read_options
    from rlhf_trl.recipe.schema import Data, Evaluation

    table = README.split("### From the assignment's options to recipe keys")[1].split("## What lies where")[0]
    options = {name for kind in ("sft", "reward", "dpo", "grpo", "ppo") for name in read_options(kind)}
    for name in re.findall(r"stages\.\w+\.args\.(\w+)", table):
        assert name in options
    for section, name in re.findall(r"`(data|evaluation)\.(\w+)", table):
        assert name in (Data if section == "data" else Evaluation).model_fields
