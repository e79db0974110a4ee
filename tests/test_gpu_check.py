"""The check that is prepared for a GPU, on the CPU with tiny models: every part, each in this process but one."""

import json
from dataclasses import replace

import gpu_check
import pytest
from conftest import NO_PPO, reset_accelerate, shared


@pytest.mark.skipif(bool(NO_PPO), reason="this TRL has no PPO")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_every_part_of_the_check_runs_on_a_cpu(tmp_path, monkeypatch, caplog, call, shape):
    def command(check, *words):
        status, printed, said = call(*check.program(*words)[3:])
        reset_accelerate()
        assert status == 0, said[-500:]
        return printed + said + caplog.text

    shared("hh-rlhf")
    known = gpu_check.SHAPES[shape]
    fewer = {"gpt2": ("stages.grpo=null", "stages.ppo=null"), "llama": ("stages.dpo=null",)}[shape]
    monkeypatch.setitem(gpu_check.SHAPES, shape, replace(known, overrides=(*known.overrides, *fewer)))
    monkeypatch.setattr(gpu_check.Check, "command", command)
    out = tmp_path / "out"
    assert gpu_check.main(["--tiny", "--only", shape, "--out", str(out)]) == 0
    rows = {row["part"]: row for row in json.loads((out / "gpu_check.json").read_text())["rows"]}
    for stage in ("rm", *(("sft", "dpo") if shape == "gpt2" else ("grpo", "ppo"))):
        assert rows[stage]["tokens/s"] > 0 and rows[stage]["peak GB"] > 0.1 and rows[stage]["planned GB"] > 0.1
    if shape == "gpt2":
        assert rows["sft, killed"]["outcome"].endswith("differ by 0.0e+00")


def test_a_part_that_fails_or_has_no_time_is_a_row(tmp_path):
    given = ["--tiny", "--only", "qwen", "--shared", str(tmp_path), "--out", str(tmp_path / "out")]
    assert gpu_check.main([*given, "--minutes", "0"]) == 1
    assert (tmp_path / "out" / "gpu_check.md").read_text().count("not run: the time is over") == 8
