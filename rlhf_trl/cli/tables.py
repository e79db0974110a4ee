"""The tables and sentences about a run: its plan, its state, how far a stage has come, and how it ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rlhf_trl.run.states import Progress, StepState
from rlhf_trl.text.display import visible
from rlhf_trl.text.redact import redact

if TYPE_CHECKING:  # imported where something is printed: `--help` starts without it
    from rich.console import Console
    from rich.table import Table

LABELS = {"loss": "loss", "reward": "reward", "kl": "KL"}


def duration(seconds: float) -> str:
    """Write seconds as people say them: `7.4 s`, `31 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def progress_words(progress: Progress) -> str:
    """Say how far a stage has come, how long the rest takes at this pace, and what it logged last."""
    words = [f"step {progress.step} of {progress.max_steps}"]
    pace, left = progress.seconds_per_step, progress.seconds_from(progress.step)
    words += [] if pace is None else [f"{pace:.3g} s a step"]
    words += [f"{duration(left)} left"] if left else []
    return ", ".join([*words, *(f"{LABELS[key]} {value:.4g}" for key, value in progress.values.items())])


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


def _steps_table(states: Sequence[StepState], last: str, cells: Sequence[tuple[str, str]]) -> Table:
    """One numbered row for each step: its name and trainer, what its state is in words, and a time."""
    numbered = enumerate(zip(states, cells, strict=True), 1)
    rows = [(f"{number:2}", state.step, state.trainer or "", *words) for number, (state, words) in numbered]
    return table(("", "step", "trainer", "state", last), rows)


# --- what a run is about to do ---------------------------------------------------------------------------------------


def plan_table(states: Sequence[StepState], waiting: Sequence[str]) -> list[Table | str]:
    """Lay out what a run is about to do (`waiting`: the steps that will run), and how long the timed ones took."""
    plan = _steps_table(states, "time", [(_plan_words(state, waiting), _estimate(state, waiting)) for state in states])
    known = [seconds for state in states if state.step in waiting and (seconds := _seconds_to_run(state)) is not None]
    if not known:
        return [plan]
    new = len(waiting) - len(known)
    rest = f"; {new} {'is' if new == 1 else 'are'} new" if new else ""
    return [plan, f"about {duration(sum(known))} for the {_steps(len(known))} that were timed before{rest}"]


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _plan_words(state: StepState, waiting: Sequence[str]) -> str:
    if state.state == "stopped" and state.checkpoint is None:
        return "to do again: stopped before its first checkpoint"
    if state.state == "stopped":
        return f"goes on at step {state.checkpoint}" + (f" of {state.progress.max_steps}" if state.progress else "")
    if state.state == "changed":
        lost = "" if state.checkpoint is None else f"; checkpoint {state.checkpoint} is discarded"
        return f"to do again: settings changed{lost}"
    if state.state == "running":
        return f"running: {state.holder or 'a process'}"
    if state.state == "damaged":
        return f"to do again: {state.note}"
    return "to do again: its inputs may be new" if state.state == "done" and state.step in waiting else state.state


def _estimate(state: StepState, waiting: Sequence[str]) -> str:
    if state.step not in waiting:
        return "" if state.last_seconds is None else f"took {duration(state.last_seconds)}"
    seconds = _seconds_to_run(state)
    measured = state.progress is not None and state.progress.seconds_per_step is not None
    return "–" if seconds is None else f"about {duration(seconds)}{'' if measured else ' (last time)'}"


def _seconds_to_run(state: StepState) -> float | None:
    return state.last_seconds if state.state == "done" else state.seconds_left


# --- where it stands, and how it ended -------------------------------------------------------------------------------


def status_table(states: Sequence[StepState]) -> Table:
    """Lay out the state of every step of a run."""
    times = [state.last_seconds if state.state in ("done", "changed") else None for state in states]
    took = ["" if seconds is None else duration(seconds) for seconds in times]
    return _steps_table(states, "took", list(zip(map(_status_words, states), took, strict=True)))


def _status_words(state: StepState) -> str:
    progress, killed = state.progress, f" ({state.holder} was killed)" if state.holder else ""
    if state.state == "running" and progress is not None:
        return f"running: {progress_words(progress)}; last log {duration(progress.log_age)} ago"
    if state.state == "running":
        return f"running: {state.holder or 'a process'}" + (" and has not begun to train" if state.trainer else "")
    if state.state == "stopped":
        where = "" if progress is None else f" at step {progress.step} of {progress.max_steps}"
        saved = "no checkpoint" if state.checkpoint is None else f"checkpoint at {state.checkpoint}"
        return f"stopped{where}, {saved}{killed}"
    if state.state == "changed":
        return f"made with other settings{killed}"
    return state.note or state.state + killed


def summary_table(seconds: Mapping[str, float], total: float) -> Table:
    """Lay out what each step has taken."""
    return table(("", ""), [(step, duration(taken)) for step, taken in {**seconds, "total": total}.items()])


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
