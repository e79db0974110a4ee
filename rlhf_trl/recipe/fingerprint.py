"""Hashes of files and of the sources that a recipe names. Reads files in chunks and writes nothing."""

import hashlib
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 24


def hash_file(file: Path) -> str:
    """Hash the content of a file (SHA-256)."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def source_hash(source: str, hash_file: Callable[[Path], str] = hash_file) -> str:
    """Hash the content of a local file or folder, weights included; a Hub id is its own name."""
    path = Path(source)
    if source.startswith("builtin:"):
        path = Path(__file__).parent.parent / "data" / "demo.jsonl.gz"
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    except OSError:  # no path at all, such as a text that is too long for one
        files = []
    if not files:
        return source
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + bytes.fromhex(hash_file(file)))
    return digest.hexdigest()
