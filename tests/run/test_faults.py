"""Faults of the machine and signals: what is said, with which status, and that no process is left behind."""

import errno
import functools
import os
import re
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, python
from safetensors.torch import load_file, save, save_file

from rlhf_trl.recipe.errors import Exit
from rlhf_trl.run.faults import FAULTS, explain
from rlhf_trl.run.launch import run_command

# What happens, what is said of it, and the exit status.
TABLE = [
    (OSError(errno.ENOSPC, "No space left on device", "a"), "no space is left", Exit.RESOURCES),
    (PermissionError(errno.EACCES, "Permission denied", "a"), "may not read or write it", Exit.RESOURCES),
    (OSError(errno.EROFS, "Read-only file system", "a"), "may not read or write it", Exit.RESOURCES),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "is a file where a folder is needed", Exit.MISTAKE),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "is a folder where a file is needed", Exit.MISTAKE),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), "the file is missing", Exit.DAMAGED),
    (OSError(errno.EMFILE, "Too many open files", "a"), "too many files", Exit.RESOURCES),
    (OSError(errno.ENOLCK, "No locks available", "a"), "has no locks", Exit.RESOURCES),
    (OSError(524, "Unknown error 524", "a"), "has no locks", Exit.RESOURCES),
    (OSError(errno.EIO, "Input/output error", "a"), "the disk reports a fault", Exit.RESOURCES),
    (
        RuntimeError(
            "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's workers "
            "are out of shared memory."
        ),
        "the shared memory is full",
        Exit.RESOURCES,
    ),
    (MemoryError(), "the memory is full", Exit.RESOURCES),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory is full", Exit.RESOURCES),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "no space", Exit.RESOURCES),
]


@pytest.mark.parametrize(("error", "says", "status"), TABLE, ids=lambda value: str(value)[:30])
def test_a_fault_of_the_machine_is_what_happened_where_and_what_to_do(error, says, status):
    told = explain(error, "runs/x")
    (problem,) = told.problems
    assert says in problem.problem and problem.remedy and told.exit == status
    assert problem.place == ("a" if isinstance(error, OSError) else "runs/x")


def test_what_is_no_fault_of_the_machine_keeps_its_traceback():
    for error in (OSError("We could not connect"), RuntimeError("shapes differ"), OSError(99999, "?")):
        assert explain(error, "runs/x") is None


def test_a_full_disk_and_damaged_weights_are_understood_as_safetensors_and_torch_tell_them(tmp_path):
    """A limit on the size of a file is what a test can set; a full disk takes the same ways through the libraries."""
    path, limits = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for write in (lambda x: save_file({"x": x}, path), lambda x: torch.save(x, path)):
            with pytest.raises(FAULTS) as caught:
                write(torch.zeros(10**5))
            assert explain(caught.value, "here").exit == Exit.RESOURCES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path.write_bytes(save({"x": torch.zeros(100)})[:50])
    with pytest.raises(FAULTS) as caught:
        load_file(path)
    assert explain(caught.value, "here").exit == Exit.DAMAGED


def test_the_terminal_gets_the_sentence_and_the_log_the_traceback(tmp_path):
    code = (
        "import resource, sys; from rlhf_trl.cli.app import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "sys.argv = ['rlhf-trl', 'explore', 'demo', '--set', 'data.max_rows=50', '--runs', sys.argv[1]]; main()"
    )
    done = python(code, str(tmp_path))
    assert done.returncode == Exit.RESOURCES and "Traceback" not in done.stderr
    assert "no space is left on the disk" in done.stderr and "whole checkpoints are safe" in done.stderr
    assert "Traceback (most recent call last)" in (tmp_path / "demo" / "logs" / "run.log").read_text()


def test_the_exit_statuses_are_those_of_the_page():
    page = (ROOT / "docs" / "troubles.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| `(\d+)` \| .* \|$", page) == [str(code.value) for code in Exit]


# --- signals ---------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, 0.3), (signal.SIGTERM, 1.2), (signal.SIGINT, 3.0), (signal.SIGTERM, 3.0), (signal.SIGHUP, 3.0)],
)
def test_a_signal_at_any_moment_ends_the_program_with_its_number(number, moment, tmp_path):
    """While it imports, plans, or works; nothing is left running and no traceback is shown."""
    command = [sys.executable, "-m", "rlhf_trl", "run", "demo", "--runs", str(tmp_path)]
    # A shell that starts the tests in the background has them ignore SIGINT.
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heard, start_new_session=True) as process:  # fmt: skip
        time.sleep(moment)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        # A terminal sends Ctrl-C to the whole family.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    assert not any(alive(pid) for pid in family)


def test_a_second_signal_ends_what_no_longer_hears():
    """A call into C keeps Python from its handlers; after the first signal it has the time to come back."""
    code = (
        "import hashlib; from rlhf_trl.run import signals\nsignals.install(); print(flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(1)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


def test_a_hangup_that_is_ignored_stays_so():
    code = "import signal; from rlhf_trl.run import signals\nsignals.install(); signal.raise_signal(signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert python(code).returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_counts_though_the_child_ends_well():
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(60)"
    tell = f"import os, time; time.sleep(0.5); os.kill({os.getpid()}, 15)"
    with subprocess.Popen([sys.executable, "-c", tell]):
        assert run_command([sys.executable, "-c", code], dict(os.environ)) == 128 + signal.SIGTERM


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_children_end_with_a_parent_that_is_killed(tmp_path, system):
    """The parent gets SIGKILL, which it cannot pass on; the kernel ends its child, elsewhere the child itself."""
    child = (
        "import pathlib, os, sys, time; from rlhf_trl.run import signals\n"
        f"sys.platform = {system!r}; signals.install()\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = (
        f"import os, sys; from rlhf_trl.run.launch import run_command; sys.platform = {system!r}\n"
        f"run_command([sys.executable, '-c', {child!r}, sys.argv[1]], dict(os.environ))"
    )
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", code, str(note)], cwd=ROOT) as parent:
        until = time.monotonic() + 30
        while not (note.exists() and note.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        parent.kill()
    pid, until = int(note.read_text()), time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
