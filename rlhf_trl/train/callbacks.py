"""What happens around a training loop: history, health, interruption, and checkpoints that are complete or absent.

Writes `<stage>/training_stats.json` as the logs come, with what the rules of `recipe/health.py` say of them, and
`<stage>/checkpoints/checkpoint-N/`, each with a `manifest.json`.
"""

import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from ruamel.yaml import YAML
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.health import rules_of
from rlhf_trl.recipe.schema import Stage
from rlhf_trl.run import signals
from rlhf_trl.run.checkpoints import seal
from rlhf_trl.run.files import read_json, sync, write_json

logger = logging.getLogger(__name__)
# Name in training_stats.json -> keys of TRL's logs. The raw logs stand beside them, under `log`.
LOG_KEYS = {
    "loss": "loss loss/policy_avg",
    "value_loss": "loss/value_avg",
    "reward_accuracy": "accuracy rewards/accuracies",
    "reward_margin": "margin rewards/margins",
    "validation_loss": "eval_loss",
    "validation_reward_accuracy": "eval_accuracy eval_rewards/accuracies",
    "validation_reward_margin": "eval_margin eval_rewards/margins",
    "reward": "mean_reward reward",
    "reward_std": "reward_std",
    "equal_groups": "frac_reward_zero_std",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate lr",
    "kl": "kl objective/kl",
    "entropy": "entropy",
    "tokens": "num_tokens",
    "answer_tokens": "completions/mean_length answer_tokens",
    "finished": "finished",
    "clip_fraction": "policy/clipfrac_avg",
    "approx_kl": "policy/approxkl_avg",
    "kl_coef": "kl_coef",
}
NAMES = {key: name for name, keys in LOG_KEYS.items() for key in keys.split()}
TERMS = YAML(typ="safe", pure=True).load(Path(__file__).with_name("terms.yaml"))
OVERFLOWS = 20  # steps in a row that fp16 may leave out: each halves its scale, which begins at 2^16


class History(TrainerCallback):
    """Collect the logs under common names and keep `training_stats.json` current."""

    def __init__(self, path: Path, stage: str, trainer: str):
        self.path = path
        definitions = {**TERMS["definitions"], "kl": TERMS["kl"].get(trainer, TERMS["kl"]["other"])}
        self.stats: dict[str, Any] = {"stage": stage, "trainer": trainer, "definitions": definitions, "history": [],
                                      "health": []}  # fmt: skip
        self.before = 0.0
        self.start = time.perf_counter()
        self.next_write = 0.0

    @property
    def seconds(self) -> float:
        """Training time so far, with that before a resumed checkpoint."""
        return round(self.before + time.perf_counter() - self.start, 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 0 and self.path.exists():
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if best.is_dir():  # the run may lie elsewhere than when that was written
                state.best_model_checkpoint = str(best)
            before = read_json(self.path)
            for key in ("history", "health"):
                self.stats[key] = [row for row in before[key] if row["step"] <= state.global_step]
            self.before = self.stats["history"][-1]["seconds"] if self.stats["history"] else 0.0
        self.stats["max_steps"] = state.max_steps
        self.start = time.perf_counter()
        self._write(state)  # before the first log, so that `status` sees that training has begun

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        finite = {key: value for key, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
        named = {NAMES[key]: value for key, value in finite.items() if key in NAMES}
        if not named or "train_runtime" in logs:
            return
        history = self.stats["history"]
        if not history or history[-1]["step"] != state.global_step:  # a validation joins the row of its step
            history.append({"step": state.global_step, "epoch": state.epoch, "log": {}})
        history[-1] |= {**named, "seconds": self.seconds, "peak_memory_bytes": peak_memory()}
        history[-1]["log"] |= finite
        if control.should_save or time.perf_counter() >= self.next_write:
            self._write(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:  # a run that goes on from this checkpoint finds every row up to it
            self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        """Write all rows. The next write waits 20 times as long as this one takes: at most 5 % of the time."""
        if state.is_world_process_zero:
            begin = time.perf_counter()
            write_json(self.path, self.stats)
            self.next_write = begin + 21 * (time.perf_counter() - begin)


class Watch(TrainerCallback):
    """Judge each log, after `History` has taken it; what is found stands under `health` in `training_stats.json`."""

    def __init__(self, name: str, stage: Stage, history: History):
        self.name, self.history, self.rules = name, history, rules_of(stage)
        self.last: dict[str, float] = {}
        self.seen: Counter[str] = Counter()
        self.beyond: Counter[str] = Counter()  # logs in a row

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        self.judge({NAMES[key]: value for key, value in logs.items() if key in NAMES}, state.global_step)

    def judge(self, values: Mapping[str, float], step: int) -> None:
        """Judge the values of one log; UserError where one is beyond its limit for long, and its rule says stop."""
        for what in [name for name in self.rules if name in values]:
            rule, value = self.rules[what][1], values[what]
            high, low = rule.above, rule.below
            beyond = (high is not None and value > high) or (low is not None and value < low)
            self.last[what] = value
            self.seen[what] += 1
            self.beyond[what] = self.beyond[what] + 1 if beyond else 0
            if self.beyond[what] == rule.logs:
                self._report(what, step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for what, count in self.seen.items():
            if self.beyond[what] == count < (self.rules[what][1].logs or 0):  # a short run, always beyond
                self._report(what, state.global_step)

    def _report(self, what: str, step: int) -> None:
        (watched, rule), value = self.rules[what], self.last[what]
        found = self.history.stats["health"]
        if rule.then == "off" or any(entry["what"] == what for entry in found):
            return
        says = f"{watched.says.format(value)} (step {step})"
        found.append({"what": what, "step": step, "value": value, "then": rule.then, "says": says})
        if PartialState().is_main_process:
            logger.warning("%s: health: %s; %s", self.name, says, watched.remedy)
            write_json(self.history.path, self.history.stats)
        if rule.then == "stop":
            raise UserError(f"stages.{self.name}.health.{what}", says, watched.remedy, Exit.DIVERGED)


class Health(TrainerCallback):
    """Stop before the optimizer step if loss or gradient is not finite; afterwards, check that weights changed. With
    fp16 the library leaves out a step whose scaled gradient overflows: only a row of them is a diverged run."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.first_step = self.overflows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before = _digests(model)
        self.first_step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        finite = not grads or bool(torch.stack([grad.norm().float() for grad in grads]).isfinite().all())
        self.overflows = 0 if finite else self.overflows + 1
        if self.overflows > (OVERFLOWS if args.fp16 else 0):
            raise diverged(state.global_step, "the gradient", args.output_dir)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        for key in ("loss", "grad_norm", "loss/policy_avg", "loss/value_avg", "reward"):
            value = logs.get(key)
            if isinstance(value, float) and not math.isfinite(value) and not (args.fp16 and key == "grad_norm"):
                raise diverged(state.global_step, key, args.output_dir)

    def check_weights(self, model: torch.nn.Module, stage: str) -> None:
        """Raise UserError where training changed no tensor, unless it was resumed at its last step; RuntimeError where
        processes that shard no parameter hold different weights."""
        digests = _digests(model)
        if digests == self.before and self.first_step == 0:
            remedy = "raise learning_rate, or check that the data differ"
            raise UserError(f"stages.{stage}", "training changed no weight", remedy)
        if PartialState().num_processes > 1 and not is_sharded(model):
            gathered = gather_object([digests])
            if any(other != gathered[0] for other in gathered):
                raise RuntimeError("the processes hold different weights after training")


def is_sharded(model: torch.nn.Module) -> bool:
    return is_deepspeed_zero3_enabled() or any(isinstance(param, DTensor) for param in model.parameters())


def _digests(model: torch.nn.Module) -> list[float]:
    tensors: list[Any] = [param for param in model.parameters() if param.requires_grad]
    if is_deepspeed_zero3_enabled():
        tensors = [param.ds_tensor for param in tensors]
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return [float(tensor.detach().double().abs().sum()) for tensor in tensors]


def diverged(step: int, what: str, checkpoints: str) -> UserError:
    """The error that ends a run which has diverged."""
    problem = f"{what} is not finite: the run has diverged (its last good checkpoints are in {checkpoints})"
    remedy = "lower learning_rate, raise warmup_steps, or use bf16: false"
    return UserError(f"step {step}", problem, remedy, Exit.DIVERGED)


class Interrupt(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP, finish the step, save a checkpoint and stop.

    Another signal ends the process at once, unless it comes within a second: the same one may come twice, from a
    terminal or a scheduler and from `run`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self.handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.handlers = signals.handle(self._remember)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signals.restore(self.handlers)

    def _remember(self, number: int, frame: Any) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            os._exit(128 + number)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        partial = PartialState()
        if partial.num_processes > 1:  # as soon as one process has seen a signal, all of them stop at the same step
            seen = reduce(torch.tensor(float(self.signal or 0), device=partial.device), reduction="sum")
            self.signal = int(seen) and (self.signal or signal.SIGTERM)
        if self.signal:
            control.should_save = control.should_training_stop = True
            if args.save_strategy == "best":  # an evaluation would take this request back
                control.should_evaluate = False


class AtomicCheckpoints:
    """Mixin for a `transformers.Trainer`: a checkpoint is written elsewhere, hashed, synced and then renamed. The
    library writes in place, and a half-written newest one breaks the resume (huggingface/transformers#35782)."""

    def _save_checkpoint(self: Any, model: Any, trial: Any = None) -> None:
        folder = Path(self.args.output_dir)
        staging, name = folder / ".staging", f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        elsewhere = mock.patch.object(self, "_get_output_dir", lambda trial=None: str(staging))
        with elsewhere, mock.patch.object(self.args, "save_total_limit", None):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if best := self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(folder / Path(best).name)
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            seal(staging / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (staging / name).replace(folder / name)
            sync(folder)
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: the library's holds no results and names a local path as base."""


def peak_memory() -> int:
    """Peak memory of this process in bytes: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
