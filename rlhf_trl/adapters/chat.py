"""`chat`: a conversation with a policy, turn by turn; reads and writes no file.

echo "How do I bake bread?" | rlhf-trl chat shared/demo-grpo --compare shared/demo-dpo
"""

from __future__ import annotations

from rlhf_trl.adapters.load import Policy
from rlhf_trl.models.base import Messages
from rlhf_trl.text.display import visible


class Conversation:
    """What was said so far to one policy, and how it answers."""

    def __init__(self, policy: Policy, max_new_tokens: int, temperature: float, seed: int):
        self._policy = policy
        self._how = (max_new_tokens, temperature, seed)
        self._turns: Messages = []

    def reply(self, text: str) -> str:
        """Say something and get the answer, with every character that acts on a terminal spelt out."""
        self._turns.append({"role": "user", "content": text})
        answer = self._policy.answer(self._turns, *self._how)
        self._turns.append({"role": "assistant", "content": answer})
        return visible(answer)

    def forget(self) -> None:
        """Start a new conversation."""
        self._turns = []
