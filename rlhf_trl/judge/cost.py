"""What calls to a judge cost, and the limits of one run, all in US dollars. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rlhf_trl.judge.prompt import Message
from rlhf_trl.judge.replies import Usage
from rlhf_trl.recipe.schema import Price

BYTES_A_TOKEN = 4  # a rule of thumb
LIKELY_REPLY = 100  # tokens: three short sentences and a verdict


def cost(usage: Usage | None, price: Price) -> float:
    """Price what a server counted; 0 for a call it counted nothing for."""
    if usage is None:
        return 0.0
    fresh = usage["prompt_tokens"] - usage["cached_tokens"]
    dollars = fresh * price.input + usage["cached_tokens"] * price.cached + usage["completion_tokens"] * price.output
    return dollars / 1e6


def forecast(calls: Iterable[Sequence[Message]], price: Price, reply_tokens: int) -> list[float]:
    """Estimate what calls cost before any is made, given their messages and the length of each reply."""
    sizes = [-(-sum(len(turn["content"].encode()) for turn in call) // BYTES_A_TOKEN) for call in calls]
    return [cost({"prompt_tokens": of, "cached_tokens": 0, "completion_tokens": reply_tokens}, price) for of in sizes]


@dataclass
class Budget:
    """The limits of one run. Nothing is begun that, with all in flight, could go over one."""

    price: Price
    dearest: float = 0.0  # what a call may cost at most by the forecast; a call that cost more raises it
    max_cost: float | None = None
    max_requests: int | None = None
    spent: float = field(default=0.0, init=False)
    calls: int = field(default=0, init=False)

    def add(self, usage: Usage | None) -> None:
        """Count a finished call."""
        dollars = cost(usage, self.price)
        self.calls += 1
        self.spent += dollars
        self.dearest = max(self.dearest, dollars)

    def stop(self, in_flight: int) -> str | None:
        """Say why no further call may begin; None if one may."""
        if self.max_requests is not None and self.calls + in_flight >= self.max_requests:
            return f"max_requests reached: {self.calls + in_flight} calls"
        ahead = self.spent + (in_flight + 1) * self.dearest
        # What adds up to the limit exactly is within it; a sum of floats may say otherwise in its last digit.
        if self.max_cost is not None and ahead > self.max_cost * (1 + 1e-9):
            return f"max_cost reached: ${self.spent:.4f} spent, and another call could go over ${self.max_cost:.4f}"
        return None
