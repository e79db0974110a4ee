"""The progress lines of stages that train, from `training_stats.json` and the logs of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rlhf_trl.cli.tables import console, ending, printable, progress_words
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import read_progress
from rlhf_trl.text.format import format_seconds

# Seconds between two looks at the stages, and between two lines of one where there is no terminal.
LOOK, LINE = 1.0, 60.0
# Lines of a stage's output that are shown when it ends.
LAST_LINES = 20


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
