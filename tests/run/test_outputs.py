"""What a finished step vouches for: each damage is found, named and made again; checkpoints that are not whole."""

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from rlhf_trl.cli import run as run_cli
from rlhf_trl.cli.run import steps_to_run
from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.run import checkpoints
from rlhf_trl.run.checkpoints import damage, newest_checkpoint, require_launch, seal, set_aside_damaged
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states

# The steps of a run, and a file that each writes.
FILES = {
    "explore": "exploration/statistics.json", "prepare": "data/train.jsonl", "sft": "sft/model/model.safetensors",
    "rm": "rm/adapter/adapter_model.safetensors", "dpo": "dpo/training_stats.json",
    "evaluate": "evaluation/metrics.json", "judge": "judge/winrate.json",
    "compare": "comparison/comparison_report.txt", "errors": "rm/evaluation/error_analysis.json",
    "samples": "samples/samples.md", "report": "report.html",
}  # fmt: skip
# A checkpoint of each kind, without its manifest.
PLACE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
KINDS = {
    "dpo": (*PLACE, "adapter_model.safetensors"),
    "ppo": (*PLACE, "adapter_model.safetensors", "ppo_state.json", "value.safetensors"),
    "sharded": ("trainer_state.json", "rng_state_0.pth", "global_step9/mp_rank_00_model_states.pt",
                "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
}  # fmt: skip


@pytest.fixture
def run(run, recipe):
    """A finished run whose steps have written one file each."""
    for step in recipe.plan:
        run.replace(step)
        write(run.root / FILES[step], b"{}")
        run.mark_done(recipe, step, 1.0)
    return run


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def flip(path: Path) -> None:
    """Change one bit, and leave the size and the time as they were."""
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("says", "damages"),
    [("is damaged", flip), ("is missing", Path.unlink), ("is missing", lambda path: path.unlink() or path.mkdir())],
)
@pytest.mark.parametrize("step", FILES)
def test_a_damaged_output_is_named_refused_and_made_again(step, says, damages, run, recipe):
    assert steps_to_run(recipe, run) == []
    damages(run.root / FILES[step])
    sentence = f"{FILES[step]} {says}"
    (state,) = [state for state in step_states(recipe, run) if state.state != "done"]
    assert (state.step, state.state, state.note) == (step, "damaged", sentence)
    assert step in steps_to_run(recipe, run) and "report" in steps_to_run(recipe, run)
    with pytest.raises(UserError) as caught:
        run.require(recipe, step, "command RECIPE")
    (problem,) = caught.value.problems
    assert caught.value.exit == Exit.DAMAGED and sentence in problem.problem
    assert problem.remedy == "run `rlhf-trl command RECIPE` first"
    if step == "sft":
        with pytest.raises(UserError, match=r"sft/model/model\.safetensors is"):  # what it rests on
            run.require(recipe, "dpo", "train RECIPE dpo")


def test_a_step_that_lacks_an_input_keeps_its_last_result(run, recipe, monkeypatch):
    monkeypatch.setattr(run_cli, "_load_step", pytest.fail)
    run.done("dpo").unlink()
    with pytest.raises(UserError, match="the step 'dpo' is not finished"):
        run_cli.run_step(recipe, run, "evaluate")
    assert run.is_done(recipe, "evaluate")


@pytest.mark.parametrize("step", ["sft", "evaluate", "report"])
def test_a_marker_that_has_lost_an_output_vouches_for_nothing(step, run, recipe):
    write_json(run.done(step), {**read_json(run.done(step)), "outputs": {}})
    assert "its list of outputs was changed" in RunDir(run.root).fault(step)
    assert step in steps_to_run(recipe, RunDir(run.root))


def test_a_file_is_read_once_and_again_when_it_changes(run, recipe, monkeypatch):
    read: list[str] = []

    def count(path: Path) -> str:
        read.append(path.name)
        return real(path)

    real = checkpoints.hash_file
    monkeypatch.setattr(checkpoints, "hash_file", count)
    time.sleep(2 * checkpoints.TICK / 1e9)  # a file that was written just now is not trusted yet
    assert all(RunDir(run.root).is_done(recipe, step) for step in recipe.plan) and len(read) == len(FILES)
    assert all(RunDir(run.root).is_done(recipe, step) for step in recipe.plan) and len(read) == len(FILES)
    flip(run.report)
    assert not RunDir(run.root).is_done(recipe, "report") and read[-1] == "report.html"
    run.known_hashes.write_text('{"x": 1}')
    assert RunDir(run.root).is_done(recipe, "prepare") and read[-1] == "train.jsonl"


def test_files_of_a_step_are_open_to_whom_the_umask_says(run, recipe):
    run.replace("rm")
    write(run.adapter("rm") / "adapter_model.safetensors", b"x")
    (run.adapter("rm") / "adapter_model.safetensors").chmod(0o600)  # as safetensors writes it
    before = os.umask(0o027)
    run.mark_done(recipe, "rm", 1.0)
    os.umask(before)
    assert (run.adapter("rm") / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, kind: str = "dpo", without: str = "") -> Path:
    for name in KINDS[kind]:
        if name != without:
            write(folder / name, name.encode())
    seal(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_one_of_its_parts_is_passed_over_whatever_its_manifest_says(kind, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint(folder / "checkpoint-1", kind)
    assert set_aside_damaged(folder, kind) == []
    for at, name in enumerate(KINDS[kind], 2):
        checkpoint(folder / f"checkpoint-{at}", kind, without=name)
    said = set_aside_damaged(folder, kind)
    assert len(said) == len(KINDS[kind]) and all("is missing" in sentence for sentence in said)
    assert newest_checkpoint(folder) == folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("damaged", "change", "reason"),
    [
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", lambda data: data[:3], "optimizer.pt is damaged"),
        ("trainer_state.json", lambda data: b"", "trainer_state.json is damaged"),
        ("manifest.json", None, "no manifest"),
        ("manifest.json", lambda data: data[:100], "no manifest"),
        ("manifest.json", lambda data: b"{}", "is not in the manifest"),
        ("*", None, "no manifest"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damaged, change, reason):
    checkpoint(tmp_path / "checkpoint-9")
    for file in checkpoint(tmp_path / "checkpoint-10").glob(damaged):
        file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    assert reason in damage(tmp_path / "checkpoint-10")
    (sentence,) = set_aside_damaged(tmp_path, "dpo")
    assert sentence.startswith("checkpoint-10: ") and reason in sentence
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9" and set_aside_damaged(tmp_path, "dpo") == []


@pytest.mark.parametrize(
    ("file", "sharding", "processes", "batch_is_fixed", "fits"),
    [
        ("optimizer.pt", "none", 2, False, True),
        ("optimizer.pt", "none", 4, False, False),
        ("optimizer.pt", "none", 4, True, True),
        ("optimizer.pt", "DeepSpeed", 2, True, False),
        ("optimizer.bin", "FSDP", 4, True, True),
        ("global_step9", "DeepSpeed", 2, False, True),
        ("global_step9", "DeepSpeed", 4, True, False),
        ("global_step9", "none", 2, True, False),
    ],
)
def test_a_checkpoint_goes_on_in_a_launch_that_reads_it_as_it_was_meant(
    tmp_path, file, sharding, processes, batch_is_fixed, fits
):
    for name in (file, "rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    refused = pytest.raises(UserError, match=r"was written by 2 process\(es\), sharding: .*; this launch is of \d")
    with contextlib.nullcontext() if fits else refused:
        require_launch(tmp_path, sharding, processes, batch_is_fixed)


def test_a_damaged_result_is_made_again_from_the_checkpoints(run, recipe):
    write_json(run.started("dpo"), {"fingerprint": recipe.fingerprint("dpo")})
    write_json(run.training_stats("dpo"), {"max_steps": 9, "history": []})
    kept = checkpoint(run.checkpoints("dpo") / "checkpoint-9")
    run.adapter("dpo").mkdir()
    write(run.adapter("dpo") / "adapter_model.safetensors", b"x")
    run.mark_done(recipe, "dpo", 1.0)
    flip(run.adapter("dpo") / "adapter_model.safetensors")
    run.begin(recipe, "dpo")
    assert newest_checkpoint(run.checkpoints("dpo")) == kept and not run.adapter("dpo").exists()
    assert not run.done("dpo").exists()
    run.mark_done(recipe, "dpo", 1.0)
    flip(run.training_stats("dpo"))  # what was logged before the checkpoint is lost with it
    run.begin(recipe, "dpo")
    assert newest_checkpoint(run.checkpoints("dpo")) is None and read_json(run.started("dpo"))
    assert len([*(run.root / "replaced").glob("dpo-*/checkpoints/checkpoint-9")]) == 1
    shutil.rmtree(run.step("dpo"))
    run.begin(recipe, "dpo")
    stale = checkpoint(run.checkpoints("dpo") / "checkpoint-9")
    write_json(run.training_stats("dpo"), {"max_steps": 9, "history": []})
    run.begin(recipe.model_copy(update={"seed": 7}), "dpo")  # of other settings
    assert not stale.exists()
