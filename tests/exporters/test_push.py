"""Uploads to a local stand-in of the hub's API; nothing leaves this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import transformers
from exported_models import adapted, llama

import lora_lightning as ll
from lora_lightning.cli.main import main
from lora_lightning.errors import ExportError
from lora_lightning.exporters.push import check_push, push
from lora_lightning.exporters.report import ExportReport


class Hub:
    """What the stand-in was asked, the files it holds, and how it answers."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.refuses: dict[str, int] = {}
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        for end, code in self.refuses.items():
            if path.endswith(end):
                return code, {"error": "You don't have the rights to do this"}
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            known = len(self.created) > 1
            return (409 if known else 200), {"url": f"{self.url}/owner/name", "error": "exists already"}
        if path.endswith("/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        if "/commit/" in path:
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/owner/name/commit/0", "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"no such address: {path}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else self._chunks()
            found.tokens.add(self.headers.get("Authorization"))
            self._reply(*found.answer(self.path.partition("?")[0], body))

        def do_GET(self) -> None:
            self._reply(404, {"error": "not found"})

        def _chunks(self) -> bytes:
            content = b""
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                content += self.rfile.read(size)
                self.rfile.readline()
            return content

        def _reply(self, code: int, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def report(tmp_path: Path) -> ExportReport:
    """A verified export of an adapter on a base that lies in a local folder."""
    llama().save_pretrained(tmp_path / "secret" / "base")
    model = adapted(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "secret" / "base"))
    return ll.export(model, tmp_path / "out")


def test_every_file_arrives_in_one_commit_without_the_paths_of_this_machine(hub: Hub, report: ExportReport) -> None:
    assert push(report, "owner/name", private=True).endswith("/owner/name")
    (made,) = hub.created
    assert (made["name"], made["organization"], made["visibility"]) == ("name", "owner", "private")
    assert (hub.commits, hub.tokens) == (1, {"Bearer hf_test"})
    assert sorted(hub.files) == sorted(report.files)
    for name, content in hub.files.items():
        assert b"secret" not in content, name
        if not name.endswith(".json"):
            assert content == (report.directory / name).read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert "secret" in (report.directory / "adapter_config.json").read_text(), "here the path is what finds the base"


def test_a_repository_that_is_there_takes_another_commit(hub: Hub, report: ExportReport) -> None:
    push(report, "owner/name")
    push(report, "owner/name")
    assert "visibility" not in hub.created[0]
    assert hub.commits == 2


def test_nothing_is_uploaded_that_was_not_verified(hub: Hub, report: ExportReport) -> None:
    for other in (replace(report, difference=None), replace(report, verified_by="", not_run="it has no inputs")):
        with pytest.raises(ExportError, match="the export was not verified, so it stays here"):
            push(other, "owner/name")
    assert not hub.created


def test_no_token(hub: Hub, report: ExportReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        ExportError, match=r"there is no token of the hub\. Log in with `hf auth login`, or set HF_TOKEN"
    ):
        check_push("owner/name")


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "owner/", "/"])
def test_what_is_no_owner_and_name(hub: Hub, name: str) -> None:
    with pytest.raises(ExportError, match="it must be OWNER/NAME"):
        check_push(name)


@pytest.mark.parametrize(("end", "code"), [("/repos/create", 403), ("/repos/create", 401), ("/commit/main", 403)])
def test_no_right(end: str, code: int, hub: Hub, report: ExportReport) -> None:
    hub.refuses[end] = code
    with pytest.raises(ExportError, match=rf"the hub answers {code}: .*The token has no right to write there") as error:
        push(report, "owner/name")
    assert "\n" not in str(error.value)
    assert "The export is in" in str(error.value)
    assert not hub.files


def test_a_card_that_the_hub_refuses(hub: Hub, report: ExportReport) -> None:
    hub.refuses["/validate-yaml"] = 400
    with pytest.raises(ExportError, match=r'--push "owner/name": the hub refuses: Invalid metadata in README\.md'):
        push(report, "owner/name")


def test_no_network(hub: Hub, report: ExportReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"the hub cannot be reached at http://127\.0\.0\.1:9") as error:
        push(report, "owner/name")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="the hub cannot be reached"):
        push(report, "owner/name")


def test_the_command_line_uploads_what_it_has_verified(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama().save_pretrained(tmp_path / "base")
    ll.save_adapter(adapted(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--format", "merged", "--output", str(tmp_path / "out")]
    assert main([*words, "--push", "owner/name"]) == 0
    assert "pushed to http://127.0.0.1:" in capsys.readouterr().out
    assert {"model.safetensors", "README.md", "config.json"} <= hub.files.keys()
