"""The tables and sentences about a run: its plan, its state, how far a stage has come, and how it ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from rlhf_trl.run.states import Progress, StepState
from rlhf_trl.text.display import visible
from rlhf_trl.text.format import format_seconds
from rlhf_trl.text.redact import redact

if TYPE_CHECKING:  # imported where something is printed: `--help` starts without it
    from rich.console import Console
    from rich.table import Table

LABELS = {"loss": "loss", "reward": "reward", "kl": "KL"}


def progress_words(progress: Progress) -> str:
    """Say how far a stage has come, how long the rest takes at this pace, and what it logged last."""
    words = [f"step {progress.step} of {progress.max_steps}"]
    pace, left = progress.seconds_per_step, progress.seconds_from(progress.step)
    words += [] if pace is None else [f"{pace:.3g} s a step"]
    words += [f"{format_seconds(left)} left"] if left else []
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
        time = again.get(state.step, "" if took is None else format_seconds(took))
        rows.append((f"{number:2}", state.step, state.trainer or "", words, time))
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
