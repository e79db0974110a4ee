"""The program that `verify` runs in an isolated process: load an export and write its outputs on the probe as JSON.

Imports nothing of this package. Reads the export, and from standard input the lines of its card, which load it.

    python -I probe_program.py policy|reward EXPORT RESULT.json < loading_lines.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def main() -> None:
    kind, folder, result = sys.argv[1:]
    names: dict[str, Any] = {"folder": folder}
    exec(sys.stdin.read(), names)  # defines `tokenizer` and `model`
    padding, options = names["tokenizer"].pad_token_id, {}
    auto = transformers.AutoModelForCausalLM
    if kind == "reward":
        auto = transformers.AutoModelForSequenceClassification
        options = {"num_labels": 1, "pad_token_id": padding}
    direct = auto.from_pretrained(folder, dtype="float32", **options)
    probe = json.loads(Path(folder, "probe.json").read_text(encoding="utf-8"))
    rows = [torch.tensor(row["input_ids"]) for row in probe["rows"]]
    outputs = _scores if kind == "reward" else _logits
    written = {name: outputs(model, rows, padding) for name, model in (("peft", names["model"]), ("direct", direct))}
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    Path(result).write_text(json.dumps({"outputs": written, "packages": packages}), encoding="utf-8")


@torch.no_grad()
def _logits(model: Any, rows: list[torch.Tensor], _: int) -> list[list[float]]:
    """Return the logit of each next token of each row."""
    return [model(input_ids=row[None]).logits[0, :-1].gather(1, row[1:, None])[:, 0].tolist() for row in rows]


@torch.no_grad()
def _scores(model: Any, rows: list[torch.Tensor], padding: int) -> list[list[float]]:
    """Return two scores of each row: of the row alone, and in one padded batch of all rows."""
    alone = [model(input_ids=row[None]).logits[0, 0].item() for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    together = model(input_ids=batch, attention_mask=mask.long()).logits[:, 0].tolist()
    return [list(pair) for pair in zip(alone, together, strict=True)]


if __name__ == "__main__":
    main()
