"""A model hub for tests: real HTTP on a local port, with the calls that an upload makes.

with FakeHub() as hub:
    HF_ENDPOINT=hub.url ...
assert hub.files["me/demo"]["README.md"] == b"..."
"""

import base64
import json
from typing import Any

import fake_openai


class Handler(fake_openai.Handler):
    protocol_version = "HTTP/1.0"
    server: "FakeHub"

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        hub.calls.append(f"{self.command} {self.path}")
        if self.path.startswith("/objects/"):  # the address of an object is its permission
            hub.objects[self.path.rpartition("/")[2]] = body
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {hub.token}" and "validate" not in self.path:
            self.answer({"error": "Invalid credentials"}, 401)
        else:
            self.answer(*hub.respond(self.path, body))

    do_GET = do_PUT = do_POST

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


class FakeHub(fake_openai.Server):
    """Keeps repositories, their visibility and their files; a request without the right token is refused."""

    def __init__(self, token: str = "hf_test"):
        super().__init__(Handler)
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.faults: list[dict[str, str]] = []  # that it finds in a card

    def respond(self, path: str, body: bytes) -> tuple[Any, int]:
        parts = path.split("?")[0].strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.files:
                return {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409
            self.files[name], self.private[name] = {}, asked["visibility"] == "private"
            return {"url": f"{self.url}/{name}", "name": name}, 200
        if path == "/api/validate-yaml":
            return {"errors": self.faults, "warnings": []}, 400 if self.faults else 200
        if parts[-1] == "batch":
            asked = json.loads(body)["objects"]
            found = [{**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}} for one in asked]
            return {"transfer": "basic", "objects": found}, 200
        name = "/".join(parts[2:4])
        if parts[4:5] == ["preupload"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, 200
        if parts[4:5] == ["commit"]:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.files[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                elif row["key"] == "lfsFile":
                    self.files[name][row["value"]["path"]] = self.objects[row["value"]["oid"]]
            return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}, 200
        if name in self.files:
            return {"id": name, "modelId": name, "private": self.private[name], "sha": "1" * 40, "siblings": []}, 200
        return {"error": "Repository not found"}, 404
