"""Rows of one local file, whichever form it has: JSON lines, JSON, CSV, Parquet or Arrow.

Reads the file in pieces, but JSON that has no row on each line whole; writes nothing.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.text.display import first_line

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet", ".arrow")
# What a file is whose first bytes are not of the form that its name says, and what to do.
OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the data itself", "run `git lfs pull` in its folder"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"\x1f\x8b": ("compressed with gzip", "add .gz to its name"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it with `zstd -d`"),
    b"<": ("a web page", "download the file itself, not the page about it"),
}
EXPECTED = {".parquet": b"PAR1", ".gz": b"\x1f\x8b"}
SIDES = {"chosen", "rejected"}
BETWEEN = re.compile(r"[\s,]*")


def read_file(path: Path) -> Iterator[Any]:
    """Read the rows of a file as they stand there; what is no JSON on a line of its own stays text.

    UserError where the file is not what its name says, or it is damaged."""
    if not path.name.endswith(SUFFIXES):
        raise UserError(str(path), "the format of the file is not known", f"use one of {', '.join(SUFFIXES)}")
    read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".arrow": _read_arrow}
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        with path.open("rb") as file:
            start = file.read(64)
        for magic, (what, remedy) in OTHERS.items():
            if start.startswith(magic) and magic != EXPECTED.get(path.suffix):
                raise UserError(str(path), f"the file is {what}", remedy)
        yield from read.get(suffix, _read_json)(path)
    except UnicodeDecodeError as error:
        byte = f"the byte 0x{error.object[error.start]:02x}"
        problem = f"the text is not {error.encoding.upper()}: it holds {byte}, as Latin-1 or Windows-1252 does"
        remedy = f"convert it: `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`, or save it as UTF-8"
        raise UserError(str(path), problem, remedy) from error
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        problem = f"the file cannot be read: {first_line(error)}"
        raise UserError(str(path), problem, "check that it is whole and of the format that its name says") from error


def _open_text(path: Path, errors: str) -> io.TextIOWrapper:
    """Open a text, which may be compressed, in the encoding that its first bytes tell."""
    file: Any = gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb")
    return io.TextIOWrapper(file, json.detect_encoding(file.peek(4)[:4]), errors, newline="")


def _read_json(path: Path) -> Iterator[Any]:
    # A byte that is not UTF-8 becomes a lone surrogate, for which its row alone is dropped.
    with _open_text(path, "surrogateescape") as text:
        first = next((line for line in text if line.strip()), "")
        text.seek(0)
        values = _read_values(text.read()) if _goes_on(first) else (_decode(line) for line in text if line.strip())
        for value in values:
            yield from _unfold(value)


def _goes_on(line: str) -> bool:
    """Whether the first line is the beginning of a JSON value over several lines, or a list of rows."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) or line.lstrip().startswith("[{")
    except RecursionError:
        return False
    return isinstance(value, list) and all(isinstance(item, (dict, list)) for item in value)


def _decode(line: str) -> Any:
    """Parse one JSON line; what is not JSON stays text, which `normalise` calls malformed. NaN counts as null."""
    try:
        return json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return line.rstrip("\r\n")


def _read_values(text: str) -> Iterator[Any]:
    """JSON values one after another, over any number of lines; of a list, its items."""
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    at = 0
    while (at := BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]


def _unfold(value: Any) -> Iterator[Any]:
    """The rows of a JSON value: of {"train": [rows]}, of columns; else the value itself."""
    if not isinstance(value, dict):
        yield value
    elif not SIDES & value.keys():
        lists = [part for part in value.values() if isinstance(part, list)]
        rows = [row for row in itertools.chain(*lists) if isinstance(row, dict) and row.keys() >= SIDES]
        yield from rows or [value]
    elif all(map(_is_column, value.values())) and len({*map(len, value.values())}) == 1:
        columns = (column.values() if isinstance(column, dict) else column for column in value.values())
        yield from (dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True))
    else:
        yield value


def _is_column(value: Any) -> bool:
    """Whether a value has a cell for each row: in a list or, as pandas writes it, under numbered keys."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdigit() for key in value)
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    with _open_text(path, "strict") as text:
        header = text.readline()
        text.seek(0)
        # The separator that makes most columns of the header; of several, the first.
        separator = max(",;\t|", key=header.count)
        for row in csv.DictReader(text, delimiter=separator):
            # More cells than the header names: an answer was cut at a comma, and no cell can be trusted.
            yield list(row.values()) if None in row else row


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Any]:
    """What `Dataset.save_to_disk` writes."""
    import pyarrow

    with path.open("rb") as file, pyarrow.ipc.open_stream(file) as batches:
        for batch in batches:
            yield from batch.to_pylist()
