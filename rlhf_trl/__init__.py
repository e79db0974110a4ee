"""From preference pairs to shared LoRA adapters with the evidence attached."""

__version__ = "0.1.0"
