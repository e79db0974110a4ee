"""What the recipes cost on a GPU: one check of at most 12 minutes, without a network.

It builds models with random weights in the shapes of GPT-2 124M, Llama-3.1-8B and Qwen2.5-0.5B, and runs the commands
of this project on them and on real pairs of HH-RLHF: every stage of `hh_gpt2`, `hh_llama3.1_8b_qlora` (NF4) and
`hh_qwen2.5_0.5b` for a few updates, `evaluate`, and for GPT-2 the rest of `run`, and a stage that is killed and goes
on. A part is a process of its own and a row of the table; one that fails does not stop the others. Writes
`gpu_check.md`, `gpu_check.json` and `gpu_check.log`, which has what the commands printed; exits with 1 where a row is
not done.

    .venv/bin/python tests/gpu_check.py --gather .gpu                    # with a network: what the machine lacks
    python3 tests/gpu_check.py --shared .gpu --out OUT --only gpt2,llama    # on the GPU; docs/gpus.md has the rest
    .venv/bin/python tests/gpu_check.py --tiny --out OUT                 # the same on a CPU, with tiny models
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.launch import shipped

ROOT = Path(__file__).parent.parent
# What a machine with torch, accelerate, scipy and matplotlib lacks, in the versions of constraints.txt.
WHEELS = """
    trl transformers tokenizers huggingface_hub peft datasets bitsandbytes evaluate dill multiprocess xxhash fsspec
    pydantic pydantic_core typing-inspection typing_extensions annotated-types annotated-doc ruamel.yaml rapidfuzz
    typer click filelock openai sniffio jiter httpx2 httpcore2 truststore idna anyio h11 psutil
"""
MACHINE = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
MACHINE += [f"--platform=manylinux_{version}_x86_64" for version in ("2_28", "2_27", "2_24", "2_17")]
OTHER_GPUS = re.compile(r"libbitsandbytes_(cuda1[12]|rocm|xpu)")  # 36 MB for drivers that this machine has not
HEAD = ("model", "part", "outcome", "seconds", "steps", "tokens/s", "peak GB", "planned GB")


@dataclass(frozen=True)
class Shape:
    """A base with random weights, and the recipe that is tried on it."""

    recipe: str
    steps: int  # updates of sft, reward and dpo
    rollouts: int  # updates of grpo and ppo
    sizes: dict[str, Any]  # of the transformers config
    overrides: tuple[str, ...] = ()  # of the recipe


SHAPES = {
    "gpt2": Shape("hh_gpt2", 20, 4, {"model_type": "gpt2"},
                  ("stages.gold=null", "evaluation.gold=null", "judge=null")),
    "llama": Shape("hh_llama3.1_8b_qlora", 4, 2, {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    }),
    "qwen": Shape("hh_qwen2.5_0.5b", 20, 4, {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 1100}  # fmt: skip
TINY = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 1100}, "llama": SMALL, "qwen": SMALL}


class Check:
    """The parts of one shape, in a folder of its own, until the time is over."""

    def __init__(self, name: str, given: argparse.Namespace, work: Path, deadline: float):
        self.name, self.shape, self.tiny, self.shared = name, SHAPES[name], given.tiny, given.shared
        self.work, self.deadline, self.log = work, deadline, given.out / "gpu_check.log"
        self.base = work / name
        recipe = load_recipe(shipped("recipes", self.shape.recipe), list(self.shape.overrides))
        self.trainers = {stage: spec.trainer for stage, spec in recipe.stages.items()}
        self.run = work / "runs" / recipe.name
        words = [f"--set={setting}" for setting in self.settings()]
        self.options = [self.shape.recipe, "--runs", str(work / "runs"), *words]

    def settings(self) -> Iterator[str]:
        """What the check changes in the recipe: the base, the data, and how long everything takes."""
        tokens, rows, prompts, answer = (160, 150, 4, 8) if self.tiny else (512, 1500, 32, 128)
        yield from (*self.shape.overrides, f"model.model_name_or_path={self.base}")
        yield from (f"data.source={self.shared / 'hh-rlhf'}", f"data.max_rows={rows}", f"data.max_length={tokens}")
        yield from ("data.test_fraction=0.1", "data.max_dropped_fraction=1.0", "evaluation.checkpoints=0")
        yield from (f"evaluation.prompts={prompts}", f"evaluation.max_new_tokens={answer}")
        steps, rollouts = (3, 1) if self.tiny else (self.shape.steps, self.shape.rollouts)
        for stage, trainer in self.trainers.items():
            own = {"global_batch_size": 32, "args.logging_steps": 1, "args.warmup_steps": 0, "args.max_steps": steps,
                   "args.eval_strategy": "no", "args.save_steps": 1 if trainer == "sft" else 1000}  # fmt: skip
            if trainer == "grpo":
                own |= {"args.max_steps": rollouts, "args.max_completion_length": answer}
            if trainer == "ppo":
                own |= {"args.max_steps": -1, "args.total_episodes": 32 * rollouts, "args.num_ppo_epochs": 2,
                        "args.response_length": answer, "args.local_rollout_forward_batch_size": 32}  # fmt: skip
            yield from (f"stages.{stage}.{key}={value}" for key, value in own.items())

    def parts(self) -> Iterator[dict[str, Any]]:
        """Run every part, and yield its row."""
        yield self.attempt("random weights", self.build)
        yield self.attempt("prepare", partial(self.command, "prepare"))
        rows, plan = [], partial(subprocess.Popen, self.program("plan", "--json"), cwd=self.work)
        with self.log.open("a") as log, plan(stdout=subprocess.PIPE, stderr=log) as estimating:
            for stage in self.trainers:
                rows.append(self.attempt(stage, partial(self.train, stage)))
                yield rows[-1]
            yield self.attempt("evaluate", partial(self.command, "evaluate"))
            yield self.attempt("plan", partial(self.planned, estimating, rows))
            estimating.kill()
        if self.name == "gpt2":
            yield self.attempt("the rest of run", partial(self.command, "run"))
            yield self.attempt("sft, killed", self.resume)

    def attempt(self, part: str, action: Callable[[], Any]) -> dict[str, Any]:
        """Do a part, and describe what became of it; what it gives as a dict goes into the row."""
        row: dict[str, Any] = {"model": self.name, "part": part, "outcome": "not run: the time is over"}
        start = time.monotonic()
        if start < self.deadline:
            try:
                result = action()
                row |= {"outcome": "done"} | (result if isinstance(result, dict) else {})
            except subprocess.TimeoutExpired:
                row["outcome"] = "not finished: the time is over"
            except Exception as error:  # of whatever kind: the other parts go on
                row["outcome"] = f"FAILED: {error}"
            row["seconds"] = round(time.monotonic() - start, 1)
        print(self.name, part, row["outcome"], row.get("seconds", ""), flush=True)
        return row

    def program(self, command: str, *words: str) -> list[str]:
        return [sys.executable, "-m", "rlhf_trl", command, self.options[0], *words, *self.options[1:]]

    def command(self, command: str, *words: str) -> str:
        """Run a command of the project to its end, and return what it printed."""
        left, before = self.deadline - time.monotonic(), self.log.stat().st_size
        with self.log.open("a") as log:
            done = subprocess.run(self.program(command, *words), stdout=log, stderr=log, cwd=self.work, timeout=left)
        said = self.log.read_bytes()[before:].decode(errors="replace")
        if done.returncode:
            raise RuntimeError(f"{done.returncode}: {said.strip().rpartition(chr(10))[2][:300]}")
        return said

    def build(self) -> None:
        """Write the base: random weights in bfloat16, made on the GPU, and a tokenizer."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        source = self.shared / "gpt2-tokenizer"
        if self.tiny:
            from rlhf_trl.models.tokenizer import build_tiny

            build_tiny(source := self.work / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.save_pretrained(self.base)
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = self.shape.sizes | (TINY[self.name] if self.tiny else {})
        config = AutoConfig.for_model(**sizes, **ends)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(self.base, max_shard_size="4GB")
        del model
        torch.cuda.empty_cache()

    def train(self, stage: str) -> dict[str, Any]:
        """Train a stage; the first update, which warms up, does not count for the speed."""
        self.command("train", stage)
        stats = json.loads((self.run / stage / "training_stats.json").read_text())
        logs = [row for row in stats["history"] if "tokens" in row]
        first = logs[0] if len(logs) > 1 else {"tokens": 0, "seconds": 0.0}
        speed = (logs[-1]["tokens"] - first["tokens"]) / (logs[-1]["seconds"] - first["seconds"])
        peak = round(stats["summary"]["peak_memory_bytes"] / 1e9, 2)
        return {"steps": stats["summary"]["steps"], "tokens/s": round(speed), "peak GB": peak}

    def planned(self, plan: "subprocess.Popen[bytes]", rows: list[dict[str, Any]]) -> None:
        """Put what `plan` has estimated into the rows of the stages: on a GPU, what torch counts."""
        import torch

        said, _ = plan.communicate(timeout=max(self.deadline - time.monotonic(), 1))
        for row, stage in zip(rows, json.loads(said), strict=True):
            needed = stage["bytes"]
            row["planned GB"] = round((needed["total"] - needed["process"] * torch.cuda.is_available()) / 1e9, 2)

    def resume(self) -> dict[str, Any]:
        """Train sft anew, kill it after a checkpoint, and train it again: its adapter, beside the undisturbed one."""
        from safetensors.torch import load_file

        whole = (self.run / "sft").rename(self.work / "whole")
        with self.log.open("a") as log:
            process = subprocess.Popen(self.program("train", "sft"), stdout=log, stderr=log, cwd=self.work)
        while not (saved := [*self.run.glob("sft/checkpoints/checkpoint-*")]) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError("it ended before it was killed")
        if "resuming from" not in self.command("train", "sft"):
            raise RuntimeError("it began anew")
        old, new = (load_file(of / "adapter/adapter_model.safetensors") for of in (whole, self.run / "sft"))
        apart = max(float((old[key].double() - new[key].double()).abs().max()) for key in old)
        return {"outcome": f"done: killed at {saved[0].name}; the weights then differ by {apart:.1e}"}


def gather(folder: Path) -> None:
    """Collect the wheels, this project among them, the tokenizer and the pairs, and say what they weigh."""
    folder.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "-q"]
    names = [*MACHINE, "-c", str(ROOT / "constraints.txt"), *WHEELS.split()]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), *names], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    for path in folder.glob("bitsandbytes-*.whl"):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(whole := folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for item in old.infolist():
                if not OTHER_GPUS.search(item.filename):
                    new.writestr(item, old.read(item))
        whole.replace(path)
    for name in ("hh-rlhf", "gpt2-tokenizer"):
        shutil.copytree(ROOT.parent / "shared" / name, folder / name, dirs_exist_ok=True)
    for kind in ("*.whl", "**/*"):
        print(f"{folder}/{kind}: {sum(path.stat().st_size for path in folder.glob(kind)) / 1e6:.1f} MB")


def write(out: Path, rows: list[dict[str, Any]]) -> str:
    """Write what is known so far, as JSON and as a table, and return the table."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    document = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    (out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    cells = [[str(row.get(key, "")).replace("|", "/") for key in HEAD] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *cells])
    table = f"{device}, torch {torch.__version__}, {document['date']}\n\n{table}\n"
    (out / "gpu_check.md").write_text(table)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gather", type=Path, metavar="FOLDER", help="collect what the machine lacks, and end")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="hh-rlhf and gpt2-tokenizer")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--only", default=",".join(SHAPES), help="shapes, in this order: %(default)s")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the check itself")
    given = parser.parse_args(arguments)
    if given.gather:
        gather(given.gather)
        return 0
    deadline = time.monotonic() + 60 * given.minutes
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    given.out, given.shared = given.out.resolve(), given.shared.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu_check.log").write_text("")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only.split(","):
            for row in Check(name, given, Path(folder), deadline).parts():
                rows.append(row)
                table = write(given.out, rows)
    print(table)
    return int(any(not row["outcome"].startswith("done") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
