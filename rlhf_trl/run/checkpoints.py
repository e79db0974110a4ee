"""Checkpoints on disk: seal one with a manifest of hashes, list them, and set aside what is not whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from pydantic import RootModel

from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.documents import read_document
from rlhf_trl.run.files import by_umask, write_json
from rlhf_trl.run.hashes import broken

Patterns = tuple[tuple[str, ...], ...]
# What a stage goes on from: its place, weights, optimizer, schedule and random states; a pattern of each is there.
NEEDED: Patterns = (
    ("trainer_state.json",),
    ("*.safetensors", "pytorch_model*", "global_step*/*model_states.pt"),
    ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "global_step*/*optim_states.pt"),
    ("scheduler.pt", "global_step*/*"),
    ("rng_state*.pth",),
)
NEEDED_BY: dict[str, Patterns] = {"ppo": (("ppo_state.json",), ("adapter_model.safetensors",), ("value.safetensors",))}


class Manifest(RootModel[dict[str, str]]):
    """Path of a file below the checkpoint -> SHA-256."""


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint, last, with everything on disk."""
    files = list_files(folder)
    for file in files.values():
        by_umask(file)
        sync(file)
    write_json(folder / "manifest.json", {name: hash_file(file) for name, file in files.items()})
    sync(folder)


def list_files(folder: Path) -> dict[str, Path]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files if file != folder / "manifest.json"}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside_damaged(folder: Path, trainer: str) -> list[str]:
    """Rename what is newer than the newest whole checkpoint, so that nothing meets it; say of each what is wrong.

    A folder of checkpoints that may not be read is renamed as a whole.
    """
    said = []
    readable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    for path in reversed(list_checkpoints(folder).values()) if readable else [folder]:
        reason = damage(path, NEEDED + NEEDED_BY.get(trainer, ()))
        if reason is None or not path.exists():
            break
        path.rename(path.with_name(f".unusable-{path.name}-{time.time_ns()}"))
        said.append(f"{path.name}: {reason}")
    return said


def newest_checkpoint(folder: Path) -> Path | None:
    return max(list_checkpoints(folder).items(), default=(0, None))[1]


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """List the checkpoints of a stage by step, whole or not."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return dict(sorted((int(step), path) for step, path in found if step.isdigit()))


def damage(folder: Path, needed: Patterns = NEEDED, hash_file: Callable[[Path], str] = hash_file) -> str | None:
    """Say what is wrong with a sealed folder, or None: its files are those of its manifest, and `needed` is there."""
    manifest, _ = read_document(folder / "manifest.json", Manifest)
    if manifest is None:
        return "it has no manifest that can be read"
    files = list_files(folder)
    for name in files.keys() - manifest.root.keys():
        return f"{name} is not in the manifest"
    for patterns in needed:
        if not any(fnmatch(name, pattern) for name in manifest.root for pattern in patterns):
            return f"{patterns[0]} is missing"
    return next((sentence for _, sentence in broken(folder, manifest.root, hash_file)), None)
