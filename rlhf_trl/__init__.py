"""From preference pairs to shared LoRA adapters with the evidence attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trl.adapters.load import load_policy as load_policy
    from rlhf_trl.adapters.load import load_reward_model as load_reward_model

__version__ = "0.1.0"
__all__ = ["load_policy", "load_reward_model"]


def __getattr__(name: str) -> Any:
    """Import what loads models when it is first asked for, so that importing the package imports no torch."""
    if name in __all__:
        from rlhf_trl.adapters import load as loading

        return {"load_policy": loading.load_policy, "load_reward_model": loading.load_reward_model}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
