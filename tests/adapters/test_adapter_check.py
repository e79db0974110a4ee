"""Adapters that are damaged, hostile or others': each is refused with the reason, or passes; none is loaded."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from adapter_fixtures import change_json, relist
from fuzz import Tally, adapters
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_trl.adapters import check as adapter_check
from rlhf_trl.adapters.check import AdapterError, check_adapter, list_files, notes, require_sound
from rlhf_trl.adapters.rules import IMPORTS, PLAIN, LoraSettings
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.files import read_json, write_json
from rlhf_trl.run.safetensors import hash_weights, is_finite, read_header, read_weights

ADAPTER, CONFIG, LINEAGE = "adapter_model.safetensors", "adapter_config.json", "lineage.json"
TOKENIZER, TEMPLATE, BASE_CONFIG = "tokenizer_config.json", "chat_template.jinja", "base/config.json"
WEIGHTS = "base/model.safetensors"
INDEX, SHARD = "base/model.safetensors.index.json", "base/model-00001-of-00001.safetensors"
PREFIX, HEAD = "base_model.model.", "base_model.model.score.weight"
Q0, Q1 = (f"{PREFIX}model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
SETTINGS = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "./base", "r": 2, "bias": "none",
            "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "peft_version": "0.21.2"}  # fmt: skip
BASE = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 1, "hidden_size": 4, "vocab_size": 8,
        "max_position_embeddings": 10**6}  # fmt: skip


def write_base(folder, width=4, **more):
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]
    weights = {f"{name}.weight": np.ones((width, width), "f4") for name in names}
    folder.mkdir(parents=True)
    save_file(weights | {"model.embed_tokens.weight": np.ones((8, width), "f4"), **more}, folder / "model.safetensors")
    write_json(folder / "config.json", {**BASE, "hidden_size": width})
    return names


@pytest.fixture
def adapter(tmp_path):
    """A sound reward adapter on three layers of a base that it ships, with its lineage."""
    folder = tmp_path / "adapter"
    names = write_base(folder / "base")
    lora = {f"{PREFIX}{name}.lora_{end}.weight": np.ones((2, 4) if end == "A" else (4, 2), "f4")
            for name in names for end in "AB"}  # fmt: skip
    save_file(lora | {HEAD: np.ones((1, 4), "f4")}, folder / ADAPTER)
    write_json(folder / CONFIG, SETTINGS)
    write_json(folder / TOKENIZER, {"eos_token": "</s>", "bos_token": {"content": "<s>"}})
    for name in (TEMPLATE, "README.md", "probe.json"):
        (folder / name).write_text("{}")
    base = {"id": None, "revision": None, "shipped": True, "weights": hash_weights(read_weights(folder / "base"))}
    files = {name: hash_file(file) for name, file in list_files(folder).items()}
    write_json(folder / LINEAGE, {"base": base, "files": files})
    assert check_adapter(folder) == []
    return folder


def problems(folder, base=None):
    return "\n".join(problem.problem for problem in check_adapter(folder, base))


# --- what is done to that adapter: each returns a function of its folder


def tensors(change, name=ADAPTER):
    def act(folder):
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name)
        relist(folder, name)

    return act


def put(key, shape, value=1.0, dtype="f4"):
    return tensors(lambda content: content.update({key: np.full(shape, value, dtype)}))


def drop(*keys):
    return tensors(lambda content: [content.pop(key) for key in keys])


def set_to(name, **values):
    return lambda folder: change_json(folder, name, **values)


def settings(**values):
    return set_to(CONFIG, **values)


def write(name, content, listed=True):
    """Write a file; `content` may be a function of what is there."""

    def act(folder):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)
        if listed:
            relist(folder, name)

    return act


def remove(name):
    return lambda folder: (folder / name).unlink()


def make(name):
    return lambda folder: (folder / name).mkdir()


def lineage(change):
    def act(folder):
        content = read_json(folder / LINEAGE)
        change(content)
        write_json(folder / LINEAGE, content)

    return act


def unlist(*names):
    return lineage(lambda content: [content["files"].pop(name) for name in names])


def link(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


def spread(folder, file=SHARD):
    """Name the base's weights in an index, as those of large models are."""
    names = load_file((folder / WEIGHTS).rename(folder / SHARD))
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(names, file.removeprefix("base/"))})
    unlist(WEIGHTS)(folder)
    relist(folder, SHARD)
    relist(folder, INDEX)


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
lie = write(ADAPTER, struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 16)  # the file is smaller than its tensor
A1, UNASKED = f"{Q1}.lora_A.weight", "the settings do not ask for LoRA on"
# The reason that is said, and what is refused for it.
REFUSED = {
    "a pickle, or a file that may hold one": [write("adapter_model.bin", b"\x80\x04.")],
    "a program": [write("modeling_custom.py", b"import os")],
    "a file that is no part of an adapter": [write("notes.docx", b"x"), write("base/tokenizer.json", b"{}")],
    "a folder that no adapter has": [make("inner"), make("base/base")],
    "a symbolic link out of the folder": [link],
    "a place on somebody's": [settings(base_model_name_or_path=path) for path in ("/a", "../a", "~/a", "a/..", None)],
    "a place outside the folder": [set_to(TOKENIZER, vocab_file=path) for path in ("../../etc/passwd", "\\\\host\\a")],
    "makes the loader import": [settings(auto_mapping={"parent_library": "evil"}), settings(megatron_config={"x": 1}),
                                set_to(TOKENIZER, auto_map={"X": "x.y"}), set_to(BASE_CONFIG, auto_map={"X": "x.y"}),
                                set_to(BASE_CONFIG, text_config={"auto_map": {"AutoConfig": "x.y"}})],
    "is not JSON": [write(CONFIG, text) for text in (b"{", b"\xff\xfe", b"[" * 100_000)]
    + [write("base/generation_config.json", b"{")],
    "is not a JSON object": [write(CONFIG, b"[]")],
    "the header of the weights is damaged": [write(ADAPTER, lambda content: content[:-9]), write(WEIGHTS, b"x"), lie],
    "is missing": [remove(ADAPTER), remove(BASE_CONFIG), remove("probe.json")],
    # tensors
    "holds NaN or infinity": [put(A1, (2, 4), np.nan), put(A1, (2, 4), -np.inf, "f2"),
                              tensors(lambda content: content["model.embed_tokens.weight"].fill(np.nan), WEIGHTS)],
    "is empty: it was not gathered": [put(A1, 0)],
    "not of floats": [put(A1, (2, 4), 1, "i1")],
    "is not named as an adapter's are": [put("lm_head.weight", (2, 2))],
    "neither LoRA nor": [put(PREFIX + name, (4,)) for name in (
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector")],
    "lora_B.weight is missing": [drop(f"{Q1}.lora_B.weight")],
    "lora_embedding_B is missing": [put(f"{PREFIX}model.embed_tokens.lora_embedding_A", (2, 8))],
    "the reward head (score) is missing": [drop(HEAD)],
    "not that of one score": [put(HEAD, (2, 4))],
    "do not fit each other": [put(A1, (3, 4))],
    "and the configuration says": [settings(r=16), settings(rank_pattern={"q_proj": 8})],
    UNASKED: [settings(layers_to_transform=[0]), settings(layers_to_transform=1, layers_pattern="layers"),
              settings(exclude_modules=["v_proj"]), settings(target_modules=["q_proj"]),
              settings(target_modules=r".*\.[01]\..*")],
    "there is no tensor for": [settings(target_modules=["q_proj", "v_proj", "embed_tokens"]),
                                 drop(A1, f"{Q1}.lora_B.weight")],
    # lineage
    "is not what was exported": [write(ADAPTER, lambda content: content[:-1] + b"\x40", listed=False),
                                 write(TEMPLATE, b"", listed=False)],
    "is not in the lineage: it was not exported": [unlist(ADAPTER), unlist(TOKENIZER)],
    "does not say what the base": [lambda folder: write_json(folder / LINEAGE, {})],
    "does not say that the base is shipped": [lineage(lambda content: content["base"].update(shipped=False))],
    # settings
    "peft_type is 'PROMPT_TUNING', not 'LORA'": [settings(peft_type="PROMPT_TUNING")],
    "of neither a policy nor": [settings(task_type=None)],
    "neither a pattern nor a list": [settings(target_modules=[1]), settings(target_modules="(aa|aa)" * 40),
                                     settings(target_modules="a" * 3000)],
    "it changes the base, or adds more": [settings(**{key: value}) for key, value in {
        "bias": "all", "layer_replication": [[0, 2], [1, 2]], "kasa_config": {}, "lora_bias": True,
        "alora_invocation_tokens": [1], "target_parameters": ["experts"], "corda_config": False}.items()],
    "an unknown setting": [settings(new_method=True), settings(runtime_config={"ephemeral_gpu_offload": True})],
    "which changes the base": [settings(init_lora_weights="pissa_niter_4"), settings(init_lora_weights=1)],
    "only the reward head of a base": [settings(modules_to_save=["score", "wte"])],
    "not a whole number": [settings(r=rank) for rank in ("10", True, 10**9)],
    "lora_alpha is": [settings(lora_alpha=10**400),
                      write(CONFIG, lambda text: text.replace(b'"lora_alpha": 4', b'"lora_alpha": Infinity'))],
    "rank_pattern is": [settings(rank_pattern=[]), *(settings(rank_pattern={text: rank}) for text, rank in (
        ("q_proj", 0), ("(q_proj|)+", 2), (r"(.*a)*b", 2)))],
    "alpha_pattern is": [settings(alpha_pattern={text: 1}) for text in ("(", "a)(b", r"(a)\1", "(?i)Q", ".*.*.*.*x")],
    "exclude_modules is": [settings(exclude_modules="(" * 1000 + ")" * 1000)],
    "in too many ways": [settings(rank_pattern={f"{'.*' * 3}{number}": 2 for number in range(99)})],
    "revision is": [settings(revision="../../evil"), settings(revision=7)],
    "go together": [settings(target_modules=r".*_proj", layers_to_transform=[0]), settings(layers_pattern="layers")],
    "which modules were trained is not in it": [settings(target_modules="all-linear")],
    "a later one may mean more": [settings(peft_version="99.0"), settings(peft_version="x")],
    "not a number from 0 to 1": [settings(lora_dropout=2)],
    "not true or false": [settings(use_rslora="yes")],
    "lora_magnitude_vector is missing": [settings(use_dora=True)],
    # the base
    "and the adapter's base is 'owner/base'": [settings(base_model_name_or_path="owner/base")],
    "rewrite the weights": [set_to(BASE_CONFIG, quantization_config={"load_in_4bit": True})],
    "in one file and in several": [write(INDEX, b"{}")],
    "and no other": [lambda folder: spread(folder, "../../x.safetensors")],
    "and the weights hold": [set_to(BASE_CONFIG, **{key: value}) for key, value in {
        "num_hidden_layers": 10**5, "text_config": {"n_layer": 4}, "depths": [2, 9], "num_experts": 10**5}.items()],
    "a loader would fetch code": [set_to(BASE_CONFIG, _attn_implementation="owner/kernel"),
                                  set_to(BASE_CONFIG, text_config={"_attn_implementation": "paged|owner/kernel"})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "act"), [pytest.param(reason, act, id=reason) for reason, acts in REFUSED.items() for act in acts]
)
def test_a_damaged_or_hostile_adapter_is_refused_with_its_reason(adapter, reason, act):
    act(adapter)
    assert reason in problems(adapter)


@pytest.mark.parametrize(
    "act",
    [
        settings(target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
        settings(
            target_modules=r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|ffn).*?(?:q_proj|v_proj))"
        ),
        settings(target_modules=r"^(?!.*vision).*(?:q_proj|v_proj)$"),
        settings(layers_to_transform=[0, 1, 2], layers_pattern=["h", "layers"]),
        settings(rank_pattern={r"layers\.\d+\.self_attn.q_proj": 2, "v_proj": 2}, r=9),
        settings(runtime_config={"ephemeral_gpu_offload": False}, loftq_config={}, eva_config=None),
        settings(peft_version="0.10.0", use_rslora=True, init_lora_weights="gaussian"),
        spread,
        write(".gitattributes", b"*.safetensors filter=lfs"),  # the Hub's own
        remove(LINEAGE),
    ],
)
def test_what_authors_really_write_passes(adapter, act):
    act(adapter)
    assert check_adapter(adapter) == []


def test_every_setting_of_peft_has_a_rule():
    assert set(LoraSettings.model_fields) | set(IMPORTS) - {"auto_map"} <= set(PLAIN)


def test_dora_has_a_magnitude_for_each_output_of_each_module(adapter):
    settings(use_dora=True)(adapter)
    names = {key.partition(".lora_")[0] for key in load_file(adapter / ADAPTER)} - {HEAD}
    magnitudes = {f"{name}.lora_magnitude_vector": np.ones(4, "f4") for name in names}
    tensors(lambda content: content.update(magnitudes))(adapter)
    assert check_adapter(adapter) == []
    put(f"{Q0}.lora_magnitude_vector", (3,))(adapter)
    assert "are not one for each of its 4 outputs" in problems(adapter)
    drop(*(f"{Q0}.lora_{end}.weight" for end in "AB"))(adapter)
    assert f"{Q0}.lora_A.weight is missing" in problems(adapter)


TEMPLATES = {
    "{{ 'x' * 10**9 }}": "MemoryError",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it takes too long",
    "{{ raise_exception('no') }}": "TemplateError: no",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{% for": "TemplateSyntaxError",
}
DATED = ("{{ bos_token }}{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
         "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{{ m | tojson(indent=1) }}"
         "{% generation %}{{ m.content.strip() }}{{ eos_token }}{% endgeneration %}{% endfor %}")  # fmt: skip


@pytest.mark.parametrize("template", [*TEMPLATES, DATED])
def test_a_template_is_rendered_within_limits_on_time_and_memory(adapter, template):
    write(TEMPLATE, template.encode())(adapter)
    said = TEMPLATES.get(template)
    found = problems(adapter)
    assert found.startswith(f"the chat template cannot be rendered: {said}") if said else not found


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", DATED])
def test_a_template_among_the_settings_of_a_tokenizer_is_rendered_too(adapter, template):
    remove(TEMPLATE)(adapter)
    unlist(TEMPLATE)(adapter)
    for place in (template, [{"name": "default", "template": template}]):
        set_to(TOKENIZER, chat_template=place)(adapter)
        assert ("the chat template cannot be rendered" in problems(adapter)) == (template != DATED)


def test_what_changes_nothing_or_is_large_for_vllm_is_noted(adapter):
    assert notes(adapter) == []
    wide = {key: np.zeros((17, 4) if "_A" in key else (4, 17), "f4") for key in load_file(adapter / ADAPTER)}
    tensors(lambda content: content.update(wide | {HEAD: content[HEAD]}))(adapter)
    settings(r=17)(adapter)
    assert check_adapter(adapter) == []
    assert notes(adapter) == ["its rank is 17, and vLLM takes up to 16 without --max-lora-rank 32",
                              "every lora_B is zero: it adds nothing to its base, as before training"]  # fmt: skip


def test_what_a_download_leaves_is_no_part_of_the_adapter(adapter):
    left = adapter / ".cache" / "huggingface" / "download" / "README.md.metadata"
    left.parent.mkdir(parents=True)
    left.write_text("1")
    assert check_adapter(adapter) == []
    assert left not in list_files(adapter).values()
    (adapter / ".cache" / "other").mkdir()
    assert "a folder that no adapter has" in problems(adapter)


def test_all_problems_are_found_at_once_and_what_they_quote_cannot_act_on_a_terminal(adapter):
    settings(base_model_name_or_path="/tmp/\u202eevil", auto_mapping={"parent_library": "evil"})(adapter)
    put("x\x1b]0;owned\x07\nline", (2,))(adapter)
    with pytest.raises(AdapterError) as caught:
        require_sound(adapter)
    text = " ".join(map(str, caught.value.problems))
    assert len(caught.value.problems) == 4 and "⟨U+001B⟩]0;owned⟨U+0007⟩ line" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_nothing_is_opened_before_the_listing_and_no_tensor_read_before_its_header(adapter, monkeypatch):
    monkeypatch.setattr("rlhf_trl.run.safetensors._read", lambda *_: pytest.fail("a tensor was read"))
    lie(adapter)
    assert "header" in problems(adapter)
    monkeypatch.setattr(adapter_check, "_read_objects", lambda *_: pytest.fail("a file was opened"))
    write("adapter_model.bin", b"\x80\x04.")(adapter)
    assert [problem.place for problem in check_adapter(adapter)] == ["adapter_model.bin"]


def test_exports_pass_and_the_adapters_of_a_run_name_their_local_base(gpt2_run, policy_export, reward_export):
    for folder in (policy_export, reward_export):
        assert check_adapter(folder) == check_adapter(folder, gpt2_run[0]) == []
    assert "a place on somebody's machine" in problems(gpt2_run[2].adapter("sft"), gpt2_run[0])
    with pytest.raises(UserError, match="is a run, and no adapter"):
        check_adapter(gpt2_run[2].root)


# --- against a base


def embed(size):
    """Add LoRA to the embedding."""
    shapes = {"lora_embedding_A": (2, size), "lora_embedding_B": (4, 2)}
    added = {f"{PREFIX}model.embed_tokens.{key}": np.ones(shape, "f4") for key, shape in shapes.items()}

    def act(folder):
        tensors(lambda content: content.update(added))(folder)
        settings(target_modules=["q_proj", "v_proj", "embed_tokens"])(folder)

    return act


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (tensors(lambda content: [content.pop(key) for key in list(content) if ".layers.1." in key]),
         f"there is no tensor for {Q1}.lora_A.default.weight"),
        (embed(8), ""),
        (embed(9), "size mismatch for base_model.model.model.embed_tokens.lora_embedding_A"),
        (put(HEAD, (1, 5)), "size mismatch for base_model.model.score"),
    ],
)  # fmt: skip
def test_what_is_sound_by_itself_may_not_fit_its_base(adapter, tmp_path, act, problem):
    act(adapter)
    base = (adapter / "base").rename(tmp_path / "base")
    unlist(BASE_CONFIG, WEIGHTS)(adapter)
    settings(base_model_name_or_path="owner/base")(adapter)
    assert check_adapter(adapter) == []
    found = problems(adapter, base)
    assert problem in found and bool(problem) == bool(found)


def test_another_base_is_told_from_its_own(adapter, tmp_path):
    other, wide = tmp_path / "other", tmp_path / "wide"
    write_base(other, **{"model.norm.weight": np.ones(4, "f4")})
    assert "not those that the adapter was exported for, though their shapes fit" in problems(adapter, other)
    write_base(wide, 6)
    assert "it does not fit this base: size mismatch for" in problems(adapter, wide)
    write_json(wide / "config.json", {"model_type": "gpt2", "n_embd": 4, "n_head": 1, "n_layer": 3, "vocab_size": 8})
    assert "it does not fit this base: No modules were targeted" in problems(adapter, wide)
    write_json(wide / "config.json", {"model_type": "nobody"})
    assert "it does not fit this base" in problems(adapter, wide)
    (wide / "model.safetensors").unlink()
    assert "there are no weights in safetensors" in problems(adapter, wide)
    with pytest.raises(UserError, match="no such folder"):
        check_adapter(adapter, tmp_path / "nowhere")
    for name in (LINEAGE, "probe.json"):
        (adapter / name).unlink()
    assert check_adapter(adapter, other) == []
    (other / TEMPLATE).write_text("another")
    assert "the chat template differs from that of the base" in problems(adapter, other)


TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
FAMILIES = {  # whose files name their modules otherwise than the code, whose layers differ, or both
    "gemma3": {"text_config": {**TEXT, "sliding_window": 8}, "mm_tokens_per_image": 4, "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "lfm2": {**TEXT, "layer_types": ["conv", "full_attention"] * 2},
    "qwen2_moe": {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_known_by_the_modules_that_are_built_from_it(tmp_path, family):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(base)
    names = ["q_proj", "in_proj", "shared_expert.up_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", target_modules=names)
    )
    model.save_pretrained(folder)
    settings(base_model_name_or_path="owner/base")(folder)
    assert check_adapter(folder, base) == []


# --- weights without torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_found(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    values = {"sound": [0.0, -largest, largest, 1.0], "nan": [0.0, torch.nan], "infinite": [-torch.inf]}
    save_torch(
        {name: torch.tensor(numbers, dtype=dtype) for name, numbers in values.items()}, tmp_path / "x.safetensors"
    )
    header = read_header(tmp_path / "x.safetensors")
    assert [name for name, tensor in header.items() if is_finite(tensor)] == ["sound"]


def test_the_hash_of_weights_is_of_their_content_however_it_is_read(tmp_path, monkeypatch):
    first, second = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)

    def hash_of(*files: dict) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, file in enumerate(files):
            save_torch(file, folder / f"model-{number}.safetensors", metadata={"made": folder.name})
        return hash_weights(read_weights(folder))

    together = hash_of({"a": first, "b": second})
    others = [{"a": first, "c": second}, {"a": first.reshape(3, 2), "b": second}, {"a": first + 1e-6, "b": second},
              {"a": first, "b": second.view(torch.float16)}]  # fmt: skip
    assert len({together, *map(hash_of, others)}) == 5
    monkeypatch.setattr("rlhf_trl.run.safetensors.CHUNK", 8)
    assert together == hash_of({"b": second}, {"a": first})


def test_mutated_files_end_in_no_traceback_and_hang_nothing(tmp_path):
    """More of them in `make chaos`."""
    tally = Tally("adapters", random.SystemRandom().randrange(10**6))
    adapters(tally, 200, tmp_path)
    assert not tally.faults, tally
