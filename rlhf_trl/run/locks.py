"""Locks on the steps of a run: held by one process, released by the operating system when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.environment import now


@contextlib.contextmanager
def hold(holder: Path, folder: Path) -> Iterator[None]:
    """Hold the step that owns `folder` for this process.

    Args:
        holder: the file that names the process while it holds the step; the lock lies beside it, as `<step>.lock`.

    Raises:
        UserError: another process holds the step, or the run's folder cannot be written to.
    """
    lock = FileLock(lock_file(holder))
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.3, poll_interval=0.05)  # longer than the instant for which `is_held` has it
    except Timeout:
        other = "another process"
        with contextlib.suppress(FileNotFoundError):
            other = holder.read_text(encoding="utf-8")
        problem = f"the step {holder.name!r} is held by {other}"
        raise UserError(str(folder), problem, "wait for it, or stop it") from None
    except OSError as error:
        remedy = "choose a folder that you may write to with --runs"
        root = str(holder.parent.parent)
        raise UserError(root, f"cannot write here: {error.strerror}", remedy) from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()} since {now()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_held(holder: Path) -> bool:
    """Return whether a process holds the step, without disturbing it.

    Takes a shared lock without waiting and releases it at once, so that two readers do not block each other. A
    process id would not do: it may belong to another machine, or have been reused.
    """
    try:
        with lock_file(holder).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def lock_file(holder: Path) -> Path:
    return holder.with_name(f"{holder.name}.lock")
