"""Locks on the steps of a run: held by one process, released by the operating system when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.run.environment import now


@contextlib.contextmanager
def hold(holder: Path, folder: Path) -> Iterator[None]:
    """Hold the step that owns `folder` for this process; UserError where another one does.

    The file `holder` names the process while it holds the step; the lock is beside it, as `<step>.lock`.
    """
    lock = FileLock(f"{holder}.lock")
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.3, poll_interval=0.05)  # longer than the instant for which `is_held` has it
    except Timeout:
        other = "another process"
        with contextlib.suppress(OSError):
            other = holder.read_text(encoding="utf-8", errors="replace")
        problem = f"the step {holder.name!r} is held by {other}"
        raise UserError(str(folder), problem, "wait for it, or stop it", Exit.DAMAGED) from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()} since {now()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_held(holder: Path) -> bool:
    """Return whether a process holds the step: try a shared lock, which does not block another reader.

    A process id would not do: it may belong to another machine, or have been reused.
    """
    try:
        with Path(f"{holder}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False
