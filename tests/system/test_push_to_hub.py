"""What `push_to_hub` uploads, received by a small server in place of the hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cdmoe_plugin import apply_plan
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
CODE = {"modeling_cdmoe.py", "layers_cdmoe.py"}
FILES = {"README.md", "config.json", "condense_plan.json", "generation_config.json", "model.safetensors", *CODE}
PROGRAM = """
import sys
import cdmoe_plugin
import huggingface_hub.constants
from transformers import AutoModelForCausalLM
assert huggingface_hub.constants.ENDPOINT.startswith("http://127.0.0.1:")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/new")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved")
model.push_to_hub("me/written")
"""
OWN = "---\nlicense: mit\n---\n# I wrote this\n"


class Hub(BaseHTTPRequestHandler):
    """Takes commits, and has one repository with a card that somebody wrote."""

    received: dict[str, dict[str, bytes]] = {}

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/me/written/resolve/main/README.md":
            self.answer(200, OWN.encode(), {"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        result: dict[str, Any] = {"errors": [], "warnings": []}  # of /api/validate-yaml
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization', 'me')}/{wanted['name']}"
            result = {"url": f"{url}/{name}", "name": name, "id": "1"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            result = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif "/commit/" in self.path:
            repo = "/".join(self.path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.received[repo] = {file["path"]: base64.b64decode(file["content"]) for file in files}
            result = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/{repo}/commit/{'1' * 40}"}
        self.answer(200, json.dumps(result).encode(), {"Content-Type": "application/json"})

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_push_to_hub(hub: str, tmp_path: Path) -> None:
    apply_plan(tiny_model("qwen2_moe"), some_plan([1])).save_pretrained(tmp_path / "condensed")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_ENDPOINT": hub, "HF_TOKEN": "none", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "condensed"), str(tmp_path / "saved")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    saved = {file.name: file.read_bytes() for file in (tmp_path / "condensed").iterdir()}
    assert saved.keys() == FILES
    for repository in ("me/new", "me/saved", "me/written"):
        files = Hub.received[repository]
        assert files.keys() == FILES
        for name in ("model.safetensors", "condense_plan.json", *CODE):
            assert files[name] == saved[name], (repository, name)
    assert Hub.received["me/new"]["README.md"] == Hub.received["me/saved"]["README.md"] == saved["README.md"]
    assert b"# I wrote this" in Hub.received["me/written"]["README.md"]
