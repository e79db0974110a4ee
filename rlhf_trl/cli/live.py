"""The lines that stand on the screen while stages train, and what is left of them when one ends.

Reads `training_stats.json` and `logs/` of the run; writes to a stream.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rlhf_trl.cli.tables import duration, ending, progress_words
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import read_progress

# Seconds between two looks at the stages, and between two lines of one where there is no terminal.
LOOK, LINE = 1.0, 60.0
# Lines of a stage's output that are shown when it ends.
LAST_LINES = 20


@dataclass
class Attempt:
    """A stage whose process is running."""

    began: float
    """Of the monotonic clock, like `spoke`."""
    spoke: float
    since: int
    """Statistics that are not newer are an earlier attempt's (nanoseconds)."""
    offset: int
    """Where its output begins in the log, in bytes."""


class Live:
    """A line for each stage that trains: rewritten in place on a terminal, otherwise written once a minute.

    What a process prints goes to its log; the last of it, but for the library's dictionaries, is shown when it ends.
    """

    def __init__(self, run: RunDir, plan: Sequence[str], stream: TextIO, errors: TextIO):
        self.run, self.plan, self.stream, self.errors = run, plan, stream, errors
        self.running: dict[str, Attempt] = {}
        self.seconds: dict[str, float] = {}
        """What each stage that has ended took."""
        self.looked = 0.0
        self.drawn = 0
        """Lines on the terminal that will be taken back."""

    def begin(self, stage: str) -> None:
        """Announce a stage; call it before its process starts."""
        number, log, now = self.plan.index(stage) + 1, self.run.log(stage), time.monotonic()
        self.say(f"\n=== {stage} ({number} of {len(self.plan)}), its output: {log}")
        stats = self.run.training_stats(stage)
        since = stats.stat().st_mtime_ns + 1 if stats.exists() else 0
        offset = log.stat().st_size if log.exists() else 0
        self.running[stage] = Attempt(now, now, since, offset)

    def update(self) -> None:
        """Look at the stages that are running, at most once a second."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        self.looked = now
        if self.stream.isatty():
            self._take_back()
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
            self.stream.writelines(f"{self._line(*item)[:width]}\n" for item in self.running.items())
            self.stream.flush()
            self.drawn = len(self.running)
            return
        for stage, attempt in self.running.items():
            if now - attempt.spoke >= LINE:
                attempt.spoke = now
                self.say(self._line(stage, attempt))

    def end(self, stage: str, status: int) -> None:
        """Say how a stage has ended, and below it what its process said last."""
        attempt = self.running.pop(stage)
        self.seconds[stage] = time.monotonic() - attempt.began
        progress = read_progress(self.run.training_stats(stage), attempt.since)
        reached = "" if progress is None else f", {progress_words(progress)}"
        outcome = f"{ending(status)} after " if status else ""
        self.say(f"{stage}: {outcome}{self.seconds[stage]:.1f} s{reached}")
        log = self.run.log(stage)
        said = messages(log.read_bytes()[attempt.offset :].decode(errors="replace"))
        if len(said) > LAST_LINES:
            self.say(f"  ({len(said) - LAST_LINES} lines more in {log})", self.errors)
        for line in said[-LAST_LINES:]:
            self.say(f"  {line}", self.errors)

    def conclude(self, failed: Mapping[str, int], left: Sequence[str]) -> None:
        """Name the stages that failed, once all that were running have ended, and those that were not begun."""
        for stage, status in failed.items():
            self.say(f"{stage} {ending(status)}; its output: {self.run.log(stage)}", self.errors)
        if left:
            self.say(f"not begun: {', '.join(left)}", self.errors)

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """Write a line that stays."""
        self._take_back()
        stream = stream or self.stream
        stream.write(f"{line}\n")
        stream.flush()

    def _take_back(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")  # up to the first of them, and clear from there
            self.stream.flush()
            self.drawn = 0

    def _line(self, stage: str, attempt: Attempt) -> str:
        progress = read_progress(self.run.training_stats(stage), attempt.since)
        words = "starting" if progress is None else progress_words(progress)
        return f"{stage}: {duration(time.monotonic() - attempt.began)}, {words}"


def messages(output: str) -> list[str]:
    """Pick from the output of a stage what is neither a heading nor the library's log, whose every number is in the
    statistics."""
    return [line for line in output.splitlines() if line.strip() and not line.startswith(("{'", "==="))]
