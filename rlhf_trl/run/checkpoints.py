"""Checkpoints on disk: seal one with a manifest of hashes, list them, and find the newest that is whole."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.files import read_json, write_json


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint, last, with everything on disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        sync(file)
    write_json(folder / "manifest.json", {str(file.relative_to(folder)): hash_file(file) for file in files})
    sync(folder)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def last_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files match its manifest, and why each newer one was passed over."""
    rejected: list[str] = []
    for _, path in sorted(list_checkpoints(folder).items(), reverse=True):
        reason = damage(path)
        if reason is None:
            return path, rejected
        rejected.append(f"{path.name}: {reason}")
    return None, rejected


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """List the checkpoints of a stage by step, whole or not."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return {int(step): path for step, path in sorted(found) if step.isdigit()}


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None."""
    try:
        for name, digest in read_json(checkpoint / "manifest.json").items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if hash_file(checkpoint / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError):
        return "it has no manifest that can be read"
    return None
