"""The demo learns: the acceptance of the whole pipeline, run as a user runs it."""

import re

import pytest
from conftest import ROOT, command

from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states


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
    done = command("run", "demo", cwd=folder)
    assert done.returncode == 0
    assert "14 steps, 14 done already" in done.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    edited = load_recipe(ROOT / "recipes" / "demo.yaml", ["stages.dpo.args.beta=0.2"])
    changed = [state.step for state in step_states(edited, run) if state.state == "changed"]
    assert changed == ["dpo", "evaluate", "judge", "compare", "samples", "report"]
    done = command("run", "demo", "--set", "judge.prompts=50", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"=== (\w+)", done.stdout) == ["judge", "compare", "report"]
