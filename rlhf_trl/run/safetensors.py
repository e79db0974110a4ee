"""Safetensors files without torch: their headers, a hash of their content, and whether every number is finite.

Reads one tensor at a time, and none before the header of its file has passed the library's checks. Writes nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.fingerprint import CHUNK

# Dtype of floats -> bytes of a number, and the bits of its exponent, all of which are set in NaN and infinity.
FLOATS = {"F64": (8, 0x7FF0 << 48), "F32": (4, 0x7F80 << 16), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}


@dataclass(frozen=True)
class Tensor:
    """What the header of a file says of a tensor; `start` and `end` are places in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_empty(self) -> bool:
        return prod(self.shape) == 0


def read_header(file: Path) -> dict[str, Tensor]:
    """Read what a file holds, sorted by name, without any tensor; UserError where the header does not fit the file."""
    try:
        with safe_open(file, framework="numpy"):  # checks lengths, offsets, dtypes and shapes against each other
            pass
    except SafetensorError as error:
        problem = f"the header of the weights is damaged or does not fit the file: {error}"
        raise UserError(file.name, problem, "fetch the file again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all weights of a model's folder, whatever files they are spread over."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(str(folder), "there are no weights in safetensors here", "use a base that has them")
    tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
    return dict(sorted(tensors.items()))


def hash_weights(tensors: dict[str, Tensor]) -> str:
    """Hash (SHA-256) names, dtypes, shapes and every byte; how tensors are spread over files does not matter."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for chunk in _read(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor is free of NaN and infinity; one of whole numbers always is."""
    import numpy as np

    if tensor.dtype not in FLOATS:
        return True
    width, exponent = FLOATS[tensor.dtype]
    bits = np.dtype(f"<u{width}")
    return not any(((np.frombuffer(chunk, bits) & bits.type(exponent)) == exponent).any() for chunk in _read(tensor))


def is_zero(tensor: Tensor) -> bool:
    """Tell whether every byte of a tensor is zero."""
    return not any(chunk.strip(b"\0") for chunk in _read(tensor))


def check_weights(folder: Path) -> list[str]:
    """Return the names of the tensors in a folder; UserError where one is empty or not finite."""
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if tensor.is_empty or not is_finite(tensor):
                problem = f"the tensor {name} is empty or not finite"
                raise UserError(str(file), problem, "lower learning_rate and train again", Exit.DIVERGED)
            names.append(name)
    return names


def _read(tensor: Tensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for at in range(tensor.start, tensor.end, CHUNK):
            yield stream.read(min(CHUNK, tensor.end - at))
