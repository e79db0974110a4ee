"""Whether what lies in a run is whole: remembered hashes of files, and checkpoints with a manifest of theirs."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from pydantic import RootModel

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.documents import read_document
from rlhf_trl.run.files import by_umask, sync, write_json

# Nanoseconds for which a file's time says nothing: a second write within one tick of the clock leaves it as it is.
TICK = 10**8
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
# Who shards what a checkpoint holds -> what only that one writes.
SHARDED = {"DeepSpeed": "global_step*", "FSDP": "optimizer[._][b0-9]*"}
Stamp = tuple[int, int, int, int]  # inode, size, times of the last change of content and of the inode (nanoseconds)


class Known(RootModel[dict[str, tuple[Stamp, str]]]):
    """Path of a file -> its stamp, and the SHA-256 of its content."""


class Manifest(RootModel[dict[str, str]]):
    """Path of a file below the checkpoint -> SHA-256."""


class Hashes:
    """The hashes of files (SHA-256), remembered in the file at `path`: a file is read again when its stamp changes."""

    def __init__(self, path: Path):
        self.path = path
        self.new: dict[str, tuple[Stamp, str]] = {}
        self.known = self._read()

    def of(self, file: Path) -> str:
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


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint, last, with everything on disk."""
    files = _list_files(folder)
    for file in files.values():
        by_umask(file)
        sync(file)
    write_json(folder / "manifest.json", {name: hash_file(file) for name, file in files.items()})
    sync(folder)


def damage(folder: Path, needed: Patterns = NEEDED, hash_file: Callable[[Path], str] = hash_file) -> str | None:
    """Say what is wrong with a sealed folder, or None: its files are those of its manifest, and `needed` is there."""
    manifest, _ = read_document(folder / "manifest.json", Manifest)
    if manifest is None:
        return "it has no manifest that can be read"
    for name in _list_files(folder).keys() - manifest.root.keys():
        return f"{name} is not in the manifest"
    for patterns in needed:
        if not any(fnmatch(name, pattern) for name in manifest.root for pattern in patterns):
            return f"{patterns[0]} is missing"
    return next((sentence for _, sentence in broken(folder, manifest.root, hash_file)), None)


def _list_files(folder: Path) -> dict[str, Path]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files if file != folder / "manifest.json"}


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """List the checkpoints of a stage by step, whole or not."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return dict(sorted((int(step), path) for step, path in found if step.isdecimal()))


def newest_checkpoint(folder: Path) -> Path | None:
    return max(list_checkpoints(folder).items(), default=(0, None))[1]


def require_launch(checkpoint: Path, sharding: str, processes: int, batch_is_fixed: bool) -> None:
    """Refuse to go on where the library would take up a checkpoint otherwise than it was meant.

    Where its files of optimizer and schedule are missing it begins new ones, and it counts the steps of another batch
    as its own (huggingface/transformers#22580). DeepSpeed divides its state among so many processes.
    """
    written = len([*checkpoint.glob("rng_state*.pth")])
    before = next((name for name, pattern in SHARDED.items() if any(checkpoint.glob(pattern))), "none")
    if before != sharding or not (written == processes or (batch_is_fixed and before != "DeepSpeed")):
        was, now = f"{written} process(es), sharding: {before}", f"{processes}, sharding: {sharding}"
        remedy = f"launch the stage as before, or delete {checkpoint.parent} to begin it anew"
        raise UserError(str(checkpoint), f"was written by {was}; this launch is of {now}", remedy)


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
