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
_unheard = 0  # signals that have come since Python last called a handler


def install() -> None:
    """End at a signal; and at the end of the process that started this one, where that belongs to this program."""
    handle(_end)
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth)
    threading.Thread(target=_insist, args=(ear,), daemon=True).start()
    if CHILD in os.environ or "RANK" in os.environ:
        end_with(os.getppid())


def handle(handler: Any) -> dict[int, Any]:
    """Set the handler of each signal that is not ignored (under `nohup`, SIGHUP is); return those that were set."""

    def hear(number: int, frame: Any) -> None:
        global _unheard
        _unheard = 0
        handler(number, frame)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, hear) for number in heard}


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


def _insist(ear: int) -> None:
    """End at a second signal where none is heard: while a call into C lasts, Python calls no handler, and a collective
    whose other side is gone lasts for ever."""
    global _unheard
    while told := os.read(ear, 1):
        _unheard += 1
        time.sleep(1)
        if _unheard > 1:
            os._exit(128 + told[0])


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
