"""Processes: the launch of training with the accelerate profiles, and stages side by side in slots of the machine."""

import contextlib
import functools
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import psutil
from ruamel.yaml import YAML, YAMLError

from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.library import suggest
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run import signals
from rlhf_trl.run.documents import now, output_of
from rlhf_trl.run.layout import RunDir

PACKAGE = Path(__file__).parent.parent
ASKED = "RLHF_TRL_PROCESSES"
POLL = 0.1  # seconds between two looks at a child
Process = subprocess.Popen[bytes]
Slot = Mapping[str, str]  # environment variables of one stage's processes
Start = Callable[[str, Slot], Process]  # starts the process of a stage in a slot


class Watcher(Protocol):
    """Is told what happens to the stages."""

    def begin(self, stage: str) -> None: ...
    def update(self) -> None: ...
    def end(self, stage: str, status: int) -> None: ...
    def conclude(self, failed: Mapping[str, int], left: Sequence[str]) -> None: ...


# --- profiles and processes ------------------------------------------------------------------------------------------


def shipped(kind: str, name: str) -> Path:
    """Find a file that ships with the project (in `recipes` or `accelerate_configs`), by path or by name."""
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for folder in (PACKAGE / kind, PACKAGE.parent / kind) for file in folder.glob("*.yaml")}
    if name in known:
        return known[name]
    if path.exists() and not path.is_dir():  # a pipe, such as /dev/stdin
        raise UserError(name, "is no file that can be read twice", "save the text in a file, and give its path")
    here = map(str, path.parent.glob("*.y*ml"))
    otherwise = suggest(path.stem, sorted(known), f"give a path, or one of: {', '.join(sorted(known))}")
    problem = "is a folder" if path.is_dir() else f"there is no such file, and none of that name ships in {kind}/"
    raise UserError(name, problem, suggest(name, sorted([*here, *known]), otherwise))


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
        # After a signal, torch's launcher leaves its processes 30 s, and a step with its checkpoint may take longer.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        asked = processes or profile_processes(config)
        if asked is not None:
            command += ["--num_processes", str(asked)]
            environment[ASKED] = str(asked)
        if port is not None:
            command += ["--main_process_port", str(port)]
        command.append("-m")
    return [*command, "rlhf_trl", *arguments], environment


def profile_processes(config: Path) -> int | None:
    return _read_profile(config).get("num_processes")


def zero_stage(config: Path) -> int:
    """What a profile shards over its processes: 0 nothing, 2 gradients and optimizer, 3 the weights, too (or FSDP)."""
    profile = _read_profile(config)
    return 3 if profile.get("distributed_type") == "FSDP" else profile.get("deepspeed_config", {}).get("zero_stage", 0)


def require_profile(config: Path, jobs: int = 1) -> None:
    """Refuse DeepSpeed where it is not installed, and several stages at once on several machines, as their ports would
    not agree."""
    profile = _read_profile(config)
    if profile.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        problem = f"{config.stem} needs the package deepspeed, which is not installed"
        raise UserError("--accelerate", problem, 'pip install "rlhf-trl[deepspeed]"')
    if jobs > 1 and profile.get("num_machines", 1) > 1:
        raise UserError("--jobs", f"{config.stem} is a profile of several machines", "leave --jobs out")


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


def require_processes() -> None:
    """Refuse to train in fewer processes than were asked for: `accelerate launch --cpu --num_processes 2` runs one
    without a word (huggingface/accelerate#2741)."""
    asked = int(os.environ[ASKED]) if ASKED in os.environ else _launcher_processes()
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if running > 1 and "LOCAL_RANK" not in os.environ:  # a cluster has set it, for its machines
        problem = f"{running} processes are named there, and no launcher has started this one"
        raise UserError("WORLD_SIZE", problem, "unset it and RANK, or launch with --accelerate or torchrun")
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
    at = re.search(r"\baccelerate(?:-|\.commands\.|\0)launch\0(.*)", "\0".join(words), re.DOTALL)
    if at is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(at[1].split("\0"))
    return args.num_processes or (profile_processes(Path(args.config_file)) if args.config_file else None)


def start(command: Sequence[str], environment: Mapping[str, str], **more: Any) -> Process:
    """Start a process that gets SIGTERM when this one ends, however that happens."""
    tied = functools.partial(signals.end_with, os.getpid()) if sys.platform == "linux" else None
    return subprocess.Popen(command, env={**environment, signals.CHILD: "1"}, preexec_fn=tied, **more)


def start_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a process whose whole output is appended to a log, without progress bars. A file, not a pipe: a stage that
    is told to end with this process saves a checkpoint and loses no output."""
    quiet = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"=== {now()} {shlex.join(command)}\n".encode())
        file.flush()
        return start(command, {**environment, **quiet}, stdout=file, stderr=subprocess.STDOUT)


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit status, or 128 and the number of the first signal that came."""
    with _outlive_signals() as pass_on, start(command, environment) as child:
        while child.poll() is None:
            pass_on([child])
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL)
    received = pass_on([])
    return 128 + received[0] if received else exit_status(child.returncode)


@contextlib.contextmanager
def _outlive_signals() -> Iterator[Callable[[Iterable[Process]], list[int]]]:
    """Go on at a signal; yields a function that sends new ones on to children, which a Ctrl-C at a terminal reaches by
    itself, and returns all that came."""
    received: list[int] = []
    sent = 0

    def send(children: Iterable[Process]) -> list[int]:
        nonlocal sent
        new, sent = received[sent:], len(received)
        for number, child in itertools.product(new, children):
            if number != signal.SIGINT or not signals.in_foreground():
                child.send_signal(number)
        return received

    # Handlers, not SIG_IGN, which a child that starts meanwhile would inherit.
    before = signals.handle(lambda number, _: received.append(number))
    try:
        yield send
    finally:
        signals.restore(before)


def exit_status(code: int) -> int:
    """The status of a process as a shell gives it: 128 and the number of the signal that ended it."""
    return code if code >= 0 else 128 - code


# --- stages side by side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launcher:
    """How the stages of one `run` are started."""

    profile: str | None
    processes: int | None
    jobs: int

    def start_in(self, recipe: Recipe, run: RunDir) -> Start:
        """Return the function that starts a stage, which reads the recipe recorded in the run and writes its log."""
        port = 0 if self.jobs > 1 else None  # a free port for each launch

        def start(stage: str, slot: Slot) -> Process:
            arguments = ["train", str(run.root), stage, "--recorded", recipe.fingerprint(stage)]
            command, environment = launch_command(arguments, self.profile, self.processes, port)
            return start_logged(command, {**environment, **slot}, run.log(stage))

        return start


def find_slots(jobs: int, processes: int, say: Callable[[str], None]) -> list[Slot]:
    """Divide this machine into slots and report how; one job alone gets the whole machine."""
    if jobs == 1:
        return [{}]
    # Counted without torch, which would keep memory of each GPU while this process lives.
    gpus = visible_gpus(output_of("nvidia-smi", "-L"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    slots, sentence = plan_slots(jobs, processes, gpus, os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS"))
    say(f"--jobs {jobs}: {sentence}")
    return slots


def visible_gpus(listing: str, visible: str | None) -> list[str]:
    """List GPUs by index, or by whatever name CUDA_VISIBLE_DEVICES (`visible`) calls them.

    Like CUDA, this ends at the first index that does not exist: a stage that got one would train on the CPU.
    `listing` is what `nvidia-smi -L` prints: a line `GPU 0: ...` for each, indented lines for the parts of one.
    """
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    names = map(str, range(count)) if visible is None else visible.replace(" ", "").split(",")
    exists = lambda name: name and name[0] != "-" and not (name.isdigit() and int(name) >= count)  # noqa: E731
    return list(dict.fromkeys(itertools.takewhile(exists, names))) if count else []


def plan_slots(
    jobs: int, processes: int, gpus: Sequence[str], cores: int, threads: str | None
) -> tuple[list[Slot], str]:
    """Divide the machine among `jobs` stages; on GPUs, each of a stage's training processes takes one.

    `threads` is OMP_NUM_THREADS where the user has set it. Returns one slot or more, and a sentence on them.
    """
    if not gpus:
        own = threads or str(max(1, cores // (jobs * processes)))
        said = f"up to {jobs} stages at once, OMP_NUM_THREADS={own} in each process"
        return [{"OMP_NUM_THREADS": own}] * jobs, said
    starts = range(0, len(gpus) - processes + 1, processes)
    groups = [",".join(gpus[start : start + processes]) for start in starts][:jobs]
    if len(groups) < 2:
        return [{}], f"one stage at a time; two take {2 * processes} GPUs, and there are {len(gpus)}"
    fewer = "" if len(groups) == jobs else f"{len(groups)} at once, not {jobs}; "
    return [{"CUDA_VISIBLE_DEVICES": group} for group in groups], f"{fewer}GPUs {' | '.join(groups)}"


def train_stages(
    stages: Sequence[str], needs: Mapping[str, set[str]], slots: Sequence[Slot], start: Start, watcher: Watcher
) -> int:
    """Train stages in order, each as soon as the stages that it needs are done and a slot is free.

    After a failure or a signal nothing new starts; what is running comes to its own end. What a stage `needs` and is
    not in `stages` is done. Returns 0, or 128 and the number of the signal, or the status of the first stage that
    failed.
    """
    waiting, free = list(stages), list(slots)
    running: dict[str, tuple[Process, Slot]] = {}
    failed: dict[str, int] = {}
    with _outlive_signals() as pass_on:
        try:
            while True:
                received = pass_on([child for child, _ in running.values()])
                for stage, (child, slot) in list(running.items()):
                    if child.poll() is not None:
                        del running[stage]
                        free.append(slot)
                        status = exit_status(child.returncode)
                        failed |= {stage: status} if status else {}
                        watcher.end(stage, status)
                missing = {*waiting, *running}
                ready = [stage for stage in waiting if not needs[stage] & missing]
                for stage in ready[: 0 if received or failed else len(free)]:
                    waiting.remove(stage)
                    watcher.begin(stage)
                    slot = free.pop(0)
                    running[stage] = start(stage, slot), slot
                if not running:
                    break
                watcher.update()
                time.sleep(POLL)
        finally:
            for child, _ in running.values():
                child.terminate()
            for child, _ in running.values():
                child.wait()
    if failed or received:
        watcher.conclude(failed, waiting)
    return 128 + received[0] if received else next(iter(failed.values()), 0)
