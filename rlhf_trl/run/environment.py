"""What a run was made with: package versions, git state and hardware, without importing torch."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parent.parent)
PACKAGES = ["torch", "trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "numpy"]
MOMENT = "%Y-%m-%dT%H:%M:%S%z"


def now() -> str:
    """Local time with its UTC offset, ISO 8601."""
    return time.strftime(MOMENT)


def environment() -> dict[str, Any]:
    """Versions, git state and hardware, without importing torch."""
    versions = {"rlhf-trl": metadata.version("rlhf-trl"), "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "versions": versions,
        "git": output_of("git", "-C", PACKAGE, "rev-parse", "HEAD"),
        "git_dirty": bool(output_of("git", "-C", PACKAGE, "status", "--porcelain", "--untracked-files=no")),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [line.strip() for line in gpus.splitlines()],
    }


def output_of(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
