"""Start training processes with the accelerate profiles, and check that as many run as were asked for."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML, YAMLError

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.library import suggest
from rlhf_trl.run import signals

PACKAGE = Path(__file__).parent.parent
ASKED = "RLHF_TRL_PROCESSES"
POLL = 0.1  # seconds between two looks at a child


def shipped(kind: str, name: str) -> Path:
    """Find a file that ships with the project (in `recipes` or `accelerate_configs`), by path or by name."""
    path = Path(name)
    if path.is_file():
        return path
    folders = [folder for folder in (PACKAGE / kind, PACKAGE.parent / kind) if folder.is_dir()]
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    if path.exists() and not path.is_dir():  # a pipe, such as /dev/stdin
        return path
    here = {str(file): file for file in sorted(path.parent.glob("*.y*ml"))} if path.parent.is_dir() else {}
    otherwise = suggest(path.stem, known, f"give a path, or one of: {', '.join(known)}")
    problem = "is a folder" if path.is_dir() else f"there is no such file, and none of that name ships in {kind}/"
    raise UserError(name, problem, suggest(name, [*here, *known], otherwise))


def launch_command(
    arguments: Sequence[str], profile: str | None, processes: int | None, port: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """Build the command that runs `rlhf-trl ARGUMENTS` in training processes, and its environment.

    `profile` is a file of `accelerate_configs/` by name or path; None is one process without the launcher. `processes`
    and `port`, where they meet, stand in for the profile's; port 0 is any that is free.
    """
    environment = dict(os.environ)
    command = [sys.executable, "-m"]
    if profile is not None:
        config = shipped("accelerate_configs", profile)
        command += ["accelerate.commands.launch", "--config_file", str(config)]
        asked = processes or profile_processes(config)
        if asked is not None:
            command += ["--num_processes", str(asked)]
            environment[ASKED] = str(asked)
        if port is not None:
            command += ["--main_process_port", str(port)]
        command.append("-m")
    return [*command, "rlhf_trl", *arguments], environment


def run_command(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its exit status, or 128 and the number of the first signal that came.

    A Ctrl-C reaches the child, which saves a checkpoint; this process waits for it. Other signals are passed on.
    """
    with outlive_signals() as received, start(command, environment) as child:
        passed_on = 0
        while child.poll() is None:
            passed_on += pass_on(received[passed_on:], [child])
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL)
    return 128 + received[0] if received else exit_status(child.returncode)


def start(command: Sequence[str], environment: Mapping[str, str], **more: Any) -> subprocess.Popen[bytes]:
    """Start a process that gets SIGTERM when this one ends, however that happens."""
    tied = functools.partial(signals.end_with, os.getpid())
    return subprocess.Popen(command, env={**environment, signals.CHILD: "1"}, preexec_fn=tied, **more)


def pass_on(received: Sequence[int], children: Iterable[subprocess.Popen[bytes]]) -> int:
    """Send signals on, but for SIGINT, which a terminal sends to the children itself; return how many there were."""
    for number, child in itertools.product(received, children):
        if number != signal.SIGINT:
            child.send_signal(number)
    return len(received)


@contextlib.contextmanager
def outlive_signals() -> Iterator[list[int]]:
    """Go on at a signal; returns those that came, a list that grows."""
    received: list[int] = []
    # Handlers, not SIG_IGN, which a child that starts meanwhile would inherit.
    before = signals.handle(lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signals.restore(before)


def exit_status(code: int) -> int:
    """The status of a process as a shell gives it: 128 and the number of the signal that ended it."""
    return code if code >= 0 else 128 - code


def require_processes() -> None:
    """Refuse to train in fewer processes than were asked for.

    `accelerate launch --cpu --num_processes 2` runs one process without a word (huggingface/accelerate#2741).
    """
    asked = int(os.environ[ASKED]) if ASKED in os.environ else _launcher_processes()
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if asked is not None and running < asked:
        problem = f"{asked} processes were asked for and {running} {'is' if running == 1 else 'are'} running"
        remedy = "launch with `--config_file accelerate_configs/ddp.yaml` (without `--cpu`), or with torchrun"
        raise UserError("accelerate launch", problem, remedy)


def _launcher_processes() -> int | None:
    """The number of processes on the command line of the `accelerate launch` above this process, if there is one."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:  # it has ended, or belongs to somebody else
        return None
    for index, word in enumerate(words):
        name = Path(word).name
        short = name == "accelerate" and words[index + 1 : index + 2] == ["launch"]
        if short or name in ("accelerate-launch", "accelerate.commands.launch"):
            from accelerate.commands.launch import launch_command_parser

            args, _ = launch_command_parser().parse_known_args(words[index + 1 + short :])
            config = profile_processes(Path(args.config_file)) if args.config_file else None
            return config if args.num_processes is None else args.num_processes
    return None


def profile_processes(config: Path) -> int | None:
    return _read_profile(config).get("num_processes")


def require_one_machine(config: Path) -> None:
    """Refuse to train several stages at once on several machines: their ports would not agree."""
    machines = _read_profile(config).get("num_machines", 1)
    if machines > 1:
        raise UserError("--jobs", f"{config.stem} is a profile of {machines} machines", "leave --jobs out")


def _read_profile(config: Path) -> dict[str, Any]:
    try:
        profile = YAML(typ="safe", pure=True).load(config.read_text(encoding="utf-8"))
        problem = "" if isinstance(profile, dict) else "is not a profile of accelerate"
    except OSError as error:
        problem = f"cannot read the profile: {error.strerror}"
    except (YAMLError, UnicodeDecodeError) as error:
        problem = f"not valid YAML: {' '.join(str(error).split())}"
    if problem:
        raise UserError(str(config), problem, "give a file or a name of accelerate_configs/")
    return profile
