"""Run independent stages in parallel: scheduling, device slots, failures."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.environment import now, output_of
from rlhf_trl.run.launch import POLL, exit_status, launch_command, outlive_signals, pass_on, start
from rlhf_trl.run.layout import RunDir

Slot = Mapping[str, str]  # environment variables of one stage's processes
Running = dict[str, "tuple[subprocess.Popen[bytes], Slot]"]
Start = Callable[[str, Slot], "subprocess.Popen[bytes]"]  # starts the process of a stage in a slot


class Watcher(Protocol):
    """Is told what happens to the stages."""

    def begin(self, stage: str) -> None: ...
    def update(self) -> None: ...
    def end(self, stage: str, status: int) -> None: ...
    def conclude(self, failed: Mapping[str, int], left: Sequence[str]) -> None: ...


# --- device slots ----------------------------------------------------------------------------------------------------


def find_slots(jobs: int, processes: int, say: Callable[[str], None]) -> list[Slot]:
    """Divide this machine into slots and report how; one job alone gets the whole machine."""
    if jobs == 1:
        return [{}]
    # Counted without torch, which would keep memory of each GPU while this process lives.
    gpus = visible_gpus(output_of("nvidia-smi", "-L"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    slots, sentence = plan_slots(jobs, processes, gpus, os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS"))
    say(sentence)
    return slots


def visible_gpus(listing: str, visible: str | None) -> list[str]:
    """List GPUs by index, or by whatever name CUDA_VISIBLE_DEVICES (`visible`) calls them.

    Like CUDA, this ends at the first index that does not exist. `listing` is what `nvidia-smi -L` prints: a line
    `GPU 0: ...` for each, indented lines for the parts of one.
    """
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    if visible is None or count == 0:
        return [str(index) for index in range(count)]
    gpus: list[str] = []
    for name in visible.replace(" ", "").split(","):
        if name in ("", *gpus) or name.startswith("-") or (name.isdigit() and int(name) >= count):
            break
        gpus.append(name)
    return gpus


def plan_slots(
    jobs: int, processes: int, gpus: Sequence[str], cores: int, threads: str | None
) -> tuple[list[Slot], str]:
    """Divide the machine among `jobs` stages; on GPUs, each of a stage's training processes takes one.

    `threads` is OMP_NUM_THREADS where the user has set it. Returns one slot or more, and a sentence on them.
    """
    if not gpus:
        own = threads or str(max(1, cores // (jobs * processes)))
        said = f"up to {jobs} stages at once, OMP_NUM_THREADS={own} in each process"
        return [{"OMP_NUM_THREADS": own}] * jobs, f"--jobs {jobs}: {said}"
    starts = range(0, len(gpus) - processes + 1, processes)
    groups = [",".join(gpus[start : start + processes]) for start in starts][:jobs]
    if len(groups) < 2:
        said = f"one stage at a time; two take {2 * processes} GPUs, and there are {len(gpus)}"
        return [{}], f"--jobs {jobs}: {said}"
    fewer = "" if len(groups) == jobs else f"{len(groups)} at once, not {jobs}; "
    return [{"CUDA_VISIBLE_DEVICES": group} for group in groups], f"--jobs {jobs}: {fewer}GPUs {' | '.join(groups)}"


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launcher:
    """How the stages of one `run` are started."""

    profile: str | None
    processes: int | None
    jobs: int

    def start_in(self, recipe: Recipe, run: RunDir) -> Start:
        """Return the function that starts a stage, which reads the recipe recorded in the run and writes its log."""
        port = 0 if self.jobs > 1 else None  # a free port for each launch

        def start(stage: str, slot: Slot) -> subprocess.Popen[bytes]:
            arguments = ["train", str(run.root), stage, "--recorded", recipe.fingerprint(stage)]
            command, environment = launch_command(arguments, self.profile, self.processes, port)
            return start_logged(command, {**environment, **slot}, run.log(stage))

        return start


def start_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process whose whole output is appended to a log, without progress bars.

    A file, not a pipe: a stage that is told to end with this process saves a checkpoint and loses no output.
    """
    quiet = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"=== {now()} {shlex.join(command)}\n".encode())
        file.flush()
        return start(command, {**environment, **quiet}, stdout=file, stderr=subprocess.STDOUT)


def train_stages(
    stages: Sequence[str], needs: Mapping[str, set[str]], slots: Sequence[Slot], start: Start, watcher: Watcher
) -> int:
    """Train stages in order, each as soon as the stages that it needs are done and a slot is free.

    After a failure or a signal nothing new starts; what is running comes to its own end. A signal is passed on; a
    Ctrl-C reaches the processes by itself. Both make them save a checkpoint. What a stage `needs` and is not in
    `stages` is done. Returns 0, or 128 and the number of the signal, or the status of the first stage that failed.
    """
    waiting, free = list(stages), list(slots)
    running: Running = {}
    ended: dict[str, int] = {}
    passed_on = 0
    with outlive_signals() as received:
        try:
            while True:
                passed_on += pass_on(received[passed_on:], [child for child, _ in running.values()])
                _collect(running, free, ended, watcher)
                missing = {*waiting, *running}
                ready = [stage for stage in waiting if not needs[stage] & missing]
                for stage in ready[: 0 if received or any(ended.values()) else len(free)]:
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
    failed = {stage: status for stage, status in ended.items() if status}
    if failed or received:
        watcher.conclude(failed, waiting)
    return 128 + received[0] if received else next(iter(failed.values()), 0)


def _collect(running: Running, free: list[Slot], ended: dict[str, int], watcher: Watcher) -> None:
    """Take the stages whose processes have ended out of `running`, with their exit status."""
    for stage, (child, slot) in list(running.items()):
        if child.poll() is not None:
            del running[stage]
            free.append(slot)
            ended[stage] = exit_status(child.returncode)
            watcher.end(stage, ended[stage])
