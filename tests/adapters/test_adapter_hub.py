"""Pushing exports with the Hub's own client to a local stand-in, and listing them."""

import shutil

import pytest
from adapter_fixtures import change_json
from fake_hub import FakeHub
from huggingface_hub import constants

from rlhf_trl.adapters.hub import list_exports, plan
from rlhf_trl.recipe.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    """A hub that the client in this process talks to."""
    with FakeHub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_uploads_every_file_when_it_is_told_to_and_says_twice_to_whom(hub, call, policy_export):
    push = ("adapter", "push", policy_export, "me/demo")
    status, output, messages = call(*push)
    assert (status, hub.calls) == (0, []), messages
    assert "adapter_model.safetensors" in output and "to me/demo (private)" in output
    assert "nothing was uploaded" in output
    _, output, messages = call(*push, "--yes")
    assert hub.private == {"me/demo": True}
    assert hub.files["me/demo"] == contents(policy_export)
    assert f"{hub.url}/me/demo/commit/1" in output
    assert "hf_test" not in output + messages
    hub.files["me/demo"], hub.private["me/demo"] = {}, False
    status, _, messages = call(*push, "--yes")
    assert status == 2 and hub.files["me/demo"] == {}
    assert "the repository is there, and everybody can read it" in messages
    _, output, _ = call(*push, "--yes", "--public")
    assert "public: everybody can read it" in output
    assert hub.files["me/demo"] == contents(policy_export)


def test_a_wrong_token_and_a_card_that_the_hub_refuses_are_messages(hub, call, policy_export, monkeypatch):
    hub.faults = [{"message": "the license is not valid"}]
    status, _, messages = call("adapter", "push", policy_export, "me/demo", "--yes")
    assert status == 2 and "Invalid metadata in README.md. - the license is not valid" in messages
    monkeypatch.setenv("HF_TOKEN", "hf_secretSecret123")
    status, output, messages = call("adapter", "push", policy_export, "me/demo", "--yes")
    assert status == 2 and "the upload failed: " in messages and "401" in messages
    assert "hf_secretSecret123" not in output + messages


def test_what_is_not_sound_is_not_pushed(policy_export, tmp_path):
    folder = shutil.copytree(policy_export, tmp_path / "adapter")
    change_json(folder, "adapter_config.json", base_model_name_or_path="/home/me/base")
    with pytest.raises(UserError, match="a place on somebody's machine"):
        plan(folder, "me/demo")
    for name, problem in (("demo", "is not the name of a repository"), ("me/demo--two", "the Hub takes no such name")):
        with pytest.raises(UserError, match=problem):
            plan(policy_export, name)
    folder = shutil.copytree(policy_export, tmp_path / "other")
    (folder / "lineage.json").unlink()
    with pytest.raises(UserError, match="was not exported"):
        plan(folder, "me/demo")


def test_exports_stand_side_by_side(policy_export, reward_export, tmp_path):
    folder = shutil.copytree(policy_export, tmp_path / "a" / "dpo")
    shutil.copytree(reward_export, tmp_path / "b-rm")
    kl = {"mean": 1.234, "low": 1.0, "high": 1.5, "n": 9}
    gain = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 9}
    change_json(folder, "evidence.json", policy={"kl": kl, "reward_gain": gain})
    first, second = list_exports(tmp_path)
    gains = ["+0.50 [+0.20, +0.80] reward", "1.23 [1.00, 1.50]", "", ""]
    assert first[:-1] == ["a/dpo", "run", "dpo", "dpo", "owner/base", *gains]
    assert (second[0], second[5:9]) == ("b-rm", ["", "", "", ""])
    change_json(folder, "lineage.json", stage="\x1b[31mdpo")
    assert list_exports(tmp_path)[0][2] == "⟨U+001B⟩[31mdpo"
    for damage in ("{", "[]", '{"run": 1}'):
        (folder / "lineage.json").write_text(damage)
        assert [row[1] for row in list_exports(tmp_path)] == ["unreadable", "run"]
    with pytest.raises(UserError, match="no such folder"):
        list_exports(tmp_path / "nowhere")
