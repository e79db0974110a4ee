"""What a person reads about a run: tables, sentences, and the lines that stand there while stages train."""

import io
import re
import signal

import pytest

from rlhf_trl.cli import tables
from rlhf_trl.cli.tables import Live, ending, plan_table, progress_words, show, status_end, status_table
from rlhf_trl.run.files import write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import Progress, StepState


def at(step: int, **values: float) -> Progress:
    return Progress(step, 40, step / 2, values, 720.0)


def test_progress_is_said_with_what_was_logged():
    words = "step 14 of 40, 0.5 s a step, 13.0 s left, loss 0.6931, reward -1.25, KL 3"
    assert progress_words(at(14, loss=0.693147, reward=-1.25, kl=3.0)) == words
    assert progress_words(at(0)) == "step 0 of 40"


STATES = [
    StepState("prepare", None, "done", 7.44),
    StepState("sft", "sft", "stopped", 99.0, at(14), 10, "process 7 on here since noon"),
    StepState("rm", "reward", "changed", 30.0, None, 5),
    StepState("dpo", "dpo", "to do", None),
    StepState("ppo", "ppo", "running", None, at(20, kl=2.0), 20, "process 8 on here since noon"),
    StepState("judge", None, "to do", None, note="partial: max_cost"),
    StepState("report", None, "done", 1.0),
]
SFT = "2 sft sft stopped at step 14 of 40, goes on at 10 (process 7 on here since noon was killed)"
RM = "3 rm reward to do again: settings changed; checkpoint 5 is discarded"
PPO = "5 ppo ppo running: step 20 of 40, 0.5 s a step, 10.0 s left, KL 2; last log 12 min 0 s ago"


@pytest.fixture
def shown(capsys):
    """Print tables, and return their lines with single spaces."""

    def lines(*parts: object) -> list[str]:
        show(*parts)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return lines


def test_the_plan_estimates_only_from_what_was_timed(shown):
    assert shown(*plan_table(STATES, ["sft", "rm", "dpo", "judge", "report"])) == [
        "step trainer state time",
        "1 prepare done 7.4 s",
        f"{SFT} about 15.0 s",
        f"{RM} about 30.0 s (last time)",
        "4 dpo dpo to do –",
        PPO,
        "6 judge partial: max_cost –",
        "7 report to do again: its inputs may be new about 1.0 s (last time)",
        "about 46.0 s for the 3 steps that were timed before; 2 are new",
    ]
    assert not any("about" in line for line in shown(*plan_table(STATES, [])))


def test_the_status_says_where_each_step_stands_and_what_it_comes_to(shown):
    rows = ["1 prepare done 7.4 s", SFT, f"{RM} 30.0 s", "4 dpo dpo to do", PPO, "6 judge partial: max_cost"]
    assert shown(status_table(STATES)) == ["step trainer state time", *rows, "7 report done 1.0 s"]
    assert status_end(STATES, False) == "at work: 2 of 7 steps done"
    assert status_end(STATES[:4], True) == "at work: 1 of 4 steps done"
    assert status_end(STATES[:4], False) == "at rest: 1 of 4 steps done; `rlhf-trl run RECIPE` goes on from there"
    assert status_end(STATES[:1], False) == "finished"


def test_the_summary_adds_the_whole_time_and_an_ending_is_a_status_or_a_signal(shown):
    lines = shown(tables.summary_table({"sft": 3.0, "evaluate": 61.0}, 70.0))
    assert lines == ["sft 3.0 s", "evaluate 1 min 1 s", "total 1 min 10 s"]
    assert (ending(2), ending(128 + signal.SIGKILL)) == ("failed with status 2", "ended by SIGKILL")


# --- while stages train ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The clock that the lines go by; a test moves it on."""
    now = [1000.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "small")
    run.logs.mkdir(parents=True)
    return run


def log(run: RunDir, stage: str, step: int) -> None:
    history = [{"step": step, "seconds": step / 2, "loss": 0.25, "log": {}}]
    write_json(run.training_stats(stage), {"max_steps": 40, "history": history})


LATER = "step 4 of 40, 0.5 s a step, 18.0 s left, loss 0.25"


def test_without_a_terminal_there_is_a_line_a_minute_and_one_at_the_end(run, clock):
    out, errors = io.StringIO(), io.StringIO()
    lines = Live(run, ["prepare", "sft"], out, errors)
    log(run, "sft", 39)  # of an earlier attempt
    run.log("sft").write_text("old\n")
    lines.begin("sft")
    clock[0] += 60
    lines.update()
    log(run, "sft", 4)
    for _ in range(100):
        clock[0] += 1.2
        lines.update()
    with run.log("sft").open("a") as file:
        file.write(
            "=== head\n{'loss': '0.25'}\n  \n  a warning\n" + "".join(f"line {number}\n" for number in range(24))
        )
    lines.end("sft", 2)
    lines.conclude({"sft": 2}, ["dpo"])
    assert out.getvalue().splitlines() == [
        "",
        f"=== sft (2 of 2), its output: {run.log('sft')}",
        "sft: 1 min 0 s, no step yet",
        f"sft: 2 min 0 s, {LATER}",
        f"sft: 3 min 0 s, {LATER}",
        f"sft: failed with status 2 after 3 min 0 s, {LATER}",
    ]
    assert errors.getvalue().splitlines() == [
        f"  (5 lines more in {run.log('sft')})",
        *(f"  line {number}" for number in range(4, 24)),
        f"sft failed with status 2; its output: {run.log('sft')}",
        "not begun: dpo",
    ]
    assert lines.seconds == {"sft": pytest.approx(180)}


def test_a_terminal_has_one_line_for_each_stage_that_is_rewritten_and_fits(run, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    lines = Live(run, ["rm", "dpo"], out, out)
    for stage in ("rm", "dpo"):
        lines.begin(stage)
        log(run, stage, 4)
        run.log(stage).touch()

    def written(act) -> list[str]:
        start = len(out.getvalue())
        act()
        text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue()[start:])
        return [line.strip("\r") for line in text.split("\n") if line.strip()]

    clock[0] += 5
    assert written(lines.update) == [f"rm: 5.0 s, {LATER}"[:50], f"dpo: 5.0 s, {LATER}"[:50]]
    assert written(lines.update) == []  # within the same second
    clock[0] += 1
    before = len(out.getvalue())
    lines.update()
    assert out.getvalue()[before:].count("\x1b[2K") == 2  # both lines are cleared
    ended = written(lambda: (lines.end("rm", 0), lines.end("dpo", 143)))
    assert ended[-2:] == [f"rm: 6.0 s, {LATER}", f"dpo: ended by SIGTERM after 6.0 s, {LATER}"]
    lines.close()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is shown again
