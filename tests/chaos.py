"""Chaos: random signals to `run`, then every damage of its weights; the adapters come out the same, bit by bit.

Run as `make chaos` (30 minutes at most on two cores); the seed is printed, and `SEED=... KILLS=...` repeat a campaign.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import RECIPE, ROOT

from rlhf_trl.run.layout import RunDir

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LIMIT = 25 * 60  # seconds, after which no new attempt begins
# Every step of a training run is saved, and PPO makes more than one.
TEXT = RECIPE.replace('save_strategy: "no"', "save_strategy: steps\n      save_steps: 1").replace(
    "total_episodes: 32", "total_episodes: 96"
)
STAGES = ("sft", "rm", "dpo", "grpo", "ppo")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES = {"a bit": flip, "cut": lambda path: path.write_bytes(path.read_bytes()[:50]), "gone": Path.unlink}


def start(folder: Path, jobs: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rlhf_trl", "run", str(folder / "small.yaml"), "--runs", str(folder)]
    return subprocess.Popen([*command, "--jobs", str(jobs)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip


def finish(folder: Path) -> dict[str, str]:
    """Run to the end; return the hash of each stage's weights."""
    process = start(folder, 1)
    output, _ = process.communicate()
    assert process.returncode == 0 and "Traceback" not in output, output
    return {stage: hashlib.sha256(weights(folder, stage).read_bytes()).hexdigest() for stage in STAGES}


def weights(folder: Path, stage: str) -> Path:
    names = ("model/model.safetensors",) if stage == "sft" else ("adapter/adapter_model.safetensors",)
    return folder / "small" / stage / names[0]


def main() -> None:
    seed, kills = int(os.environ.get("SEED", time.time())), int(os.environ.get("KILLS", 20))
    rng, began = random.Random(seed), time.monotonic()
    print(f"seed {seed}, {kills} signals", flush=True)
    with tempfile.TemporaryDirectory() as name:
        straight, folder = Path(name) / "straight", Path(name) / "killed"
        for path in (straight, folder):
            path.mkdir()
            (path / "small.yaml").write_text(TEXT)
        expected = finish(straight)
        length = time.monotonic() - began
        print(f"without a signal: {length:.0f} s", flush=True)
        sent = done = 0
        while sent < kills and time.monotonic() - began < LIMIT:
            number, process = rng.choice(SIGNALS), start(folder, rng.choice((1, 2)))
            try:
                output, _ = process.communicate(timeout=rng.uniform(1, length / 2))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                output, _ = process.communicate(timeout=60)
                assert process.returncode in (-number, 128 + number), (number, process.returncode, output)
                sent += 1
                while any(RunDir(folder / "small").is_held(stage) for stage in STAGES):  # its children save and end
                    time.sleep(0.1)
            assert "Traceback" not in output, output
            if process.returncode == 0:  # it came to its end: begin again
                assert finish(folder) == expected
                subprocess.run(["rm", "-r", str(folder / "small")], check=True)
                done += 1
        assert finish(folder) == expected
        print(f"{sent} signals, {done + 1} runs came to their end with the same weights", flush=True)
        for stage in STAGES:
            for damage, make in DAMAGES.items():
                if time.monotonic() - began > LIMIT:
                    break
                make(weights(folder, stage))
                assert finish(folder) == expected, (stage, damage)
                print(f"{stage}: {damage}: made again, the same weights", flush=True)


if __name__ == "__main__":
    main()
