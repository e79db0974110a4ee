"""Pushing exports with the Hub's own client to a local stand-in, and listing them."""

import os
import shutil
import subprocess
import sys

import pytest
from adapter_fixtures import change_json
from fake_hub import FakeHub

from rlhf_trl.adapters.hub import list_exports, plan
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, write_json


def push(hub: FakeHub, folder, *options: str, token: str = "hf_test", repository: str = "me/demo"):
    """Run the command as a user does: the client reads its address and token when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token,
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-m", "rlhf_trl", "adapter", "push", str(folder), repository, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_uploads_every_file_when_it_is_told_to_and_says_twice_to_whom(policy_export):
    with FakeHub() as hub:
        done = push(hub, policy_export)
        assert done.returncode == 0 and hub.calls == [], done.stderr
        assert "adapter_model.safetensors" in done.stdout and "to me/demo (private)" in done.stdout
        assert "nothing was uploaded" in done.stdout
        done = push(hub, policy_export, "--yes")
        assert hub.private == {"me/demo": True}
        assert hub.files["me/demo"] == contents(policy_export)
        assert f"{hub.url}/me/demo/commit/1" in done.stdout
        assert "hf_test" not in done.stdout + done.stderr
        hub.files["me/demo"], hub.private["me/demo"] = {}, False
        refused = push(hub, policy_export, "--yes")
        assert refused.returncode == 2 and hub.files["me/demo"] == {}
        assert "the repository is there, and everybody can read it" in refused.stderr
        done = push(hub, policy_export, "--yes", "--public")
    assert "public: everybody can read it" in done.stdout
    assert hub.files["me/demo"] == contents(policy_export)


def test_a_wrong_token_is_a_message_that_does_not_hold_it(policy_export):
    with FakeHub() as hub:
        done = push(hub, policy_export, "--yes", token="hf_secretSecret123")
    assert done.returncode == 2, done.stderr
    assert "the upload failed: " in done.stderr
    assert "401" in done.stderr
    assert "hf_secretSecret123" not in done.stdout + done.stderr


def test_what_is_not_sound_is_not_pushed(policy_export, tmp_path):
    folder = shutil.copytree(policy_export, tmp_path / "adapter")
    change_json(folder, "adapter_config.json", base_model_name_or_path="/home/me/base")
    with pytest.raises(UserError, match="a place on somebody's machine"):
        plan(folder, "me/demo")
    with pytest.raises(UserError, match="is not the name of a repository"):
        plan(policy_export, "demo")
    with pytest.raises(UserError, match="the Hub takes no such name"):
        plan(policy_export, "me/demo--two")
    folder = shutil.copytree(policy_export, tmp_path / "other")
    (folder / "lineage.json").unlink()
    with pytest.raises(UserError, match="was not exported"):
        plan(folder, "me/demo")


def test_exports_stand_side_by_side(policy_export, reward_export, tmp_path):
    for name, folder in (("a/dpo", policy_export), ("b-rm", reward_export)):
        shutil.copytree(folder, tmp_path / name)
    evidence = read_json(tmp_path / "a" / "dpo" / "evidence.json")
    kl = {"mean": 1.234, "low": 1.0, "high": 1.5, "n": 9}
    gain = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 9}
    write_json(tmp_path / "a" / "dpo" / "evidence.json", {**evidence, "policy": {"kl": kl, "reward_gain": gain}})
    first, second = list_exports(tmp_path)
    gains = ["+0.50 [+0.20, +0.80] reward", "1.23 [1.00, 1.50]", "", ""]
    assert first[:-1] == ["a/dpo", "run", "dpo", "dpo", "owner/base", *gains]
    assert (second[0], second[5:9]) == ("b-rm", ["", "", "", ""])
    change_json(tmp_path / "a" / "dpo", "lineage.json", stage="\x1b[31mdpo")
    assert list_exports(tmp_path)[0][2] == "⟨U+001B⟩[31mdpo"
    for damage in ("{", "[]", '{"run": 1}'):
        (tmp_path / "a" / "dpo" / "lineage.json").write_text(damage)
        assert [row[1] for row in list_exports(tmp_path)] == ["unreadable", "run"]
    with pytest.raises(UserError, match="no such folder"):
        list_exports(tmp_path / "nowhere")
