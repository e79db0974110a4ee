"""`adapter merge`: an adapter folded into its base, as a model of its own that answers, or scores, the same.

Reads an adapter and its base; writes a model's folder, in float32, with the tokenizer and a `lineage.json`.

    rlhf-trl adapter merge shared/demo-grpo merged/demo-grpo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_trl.adapters.export import one_score, write_tokenizer
from rlhf_trl.adapters.files import CONFIG, LINEAGE, require_new
from rlhf_trl.adapters.load import load_policy, load_reward_model, locate_base
from rlhf_trl.adapters.verify import require_equal
from rlhf_trl.models.tokenizer import encode
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, staged, write_json

# What the outputs are compared on.
TEXTS = (("What is a good way to learn a language?", "Read a little every day, and talk to people."),
         ("Why is the sky blue?", "Because air scatters blue light more than red."))  # fmt: skip


def merge(folder: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    """Merge an adapter into its base in float32, and compare what was saved with the adapter.

    They are compared in float64: in float32, rounding on the way through the layers is larger than what merging does.

    Returns:
        The largest absolute `difference` of an output, and the `largest` absolute output.

    Raises:
        UserError: the adapter or the base is not sound, the base is quantised, or the merged model's outputs differ.
    """
    require_new(out)
    path = locate_base(folder, base)
    classifier = read_json(folder / CONFIG)["task_type"] == "SEQ_CLS"
    if read_json(path / "config.json").get("quantization_config") is not None:
        problem = "the base is quantised: merged weights would be rounded to its few values"
        raise UserError(str(path), problem, "merge into the base in full precision: --base")
    model, tokenizer = _load(folder, path, classifier)
    pairs = [encode(tokenizer, [{"role": "user", "content": text}], answer) for text, answer in TEXTS]
    texts = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    before = _outputs(model.double(), texts)
    del model  # one copy in memory at a time
    with staged(out) as target:
        merged = _load(folder, path, classifier)[0].merge_and_unload()
        if classifier:
            merged.config.update(one_score(tokenizer))
        merged.save_pretrained(target)
        write_tokenizer(tokenizer, "reward" if classifier else "policy", target)
        del merged
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        after = _outputs(auto.from_pretrained(target, dtype="float64", trust_remote_code=False), texts)
        found = {"difference": float((before - after).abs().max()), "largest": float(before.abs().max())}
        require_equal(str(folder), "the merged model", **found)
        lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).exists() else None
        write_json(target / LINEAGE, {"merged": found, "adapter": lineage})
    return found


def _load(folder: Path, base: Path, classifier: bool) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    loaded = load_reward_model(folder, base) if classifier else load_policy(folder, base, dtype="float32")
    return loaded.model, loaded.tokenizer


@torch.no_grad()
def _outputs(model: Any, texts: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None].to(model.device)).logits.cpu().flatten() for row in texts])
