"""Reading and writing whole files: text, JSON and JSON lines. A write is atomic."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_trl.text.redact import without_values

AT_ONCE = 1000  # pieces of text that a file takes in one
_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False).encode


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that then takes its place; a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[str], None]]:
    """Open a file, as a function that writes to it, without secrets, as `replacing` does."""
    waiting: list[str] = []

    def write(text: str, at_once: bool = False) -> None:
        waiting.append(text)
        if at_once or len(waiting) == AT_ONCE:
            file.write(without_values("".join(waiting)))
            waiting.clear()

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield write
        write("", at_once=True)


def write_text(path: Path, text: str) -> None:
    with writing(path) as write:
        write(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; ValueError where a number is NaN or infinite."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON object a line, row by row."""
    with writing(path) as write:
        for row in rows:
            write(json_line(row))


def json_line(row: Any) -> str:
    return _encode(row) + "\n"


def read_jsonl(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def by_umask(file: Path) -> None:
    """Let a file be read as the user's umask says; safetensors lets nobody but its owner read one."""
    mask = os.umask(0o077)
    os.umask(mask)
    if file.suffix == ".safetensors":
        file.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file, or the list of what lies in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder, if there is one, also where folders in it may not be read; of a link to one, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        for place, names, _ in itertools.chain([(str(folder.parent), [folder.name], [""])], os.walk(folder)):
            for path in (Path(place) / name for name in names):
                if not path.is_symlink() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                    path.chmod(0o700)
        shutil.rmtree(folder)
