"""The raw replies of a judge: an append-only JSONL file with a line for every finished call, and a lock beside it.

A run that was killed goes on from this file and pays for no call twice; verdicts are parsed from it, never stored.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from rlhf_trl.judge.replies import FAULTS, Usage
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import json_line

logger = logging.getLogger(__name__)


@with_config(extra="allow", strict=True)
class Line(TypedDict):
    """What is read again of a line; more stands in it for people."""

    key: str
    status: str
    reply: str | None
    usage: NotRequired[Usage | None]
    model: NotRequired[str | None]
    detail: NotRequired[str | None]


LINE = TypeAdapter(Line)


class JudgeCache:
    """The replies in one file. A line whose call may pass is kept as a log, but is no hit."""

    def __init__(self, path: Path):
        """Read the file, mend an end that a kill cut off, and hold the file, which its owner alone may read.

        Raises:
            UserError: another process holds the file.
        """
        self.path = path
        self._latest: dict[str, Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, or stop it"
            raise UserError(str(path), "another process writes to this file of judge replies", remedy) from None
        self._load()
        self._file = path.open("ab")
        self._sync()
        path.chmod(0o600)  # a server may have sent anything

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._file.close()
        self._lock.release()

    def get(self, key: str) -> Line | None:
        """Find the reply to a call that needs not be made again."""
        line = self._latest.get(key)
        return line if line and FAULTS[line["status"]].stands else None

    def latest(self, key: str) -> Line | None:
        """Find what a call brought last, a failure too; a reply that stands is never hidden by a later failure."""
        return self._latest.get(key)

    def append(self, line: Line) -> None:
        """Add a finished call. A kill loses nothing, a power failure the last second: a disk takes longer than a call.

        Raises:
            ValueError: a number is not finite.
        """
        self._file.write(json_line(line).encode())
        self._file.flush()
        if time.monotonic() > self._synced + 1.0:
            self._sync()
        self._note(line)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _note(self, line: Line) -> None:
        if self.get(line["key"]) is None:
            self._latest[line["key"]] = line

    def _load(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: its last line was cut off; that call is made again", self.path)
            os.truncate(self.path, whole)
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                line = LINE.validate_json(text)
                if line["status"] not in FAULTS or (line["status"] == "ok" and line["reply"] is None):
                    raise ValueError("an unknown status, or a reply without a text")
            except ValueError:  # pydantic's ValidationError is one
                logger.warning("%s:%d: not a judge reply, passed over; its call is made again", self.path, number)
            else:
                self._note(line)
