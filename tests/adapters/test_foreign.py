"""Adapters that others made: what their settings may say, and that no settings end in a traceback or hang."""

import json
import os
import random
import time
from copy import deepcopy
from dataclasses import fields

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from rlhf_trl.adapters.check import check_adapter, notes
from rlhf_trl.adapters.settings import IMPORTS, OFF, LoraSettings, is_target, rank_of
from rlhf_trl.run.files import read_json, write_json

COUNT = int(os.environ.get("FUZZ", "200"))  # mutations; 10,000 in `make chaos`
SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "./base", "r": 2, "bias": "none",
            "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "peft_version": "0.21.2"}  # fmt: skip
BASE = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 4, "vocab_size": 8,
        "max_position_embeddings": 10**6}  # fmt: skip
TOKENIZER = {"eos_token": "</s>", "bos_token": {"content": "<s>"}}
PREFIX, Q0 = "base_model.model.", "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter on three layers of a base that it ships."""
    folder = tmp_path / "adapter"
    (folder / "base").mkdir(parents=True)
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]
    weights = {f"{name}.weight": np.ones((4, 4), "f4") for name in modules}
    save_file(weights | {"model.embed_tokens.weight": np.ones((8, 4), "f4")}, folder / "base" / "model.safetensors")
    lora = {f"{PREFIX}{name}.lora_{end}.weight": np.ones((2, 4) if end == "A" else (4, 2), "f4")
            for name in modules for end in "AB"}  # fmt: skip
    save_file(lora, folder / "adapter_model.safetensors")
    for name, content in (("adapter_config", SETTINGS), ("base/config", BASE), ("tokenizer_config", TOKENIZER)):
        write_json(folder / f"{name}.json", content)
    assert check_adapter(folder) == []
    return folder


def change(folder, name, **values):
    write_json(folder / name, {**read_json(folder / name), **values})


def retouch(folder, act):
    tensors = load_file(folder / "adapter_model.safetensors")
    act(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def problems(folder):
    return "\n".join(problem.problem for problem in check_adapter(folder))


# Settings that PEFT would ignore, or obey with another result than the author's -> the reason that is said.
REFUSED = [
    ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ({"layers_to_transform": [0]}, "the settings do not ask for LoRA on"),
    ({"layers_to_transform": 1, "layers_pattern": "layers"}, "the settings do not ask for LoRA on"),
    ({"exclude_modules": ["v_proj"]}, "the settings do not ask for LoRA on"),
    ({"target_modules": ["q_proj"]}, "the settings do not ask for LoRA on"),
    ({"target_modules": r".*\.[01]\..*"}, "the settings do not ask for LoRA on"),
    ({"target_modules": r".*_proj", "layers_to_transform": [0]}, "go together"),
    ({"layers_pattern": "layers"}, "go together"),
    ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "embed_tokens is a target without tensors"),
    ({"target_modules": "all-linear"}, "which modules were trained is not in it"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"alora_invocation_tokens": [1]}, "acts on a part of a text"),
    ({"target_parameters": ["experts"]}, "target_parameters is"),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config is"),
    ({"new_method": True}, "new_method is True, an unknown setting"),
    ({"another": None}, "another is None, an unknown setting"),
    ({"peft_version": "99.0"}, "a later one may mean more"),
    ({"peft_version": "x"}, "peft_version is 'x'"),
    ({"lora_dropout": 2}, "not a number from 0 to 1"),
    ({"use_rslora": "yes"}, "not true or false"),
    ({"rank_pattern": {"(q_proj|)+": 2}}, "no group repeats"),
    ({"rank_pattern": {r"(.*a)*b": 2}}, "no group repeats"),
    ({"alpha_pattern": {r"(a)\1": 2}}, "no group repeats"),
    ({"alpha_pattern": {"(?i)Q": 2}}, "no group repeats"),
    ({"alpha_pattern": {"a)(b": 2}}, "alpha_pattern is"),
    ({"alpha_pattern": {".*.*.*.*x": 2}}, "alpha_pattern is"),
    ({"rank_pattern": {f"{'.*' * 3}{number}": 2 for number in range(99)}}, "in too many ways"),
    ({"target_modules": "(aa|aa)" * 40}, "target_modules is"),
    ({"exclude_modules": "(" * 1000 + ")" * 1000}, "exclude_modules is"),
    ({"target_modules": "a" * 3000}, "target_modules is"),
]


@pytest.mark.parametrize(("values", "reason"), REFUSED)
def test_settings_that_are_not_what_was_trained_are_refused(adapter, values, reason):
    change(adapter, "adapter_config.json", **values)
    assert reason in problems(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|ffn).*?(?:q_proj|v_proj))"},
        {"target_modules": r"^(?!.*vision).*(?:q_proj|v_proj)$"},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]},
        {"rank_pattern": {r"layers\.\d+\.self_attn.q_proj": 2, "v_proj": 2}, "r": 9},
        {"runtime_config": {"ephemeral_gpu_offload": False}, "loftq_config": {}, "eva_config": None},
        {"peft_version": "0.10.0", "use_rslora": True, "init_lora_weights": "gaussian"},
    ],
)
def test_what_authors_really_write_passes(adapter, values):
    change(adapter, "adapter_config.json", **values)
    assert check_adapter(adapter) == []


def test_every_setting_of_peft_is_known():
    known = {field.name for field in fields(LoraConfig)}
    assert known <= {*LoraSettings.model_fields, *OFF, *IMPORTS}


@pytest.mark.parametrize("layers", [None, 1, [0, 2]])
@pytest.mark.parametrize("behind", [None, "layers", ["h", "layers"]])
@pytest.mark.parametrize("targets", [["q_proj"], ["layers.0.mlp.up"], r".*\.(q|v)_proj"])
def test_modules_are_found_as_peft_finds_them(layers, behind, targets):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": behind, "r": 3,
              "exclude_modules": ["h.1.q_proj"], "rank_pattern": {r"\d.q_proj": 5}}  # fmt: skip
    theirs = LoraConfig(**config | ({} if isinstance(targets, list) and layers is not None else
                                    {"layers_to_transform": None, "layers_pattern": None}))  # fmt: skip
    if isinstance(targets, str):
        config["layers_to_transform"] = None
    for module in ("model.layers.0.q_proj", "layers.1.q_proj", "model.layers.0.mlp.up", "model.h.1.q_proj", "q_proj",
                   "transformer.h.2.experts.0.q_proj", "my_q_proj", "score"):  # fmt: skip
        assert is_target(config, module) == bool(check_target_module_exists(theirs, module)), module
        patterns = config["rank_pattern"]
        assert rank_of(config, module) == patterns.get(get_pattern_key(patterns, module), 3)


def test_dora_has_a_magnitude_for_each_output_of_each_module(adapter):
    change(adapter, "adapter_config.json", use_dora=True)
    names = {key.partition(".lora_")[0] for key in load_file(adapter / "adapter_model.safetensors")}
    retouch(adapter, lambda all: all.update({f"{name}.lora_magnitude_vector": np.ones(4, "f4") for name in names}))
    assert check_adapter(adapter) == []
    retouch(adapter, lambda tensors: tensors.update({f"{Q0}.lora_magnitude_vector": np.ones(3, "f4")}))
    assert "are not one for each of its 4 outputs" in problems(adapter)
    retouch(adapter, lambda tensors: [tensors.pop(f"{Q0}.lora_{end}.weight") for end in "AB"])
    assert "and no LoRA" in problems(adapter)


BASES = [
    ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000, and the weights hold 3 at most"),
    ({"text_config": {"n_layer": 4}}, "n_layer is 4"),
    ({"depths": [2, 9]}, "depths is 9"),
    ({"num_local_experts": 10**5}, "num_local_experts is 100000"),
    ({"_attn_implementation": "owner/kernel"}, "a loader would fetch code"),
    ({"text_config": {"_attn_implementation": "paged|owner/kernel"}}, "a loader would fetch code"),
    ({"text_config": {"auto_map": {"AutoConfig": "x.y"}}}, "auto_map"),
]


@pytest.mark.parametrize(("values", "reason"), BASES)
def test_a_shipped_base_is_no_larger_than_its_weights_and_names_no_kernel(adapter, values, reason):
    change(adapter, "base/config.json", **values)
    assert reason in problems(adapter)


TEMPLATES = {
    "{{ 'x' * 10**9 }}": "MemoryError",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it takes too long",
    "{{ raise_exception('no') }}": "TemplateError: no",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{% for": "TemplateSyntaxError",
    "{{ range(10**8) | list }}": "OverflowError",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "settings", "named"])
def test_a_template_is_rendered_within_limits_on_time_and_memory(adapter, template, place):
    if place == "file":
        (adapter / "chat_template.jinja").write_text(template)
    named = [{"name": "default", "template": template}] if place == "named" else template
    change(adapter, "tokenizer_config.json", chat_template="fine" if place == "file" else named)
    assert f"the chat template cannot be rendered: {TEMPLATES[template]}" in problems(adapter)


def test_a_template_of_every_day_passes(adapter):
    template = ("{{ bos_token }}{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
                "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{{ m | tojson(indent=1) }}"
                "{% generation %}{{ m.content.strip() }}{{ eos_token }}{% endgeneration %}{% endfor %}")  # fmt: skip
    (adapter / "chat_template.jinja").write_text(template)
    assert check_adapter(adapter) == []


def test_what_changes_nothing_or_is_large_for_vllm_is_noted(adapter):
    assert notes(adapter) == []
    retouch(adapter, lambda tensors: tensors.update(
        {key: np.zeros((17, 4) if "_A" in key else (4, 17), "f4") for key in tensors}))  # fmt: skip
    change(adapter, "adapter_config.json", r=17)
    assert check_adapter(adapter) == []
    assert notes(adapter) == ["its rank is 17, and vLLM takes up to 16 without --max-lora-rank 32",
                              "every lora_B is zero: it adds nothing to its base, as before training"]  # fmt: skip


# --- mutations

VALUES = [None, True, False, 0, -1, 1, 3, 1e308, 10**400, float("nan"), float("inf"), "", "x", "\x1b[0m", "\ud800",
          [], {}, [None], [[]], [1], ["q_proj"], {"a": 1}, {"": {}}, "(a+)+$", "((a|a)*)*b", "(.*)*" * 9, "[", "\\",
          "(?P<a>", "a{9999}", "{{ 'x' * 10**10 }}", "{% for", "../..", "owner/kernel", list(range(999)), "y" * 10**5,
          "0.21.2", "q_proj|v_proj", {"q_proj": 2}, {"(a*)*": 2}, "LORA", "SEQ_CLS", 10**5, "./base",
          [{"name": "default", "template": "x"}]]  # fmt: skip
DOCUMENTS = ("adapter_config.json", "base/config.json", "tokenizer_config.json")


def mutate(document, rng, keys):
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        key, value = rng.choice(keys), deepcopy(rng.choice(VALUES))
        if rng.random() < 0.15:
            document.pop(key, None)
        elif isinstance(document.get(key), dict | list) and document[key] and rng.random() < 0.5:
            inside = document[key]
            inside[rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))] = value
        else:
            document[key] = value
    return document if rng.random() > 0.02 else rng.choice(VALUES)


def test_mutated_settings_end_in_no_traceback_and_hang_nothing(adapter):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    rng, slowest, refused = random.Random(seed), 0.0, 0
    originals = {name: (adapter / name).read_text() for name in DOCUMENTS}
    more = [*LoraSettings.model_fields, *OFF, *IMPORTS, *BASE, "chat_template", "_attn_implementation", "auto_map",
            "quantization_config", "text_config", "vocab_file", "new"]  # fmt: skip
    for number in range(COUNT):
        name = DOCUMENTS[0] if rng.random() < 0.6 else rng.choice(DOCUMENTS)
        content = json.dumps(mutate(json.loads(originals[name]), rng, more))
        if rng.random() < 0.02:
            content = content[: rng.randrange(len(content))]
        (adapter / name).write_text(content)
        started = time.monotonic()
        try:
            refused += bool(check_adapter(adapter))
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutation {number} of {name}: {content[:500]}") from error
        slowest = max(slowest, time.monotonic() - started)
        (adapter / name).write_text(originals[name])
    print(f"seed {seed}: {COUNT} mutations, {refused} refused, the slowest took {slowest:.1f} s")
    assert slowest < 10, seed
