"""What SIGINT, SIGTERM and SIGHUP do to this process and to its children. Installed before anything else is imported.

A signal ends a process with 128 and its number, whatever else happens on the way out.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

CHILD = "RLHF_TRL_CHILD"  # set in the environment of the processes that this program starts
received: list[int] = []
_cleans_up = False


def install() -> None:
    """End at a signal; and at the end of the process that started this one, where that belongs to this program."""
    handle(_end)
    if CHILD in os.environ or "RANK" in os.environ:
        end_with(os.getppid())


def handle(handler: Any) -> dict[int, Any]:
    """Set the handler of each signal that is not ignored (under `nohup`, SIGHUP is); return those that were set."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def in_foreground() -> bool:
    """Whether a Ctrl-C at the terminal reaches this process and its children alike."""
    return any(os.tcgetpgrp(file) == os.getpgrp() for file in range(3) if os.isatty(file))


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Let the first signal raise SystemExit, so that files and locks are left in order.

    Elsewhere, such as during an import, which an exception can leave in pieces, a signal ends the process at once.
    """
    global _cleans_up
    _cleans_up = True
    try:
        yield
    finally:
        _cleans_up = False


def _end(number: int, _: Any) -> None:
    received.append(number)
    if _cleans_up and len(received) == 1:
        raise SystemExit(128 + number)
    with contextlib.suppress(Exception):  # the signal may have come in the middle of a write
        sys.stdout.flush()
    os._exit(128 + number)


def end_with(parent: int) -> None:
    """Have this process get SIGTERM when its parent ends: on Linux from the kernel, elsewhere from a thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
