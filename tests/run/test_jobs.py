"""Stages side by side: who starts when and where, and what a failure and a signal mean."""

import os
import signal
import subprocess
import sys

import pytest

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.launch import (
    launch_command,
    plan_slots,
    require_profile,
    shipped,
    start_logged,
    train_stages,
    visible_gpus,
)

LISTING = (
    "GPU 0: NVIDIA H100 (UUID: GPU-aaaa)\n  MIG 1g.10gb  Device  0: (UUID: MIG-bbbb)\nGPU 1: NVIDIA H100 (UUID: c)"
)
NEEDS = {"sft": set(), "rm": {"sft"}, "dpo": {"sft"}, "grpo": {"sft", "rm"}, "ppo": {"sft", "rm"}, "solo": set()}


class Story:
    """A watcher that writes down what happens, and does what a test wants at each look."""

    def __init__(self, at_update=lambda: None):
        self.told: list[str] = []
        self.update = at_update

    def begin(self, stage):
        self.told.append(f"+{stage}")

    def end(self, stage, status):
        self.told.append(f"-{stage}" + (f" {status}" if status else ""))

    def conclude(self, failed, left):
        self.told.append(f"failed {dict(failed)}, left {list(left)}")


class FakeProcess:
    """A process that ends with a status at its nth poll."""

    def __init__(self, polls, returncode=0):
        self.polls, self.code, self.returncode = polls, returncode, None

    def poll(self):
        self.polls -= 1
        if self.polls <= 0:
            self.returncode = self.code
        return self.returncode


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("rlhf_trl.run.launch.POLL", 0.001)


@pytest.mark.parametrize(
    ("lengths", "slots", "codes", "status", "story"),
    [
        ({"sft": 2, "rm": 2, "solo": 2}, "A", {}, 0, "+sft@A -sft +rm@A -rm +solo@A -solo"),
        # solo needs nothing and goes first beside sft; dpo is long, and grpo and ppo take turns beside it
        ({"sft": 3, "rm": 3, "dpo": 30, "grpo": 3, "ppo": 3, "solo": 9}, "AB", {}, 0,
         "+sft@A +solo@B -sft +rm@A -rm +dpo@A -solo +grpo@B -grpo +ppo@B -ppo -dpo"),
        ({"grpo": 2, "ppo": 3}, "AB", {}, 0, "+grpo@A +ppo@B -grpo -ppo"),  # what is trained is not waited for
        ({"rm": 2, "dpo": 20, "grpo": 2, "solo": 2}, "AB", {"rm": 2}, 2,
         "+rm@A +dpo@B -rm 2 -dpo failed {'rm': 2}, left ['grpo', 'solo']"),
        ({"sft": 1}, "A", {"sft": -9}, 137, "+sft@A -sft 137 failed {'sft': 137}, left []"),
    ],
)  # fmt: skip
def test_a_stage_starts_as_soon_as_what_it_needs_is_there_and_a_slot_is_free(lengths, slots, codes, status, story):
    """After a failure what runs ends and nothing starts."""
    watcher = Story()

    def start(stage, slot):
        watcher.told[-1] += f"@{slot['at']}"
        return FakeProcess(lengths[stage], codes.get(stage, 0))

    assert train_stages(list(lengths), NEEDS, [{"at": slot} for slot in slots], start, watcher) == status
    assert " ".join(watcher.told) == story


@pytest.mark.parametrize(
    ("number", "foreground", "sent_on"),
    [(signal.SIGTERM, True, 1), (signal.SIGINT, False, 1), (signal.SIGINT, True, 0)],
)
def test_a_signal_reaches_every_stage_once_and_a_ctrl_c_is_the_terminals_to_send(
    number, foreground, sent_on, tmp_path, monkeypatch
):
    """The processes count the signals; without one of their own they end well, and still nothing new starts."""
    code = (
        "import pathlib, signal, sys, time\n"
        "path, got = pathlib.Path(sys.argv[1]), []\n"
        "for one in (signal.SIGTERM, signal.SIGINT): signal.signal(one, lambda *_: got.append(1))\n"
        "path.with_suffix('.ready').touch(); time.sleep(0.6)\n"
        "path.write_text(str(len(got))); sys.exit(130 if got else 0)"
    )
    sent = []

    def send():
        if not sent and len(list(tmp_path.glob("*.ready"))) == 2:
            sent.append(os.kill(os.getpid(), number))

    def start(stage, slot):
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / stage)])

    monkeypatch.setattr("rlhf_trl.run.signals.in_foreground", lambda: foreground)
    before, story = signal.getsignal(number), Story(send)
    status = train_stages(["rm", "dpo", "solo"], {stage: set() for stage in NEEDS}, [{}, {}], start, story)
    assert [int((tmp_path / stage).read_text()) for stage in ("rm", "dpo")] == [sent_on] * 2
    assert story.told[-1].endswith("left ['solo']") and status == 128 + number
    assert signal.getsignal(number) is before


def test_a_defect_here_leaves_no_process_behind():
    children = []

    def start(stage, slot):
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return children[-1]

    with pytest.raises(ZeroDivisionError):
        train_stages(["sft"], NEEDS, [{}], start, Story(lambda: 1 / 0))
    assert children[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["0", "1"]),
        ("1,0", ["1", "0"]),
        ("0, -1, 1", ["0"]),
        ("1,1,2,0", ["1"]),
        ("", []),
        ("GPU-c,MIG-b", ["GPU-c", "MIG-b"]),
    ],
)
def test_gpus_are_those_that_are_visible(visible, found):
    assert visible_gpus(LISTING, visible) == found and visible_gpus("", visible) == []


@pytest.mark.parametrize(
    ("jobs", "processes", "gpus", "cores", "threads", "slots", "says"),
    [
        (2, 1, "012", 64, None, ["0", "1"], "GPUs 0 | 1"),
        (4, 1, "012", 64, None, ["0", "1", "2"], "3 at once, not 4; GPUs 0 | 1 | 2"),
        (3, 2, "01234", 64, None, ["0,1", "2,3"], "2 at once, not 3; GPUs 0,1 | 2,3"),
        (2, 2, "012", 64, None, [], "one stage at a time; two take 4 GPUs, and there are 3"),
        (2, 1, "", 8, None, ["4"] * 2, "up to 2 stages at once, OMP_NUM_THREADS=4 in each process"),
        (4, 1, "", 2, None, ["1"] * 4, "up to 4 stages at once, OMP_NUM_THREADS=1 in each process"),
        (2, 2, "", 8, None, ["2"] * 2, "up to 2 stages at once, OMP_NUM_THREADS=2 in each process"),
        (2, 1, "", 8, "3", ["3"] * 2, "up to 2 stages at once, OMP_NUM_THREADS=3 in each process"),
    ],
)
def test_each_job_has_gpus_of_its_own_or_a_share_of_the_cores(jobs, processes, gpus, cores, threads, slots, says):
    name = "CUDA_VISIBLE_DEVICES" if gpus else "OMP_NUM_THREADS"
    expected = [{name: slot} for slot in slots] or [{}]
    assert plan_slots(jobs, processes, list(gpus), cores, threads) == (expected, says)


def test_launches_at_the_same_time_meet_at_ports_of_their_own():
    command, _ = launch_command(["train"], "ddp", None, 0)
    assert command[command.index("--main_process_port") + 1] == "0"
    assert "--main_process_port" not in launch_command(["train"], "ddp", None)[0]
    with pytest.raises(UserError, match="profile of several machines"):
        require_profile(shipped("accelerate_configs", "multi_node"), 2)
    require_profile(shipped("accelerate_configs", "ddp"), 2)


def test_deepspeed_that_is_not_installed_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr("rlhf_trl.run.launch.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rlhf-trl\[deepspeed\]"):
        require_profile(shipped("accelerate_configs", "zero2"))


def test_the_whole_output_of_every_attempt_is_in_the_log(tmp_path):
    code = "import os, sys; print(os.environ['AT']); print('error', file=sys.stderr); os.system('echo raw >&2')"
    log = tmp_path / "logs" / "sft.log"
    for slot in ("one", "two"):
        assert start_logged([sys.executable, "-c", code], {**os.environ, "AT": slot}, log).wait() == 0
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("=== 20")] == ["one", "error", "raw", "two", "error", "raw"]
    assert len(lines) == 8 and sys.executable in lines[4]
