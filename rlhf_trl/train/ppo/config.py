"""The options of a PPO stage: TRL's, and those that TRL's trainer lacks.

Read by the recipe's check, without importing this module, and by `rlhf_trl.train.ppo.trainer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl.experimental import ppo as trl_ppo


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    """TRL's PPOConfig and the options that it lacks."""

    entropy_coef: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient c of the entropy bonus: c times the mean entropy of the answer tokens is added to "
            "the objective."
        },
    )
    value_init: Literal["zero", "reward"] = field(
        default="zero",
        metadata={
            "help": "Where the value model starts: at zero, or from the reward model, which must lie on the same base."
        },
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Subtract the mean of the reward model's scores on held-out pairs, and divide by their deviation."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL to the reference, nats per answer, that kl_coef is adapted to (Ziegler et al., 2019)."},
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Episodes over which kl_coef adapts to kl_target."},
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "KL to the reference, nats per answer, at which the run stops with its last good policy."},
    )
