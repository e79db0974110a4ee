"""Adapters that are damaged or hostile: each is refused, with the reason, and none is loaded."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_fixtures import ADAPTER, CONFIG, change_json, change_tensors, forget, write_base, write_lie
from safetensors.torch import save_file

from rlhf_trl import adapter_check
from rlhf_trl.adapter_check import AdapterError, check_adapter, is_path, require_sound
from rlhf_trl.recipe import UserError
from rlhf_trl.rundir import write_json
from rlhf_trl.weights import hash_weights, is_finite, read_header, read_weights

MODULE = "base_model.model.transformer.h.1.attn.c_attn"


@pytest.fixture
def copy(reward_export, tmp_path):
    return shutil.copytree(reward_export, tmp_path / "adapter")


def drop(*keys):
    return lambda folder: change_tensors(folder, lambda tensors: [tensors.pop(key) for key in keys])


def put(key, tensor):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def set_to(name, **values):
    return lambda folder: change_json(folder, name, **values)


def write(name, content):
    def act(folder):
        (folder / name).write_bytes(content)
        forget(folder, name)

    return act


def link(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


def truncate(folder):
    data = (folder / ADAPTER).read_bytes()
    write(ADAPTER, data[:-100])(folder)


def lie(folder):
    write_lie(folder / ADAPTER)
    forget(folder, ADAPTER)


def flip(folder):
    data = bytearray((folder / ADAPTER).read_bytes())
    data[-1] ^= 1
    (folder / ADAPTER).write_bytes(data)


def nest(folder):
    (folder / "inner").mkdir()


def retemplate(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


# Name -> what is done to a sound reward adapter, and the reason that it is refused for.
HOSTILE = {
    "pickle": (write("adapter_model.bin", b"\x80\x04."), "a pickle, or a file that may hold one"),
    "program": (write("modeling_custom.py", b"import os"), "a program; an adapter is numbers and settings"),
    "unknown file": (write("notes.docx", b"x"), "a file that is no part of an adapter"),
    "folder": (nest, "a folder that no adapter has"),
    "link": (link, "a symbolic link out of the folder"),
    "local base": (set_to(CONFIG, base_model_name_or_path="/home/me/base"), "a place on somebody's machine"),
    "climbing base": (set_to(CONFIG, base_model_name_or_path="../base"), "a place on somebody's machine"),
    "no base": (set_to(CONFIG, base_model_name_or_path=None), "a place on somebody's machine"),
    "other method": (set_to(CONFIG, peft_type="PROMPT_TUNING"), "peft_type is 'PROMPT_TUNING', not 'LORA'"),
    "no task": (set_to(CONFIG, task_type=None), "of neither a policy nor"),
    "targets": (set_to(CONFIG, target_modules=[1]), "neither a pattern nor a list"),
    "imported class": (set_to(CONFIG, auto_mapping={"parent_library": "evil"}), "auto_mapping makes the loader"),
    "imported backend": (set_to(CONFIG, megatron_config={"x": 1}), "megatron_config makes the loader import"),
    "tokenizer code": (set_to("tokenizer_config.json", auto_map={"X": "x.y"}), "auto_map makes the loader"),
    "tokenizer path": (set_to("tokenizer_config.json", vocab_file="../../etc/passwd"), "a place outside the folder"),
    "no JSON": (write(CONFIG, b"{"), "is not JSON"),
    "not UTF-8": (write(CONFIG, b"\xff\xfe"), "is not JSON"),
    "deep JSON": (write(CONFIG, b"[" * 100_000), "is not JSON"),
    "no object": (write(CONFIG, b"[]"), "is not a JSON object"),
    "cut weights": (truncate, "the header of the weights is damaged or does not fit the file"),
    "lying header": (lie, "the header of the weights is damaged or does not fit the file"),
    "no weights": (lambda folder: (folder / ADAPTER).unlink(), "is missing"),
    "NaN": (put(f"{MODULE}.lora_A.weight", torch.full((10, 32), torch.nan)), "holds NaN or infinity"),
    "infinity": (put(f"{MODULE}.lora_A.weight", torch.full((10, 32), -torch.inf, dtype=torch.bfloat16)),
                 "holds NaN or infinity"),
    "empty tensor": (put(f"{MODULE}.lora_A.weight", torch.zeros(0)), "is empty: it was not gathered"),
    "integers": (put(f"{MODULE}.lora_A.weight", torch.ones(10, 32, dtype=torch.int8)), "not of floats"),
    "foreign tensor": (put("lm_head.weight", torch.ones(2, 2)), "is not named as an adapter's are"),
    "half a module": (drop(f"{MODULE}.lora_B.weight"), f"the tensor {MODULE}.lora_B.weight is missing"),
    "missing module": (drop(f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"), "the tensors of the target module"),
    "no head": (drop("base_model.model.score.weight"), "the reward head (score) is missing"),
    "wrong rank": (set_to(CONFIG, r=16), "and the configuration says 16"),
    "shapes apart": (put(f"{MODULE}.lora_A.weight", torch.ones(3, 32)), "do not fit each other"),
    "changed weights": (flip, "the weights are not what was exported"),
    "changed template": (retemplate, "the chat template is not what was exported"),
    "lost file": (lambda folder: (folder / "probe.json").unlink(), "is missing: the lineage names it"),
    "empty lineage": (lambda folder: write_json(folder / "lineage.json", {}), "does not say what the base"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_adapter_is_refused_with_its_reason(copy, name):
    act, reason = HOSTILE[name]
    act(copy)
    problems = check_adapter(copy)
    assert reason in problems[0].problem
    with pytest.raises(AdapterError):
        require_sound(copy)


def test_every_reason_is_another_one():
    reasons = [reason for _, reason in HOSTILE.values()]
    assert len(set(reasons)) >= 25


def test_sound_adapters_pass(gpt2_run, policy_export, reward_export):
    base = gpt2_run[0]
    for folder in (policy_export, reward_export):
        assert check_adapter(folder) == []
        assert check_adapter(folder, base) == []


def test_no_tensor_is_read_before_the_header_was_checked(copy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("rlhf_trl.weights._read", refuse)
    lie(copy)
    assert "header" in check_adapter(copy)[0].problem


def test_a_pickle_is_not_opened(copy, monkeypatch):
    write("adapter_model.bin", b"\x80\x04.")(copy)
    monkeypatch.setattr(adapter_check, "_read_object", lambda file: pytest.fail(f"{file} was opened"))
    assert [problem.place for problem in check_adapter(copy)] == ["adapter_model.bin"]


def test_all_problems_are_found_at_once(copy):
    change_json(copy, CONFIG, base_model_name_or_path="../base", auto_mapping={"parent_library": "evil"})
    drop("base_model.model.score.weight")(copy)
    assert len(check_adapter(copy)) == 3


# --- against a base
# ----------------------------------------------------------------------------------------------------


def test_another_base_is_told_from_its_own(gpt2_run, copy, tmp_path):
    base = shutil.copytree(gpt2_run[0], tmp_path / "base")
    weights = read_weights(base)
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in weights.items()}
    save_file(tensors, base / "model.safetensors")
    (problem,) = check_adapter(copy, base)
    assert "not those that the adapter was exported for, though their shapes fit" in problem.problem
    assert "owner/base" in problem.remedy
    save_file({key: torch.zeros([size + 1 for size in value.shape]) for key, value in tensors.items()},
              base / "model.safetensors")  # fmt: skip
    (problem,) = check_adapter(copy, base)
    assert "is for a weight of 96 × 32, and the base's is 97 × 33" in problem.problem
    llama = write_base(tmp_path / "llama", "llama")
    (problem,) = check_adapter(copy, llama)
    assert "it is another architecture" in problem.problem
    (llama / "model.safetensors").unlink()
    assert "there are no weights in safetensors" in check_adapter(copy, llama)[0].problem
    with pytest.raises(UserError, match="no such folder"):
        check_adapter(copy, tmp_path / "nowhere")


def test_a_whole_layer_that_is_missing_shows_against_the_base(gpt2_run, copy):
    def cut(tensors):
        for key in [key for key in tensors if ".h.1." in key]:
            del tensors[key]

    change_tensors(copy, cut)
    assert check_adapter(copy) == []  # a model of one layer would look like this
    (problem,) = check_adapter(copy, gpt2_run[0])
    assert problem.problem == "the base's module h.1.attn.c_attn is a target without tensors"


def test_an_adapter_without_lineage_is_checked_too(gpt2_run, copy, tmp_path):
    for name in ("lineage.json", "evidence.json", "probe.json"):
        (copy / name).unlink()
    base = shutil.copytree(gpt2_run[0], tmp_path / "base")
    assert check_adapter(copy, base) == []
    (base / "chat_template.jinja").write_text("another")
    (problem,) = check_adapter(copy, base)
    assert "the chat template differs from that of the base" in problem.problem


def test_the_adapters_of_a_run_name_their_local_base(trained):
    run = trained[1]
    (problem,) = check_adapter(run.adapter("rm"), run.model("sft"))
    assert "a place on somebody's machine" in problem.problem


@pytest.mark.parametrize("text", ["/a", "~/a", "../a", "a/../b", "C:\\a", "a\\b", "./a", "\\\\host\\a"])
def test_paths_are_known(text):
    assert is_path(text)


@pytest.mark.parametrize("text", ["owner/name", "gpt2", "owner/name-1.5"])
def test_ids_are_no_paths(text):
    assert not is_path(text)


# --- weights without torch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_found(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    tensors = {
        "sound": torch.tensor([0.0, -largest, largest, 1.0], dtype=dtype),
        "nan": torch.tensor([0.0, torch.nan], dtype=dtype),
        "infinite": torch.tensor([[-torch.inf]], dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert {name: is_finite(tensor) for name, tensor in header.items()} == {
        "sound": True, "nan": False, "infinite": False,
    }  # fmt: skip
    assert header["sound"].shape == (4,)


def test_the_hash_of_weights_is_of_their_content(tmp_path):
    first, second = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)

    def hash_of(name: str, *files: dict) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for number, file in enumerate(files):
            save_file(file, folder / f"model-{number}.safetensors", metadata={"made": name})
        return hash_weights(read_weights(folder))

    together = hash_of("together", {"a": first, "b": second})
    assert together == hash_of("apart", {"b": second}, {"a": first})
    others = [
        hash_of("renamed", {"a": first, "c": second}),
        hash_of("reshaped", {"a": first.reshape(3, 2), "b": second}),
        hash_of("changed", {"a": first + 1e-6, "b": second}),
        hash_of("recast", {"a": first, "b": second.view(torch.float16)}),
    ]
    assert len({together, *others}) == 5


def test_weights_on_disk_are_read_in_pieces(tmp_path, monkeypatch):
    values = np.arange(1000, dtype=np.float32)
    save_file({"x": torch.from_numpy(values)}, tmp_path / "model.safetensors")
    whole = hash_weights(read_weights(tmp_path))
    monkeypatch.setattr("rlhf_trl.weights.CHUNK", 64)
    assert hash_weights(read_weights(tmp_path)) == whole


def test_the_check_loads_no_torch(policy_export):
    code = (
        "import sys; from pathlib import Path; from rlhf_trl.adapter_check import check_adapter\n"
        f"assert check_adapter(Path({str(policy_export)!r})) == []\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
