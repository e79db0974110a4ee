"""The proof that an export works by itself: the lines of its card, run in a fresh process without this package.

The process is an isolated one (`python -I`) of the same interpreter, with the same packages installed. It has no
network, no GPU, and the base under its public id, in a model cache made for it.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_trl.adapters.check import PROBE, run_isolated
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, write_text

# Largest difference to the run's outputs, as a share of the largest of them (1 at least): float32 holds 7 digits, and
# a merged model rounds otherwise than one with its adapter beside it.
TOLERANCE = 1e-5
COMMIT = re.compile(r"[0-9a-f]{40}")
PROGRAM = Path(__file__).with_name("probe_program.py")
# How to load an export whose base has a public id, and one that ships its base. The card shows these lines.
NAMED = """\
from peft import AutoPeftModelFor{task}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
{settings}model = AutoPeftModelFor{task}.from_pretrained(folder, {options})
"""
SHIPPED = """\
from peft import PeftModel
from transformers import AutoModelFor{task}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
{settings}base = AutoModelFor{task}.from_pretrained(f"{{folder}}/base", {options})
model = PeftModel.from_pretrained(base, folder)
"""
ONE_SCORE = 'one_score = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}\n'
# Kind of export -> the class that loads it, the line that prepares its options, and the options.
KINDS = {"policy": ("CausalLM", "", 'dtype="float32"'), "reward": ("SequenceClassification", ONE_SCORE, "**one_score")}


def loading_lines(kind: str, shipped: bool) -> str:
    """Return the Python lines that load an export (`policy` or `reward`), whose folder they call `folder`."""
    task, settings, options = KINDS[kind]
    return (SHIPPED if shipped else NAMED).format(task=task, settings=settings, options=options)


def verify(folder: Path, kind: str, base: Path, base_id: str | None, revision: str | None) -> dict[str, Any]:
    """Load an export in a fresh process, by `peft` and by `transformers`, and compare its outputs on the probe with
    those of the run's adapter in float32. A reward adapter scores each text alone and all in one padded batch.

    `base_id` is the public id of the files in `base`; None where the base lies in the export. Returns the number of
    `rows` and `outputs`, the `largest` absolute output, and the largest absolute `difference`; a UserError says that
    the export cannot be loaded, or that its outputs are not the run's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cache, result = Path(scratch) / "hub", Path(scratch) / "result.json"
        if base_id is not None:  # links to its files lie where `huggingface_hub` looks for that id and revision
            commit = revision if revision and COMMIT.fullmatch(revision) else "0" * 40
            repository = cache / f"models--{base_id.replace('/', '--')}"
            snapshot = repository / "snapshots" / commit
            snapshot.mkdir(parents=True)
            for file in filter(Path.is_file, base.iterdir()):
                (snapshot / file.name).symlink_to(file.resolve())
            # `transformers` asks for the default branch where a call names no revision.
            for name in {"main", revision or "main"} - {commit}:
                write_text(repository / "refs" / name, commit)
        lines, environment = loading_lines(kind, base_id is None), {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        why = run_isolated(PROGRAM, kind, str(folder.resolve()), str(result), given=lines, HF_HUB_CACHE=str(cache),
                           HF_HUB_DISABLE_TELEMETRY="1", **environment)  # fmt: skip
        if why is not None:
            raise UserError(str(folder), f"a fresh process cannot load the export: {why}", "report this")
        written = read_json(result)
    if "rlhf_trl" in written["packages"]:
        raise UserError(str(folder), "the fresh process has loaded rlhf_trl itself", "report this")
    rows = [row["outputs"] for row in read_json(folder / PROBE)["rows"]]
    expected, found = np.hstack(rows), np.array([np.hstack(outputs) for outputs in written["outputs"].values()])
    largest, difference = float(np.abs(expected).max()), float(np.abs(found - expected).max())
    require_equal(PROBE, "the export", difference, largest)
    return {"rows": len(rows), "outputs": found.size, "largest": largest, "difference": difference}


def require_equal(place: str, what: str, difference: float, largest: float) -> None:
    """Refuse, by a UserError, outputs that differ by more than rounding does, or by NaN."""
    if not difference <= TOLERANCE * max(1.0, largest):
        problem = f"the outputs of {what} differ from the adapter's by up to {difference:.3g}, of up to {largest:.3g}"
        raise UserError(place, problem, "use the adapter as it is, and report this together with the recipe")
