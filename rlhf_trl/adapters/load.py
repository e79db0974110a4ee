"""Adapters for use in Python: a policy that answers, a reward model that scores.

An adapter is checked first, whoever made it. Its base is the one that it ships, the given one, or that of its public
id, from the local cache or the Hub.

    policy = rlhf_trl.load_policy("shared/demo-grpo")
    print(policy.answer([{"role": "user", "content": "Hello."}]))
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf_trl.adapters.check import ADAPTER, BASE, CONFIG, TOKENIZER_CONFIG, notes, require_sound
from rlhf_trl.adapters.evidence import require_stage
from rlhf_trl.adapters.rules import FOREIGN
from rlhf_trl.models import rewards
from rlhf_trl.models.base import base_block, below_path, fetch, lay, load_causal, load_classifier, prompt_room
from rlhf_trl.models.rewards import RewardModel
from rlhf_trl.models.sampling import sample
from rlhf_trl.models.tokenizer import Messages, recorded_tokenizer, set_up_tokenizer
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import first_line

KINDS = {"CAUSAL_LM": "a policy", "SEQ_CLS": "a reward model"}


@dataclass
class Policy:
    """A language model with an adapter on it, and the tokenizer that renders text for it."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    made: str  # tells it from another one that lies in the same place

    def without_adapter(self) -> AbstractContextManager[None]:
        """Answer as the base alone, as long as this lasts."""
        if not isinstance(self.model, PeftModel):
            raise UserError("--base-only", "the policy was fine-tuned whole: it has no adapter", "leave it out")
        context: AbstractContextManager[None] = self.model.disable_adapter()
        return context

    def answer(self, prompt: Messages, max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0) -> str:
        """Answer one conversation, as `answer_all`."""
        return self.answer_all([prompt], max_new_tokens, temperature, seed)[0]

    def answer_all(
        self, prompts: Sequence[Messages], max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0,
        batch_size: int = 16,
    ) -> list[str]:  # fmt: skip
        """Answer conversations that end on a user turn; a seed and a prompt fix the answer, whatever the others are.

        A prompt that leaves no room for `max_new_tokens` loses its beginning; temperature 0 takes the likeliest token.

        UserError where the model has not more positions than `max_new_tokens`."""
        room = prompt_room(self.model, max_new_tokens)
        found = sample(self.model, self.tokenizer, prompts, max_new_tokens, batch_size, seed,
                       Decoding(temperature=temperature), max_prompt_tokens=room)  # fmt: skip
        return [one.text for one in found]


def load_policy(
    folder: str | Path, base: str | Path | None = None, dtype: str = "auto", stage: str | None = None
) -> Policy:
    """Load a policy adapter on its base, ready to answer, on the accelerator if there is one.

    Args:
        base: a folder with the base, instead of the one that the adapter names.
        dtype: `auto` is that of the base's weights.
        stage: of a run, whose folder is given instead of an adapter's.

    Raises:
        AdapterError: with everything that is wrong with the adapter, or with this base for it.
        UserError: it is a reward adapter, or the base cannot be reached.
    """
    if stage is None:
        return Policy(*load(Path(folder), base, dtype, "CAUSAL_LM")[:2], hash_file(Path(folder) / ADAPTER))
    run = RunDir(Path(folder))
    recipe = require_stage(run, stage)
    tokenizer, adapted = recorded_tokenizer(recipe, run), bool(recipe.model_block(stage).get("use_peft"))
    path = below_path(recipe, run, stage) if adapted else str(run.model(stage))
    model: Any = load_causal(path, ModelConfig(**base_block(recipe, stage)), tokenizer)
    model = lay(model, run.adapter(stage)) if adapted else model
    return Policy(model.to(PartialState().device).eval(), tokenizer, str(run.finished(stage)))


def load_reward_model(folder: str | Path, base: str | Path | None = None, stage: str | None = None) -> RewardModel:
    """Load a reward adapter on its base in float32, ready to score, as `load_policy` a policy."""
    if stage is not None:
        run = RunDir(Path(folder))
        return rewards.load_reward_model(require_stage(run, stage), run, stage)
    model, tokenizer, _ = load(Path(folder), base, "float32", "SEQ_CLS")
    return RewardModel(model.requires_grad_(False), tokenizer)


def locate_base(folder: Path, base: str | Path | None) -> Path:
    """Check an adapter, and find the folder of its base: the given one, the one that it ships, or that of its id."""
    require_sound(folder)
    if base is not None:
        if not (Path(base) / "config.json").is_file():
            raise UserError(str(base), "there is no model here", "give a folder with the base")
        return Path(base)
    config = read_json(folder / CONFIG)
    if config["base_model_name_or_path"] == f"./{BASE}":
        return folder / BASE
    return fetch(config["base_model_name_or_path"], config.get("revision"))


def load(
    folder: Path, base: str | Path | None, dtype: str, task: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Check an adapter and its base, and lay the one on the other; with the adapter's own tokenizer, or that of its
    base where others have left it out. `task`, a key of `KINDS`, is refused if the adapter has another; returned, too.
    """
    path, found = locate_base(folder, base), read_json(folder / CONFIG)["task_type"]
    if task not in (None, found):
        problem = f"the adapter is of {KINDS[found]}, not of {KINDS[task]}"
        raise UserError(str(folder), problem, "use the other command, or load function")
    if path != folder / BASE:  # which was checked with the adapter
        require_sound(folder, path)
    for note in notes(folder):
        warnings.warn(f"{folder}: {note}", stacklevel=3)
    try:
        tokenizer = set_up_tokenizer(str(folder if (folder / TOKENIZER_CONFIG).exists() else path), {})
        read = load_classifier if found == "SEQ_CLS" else load_causal
        adapted = PeftModel.from_pretrained(read(str(path), ModelConfig(dtype=dtype), tokenizer), folder)
        adapted = adapted.to(PartialState().device).eval()
        with torch.no_grad():
            ids = tokenizer("Hello.", return_tensors="pt").input_ids
            if not adapted(input_ids=ids.to(adapted.device)).logits.isfinite().all():
                raise ValueError("the outputs are no finite numbers")
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except FOREIGN as error:
        problem = f"the adapter cannot be laid on its base: {first_line(error)}"
        raise UserError(str(folder), problem, "ask its author for another one") from error
    return adapted, tokenizer, found
