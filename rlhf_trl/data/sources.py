"""Rows as they stand in a source: a Hub dataset, local files or `builtin:demo`.

Reads the source; writes nothing. `prepare` and `explore` see the same rows:

    for number, subset, raw in read_rows(recipe.data, recipe.seed):
        ...
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import heapq
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Data

Row = tuple[int, str, Any]

DEMO = Path(__file__).parent / "demo.jsonl.gz"
SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet", ".csv")
HUB_SPLITS = ("train", "test", "train_prefs", "test_prefs")


def read_rows(data: Data, seed: int) -> Iterator[Row]:
    """Read the source row by row: number, subset, and the row as it stands there.

    The number counts from 0 over the whole source, in the order read. The subset is the row's own `subset`, else the
    name of its file or folder. With `data.max_rows`, the rows whose seeded hash is smallest are kept, in their order;
    which ones these are does not depend on that order.

    Raises:
        UserError: the source is missing, unreadable or empty, lacks a subset, or has no preference columns.
    """
    rows = _number(data)
    if data.max_rows is not None:
        kept = heapq.nsmallest(data.max_rows, rows, key=lambda row: (_seeded_hash(seed, row), row[0]))
        rows = iter(sorted(kept, key=lambda row: row[0]))
    return rows


def _seeded_hash(seed: int, row: Row) -> str:
    content = json.dumps(row[1:], sort_keys=True, default=str)
    return hashlib.sha256(f"{seed} {content}".encode()).hexdigest()


def _number(data: Data) -> Iterator[Row]:
    present: set[str] = set()
    columns: set[str] = set()
    usable = False
    for number, (name, raw) in enumerate(_read_source(data)):
        subset = name
        if isinstance(raw, dict) and isinstance(raw.get("subset"), str):
            subset = raw["subset"].encode(errors="backslashreplace").decode()  # it becomes a key of UTF-8 files
        present.add(subset)
        if data.subsets and subset not in data.subsets:
            continue
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
        what = f"their columns are {', '.join(sorted(columns))}" if columns else "none of them is a JSON object"
        remedy = "give them `chosen` and `rejected`, and `prompt` unless these hold whole conversations"
        raise UserError(data.source, f"the rows are not preference pairs: {what}", remedy)


def _read_source(data: Data) -> Iterator[tuple[str, Any]]:
    source, path = data.source, DEMO if data.source == "builtin:demo" else Path(data.source)
    if path.is_file():
        yield from _read_file(path, _stem(path))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise UserError(source, "the folder has no data files", f"put files of {', '.join(SUFFIXES)} there")
        for file in files:
            # A folder inside is a subset with its splits, as in a clone of the HH-RLHF repository.
            inside = file.relative_to(path).parts
            yield from _read_file(file, inside[0] if len(inside) > 1 else _stem(file))
    elif source.startswith(("/", ".", "~", "builtin:")) or source.endswith(SUFFIXES) or source.count("/") > 1:
        remedy = "a Hub id has the form owner/name; `~` is not expanded; `builtin:demo` is the only built-in source"
        raise UserError(source, "there is no such file or folder", remedy)
    else:
        yield from _read_hub(data)


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)


def _read_file(path: Path, subset: str) -> Iterator[tuple[str, Any]]:
    read = {
        ".gz": _read_lines,
        ".jsonl": _read_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    if path.suffix not in read:
        raise UserError(str(path), "the format of the file is not known", f"use one of {', '.join(SUFFIXES)}")
    try:
        for row in read[path.suffix](path):
            yield subset, row
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        problem = f"the file cannot be read: {_one_line(error)}"
        raise UserError(str(path), problem, "check that it is whole and of the format that its name says") from error


def _read_lines(path: Path) -> Iterator[Any]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        yield from (_decode(line) for line in lines if line.strip())


def _decode(line: bytes) -> Any:
    """Parse one JSON line; what is not JSON stays text, which `normalise` calls malformed. NaN counts as null."""
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return line.decode(errors="backslashreplace").rstrip("\r\n")


def _read_json(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        is_list = file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        if is_list:
            yield from json.loads(file.read(), parse_constant=lambda _: None)
            return
    yield from _read_lines(path)  # JSON lines under the wrong name, as `datasets` writes them


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        for row in csv.DictReader(text):
            # More cells than the header names: an answer was cut at a comma, and no cell can be trusted.
            yield list(row.values()) if None in row else row


def _read_hub(data: Data) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    subsets: list[str | None] = [*data.subsets] or [None]
    for subset in subsets:
        where = f"{data.source}/{subset}" if subset else data.source
        try:
            splits = load_dataset(data.source, data_dir=subset, revision=data.revision)
        except (OSError, ValueError, DatasetsError) as error:
            remedy = "check the name, `data.subsets`, the network and your access, or give a local folder"
            raise UserError(where, f"the dataset cannot be loaded: {_one_line(error)}", remedy) from error
        present = [split for split in HUB_SPLITS if split in splits]
        if not present:
            remedy = f"use a dataset with one of {', '.join(HUB_SPLITS)}"
            raise UserError(where, f"the dataset has only the splits {', '.join(map(str, splits))}", remedy)
        for split in present:
            for row in splits[split]:
                yield subset or data.source.rpartition("/")[2], row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
