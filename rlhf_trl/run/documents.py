"""The state documents of a run, each with its type, and what a run was made with. Writes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "numpy")


class Document(BaseModel):
    """What `status` and `run` read of a document; its other keys are for the steps."""

    model_config = ConfigDict(strict=True, frozen=True)


T = TypeVar("T", bound=BaseModel)


class Started(Document):
    """`started.json`: what the checkpoints of a stage belong to."""

    fingerprint: str


class Done(Document):
    """`done.json`: what a step depended on and what it wrote (path below the run's root -> SHA-256)."""

    step: str
    fingerprint: str
    seconds: Seconds
    finished: AwareDatetime
    outputs: dict[str, str]
    sealed: str = ""  # hash of the outputs: one that is lost from the list would never be looked at again

    @model_validator(mode="after")
    def _check_seal(self) -> Done:
        if not self.sealed:
            raise PydanticCustomError("seal", "an earlier version of this program wrote it, with fewer checks")
        if self.sealed != seal_outputs(self.outputs):
            raise PydanticCustomError("seal", "its list of outputs was changed")
        return self


def seal_outputs(outputs: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


class Logged(Document):
    """One row of `training_stats.json`."""

    step: Count
    seconds: Seconds
    loss: Finite | None = None
    reward: Finite | None = None
    kl: Finite | None = None


class Stats(Document):
    """`training_stats.json`."""

    max_steps: Count
    history: list[Logged]


class Env(Document):
    """`env.json`: the order of the steps, and the hashes of the sources."""

    plan: list[str]
    sources: dict[str, str]


class WinRate(Document):
    """`winrate.json`: whether the judge came to its end, and on which answers."""

    status: str
    evaluation: str | None = None
    reason: str | None = None


def read_document(path: Path, kind: type[T]) -> tuple[T | None, str | None]:
    """Read a document; None where there is none that can be read, and what is wrong where it is there."""
    try:
        return kind.model_validate_json(path.read_bytes()), None
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"].split(":")[0].lower()])
    return None, f"{path.parent.name}/{path.name} cannot be read: {reason}"


def now() -> str:
    """Local time with its UTC offset, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment() -> dict[str, Any]:
    """Versions, git state and hardware, without importing torch."""
    versions = {"rlhf-trl": metadata.version("rlhf-trl"), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    git = ("git", "-C", str(Path(__file__).parent))
    return {
        "versions": versions,
        "git": output_of(*git, "rev-parse", "HEAD"),
        "git_dirty": bool(output_of(*git, "status", "--porcelain", "--untracked-files=no")),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader").splitlines(),
    }


def output_of(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
