"""What an error of the machine means to a user: disk, permissions, memory. Reads and writes nothing."""

import errno
import re

from safetensors import SafetensorError

from rlhf_trl.recipe.errors import Exit, UserError

# What the machine, torch (RuntimeError) and safetensors raise; `explain` tells which of them are no defects.
FAULTS = (OSError, MemoryError, RuntimeError, SafetensorError)

SAFE = "finished steps and whole checkpoints are safe, and the same command goes on from there"
FULL = "no space is left on the disk", f"free some; {SAFE}", Exit.RESOURCES
CLOSED = "this user may not read or write it", f"change its permissions, or choose a folder with --runs; {SAFE}"
NO_FOLDER = "is a file where a folder is needed", "choose a folder that you may write to with --runs", Exit.MISTAKE
NO_LOCKS = "the file system has no locks", "choose a folder on another one with --runs", Exit.RESOURCES
NO_SHARED = "the shared memory is full", "in docker, add --ipc=host; else dataloader_num_workers: 0", Exit.RESOURCES
TOO_MANY = "too many files are open", f"raise `ulimit -n`; {SAFE}", Exit.RESOURCES
MEMORY = "the memory is full", f"use smaller batches, a shorter max_length or fewer --jobs; {SAFE}", Exit.RESOURCES
GONE = "the file is missing", "`rlhf-trl status RUN` says what is damaged, and `rlhf-trl run RECIPE` makes it again"

# Number of an OSError -> what happened, what to do, and the exit status.
NUMBERS: dict[int, tuple[str, str, Exit]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), (*CLOSED, Exit.RESOURCES)),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), NO_FOLDER),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), TOO_MANY),
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524), NO_LOCKS),  # 524: ENOTSUPP of the kernel
    errno.EISDIR: ("is a folder where a file is needed", "remove it, or give another path", Exit.MISTAKE),
    errno.EIO: ("the disk reports a fault", f"check the disk; {SAFE}", Exit.RESOURCES),
    errno.ENOMEM: MEMORY,
    errno.ENOENT: (*GONE, Exit.DAMAGED),
}
# What the libraries say without a number.
TEXTS: tuple[tuple[str, tuple[str, str, Exit]], ...] = (
    (r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos \d+", FULL),
    (r"of shared memory|shared memory segment|/dev/shm", NO_SHARED),
    (r"out of memory|can't allocate memory|Unable to allocate", MEMORY),
    (r"SafetensorError|PytorchStreamReader failed", ("a file of weights is damaged", GONE[1], Exit.DAMAGED)),
)


def explain(error: BaseException, place: str) -> UserError | None:
    """Say what an error of the machine, or what a library makes of one, means; None of any other error.

    `place` stands in where the error names no file.
    """
    text = f"{type(error).__name__}: {error}"
    by_library = re.search(r"\(os error (\d+)\)", text)
    number = error.errno if isinstance(error, OSError) else by_library and int(by_library[1])
    meaning = MEMORY if isinstance(error, MemoryError) else NUMBERS.get(number or 0)
    if meaning is None and not isinstance(error, OSError):
        meaning = next((meaning for pattern, meaning in TEXTS if re.search(pattern, text)), None)
    return meaning and UserError(str(getattr(error, "filename", None) or place), *meaning)
