"""What a person reads about a run: its plan, its state, the progress of stages that train, and how it ended."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

from rlhf_trl.recipe.library import BATCH, value_of
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import Progress, StepState, read_progress
from rlhf_trl.text.display import visible
from rlhf_trl.text.format import format_seconds
from rlhf_trl.text.redact import redact

if TYPE_CHECKING:  # imported where something is printed: `--help` starts without it
    from rich.console import Console
    from rich.table import Table

# Seconds between two looks at the stages, and between two lines of one where there is no terminal.
LOOK, LINE = 1.0, 60.0
# Lines of a stage's output that are shown when it ends.
LAST_LINES = 20
LABELS = {"loss": "loss", "reward": "reward", "kl": "KL"}


def progress_words(progress: Progress) -> str:
    """Say how far a stage has come, how long the rest takes at this pace, and what it logged last."""
    words = [f"step {progress.step} of {progress.max_steps}"]
    pace, left = progress.seconds_per_step, progress.seconds_from(progress.step)
    words += [] if pace is None else [f"{pace:.3g} s a step"]
    words += [f"{format_seconds(left)} left"] if left else []
    return ", ".join([*words, *(f"{LABELS[key]} {value:.4g}" for key, value in progress.values.items())])


def batch_line(recipe: Recipe, stage: str, processes: int) -> str:
    """Say what the batch of an update, or of PPO's rollout, is made of."""
    args = recipe.args_of(stage, processes)
    rows, steps = (value_of(recipe.stages[stage].trainer, args, key) for key in BATCH)
    whole = f"{rows} a device x {steps} accumulated x {processes} process{'es' * (processes > 1)}"
    return f"{stage}: {rows * steps * processes} = {whole}"


def printable(text: object) -> str:
    """Make a text fit for the terminal: without secrets, and with every character that acts or hides spelt out."""
    return visible(redact(str(text)))


def console(stream: TextIO) -> Console:
    """A console that writes text as it is: as wide as the terminal, or without a limit where there is none."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False, markup=False, emoji=False)


def show(*parts: Table | str) -> None:
    """Print tables and sentences, each on lines of its own."""
    writer = console(sys.stdout)
    for part in parts:
        writer.print(part)
    sys.stdout.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out rows below a head; an empty head leaves its line out."""
    from rich.table import Table

    laid_out = Table(*head, box=None, show_header=any(head), header_style="", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        laid_out.add_row(*map(printable, row))
    return laid_out


def plan_table(states: Sequence[StepState], waiting: Sequence[str]) -> list[Table | str]:
    """Lay out what a run is about to do (`waiting`: the steps that will run), and how long the timed ones took."""
    times, known = {}, []
    for state in states:
        if state.step in waiting:
            seconds = state.last_seconds if state.state == "done" else state.seconds_left
            known += [] if seconds is None else [seconds]
            measured = state.progress is not None and state.progress.seconds_per_step is not None
            last = "" if measured else " (last time)"
            times[state.step] = "–" if seconds is None else f"about {format_seconds(seconds)}{last}"
    if not known:
        return [status_table(states, times)]
    new = len(waiting) - len(known)
    rest = f"; {new} {'is' if new == 1 else 'are'} new" if new else ""
    said = f"about {format_seconds(sum(known))} for the {_steps(len(known))} that were timed before{rest}"
    return [status_table(states, times), said]


def status_table(states: Sequence[StepState], again: Mapping[str, str] = MappingProxyType({})) -> Table:
    """Lay out the state of every step of a run, and the time that it took; or, of one that runs `again`, may take."""
    rows = []
    for number, state in enumerate(states, 1):
        words = (
            "to do again: its inputs may be new" if state.step in again and state.state == "done" else _words(state)
        )
        took = state.last_seconds if state.state in ("done", "changed") else None
        took_words = again.get(state.step, "" if took is None else format_seconds(took))
        rows.append((f"{number:2}", state.step, state.trainer or "", words, took_words))
    return table(("", "step", "trainer", "state", "time"), rows)


def _words(state: StepState) -> str:
    progress, killed = state.progress, f" ({state.holder} was killed)" if state.holder else ""
    if state.state == "running" and progress is not None:
        return f"running: {progress_words(progress)}; last log {format_seconds(progress.log_age)} ago"
    if state.state == "running":
        return f"running: {state.holder or 'a process'}" + (" and has not begun to train" if state.trainer else "")
    if state.state == "stopped":
        where = "" if progress is None else f" at step {progress.step} of {progress.max_steps}"
        saved = "begins again: no checkpoint" if state.checkpoint is None else f"goes on at {state.checkpoint}"
        return f"stopped{where}, {saved}{killed}"
    if state.state == "changed":
        lost = "" if state.checkpoint is None else f"; checkpoint {state.checkpoint} is discarded"
        return f"to do again: settings changed{lost}{killed}"
    return state.note or state.state + killed


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def memory_plan(stages: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    """Lay out what `plan` estimates of every stage, in GB of 10^9 bytes."""
    names = ("weights", "trained", "gradients", "optimizer", "activations", "rollout", "process", "total")
    rows, notes = [], []
    for stage in stages:
        size = [f"{stage['bytes'][name] / 1e9:.2f}" for name in names]
        measured = "" if stage["measured_bytes"] is None else f"{stage['measured_bytes'] / 1e9:.2f}"
        length = ["" if stage[key] is None else f"{stage[key]:,}" for key in ("steps", "tokens")]
        took = "" if stage["seconds"] is None else format_seconds(stage["seconds"])
        rows.append((stage["stage"], *size, "yes" if stage["fits"] else "NO", measured, *length, took))
        notes.append(f"{stage['stage']}: {stage['helps_most']} lowers it most, to {stage['bytes_then'] / 1e9:.2f} GB")
    head = ("stage", *names, "fits", "measured", "steps", "tokens at most", "took")
    memory = f"GB at the peak of one device, which has {stages[0]['memory'] / 1e9:.1f}; of activations and rollout the"
    return [table(head, rows), f"{memory} larger one counts", *notes]


def summary_table(seconds: Mapping[str, float], total: float) -> Table:
    """Lay out what each step has taken."""
    return table(("", ""), [(step, format_seconds(taken)) for step, taken in {**seconds, "total": total}.items()])


def status_end(states: Sequence[StepState], running: bool) -> str:
    """Say in a sentence what the states come to; `running`: `run` is at work, if only between two steps."""
    done = sum(state.state == "done" for state in states)
    if done == len(states):
        return "finished"
    if running or any(state.state == "running" for state in states):
        return f"at work: {done} of {_steps(len(states))} done"
    return f"at rest: {done} of {_steps(len(states))} done; `rlhf-trl run RECIPE` goes on from there"


def ending(status: int) -> str:
    """Say what an exit status above 0 means; one above 128 is a signal."""
    return f"ended by {signal.Signals(status - 128).name}" if status > 128 else f"failed with status {status}"


# --- while stages train ----------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A stage whose process is running; times are of the monotonic clock."""

    began: float
    spoke: float
    since: int  # statistics that are not newer are an earlier attempt's (nanoseconds)
    offset: int  # where its output begins in the log, in bytes


class Live:
    """A line for each stage that trains: rewritten in place on a terminal, otherwise written once a minute.

    The last lines that a process printed, without headings and the library's metrics, are shown when it ends.
    `seconds` has what each stage that has ended took.
    """

    def __init__(self, run: RunDir, plan: Sequence[str], stream: TextIO, errors: TextIO):
        from rich.live import Live as RichLive

        self.run, self.plan, self.stream, self.errors = run, plan, stream, errors
        self.running: dict[str, Attempt] = {}
        self.seconds: dict[str, float] = {}
        self.looked = 0.0
        terminal = console(stream)
        self.redraws = terminal.is_terminal and not terminal.is_dumb_terminal
        self.lines = RichLive(console=terminal, auto_refresh=False, transient=True, redirect_stdout=False,
                              redirect_stderr=False)  # fmt: skip

    def begin(self, stage: str) -> None:
        """Announce a stage; call it before its process starts."""
        log, stats, now = self.run.log(stage), self.run.training_stats(stage), time.monotonic()
        self.say(f"\n=== {stage} ({self.plan.index(stage) + 1} of {len(self.plan)}), its output: {log}")
        since = stats.stat().st_mtime_ns + 1 if stats.exists() else 0
        self.running[stage] = Attempt(now, now, since, log.stat().st_size if log.exists() else 0)

    def update(self) -> None:
        """Look at the stages that are running, at most once a second."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        self.looked = now
        if self.redraws:
            from rich.text import Text

            lines = "\n".join(self._line(*item, "") for item in self.running.items())
            self.lines.start()
            self.lines.update(Text(lines, no_wrap=True, overflow="crop"), refresh=True)
            return
        for stage, attempt in self.running.items():
            if now - attempt.spoke >= LINE:
                attempt.spoke = now
                self.say(self._line(stage, attempt, ""))

    def end(self, stage: str, status: int) -> None:
        """Say how a stage has ended, and below it what its process said last."""
        attempt, log = self.running.pop(stage), self.run.log(stage)
        self.seconds[stage] = time.monotonic() - attempt.began
        self.say(self._line(stage, attempt, f"{ending(status)} after " if status else ""))
        lines = log.read_bytes()[attempt.offset :].decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip() and not line.startswith(("{'", "==="))]
        more = [f"({len(said) - LAST_LINES} lines more in {log})"] if len(said) > LAST_LINES else []
        for line in [*more, *said[-LAST_LINES:]]:
            self.say(f"  {line}", self.errors)

    def conclude(self, failed: Mapping[str, int], left: Sequence[str]) -> None:
        """Name the stages that failed, once all that were running have ended, and those that were not begun."""
        for stage, status in failed.items():
            self.say(f"{stage} {ending(status)}; its output: {self.run.log(stage)}", self.errors)
        if left:
            self.say(f"not begun: {', '.join(left)}", self.errors)

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """Write a line that stays, in the place of the progress lines until they are drawn again."""
        self.close()
        stream = stream or self.stream
        stream.write(f"{printable(line)}\n")
        stream.flush()

    def close(self) -> None:
        """Remove the progress lines."""
        self.lines.stop()

    def _line(self, stage: str, attempt: Attempt, outcome: str) -> str:
        progress = read_progress(self.run.training_stats(stage), attempt.since)
        words = "no step yet" if progress is None else progress_words(progress)
        return f"{stage}: {outcome}{format_seconds(time.monotonic() - attempt.began)}, {words}"
