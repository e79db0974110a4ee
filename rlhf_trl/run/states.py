"""The state of each step of a run, from its markers, locks, statistics and checkpoints. Writes nothing."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import list_checkpoints
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir

# What of a training log is shown while it grows, as in training_stats.json.
SHOWN = ("loss", "reward", "kl")


@dataclass(frozen=True)
class Progress:
    """How far a training run has come."""

    step: int
    max_steps: int
    seconds: float
    """Of training up to `step`, that before an interruption included."""
    values: dict[str, float]
    """The last of each of `SHOWN` that was logged."""
    log_age: float
    """Seconds since the last log, or since training began."""

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
    that was made, or a stage that was begun, with other settings.
    """

    step: str
    trainer: str | None
    state: Literal["done", "running", "stopped", "changed", "to do"]
    last_seconds: float | None
    """What the step took when it last finished in this directory, with whatever settings."""
    progress: Progress | None = None
    """Of a stage that is running or stopped, once training has begun."""
    checkpoint: int | None = None
    """The step of the newest checkpoint of an unfinished stage."""
    holder: str | None = None
    """Who runs the step; where it does not run, who was killed while running it."""
    note: str | None = None
    """Why a judge has not finished."""

    @property
    def seconds_left(self) -> float | None:
        """Estimate what is left to do, in seconds; None where nothing was measured.

        The remaining steps at the pace of this training run so far, else what the step took the last time.
        """
        if self.state == "done":
            return 0.0
        if self.progress is not None:
            start = self.progress.step if self.state == "running" else self.checkpoint or 0
            left = self.progress.seconds_from(start)
            if left is not None:
                return left
        return self.last_seconds

    def as_dict(self) -> dict[str, Any]:
        """The state for machines: times in seconds."""
        pace = None if self.progress is None else self.progress.seconds_per_step
        return {**dataclasses.asdict(self), "seconds_per_step": pace, "seconds_left": self.seconds_left}


def step_states(recipe: Recipe, run: RunDir) -> list[StepState]:
    """Tell the state of every step of a recipe in its run directory, in the order of the plan."""
    return [_step_state(recipe, run, step) for step in recipe.plan]


def _step_state(recipe: Recipe, run: RunDir, step: str) -> StepState:
    trainer = recipe.stages[step].trainer if step in recipe.stages else None
    before, held, after = _holder(run.holder(step)), run.is_held(step), _holder(run.holder(step))
    finished, fingerprint = run.fingerprint_of(step), recipe.fingerprint(step)
    begun = _read_or_empty(run.started(step)).get("fingerprint") if trainer and finished is None else None
    state: Literal["done", "running", "stopped", "changed", "to do"]
    if held:
        state = "running"
    elif finished == fingerprint:
        state = "done"
    elif begun == fingerprint:
        state = "stopped"
    else:
        state = "changed" if finished or begun else "to do"
    progress = None
    if begun and state in ("running", "stopped"):
        # A stage that goes on has the statistics of its last attempt until training begins.
        since = _modified(run.holder(step)) if held else 0
        progress = read_progress(run.training_stats(step), since or 0)
    return StepState(
        step,
        trainer,
        state,
        run.last_seconds(step),
        progress,
        max(list_checkpoints(run.checkpoints(step)), default=None) if begun else None,
        after if held or after == before else None,  # neither begun nor ended between the looks
        _judge_note(recipe, run) if step == "judge" and state != "done" else None,
    )


def read_progress(path: Path, since: int = 0) -> Progress | None:
    """Read how far a stage has come from its `training_stats.json`.

    Args:
        since: nanoseconds of the clock of the file system; a file that was written before them does not count.

    Returns:
        None while there is no file that counts.
    """
    written = _modified(path)
    if written is None or written < since:
        return None
    stats = _read_or_empty(path)
    if "max_steps" not in stats:  # gone since, or of a version that did not write it
        return None
    history = stats["history"]
    values = {key: row[key] for row in history for key in SHOWN if key in row}
    step, seconds = (history[-1]["step"], history[-1]["seconds"]) if history else (0, 0.0)
    return Progress(step, stats["max_steps"], seconds, values, max(time.time() - written / 1e9, 0.0))


def _judge_note(recipe: Recipe, run: RunDir) -> str | None:
    result = _read_or_empty(run.winrate)
    current = result.get("evaluation") == recipe.fingerprint("evaluate")
    return f"{result['status']}: {result['reason']}" if current and result["status"] != "complete" else None


def _holder(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


# A step that starts or ends at this moment may remove its files between two reads.


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
