"""Exported adapters: export, check, merge, push, and their use by `load_policy` and `load_reward_model`."""
