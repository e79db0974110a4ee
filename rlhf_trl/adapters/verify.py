"""The proof that an export works by itself: the lines of its card, run in a fresh process without this package.

Reads an export and the files of its base; writes nothing that stays. The process is an isolated one (`python -I`) of
the same interpreter, with the same packages installed, in which `rlhf_trl` must not be loaded. It has no network, no
GPU, and the base under its public id, in a model cache made for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.check import PROBE
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json

# Largest difference to the run's outputs, as a share of the largest of them (1 at least): float32 holds 7 digits, and
# a merged model rounds otherwise than one with its adapter beside it.
TOLERANCE = 1e-5
COMMIT = re.compile(r"[0-9a-f]{40}")

# (Whether it is a policy, whether its base is shipped) -> how to load an export. The card shows these lines.
LINES = {
    (True, False): """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
""",
    (True, True): """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype="float32")
model = PeftModel.from_pretrained(base, folder)
""",
    (False, False): """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
one_score = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **one_score)
""",
    (False, True): """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
one_score = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base", **one_score)
model = PeftModel.from_pretrained(base, folder)
""",
}
PROGRAM = """\
import json, sys
import torch, transformers
folder, result = sys.argv[1:]
{lines}
more = {{"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}} if {classifier} else {{}}
direct = transformers.{auto}.from_pretrained(folder, dtype="float32", **more)
with open(folder + "/probe.json") as file:
    rows = [torch.tensor(row["input_ids"]) for row in json.load(file)["rows"]]

@torch.no_grad()
def outputs(model):
    logits = [model(input_ids=row[None]).logits[0] for row in rows]
    if {classifier}:
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return [[*one.tolist(), *other] for one, other in
                zip(logits, model(input_ids=batch, attention_mask=mask.long()).logits.tolist())]
    return [one[:-1].gather(1, row[1:, None])[:, 0].tolist() for one, row in zip(logits, rows)]

found = {{"peft": outputs(model), "transformers": outputs(direct)}}
packages = sorted({{name.partition(".")[0] for name in sys.modules}})
with open(result, "w") as file:
    json.dump({{"outputs": found, "packages": packages}}, file)
"""


def loading_lines(kind: str, shipped: bool) -> str:
    """Return the Python lines that load an export, whose folder they call `folder`.

    Args:
        kind: `policy` or `reward`.
        shipped: whether the base lies in the export.
    """
    return LINES[kind == "policy", shipped]


def verify(folder: Path, kind: str, base: Path, base_id: str | None, revision: str | None) -> dict[str, Any]:
    """Load an export in a fresh isolated process of the same interpreter, with `rlhf_trl` not loaded, by `peft` and by
    `transformers`, and compare its outputs on the probe with those of the run's adapter in float32.

    A reward adapter scores each text alone and all in one padded batch.

    Args:
        kind: `policy` or `reward`.
        base: where the files of its base lie.
        base_id: the public id that stands for them; None where the base lies in the export.

    Returns:
        `rows`, `outputs` (their number), `largest` (the largest absolute output), the largest absolute `difference`,
        and `relative`, its share of `largest` (of 1 where that is less).

    Raises:
        UserError: the export cannot be loaded, or its outputs are not the run's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cache, result = Path(scratch) / "hub", Path(scratch) / "result.json"
        if base_id is not None:
            _fill_cache(cache, base, base_id, revision)
        classifier = kind == "reward"
        auto = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
        program = PROGRAM.format(lines=loading_lines(kind, base_id is None), classifier=classifier, auto=auto)
        environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            # -I: neither the directory, nor PYTHONPATH, nor packages of the user
            [sys.executable, "-I", "-c", program, str(folder.resolve()), str(result)],
            cwd=folder,  # where `./base` is the base that is shipped
            env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
            raise UserError(str(folder), f"a fresh process cannot load the export: {reason}", "report this")
        found = read_json(result)
    if "rlhf_trl" in found["packages"]:
        raise UserError(str(folder), "the fresh process has loaded rlhf_trl itself", "report this")
    return compare(read_json(folder / PROBE), found["outputs"])


def compare(probe: dict[str, Any], outputs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Compare outputs on the probe, by loader and row, with those that it records; as `verify`."""
    expected = [row["outputs"] for row in probe["rows"]]
    largest = max(abs(value) for row in expected for value in row)
    # A classifier has two outputs of a row, both of which are to be the recorded one.
    pairs = [
        (value, given)
        for loaded in outputs.values()
        for row, values in zip(expected, loaded, strict=True)
        for value, given in zip(row * (len(values) // len(row)), values, strict=True)
    ]
    difference = max(abs(value - given) for value, given in pairs)
    relative = difference / max(1.0, largest)
    if not relative <= TOLERANCE:
        problem = f"the outputs differ from the run's by up to {difference:.3g}, at outputs up to {largest:.3g}"
        raise UserError(PROBE, problem, "report this together with the recipe")
    return {"rows": len(expected), "outputs": len(pairs), "largest": largest, "difference": difference,
            "relative": relative}  # fmt: skip


def _fill_cache(cache: Path, base: Path, base_id: str, revision: str | None) -> None:
    """Lay links to a model's files where `huggingface_hub` looks for that id and revision."""
    commit = revision if revision and COMMIT.fullmatch(revision) else "0" * 40
    repository = cache / f"models--{base_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file.resolve())
    # `transformers` asks for the default branch where a call names no revision.
    for name in {"main", revision or "main"} - {commit}:
        reference = repository / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
