"""Hashes of files, remembered in the run directory: a file is read again only when its inode, size or times change."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import RootModel

from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.documents import read_document
from rlhf_trl.run.files import write_json

# Nanoseconds for which a file's time says nothing: a second write within one tick of the clock leaves it as it is.
TICK = 10**8
Stamp = tuple[int, int, int, int]  # inode, size, times of the last change of content and of the inode (nanoseconds)


class Known(RootModel[dict[str, tuple[Stamp, str]]]):
    """Path of a file -> its stamp, and the SHA-256 of its content."""


class Hashes:
    """The hashes that the file at `path` remembers; where it cannot be read or written, every file is read again."""

    def __init__(self, path: Path):
        self.path = path
        self.new: dict[str, tuple[Stamp, str]] = {}

    @functools.cached_property
    def known(self) -> dict[str, tuple[Stamp, str]]:
        return self._read()

    def of(self, file: Path) -> str:
        """Hash the content of a file (SHA-256)."""
        stat, name = file.stat(), str(file.absolute())
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if name in self.known and self.known[name][0] == stamp:
            return self.known[name][1]
        digest = hash_file(file)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > TICK:
            self.known[name] = self.new[name] = stamp, digest
        return digest

    def save(self) -> None:
        """Remember what is new, beside what other processes have written meanwhile."""
        if self.new and self.path.parent.is_dir():
            merged = {**self._read(), **self.new}
            with contextlib.suppress(OSError):
                write_json(self.path, {name: entry for name, entry in merged.items() if Path(name).exists()})
                self.new = {}

    def _read(self) -> dict[str, tuple[Stamp, str]]:
        document, _ = read_document(self.path, Known)
        return document.root if document else {}


def broken(root: Path, digests: Mapping[str, str], hash_file: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    """Yield each file below `root` that is not as its hash says, and what is wrong with it."""
    for name, digest in digests.items():
        try:
            if not (root / name).is_file():
                yield name, f"{name} is missing"
            elif hash_file(root / name) != digest:
                yield name, f"{name} is damaged"
        except OSError as error:
            yield name, f"{name} cannot be read: {error.strerror}"
