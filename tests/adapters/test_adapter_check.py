"""Adapters that are damaged or hostile: each is refused, with the reason, and none is loaded."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_fixtures import ADAPTER, CONFIG, change_json, change_tensors, relist, write_base, write_lie
from safetensors.torch import load_file, save_file

from rlhf_trl.adapters import check as adapter_check
from rlhf_trl.adapters.check import AdapterError, check_adapter, is_path, require_sound
from rlhf_trl.adapters.files import list_files
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.safetensors import hash_weights, is_finite, read_header, read_weights

MODULE = "base_model.model.transformer.h.1.attn.c_attn"
SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(reward_export, tmp_path):
    return shutil.copytree(reward_export, tmp_path / "adapter")


# --- what is done to a sound adapter: each returns a function of its folder


def drop(*keys):
    return lambda folder: change_tensors(folder, lambda tensors: [tensors.pop(key) for key in keys])


def put(key, tensor):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def set_to(name, **values):
    return lambda folder: change_json(folder, name, **values)


def write(name, content, listed=True):
    """Write a file; `content` may be a function of what is there."""

    def act(folder):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)
        if listed:
            relist(folder, name)

    return act


def change_lineage(change):
    def act(folder):
        lineage = read_json(folder / "lineage.json")
        change(lineage)
        write_json(folder / "lineage.json", lineage)

    return act


def unlist(name):
    return change_lineage(lambda lineage: lineage["files"].pop(name))


def alpha(text):
    return write(CONFIG, lambda content: content.replace(b'"lora_alpha": 10', b'"lora_alpha": ' + text))


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def link(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


def lie(folder):
    write_lie(folder / ADAPTER)
    relist(folder, ADAPTER)


def spread(folder, file=SHARD):
    """Name the base's weights in an index, as those of large models are."""
    (folder / "base" / "model.safetensors").rename(folder / "base" / SHARD)
    write_json(folder / "base" / INDEX, {"weight_map": dict.fromkeys(load_file(folder / "base" / SHARD), file)})
    unlist("base/model.safetensors")(folder)
    relist(folder, f"base/{SHARD}")
    relist(folder, f"base/{INDEX}")


def poison(folder):
    tensors = load_file(folder / "base" / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = torch.nan
    save_file(tensors, folder / "base" / "model.safetensors")
    relist(folder, "base/model.safetensors")


# Name -> what is done to a sound reward adapter, and the reason that it is refused for.
HOSTILE = {
    "pickle": (write("adapter_model.bin", b"\x80\x04."), "a pickle, or a file that may hold one"),
    "program": (write("modeling_custom.py", b"import os"), "a program; an adapter is numbers and settings"),
    "unknown file": (write("notes.docx", b"x"), "a file that is no part of an adapter"),
    "folder": (lambda folder: (folder / "inner").mkdir(), "a folder that no adapter has"),
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
    "cut weights": (write(ADAPTER, lambda content: content[:-100]), "the header of the weights is damaged"),
    "lying header": (lie, "the header of the weights is damaged"),
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
    "changed weights": (write(ADAPTER, flip, listed=False), "the weights are not what was exported"),
    "changed template": (write("chat_template.jinja", b"", listed=False), "the chat template is not what was"),
    "lost file": (lambda folder: (folder / "probe.json").unlink(), "is missing: the lineage names it"),
    "unlisted weights": (unlist(ADAPTER), "is not in the lineage: it was not exported"),
    "unlisted tokenizer": (unlist("tokenizer.json"), "is not in the lineage: it was not exported"),
    "base weight": (put("base_model.model.transformer.wte.weight", torch.ones(1024, 32)), "neither LoRA nor"),
    "base layer": (put(f"{MODULE}.base_layer.weight", torch.ones(32, 96)), "neither LoRA nor"),
    "named adapter": (put(f"{MODULE}.lora_A.default.weight", torch.ones(10, 32)), "neither LoRA nor"),
    "trained bias": (put(f"{MODULE}.lora_B.bias", torch.ones(96)), "neither LoRA nor"),
    "magnitude": (put(f"{MODULE}.lora_magnitude_vector", torch.ones(96)), "neither LoRA nor"),
    "half an embedding": (put("base_model.model.transformer.wte.lora_embedding_A", torch.ones(10, 1024)),
                          "lora_embedding_B is missing"),
    "two scores": (put("base_model.model.score.weight", torch.ones(2, 32)), "not that of one score"),
    "biases": (set_to(CONFIG, bias="all"), "bias is 'all': it would replace biases"),
    "whole embedding": (set_to(CONFIG, modules_to_save=["score", "wte"]), "only the reward head of a base"),
    "uninvited base": (write("base/config.json", b"{}"), "a model lies here, and the adapter's base is 'owner/base'"),
    "rank as text": (set_to(CONFIG, r="10"), "r is '10', not a whole number"),
    "rank true": (set_to(CONFIG, r=True), "r is True, not a whole number"),
    "huge rank": (set_to(CONFIG, r=10**9), "r is 1000000000, not a whole number"),
    "alpha": (alpha(b"Infinity"), "lora_alpha is inf"),
    "large alpha": (alpha(b"1" + b"0" * 400), "lora_alpha is 10000"),
    "rank pattern": (set_to(CONFIG, rank_pattern={"c_attn": 0}), "rank_pattern is"),
    "no pattern": (set_to(CONFIG, alpha_pattern={"(": 1}), "alpha_pattern is"),
    "rank of a pattern": (set_to(CONFIG, rank_pattern={"c_attn": 8}), "and the configuration says 8"),
    "revision": (set_to(CONFIG, revision="../../evil"), "revision is '../../evil', not a branch"),
    "revision number": (set_to(CONFIG, revision=7), "revision is 7, not a branch"),
    "PiSSA": (set_to(CONFIG, init_lora_weights="pissa_niter_4"), "changes the base"),
    "number as start": (set_to(CONFIG, init_lora_weights=1), "changes the base"),
    "repeated layers": (set_to(CONFIG, layer_replication=[[0, 2], [1, 2]]), "it repeats layers of the base"),
    "cut base": (set_to(CONFIG, kasa_config={}), "cuts off small singular values"),
    "no table": (set_to(CONFIG, rank_pattern=[]), "rank_pattern is []"),
    "empty lineage": (lambda folder: write_json(folder / "lineage.json", {}), "does not say what the base"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_adapter_is_refused_with_its_reason(copy, name):
    act, reason = HOSTILE[name]
    act(copy)
    assert reason in check_adapter(copy)[0].problem
    with pytest.raises(AdapterError):
        require_sound(copy)


# Name -> what is done to a sound adapter that ships its base, and the reason that it is refused for.
HOSTILE_BASE = {
    "named otherwise": (set_to(CONFIG, base_model_name_or_path="owner/base"), "the adapter's base is 'owner/base'"),
    "not said": (change_lineage(lambda lineage: lineage["base"].update(shipped=False)), "does not say that the base"),
    "code": (set_to("base/config.json", auto_map={"AutoConfig": "x.y"}), "auto_map makes the loader import"),
    "quantised": (set_to("base/config.json", quantization_config={"load_in_4bit": True}), "rewrite the weights"),
    "no settings": (lambda folder: (folder / "base" / "config.json").unlink(), "is missing"),
    "no JSON": (write("base/generation_config.json", b"{"), "is not JSON"),
    "NaN": (poison, "of the base holds NaN or infinity"),
    "two kinds": (write("base/model.safetensors.index.json", b"{}"), "in one file and in several"),
    "climbing index": (lambda folder: spread(folder, "../../x.safetensors"), "and no other"),
    "damaged": (write("base/model.safetensors", b"x"), "the header of the weights is damaged"),
    "tokenizer": (write("base/tokenizer.json", b"{}"), "a file that is no part of an adapter"),
    "inner folder": (lambda folder: (folder / "base" / "base").mkdir(), "a folder that no adapter has"),
}  # fmt: skip


@pytest.fixture
def with_base(gpt2_run, copy):
    """The reward adapter with its base beside it, as an export for a base without a public id."""
    (copy / "base").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(gpt2_run[0] / name, copy / "base" / name)
        relist(copy, f"base/{name}")
    change_json(copy, CONFIG, base_model_name_or_path="./base", revision=None)
    change_lineage(lambda lineage: lineage["base"].update(id=None, revision=None, shipped=True))(copy)
    return copy


def test_a_shipped_base_in_one_file_or_in_several_passes(with_base):
    assert check_adapter(with_base) == []
    spread(with_base)
    assert check_adapter(with_base) == []


@pytest.mark.parametrize("name", HOSTILE_BASE)
def test_a_hostile_base_is_refused_with_its_reason(with_base, name):
    act, reason = HOSTILE_BASE[name]
    act(with_base)
    assert reason in check_adapter(with_base)[0].problem


def test_a_folder_called_base_is_checked_as_any_other(reward_export, tmp_path):
    folder = shutil.copytree(reward_export, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"x")
    (problem,) = check_adapter(folder)
    assert problem.place == "model.safetensors"
    assert "a file that is no part of an adapter" in problem.problem


def test_what_a_download_leaves_is_no_part_of_the_adapter(copy):
    left = copy / ".cache" / "huggingface" / "download" / "README.md.metadata"
    left.parent.mkdir(parents=True)
    left.write_text("1")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")  # the Hub's own
    assert check_adapter(copy) == []
    assert left not in list_files(copy).values()
    (copy / ".cache" / "other").mkdir()
    assert "a folder that no adapter has" in check_adapter(copy)[0].problem


def test_what_a_problem_quotes_cannot_act_on_a_terminal(copy):
    change_json(copy, CONFIG, base_model_name_or_path="/tmp/\u202eevil")
    put("x\x1b]0;owned\x07\nline", torch.ones(2))(copy)
    text = " ".join(map(str, check_adapter(copy)))
    assert "⟨U+001B⟩]0;owned⟨U+0007⟩ line" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_sound_adapters_pass_and_those_of_a_run_name_their_local_base(gpt2_run, policy_export, reward_export):
    for folder in (policy_export, reward_export):
        assert check_adapter(folder) == check_adapter(folder, gpt2_run[0]) == []
    (problem,) = check_adapter(gpt2_run[2].adapter("sft"), gpt2_run[0])
    assert "a place on somebody's machine" in problem.problem


def test_no_tensor_is_read_before_the_header_was_checked(copy, monkeypatch):
    monkeypatch.setattr("rlhf_trl.run.safetensors._read", lambda *_: pytest.fail("a tensor was read"))
    lie(copy)
    assert "header" in check_adapter(copy)[0].problem


def test_a_pickle_is_not_opened(copy, monkeypatch):
    write("adapter_model.bin", b"\x80\x04.")(copy)
    monkeypatch.setattr(adapter_check, "_read_objects", lambda *_: pytest.fail("a file was opened"))
    assert [problem.place for problem in check_adapter(copy)] == ["adapter_model.bin"]


def test_all_problems_are_found_at_once(copy):
    change_json(copy, CONFIG, base_model_name_or_path="../base", auto_mapping={"parent_library": "evil"})
    drop("base_model.model.score.weight")(copy)
    assert len(check_adapter(copy)) == 3


# --- against a base


def cut(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".h.1." in key])


def embed(size):
    """Add LoRA to the embedding, and to the output layer that is tied to it."""
    shapes = {"transformer.wte.lora_embedding_A": (10, size), "transformer.wte.lora_embedding_B": (32, 10),
              "lm_head.lora_A.weight": (10, 32), "lm_head.lora_B.weight": (1024, 10)}  # fmt: skip
    added = {f"base_model.model.{key}": torch.ones(shape) for key, shape in shapes.items()}

    def act(folder):
        change_tensors(folder, lambda tensors: tensors.update(added))
        change_json(folder, CONFIG, target_modules=[*read_json(folder / CONFIG)["target_modules"], "wte", "lm_head"])

    return act


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (cut, "the base's module h.1.attn.c_attn is a target without tensors"),
        (embed(1024), None),
        (embed(1000), "wte is for a weight of 1000 × 32, and the base's is 1024 × 32"),
        (put("base_model.model.score.weight", torch.ones(1, 48)),
         "the reward head reads 48 numbers, and the base's hidden size is 32"),
    ],
)  # fmt: skip
def test_what_is_sound_by_itself_may_not_fit_its_base(gpt2_run, copy, act, problem):
    act(copy)
    assert check_adapter(copy) == []
    found = [one.problem for one in check_adapter(copy, gpt2_run[0])]
    assert found == [problem] if problem else not found


def test_another_base_is_told_from_its_own(gpt2_run, copy, tmp_path):
    base = shutil.copytree(gpt2_run[0], tmp_path / "base")
    shapes = {key: tensor.shape for key, tensor in read_weights(base).items()}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, base / "model.safetensors")
    (problem,) = check_adapter(copy, base)
    assert "not those that the adapter was exported for, though their shapes fit" in problem.problem
    assert "owner/base" in problem.remedy
    larger = {key: torch.zeros([size + 1 for size in shape]) for key, shape in shapes.items()}
    save_file(larger, base / "model.safetensors")
    (problem,) = check_adapter(copy, base)
    assert "is for a weight of 96 × 32, and the base's is 97 × 33" in problem.problem
    llama = write_base(tmp_path / "llama", "llama")
    (problem,) = check_adapter(copy, llama)
    assert "it is another architecture" in problem.problem
    (llama / "model.safetensors").unlink()
    assert "there are no weights in safetensors" in check_adapter(copy, llama)[0].problem
    with pytest.raises(UserError, match="no such folder"):
        check_adapter(copy, tmp_path / "nowhere")


def test_ranks_by_pattern_are_checked_by_module(copy):
    set_to(CONFIG, r=4, rank_pattern={"c_attn": 10, r".*\.mlp\..*": 10})(copy)
    problems = {problem.problem.rpartition("c_proj")[2] for problem in check_adapter(copy)}
    assert problems == {" has rank 10, and the configuration says 4"}


def test_an_adapter_without_lineage_is_checked_too(gpt2_run, copy, tmp_path):
    for name in ("lineage.json", "evidence.json", "probe.json"):
        (copy / name).unlink()
    base = shutil.copytree(gpt2_run[0], tmp_path / "base")
    assert check_adapter(copy, base) == []
    (base / "chat_template.jinja").write_text("another")
    (problem,) = check_adapter(copy, base)
    assert "the chat template differs from that of the base" in problem.problem


def test_paths_are_told_from_ids():
    assert all(map(is_path, ("/a", "~/a", "../a", "a/../b", "C:\\a", "a\\b", "./a", "\\\\host\\a")))
    assert not any(map(is_path, ("owner/name", "gpt2", "owner/name-1.5")))


# --- weights without torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_found(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    values = {"sound": [0.0, -largest, largest, 1.0], "nan": [0.0, torch.nan], "infinite": [-torch.inf]}
    tensors = {name: torch.tensor(numbers, dtype=dtype) for name, numbers in values.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert [name for name, tensor in header.items() if is_finite(tensor)] == ["sound"]
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
    monkeypatch.setattr("rlhf_trl.run.safetensors.CHUNK", 64)
    assert hash_weights(read_weights(tmp_path)) == whole


def test_the_check_loads_no_torch(policy_export):
    code = (
        "import sys; from pathlib import Path; from rlhf_trl.adapters.check import check_adapter\n"
        f"assert check_adapter(Path({str(policy_export)!r})) == []\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
