"""Hold the logs of a stage against the rules of `recipe/health.py`: warn on terminal and page, or stop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.health import rules_of
from rlhf_trl.recipe.schema import Stage
from rlhf_trl.run.files import write_json
from rlhf_trl.train.callbacks import NAMES, History

logger = logging.getLogger(__name__)


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
        """Judge the values of one log.

        Raises:
            UserError: a value was beyond its limit for as many logs as its rule says, and the rule says stop.
        """
        for what in [name for name in self.rules if name in values]:
            rule, value = self.rules[what][1], values[what]
            over = rule.above is not None and value > rule.above
            under = rule.below is not None and value < rule.below
            self.last[what] = value
            self.seen[what] += 1
            self.beyond[what] = self.beyond[what] + 1 if over or under else 0
            if self.beyond[what] == rule.logs:
                self._report(what, step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for what, count in self.seen.items():
            if self.beyond[what] == count < (self.rules[what][1].logs or 0):  # a run of fewer logs, all of them beyond
                self._report(what, state.global_step)

    def _report(self, what: str, step: int) -> None:
        (watched, rule), value = self.rules[what], self.last[what]
        found = self.history.stats["health"]
        if rule.then == "off" or any(entry["what"] == what for entry in found):
            return
        says = f"{watched.says.format(value)} (step {step})"
        limit = rule.above if rule.above is not None and value > rule.above else rule.below
        found.append({"what": what, "step": step, "value": value, "limit": limit, "then": rule.then, "says": says})
        if PartialState().is_main_process:
            logger.warning("%s: health: %s; %s", self.name, says, watched.remedy)
            write_json(self.history.path, self.history.stats)
        if rule.then == "stop":
            raise UserError(f"stages.{self.name}.health.{what}", says, watched.remedy, Exit.DIVERGED)
