"""Hashes of files, remembered in the run directory: a file is read again only when its inode, size or times change."""

from __future__ import annotations

import contextlib
import time
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
        self.known: dict[str, tuple[Stamp, str]] | None = None
        self.new: dict[str, tuple[Stamp, str]] = {}

    def of(self, file: Path) -> str:
        """Hash the content of a file (SHA-256)."""
        if self.known is None:
            self.known = self._read()
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
