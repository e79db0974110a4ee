"""Rows as they stand in a source (a Hub dataset, local files or `builtin:demo`), and work on chunks of them.

Reads the source; writes nothing. `prepare` and `explore` see the same rows.
"""

import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rlhf_trl.data.files import SUFFIXES, read_file
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Data
from rlhf_trl.run.signals import end_with
from rlhf_trl.text.display import first_line, visible

Row = tuple[int, str, Any]
T = TypeVar("T")

DEMO = Path(__file__).parent / "demo.jsonl.gz"
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB_SPLITS = ("train", "test", "train_prefs", "test_prefs")
CHUNK = 250  # rows
ALONE = 40  # chunks, before other processes are worth their start
_worker: Callable[[list[Row]], Any]


def read_rows(data: Data, seed: int) -> Iterator[Row]:
    """Read the source row by row: number, subset, and the row as it stands there.

    The number counts from 0 over the whole source, in the order read. The subset is the row's own `subset`, else the
    name of its file or folder. With `data.max_rows`, the rows whose seeded hash is smallest are kept, in their order;
    which ones these are does not depend on that order.

    UserError where the source is missing, unreadable or empty, lacks a subset, or has no preference columns."""
    if data.max_rows is None:
        return _number(data)
    ranks = ((seeded_hash(seed, row), row[0]) for row in _number(data))
    kept = {number for _, number in heapq.nsmallest(data.max_rows, ranks)}
    return (row for row in _number(data) if row[0] in kept)


def seeded_hash(seed: int, row: Row) -> str:
    """Hash a row without its number."""
    content = json.dumps(row[1:], sort_keys=True, default=str)
    return hashlib.sha256(f"{seed} {content}".encode()).hexdigest()


def _number(data: Data) -> Iterator[Row]:
    present: set[str] = set()
    columns: set[str] = set()
    first, usable = "", False
    for number, (name, raw) in enumerate(_read_source(data)):
        subset = name
        if isinstance(raw, dict) and isinstance(raw.get("subset"), str):
            subset = raw["subset"].encode(errors="backslashreplace").decode()  # it becomes a key of UTF-8 files
        present.add(subset)
        if data.subsets and subset not in data.subsets:
            continue
        first = first or repr(raw)
        if isinstance(raw, dict):
            columns = columns or {str(key) for key in raw}
            usable = usable or {"chosen", "rejected"} <= raw.keys()
        yield number, subset, raw
    if not present:
        raise UserError(data.source, "the source has no rows", "point `data.source` at preference pairs")
    missing = [subset for subset in data.subsets if subset not in present]
    if missing:
        names = ", ".join(sorted(present)[:20])
        raise UserError(data.source, f"there is no subset {missing[0]!r}", f"`data.subsets` can name: {names}")
    if not usable:
        what = f"their columns are {', '.join(sorted(columns))}" if columns else f"the first is {first[:60]}"
        remedy = "give them `chosen` and `rejected`, and `prompt` unless these hold whole conversations"
        raise UserError(data.source, f"the rows are not preference pairs: {what}", remedy)


def _read_source(data: Data) -> Iterator[tuple[str, Any]]:
    source, path = data.source, DEMO if data.source == "builtin:demo" else Path(data.source)
    if path.is_file():
        yield from ((_subset_of(path), row) for row in read_file(path))
    elif path.is_dir():
        inside = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        shown = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
        files = [file for file in shown if file.name.endswith(SUFFIXES) and file.name not in METADATA]
        if not files:
            there = ", ".join(str(file) for file in inside[:5]) or "nothing"
            problem = f"the folder has no data files; it holds {there}"
            raise UserError(source, problem, f"put files of {', '.join(SUFFIXES)} there")
        for file in files:
            # A folder inside is a subset with its splits, as in a clone of the HH-RLHF repository.
            whole = path.resolve().name if file.suffix == ".arrow" else _subset_of(file)
            subset = file.parts[0] if len(file.parts) > 1 else whole
            yield from ((subset, row) for row in read_file(path / file))
    else:
        require_source(source)
        yield from _read_hub(data)


def require_source(source: str) -> None:
    """Refuse a source that is neither here nor can be the id of one on the Hub."""
    named = source.startswith(("/", ".", "~", "builtin:")) or source.endswith(SUFFIXES) or source.count("/") > 1
    if named and source != "builtin:demo" and not Path(source).exists():
        remedy = "a Hub id has the form owner/name; `~` is not expanded; `builtin:demo` is the only built-in source"
        raise UserError("data.source", f"there is no such file or folder: {source}", remedy)


def _subset_of(path: Path) -> str:
    return next(path.name.removesuffix(suffix) for suffix in (*SUFFIXES, path.suffix) if path.name.endswith(suffix))


def _read_hub(data: Data) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    from rlhf_trl.models.tokenizer import ABSENT

    subsets: list[str | None] = [*data.subsets] or [None]
    for subset in subsets:
        where = f"{data.source}/{subset}" if subset else data.source
        try:
            splits = load_dataset(data.source, data_dir=subset, revision=data.revision)
        except (*ABSENT, DatasetsError) as error:
            remedy = "check the name, `data.subsets`, the network and your access, or download it and give the folder"
            said = first_line(error)
            if isinstance(error, DatasetGenerationError):  # its first line says nothing
                said = visible(" ".join(f"{error} {error.__cause__ or ''}".split()))[:300]
            raise UserError(where, f"the dataset cannot be loaded: {said}", remedy) from error
        present = [split for split in HUB_SPLITS if split in splits]
        if not present:
            remedy = f"use a dataset with one of {', '.join(HUB_SPLITS)}"
            raise UserError(where, f"the dataset has only the splits {', '.join(map(str, splits))}", remedy)
        for split in present:
            for row in splits[split]:
                yield subset or data.source.rpartition("/")[2], row


def map_chunks(work: Callable[[list[Row]], T], rows: Iterator[Row]) -> Iterator[tuple[list[Row], T]]:
    """Yield the rows in chunks, each with the result of `work`, which depends on its chunk alone.

    From a file, `work` reaches other processes: one that died before it had read more than a pipe holds would leave
    this one waiting for ever. What it holds is pickled, such as a tokenizer, whose class alone imports no torch.
    """
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    yield from ((chunk, work(chunk)) for chunk in itertools.islice(chunks, ALONE))
    cores = os.cpu_count() or 1
    waiting: deque[tuple[list[Row], Future[T]]] = deque()
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(work, file)
        file.flush()
        # Spawned: a process that is forked off one with threads, such as the tokenizer's, may hang. None starts before
        # it has something to do.
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _start, (file.name, os.getpid()))
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_run, chunk)))
                if len(waiting) > 2 * cores:
                    done, result = waiting.popleft()
                    yield done, result.result()
            yield from ((done, result.result()) for done, result in waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def _start(work: str, parent: int) -> None:
    """Set up a worker process, which ends with its parent and leaves Ctrl-C and the other cores to it."""
    global _worker
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = pickle.loads(Path(work).read_bytes())


def _run(chunk: list[Row]) -> Any:
    return _worker(chunk)
