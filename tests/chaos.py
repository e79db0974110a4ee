"""The campaign against silent damage: fuzzed inputs, damaged files, killed processes; counts what nobody may see.

Run as `make chaos` (30 minutes at most on two cores). It prints its seed and one table, and ends with 1 where a result
differs without a word, a traceback shows, something hangs for more than 10 seconds, or a verdict is lost:

    make chaos                                  # every part
    make chaos ARGS="--seed 7 --only kills"     # one part again; --only recipes:137 is one input of it
    make chaos ARGS="--only cost"               # what verifying outputs adds to a run, at most 2 %
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OPENAI_API_KEY": "EMPTY"}

import fuzz
from conftest import RECIPE, ROOT, reset_accelerate
from fake_openai import FakeOpenAI, completion
from fuzz import Lost, Tally, Wrong

from rlhf_trl.cli.run import execute, steps_to_run
from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run import layout
from rlhf_trl.run.checkpoints import list_checkpoints
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir

FAULTS = ("silent", "tracebacks", "hangs", "lost")
STAGES = ("sft", "rm", "dpo", "grpo", "ppo")
# Two or three steps a stage, each with a checkpoint, and as little as possible after them.
CHANGES = {
    'save_strategy: "no"': "save_strategy: steps\n      save_steps: 1", "total_episodes: 32": "total_episodes: 48",
    "max_steps: 12": "max_steps: 3", "max_steps: 6": "max_steps: 3", "max_steps: 4": "max_steps: 3",
    "num_generations: 4": "num_generations: 2", "max_rows: 240": "max_rows: 160",
    "prompts: 12, max_new_tokens: 16, best_of_n: 4": "prompts: 6, max_new_tokens: 8, best_of_n: 2",
}  # fmt: skip
TEXT = RECIPE + "errors: {pairs: 20, examples: 2}\nsamples: {per_model: 2}\njudge: {prompts: 6, workers: 4}\n"
for before, after in CHANGES.items():
    assert before in TEXT
    TEXT = TEXT.replace(before, after)


# --- a server, half of whose answers are 429 -------------------------------------------------------------------------


class Busy(FakeOpenAI):
    """A judge that prefers by a hash of what it is shown; it counts the verdicts that it gave."""

    def __init__(self, seed: int):
        self.given, rng, turn = 0, random.Random(seed), threading.Lock()

        def act(handler: Any, body: dict[str, Any]) -> None:
            with turn:
                refuses = rng.random() < 0.5
                self.given += not refuses
            verdict = "AB"[hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0] % 2]
            message = {"error": {"message": "busy"}} if refuses else completion(f"[[{verdict}]]")
            handler.answer(message, 429 if refuses else 200)

        super().__init__(then=act)


# --- runs ------------------------------------------------------------------------------------------------------------


def hashes(run: RunDir) -> dict[str, str]:
    """The hash of each file of a run, without those of attempts and of its logs."""
    aside = ("replaced", "logs", ".locks", "checkpoints")
    files = [file for file in sorted(run.root.rglob("*")) if file.is_file() and file.suffix not in (".png", ".html")]
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
            if not {*Path(name := file.relative_to(run.root).as_posix()).parts} & {*aside}}  # fmt: skip


def differing(run: RunDir, expected: dict[str, str]) -> list[str]:
    now = hashes(run)
    return [name for name, digest in expected.items() if now.get(name) != digest]


class Here:
    """Stands in for the launcher: trains a stage in this process."""

    jobs, returncode = 1, 0

    def start_in(self, recipe: Recipe, run: RunDir) -> Callable[..., Any]:
        from rlhf_trl.train.step import train

        def start(stage: str, slot: object) -> "Here":
            run.logs.mkdir(exist_ok=True)
            run.log(stage).touch()
            with run.lock(stage):
                train(recipe, RunDir(run.root), stage)  # as a process of its own, which knows no hashes yet
            reset_accelerate()
            return self

        return start

    def poll(self) -> int:
        return 0

    terminate = wait = poll


def finish(recipe: Recipe, run: RunDir, leave_out: str = "") -> str:
    """What `run` does, in this process; returns what it says."""
    said, handler = io.StringIO(), logging.StreamHandler(io.StringIO())
    handler.stream = said
    logging.getLogger("rlhf_trl").addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for _ in range(5):  # a judge that was refused too often goes on at the next start
            launcher: Any = Here()
            waiting = [step for step in steps_to_run(recipe, run) if step != leave_out]
            execute(recipe, run, waiting, launcher, 1)
            if run.is_done(recipe, "judge"):
                break
    logging.getLogger("rlhf_trl").removeHandler(handler)
    return said.getvalue()


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rlhf_trl", "run", str(folder / "small.yaml"), "--runs", str(folder), *options]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=output, stderr=output, start_new_session=True)


def complete(folder: Path, *options: str) -> None:
    for _ in range(5):
        code = start(folder, *options).wait(600)
        if code != Exit.NOT_RUN:
            break
    if code:
        raise Wrong(f"ended with {code}: {(folder / 'output.txt').read_text()[-1500:]}")


@functools.cache
def undisturbed(home: Path) -> tuple[Recipe, dict[str, str]]:
    """Two undisturbed runs at the same time, in this process and in others; the files in which they agree."""
    folders = [home / "here", home / "others"]
    for folder in folders:
        folder.mkdir()
        (folder / "small.yaml").write_text(TEXT)
    recipe = load_recipe(folders[0] / "small.yaml")
    other = threading.Thread(target=complete, args=(folders[1], "--jobs", "2"))
    other.start()
    finish(recipe, RunDir(folders[0] / "small"))
    other.join()
    one, two = (hashes(RunDir(folder / "small")) for folder in folders)
    same = {name: digest for name, digest in one.items() if two.get(name) == digest}
    differ = sorted((one.keys() | two.keys()) - same.keys())
    weights = {f"{stage}/adapter/adapter_model.safetensors" for stage in STAGES[1:]}
    needed = weights | {"sft/model/model.safetensors", "data/train.jsonl", "evaluation/completions-ppo.jsonl"}
    needed |= {"judge/prompt_scores.json"}
    if not same.keys() >= needed:
        raise Wrong(f"two undisturbed runs differ in {sorted(needed - same.keys())}")
    print(f"  two undisturbed runs: {len(same)} files are bit-equal, {len(differ)} have times in them", flush=True)
    return recipe, same


# --- damages ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(**values: Any) -> Callable[[Path], None]:
    return lambda path: write_json(path, {**read_json(path), **values})


def keep_one(path: Path) -> None:
    write_json(path, dict([next(iter(read_json(path).items()))]))


# What is damaged (below the folder of a stage, of its newest checkpoint, or `data/`) -> how.
WAYS: dict[str, Callable[[Path], Any]] = {
    "bit": flip, "cut": cut, "gone": Path.unlink, "{}": lambda path: path.write_text("{}"),
    "by hand": lambda path: path.write_text('{"step": 1}'), "one file": keep_one, "no outputs": edit(outputs={}),
}  # fmt: skip
DAMAGES = {
    "result": {"*/*.safetensors": "bit cut gone", "*/*config.json": "bit", "training_stats.json": "bit gone {}",
               "done.json": "bit cut {}, no outputs"},
    "checkpoint": {"manifest.json": "bit gone {}, one file", "optimizer.pt": "bit cut", "*.safetensors": "bit gone",
                   "trainer_state.json": "cut", "../../started.json": "by hand", "../../training_stats.json": "gone"},
    "data": {"prompts_train.jsonl": "bit", "train.jsonl": "bit cut", "done.json": "{}"},
}  # fmt: skip


def cases() -> Iterator[tuple[str, str, str, str]]:
    for stage, (kind, table) in itertools.product(STAGES, DAMAGES.items()):
        yield from ((stage, kind, file, how) for file, ways in table.items() for how in WAYS if how in ways)


def damages(tally: Tally, home: Path, share: float) -> None:
    """Each damage of what a trainer wrote, reads or goes on from: named, refused, made again, with the same files."""
    recipe, expected = undisturbed(home)
    for number, (stage, kind, pattern, how) in enumerate(cases()):
        kept = random.Random(f"{tally.seed} damages {number}").random() < share
        if number != tally.only if tally.only is not None else not kept:
            continue
        run = RunDir(home / "damaged" / "small")
        shutil.rmtree(run.root, ignore_errors=True)
        shutil.copytree(home / "here" / "small", run.root)
        with tally.attempt(f"{number} ({stage}: {kind}: {pattern}: {how})", limit=120):
            damage(recipe, run, stage, kind, pattern, WAYS[how])
            said = finish(recipe, run, leave_out="report")
            if "Traceback" in said:
                raise RuntimeError(said[-1500:])
            if names := differing(run, expected):
                raise Wrong(f"{names} differ: {said[-500:]}")
            if kind == "checkpoint" and how != "gone" and not ("passed over" in said or "made again" in said):
                raise Wrong(f"nothing is said: {said[-500:]}")


def damage(recipe: Recipe, run: RunDir, stage: str, kind: str, pattern: str, harm: Callable[[Path], Any]) -> None:
    """Do the damage; see that it is found, and that a trainer that reads the file refuses to begin."""
    folder = {"result": run.step(stage), "data": run.data, "checkpoint": run.checkpoints(stage)}[kind]
    if kind == "checkpoint":  # as an attempt that was killed after its last checkpoint leaves it
        run.done(stage).unlink()
        shutil.rmtree(run.adapter(stage), ignore_errors=True)
        folder = [*list_checkpoints(folder).values()][-1]
    harm(next(iter(sorted(folder.glob(pattern))), folder / pattern))
    run, step = RunDir(run.root), "prepare" if kind == "data" else stage
    if step not in steps_to_run(recipe, run):
        raise Wrong("the step counts as done")
    readers = [stage] if kind == "data" else [name for name, links in recipe.links.items() if stage in links]
    for reader in readers[: 0 if kind == "checkpoint" else 1]:
        run.done(reader).unlink()
        try:
            Here().start_in(recipe, run)(reader, {})
        except UserError as error:
            if error.exit not in (Exit.DAMAGED, Exit.NOT_RUN):
                raise Wrong(f"{reader} ends with {error.exit}") from error
        else:
            raise Wrong(f"{reader} is trained on it")


# --- kills -----------------------------------------------------------------------------------------------------------

HOW = ("run KILL", "run TERM", "run HUP", "all INT", "step KILL", "all TERM")
MODES = (("--jobs", "1"), ("--jobs", "2"), ("--accelerate", "ddp", "--processes", "2"))


TRACEBACK = re.compile(r"^Traceback .*?^\S[^\n]*", re.MULTILINE | re.DOTALL)
LAUNCHERS = re.compile(r"ChildFailedError|SignalException")  # how torch's launcher reports a process that was killed


def kills(tally: Tally, home: Path, count: int) -> None:
    """Signals at random moments of all steps, to `run`, its step or all processes; one stage at a time, two, DDP."""
    recipe, alone = undisturbed(home)
    deck = random.Random(f"{tally.seed} kills").sample(recipe.plan, len(recipe.plan)) * 9
    third = count // 3
    for mode, (options, steps) in enumerate(zip(MODES, (deck[third : count - third], deck[:third], []), strict=True)):
        if tally.only not in (None, mode):
            continue
        rng = random.Random(f"{tally.seed} kills {mode}")
        folder = home / f"killed{mode}"
        expected = alone
        if options[0] == "--accelerate":
            (home / "ddp").mkdir()
            (home / "ddp" / "small.yaml").write_text(TEXT)
            complete(home / "ddp", *options)
            whole = hashes(RunDir(home / "ddp" / "small"))
            expected = {name: whole[name] for name in alone if name in whole}
        folder.mkdir()
        (folder / "small.yaml").write_text(TEXT)
        run = RunDir(folder / "small")
        if options[0] == "--accelerate":  # what is trained and evaluated in two processes
            steps = (rng.sample([*STAGES, "evaluate"], 6) * 9)[:third]
        length = {step: read_json(RunDir(home / "here" / "small").done(step))["seconds"] for step in recipe.plan}
        for step in sorted(steps, key=recipe.plan.index):
            how = rng.choice(HOW)
            with tally.attempt(f"{mode} ({' '.join(options)}: {step}: {how})", limit=300):
                longest = length[step] + 3 * (step in STAGES)  # a stage imports the trainers first
                while not strike(start(folder, *options), run, step, how, rng.uniform(0, longest)):
                    shutil.rmtree(run.root)  # it came to its end: from the beginning, and earlier
                    longest /= 2
        with tally.attempt(f"{mode} ({' '.join(options)}: the end)", limit=600):
            complete(folder, *options)
            for log in (folder / "output.txt", *run.logs.glob("*.log")):
                told = TRACEBACK.findall(log.read_text())
                if own := [one for one in told if not LAUNCHERS.search(one)]:
                    raise RuntimeError(f"{log.name}: {own[0][:1500]}")
            if names := differing(run, expected):
                raise Wrong(f"{names} differ")
            (replies,) = run.winrate.parent.glob("*@*.jsonl")
            keys = [line["key"] for line in read_jsonl(replies) if line["status"] == "ok"]
            if len(keys) != len({*keys}) or len(keys) < 2 * 3 * 6:
                raise Lost(f"{len(keys)} verdicts, {len({*keys})} different ones")


def strike(process: "subprocess.Popen[str]", run: RunDir, step: str, how: str, delay: float) -> bool:
    """Wait for a step, then a while, and send a signal: everything ends as is documented. False if it ended before."""
    whom, name = how.split()
    number = signal.Signals[f"SIG{name}"]
    while process.poll() is None and not (run.holder(step).exists() and run.is_held(step)):
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    if process.poll() is not None:  # it came to its end
        if process.returncode not in (Exit.OK, Exit.NOT_RUN):
            raise Wrong(f"ended by itself with {process.returncode}")
        return False
    target = process.pid
    if whom == "step":  # or the one after it
        with contextlib.suppress(OSError, IndexError, ValueError, StopIteration):
            holder = next(path for path in map(run.holder, (step, *STAGES)) if path.exists())
            target = int(holder.read_text().split()[1])
    (os.killpg if whom == "all" else os.kill)(target, number)
    began = time.monotonic()
    try:
        code = process.wait(60)
        while any(run.is_held(one) for one in (*STAGES, "run")) and time.monotonic() - began < 60:
            time.sleep(0.05)
    finally:
        with contextlib.suppress(OSError):  # whatever is left
            os.killpg(process.pid, signal.SIGKILL)
    print(f"  {step}: {how} after {delay:.1f} s: {code}, {time.monotonic() - began:.1f} s", flush=True)
    if whom != "step" and code not in (-number, 128 + number, Exit.OK):
        raise Wrong(f"ended with {code}")
    if time.monotonic() - began > fuzz.LIMIT:
        raise fuzz.Hang(f"ended {time.monotonic() - began:.0f} s after the signal")
    return True


# --- the cost of verifying -------------------------------------------------------------------------------------------


def cost(home: Path, recipe_name: str) -> bool:
    """Time what a run spends on the hashes of its outputs: wall and CPU seconds, and their share."""
    spent, depth = [0.0, 0.0], 0

    def timed(act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            nonlocal depth
            begun, depth = (time.perf_counter(), time.process_time()), depth + 1
            try:
                return act(*arguments, **more)
            finally:
                depth -= 1
                if depth == 0:
                    spent[0] += time.perf_counter() - begun[0]
                    spent[1] += time.process_time() - begun[1]

        return wrapper

    for name in ("fault", "_damage", "is_done"):
        setattr(RunDir, name, timed(getattr(RunDir, name)))
    for name in ("of", "save"):
        setattr(layout.Hashes, name, timed(getattr(layout.Hashes, name)))
    recipe = load_recipe(ROOT / "recipes" / f"{recipe_name}.yaml")
    began = time.perf_counter(), time.process_time()
    finish(recipe, RunDir(home / recipe.name))
    whole = time.perf_counter() - began[0], time.process_time() - began[1]
    shares = [part / all_of_it for part, all_of_it in zip(spent, whole, strict=True)]
    print(f"verifying outputs of {recipe_name}: {spent[0]:.2f} of {whole[0]:.1f} s of wall time ({shares[0]:.2%}), "
          f"{spent[1]:.2f} of {whole[1]:.1f} s of CPU time ({shares[1]:.2%}); the bar is 2 %", flush=True)  # fmt: skip
    return max(shares) <= 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", default="", help=f"PART[:NUMBER] of {', '.join(fuzz.PARTS)}, damages, kills, cost")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--share", type=float, default=1.0, help="of the fuzzed inputs and of the damages")
    given = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what `nohup` ignores, the killed processes would ignore, too
    part, _, number = given.only.partition(":")
    only = int(number) if number.isdigit() else None
    print(f"seed {given.seed}", flush=True)
    tallies = []
    with tempfile.TemporaryDirectory() as name, Busy(given.seed) as server:
        home = Path(name)
        os.environ["OPENAI_BASE_URL"] = server.url
        if part == "cost":
            return 0 if cost(home, "demo") else 1
        for each in [part] if part else [*fuzz.PARTS, "damages", "kills"]:
            began, tally = time.monotonic(), Tally(each, given.seed, only)
            (home / each).mkdir()
            if each in fuzz.PARTS:
                fuzz.fuzz(tally, home / each, given.share)
            elif each == "damages":
                damages(tally, home, given.share)
            else:
                kills(tally, home, given.kills)
            tallies.append(tally)
            tally.seconds = time.monotonic() - began
            print(f"{each}: {tally.inputs} in {tally.seconds:.0f} s, {tally.faults.total()} faults", flush=True)
    print("\n" + "".join(f"{name:>11}" for name in ("part", "inputs", "refused", *FAULTS, "slowest, s", "seconds")))
    for tally in tallies:
        counts = [tally.part, tally.inputs, tally.refused, *(tally.faults[name] for name in FAULTS)]
        print("".join(f"{value:>11}" for value in [*counts, f"{tally.slowest:.1f}", f"{tally.seconds:.0f}"]))
    return 1 if any(tally.faults for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
