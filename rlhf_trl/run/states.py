"""The state of each step of a run, from its markers, locks, statistics and checkpoints. Writes nothing."""

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import list_checkpoints
from rlhf_trl.run.documents import Started, Stats, WinRate, read_document
from rlhf_trl.run.layout import RunDir, read_holder

# What of a training log is shown while it grows, as in training_stats.json.
SHOWN = ("loss", "reward", "kl")
State = Literal["done", "running", "stopped", "changed", "damaged", "to do"]


@dataclass(frozen=True)
class Progress:
    """How far a training run has come."""

    step: int
    max_steps: int
    seconds: float  # of training up to `step`, that before an interruption included
    values: dict[str, float]  # the last of each of `SHOWN` that was logged
    log_age: float  # seconds since the last log, or since training began

    @property
    def seconds_per_step(self) -> float | None:
        return self.seconds / self.step if self.step else None

    def seconds_from(self, step: int) -> float | None:
        """Estimate the seconds from `step` to the end, at the mean pace so far; None before the first log."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(self.max_steps - step, 0)


@dataclass(frozen=True)
class StepState:
    """One step of a run.

    `stopped` is a stage that has begun with these settings and is neither finished nor running; `changed` is a step
    that was made, or a stage that was begun, with other settings; `damaged` is a step whose marker or outputs are not
    whole.
    """

    step: str
    trainer: str | None
    state: State
    last_seconds: float | None  # what the finished step in this directory took, with whatever settings
    progress: Progress | None = None  # of a stage that is running or stopped, once training has begun
    checkpoint: int | None = None  # the step of the newest checkpoint of an unfinished stage
    holder: str | None = None  # who runs the step; where it does not run, who was killed while running it
    note: str | None = None  # why a judge has not finished, or which file is damaged

    @property
    def seconds_left(self) -> float | None:
        """Estimate the seconds that are left: the remaining steps at the pace of this training run, else the time that
        the step took the last time; None where nothing was measured."""
        if self.state == "done":
            return 0.0
        if self.progress is not None and self.progress.seconds_per_step is not None:
            return self.progress.seconds_from(self.progress.step if self.state == "running" else self.checkpoint or 0)
        return self.last_seconds

    def as_dict(self) -> dict[str, Any]:
        """The state for machines: times in seconds."""
        pace = None if self.progress is None else self.progress.seconds_per_step
        return {**asdict(self), "seconds_per_step": pace, "seconds_left": self.seconds_left}


def step_states(recipe: Recipe, run: RunDir) -> list[StepState]:
    """Tell the state of every step of a recipe in its run directory, in the order of the plan."""
    return [_step_state(recipe, run, step) for step in recipe.plan]


# A step that starts or ends at this moment may remove its files between two reads: a file that is gone is no error.


def _step_state(recipe: Recipe, run: RunDir, step: str) -> StepState:
    trainer = recipe.stages[step].trainer if step in recipe.stages else None
    path, fingerprint = run.holder(step), recipe.fingerprint(step)
    before, held, holder = read_holder(path), run.is_held(step), read_holder(path)
    done, _ = run.marker(step)
    started, unread = read_document(run.started(step), Started) if trainer and not done else (None, None)
    fault = None if done and done.fingerprint != fingerprint else run.fault(step) or unread
    state: State = "changed" if done or started else "to do"
    if held:
        state = "running"
    elif fault:
        state = "damaged"
    elif made := done or started:
        current = made.fingerprint == fingerprint
        state = "changed" if not current else "done" if done else "stopped"
    progress = None
    if started and state in ("running", "stopped"):
        # A stage that goes on has the statistics of its last attempt until training begins.
        progress = read_progress(run.training_stats(step), (_modified(path) or 0) if held else 0)
    checkpoint = max(list_checkpoints(run.checkpoints(step)), default=None) if started else None
    note = None if held else fault
    if step == "judge" and state in ("changed", "to do"):
        result, note = read_document(run.winrate, WinRate)
        if result and result.evaluation == recipe.fingerprint("evaluate") and result.status != "complete":
            note = f"{result.status}: {result.reason}"
    if not held and holder != before:  # begun or ended between the two reads
        holder = None
    return StepState(step, trainer, state, done.seconds if done else None, progress, checkpoint, holder, note)


def read_progress(path: Path, since: int = 0) -> Progress | None:
    """Read how far a stage has come from its `training_stats.json`; None while none is newer than `since` (ns)."""
    written = _modified(path)
    stats, _ = read_document(path, Stats)
    if written is None or written < since or stats is None:
        return None
    values = {key: value for row in stats.history for key in SHOWN if (value := getattr(row, key)) is not None}
    step, seconds = (stats.history[-1].step, stats.history[-1].seconds) if stats.history else (0, 0.0)
    return Progress(step, stats.max_steps, seconds, values, max(time.time() - written / 1e9, 0.0))


def _modified(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None
