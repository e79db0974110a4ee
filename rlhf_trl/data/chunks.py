"""Chunks of rows, worked on in this process or, of a long source, in several; the results come in order.

Works on values in memory.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

from rlhf_trl.data.sources import Row
from rlhf_trl.run.signals import end_with

T = TypeVar("T")

ROWS = 250
ALONE = 40  # chunks, before other processes are worth their start
_worker: Callable[[list[Row]], Any]


def map_chunks(set_up: Callable[[], Callable[[list[Row]], T]], rows: Iterator[Row]) -> Iterator[tuple[list[Row], T]]:
    """Yield the rows in chunks, each with the result of a function that depends on its chunk alone.

    Args:
        set_up: what makes this function, here and in other processes. It is small when pickled: a process that dies
            before it has read more than a pipe holds would leave this one waiting for ever.
    """
    work = set_up()
    chunks = iter(lambda: list(itertools.islice(rows, ROWS)), [])
    yield from ((chunk, work(chunk)) for chunk in itertools.islice(chunks, ALONE))
    cores = os.cpu_count() or 1
    waiting: deque[tuple[list[Row], Future[T]]] = deque()
    # Spawned: a process that is forked off one with threads, such as the tokenizer's, may hang. None starts before it
    # has something to do.
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _start, (set_up, os.getpid()))
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_run, chunk)))
            if len(waiting) > 2 * cores:
                done, result = waiting.popleft()
                yield done, result.result()
        yield from ((done, result.result()) for done, result in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(set_up: Callable[[], Callable[[list[Row]], Any]], parent: int) -> None:
    """Set up a worker process, which ends with its parent and leaves Ctrl-C and the other cores to it."""
    global _worker
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = set_up()


def _run(chunk: list[Row]) -> Any:
    return _worker(chunk)
