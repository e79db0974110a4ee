"""The options of a PPO stage: TRL's, and those that TRL's trainer lacks.

Read by the recipe's check, without importing this module, and by `rlhf_trl.train.ppo.trainer`.
"""

from dataclasses import dataclass
from typing import Literal

from trl.experimental import ppo as trl_ppo


@dataclass
class PPOConfig(trl_ppo.PPOConfig):
    """TRL's PPOConfig and the options that it lacks."""

    entropy_coef: float = 0.0
    """Coefficient c of the entropy bonus: c times the mean entropy of the answer tokens is added to the objective."""
    value_init: Literal["zero", "reward"] = "zero"
    """Where the value model starts: at zero, or from the reward model, which must lie on the same base."""
    normalize_rewards: bool = False
    """Subtract the mean of the reward model's scores on held-out pairs, and divide by their deviation."""
    kl_target: float | None = None
    """KL to the reference, nats per answer, that kl_coef is adapted to (Ziegler et al., 2019)."""
    kl_horizon: int = 10_000
    """Episodes over which kl_coef adapts to kl_target."""
    max_kl: float | None = None
    """KL to the reference, nats per answer, at which the run stops with its last good policy."""
