"""The program that `verify` runs: load an export and write its outputs on the probe as JSON.

Imports nothing of this package. Reads the export, and from standard input the lines of its card, which load it.

    python -I probe_program.py policy|reward EXPORT RESULT.json < loading_lines.py
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


@torch.no_grad()
def outputs(model: Any, rows: list[torch.Tensor]) -> list[list[float]]:
    """Compute the score of each row of token ids, or the logit of each of its next tokens."""
    found = []
    for row in rows:
        logits = model.eval()(input_ids=row[None].to(model.device)).logits[0].cpu()
        found.append(logits.tolist() if logits.ndim == 1 else logits[:-1].gather(1, row[1:, None])[:, 0].tolist())
    return found


@torch.no_grad()
def _padded(model: Any, rows: list[torch.Tensor], padding: int) -> list[list[float]]:
    """Compute the score of each row in one padded batch."""
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return model(input_ids=batch, attention_mask=mask.long()).logits.tolist()


def main() -> None:
    kind, folder, result = sys.argv[1:]
    os.chdir(folder)  # where `./base` is the base that is shipped
    names: dict[str, Any] = {"folder": folder}
    exec(sys.stdin.read(), names)  # defines `tokenizer` and `model`
    auto, options, padding = transformers.AutoModelForCausalLM, {}, names["tokenizer"].pad_token_id
    if kind == "reward":
        auto = transformers.AutoModelForSequenceClassification
        if not Path("base").exists():  # one that is shipped says so itself
            options = {"num_labels": 1, "pad_token_id": padding}
    models = {"peft": names["model"], "direct": auto.from_pretrained(folder, dtype="float32", **options)}
    rows = [torch.tensor(row["input_ids"]) for row in json.loads(Path("probe.json").read_bytes())["rows"]]
    found = {name: outputs(model, rows) for name, model in models.items()}
    if kind == "reward":
        found |= {f"{name}, padded": _padded(model, rows, padding) for name, model in models.items()}
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    Path(result).write_text(json.dumps({"outputs": found, "packages": packages}), encoding="utf-8")


if __name__ == "__main__":
    main()
