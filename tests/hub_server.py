"""A small Hugging Face hub on loopback: what huggingface_hub asks for when it lists, downloads, makes and commits.

Files are sent as git files (no LFS, no xet). What goes wrong is set by a test: `status`, `failing`, `cuts`, `silent`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Runs within `with`.

    Attributes:
        repos: repository id -> name -> bytes.
        made: what was asked for when repositories were made.
        requests: "METHOD path" of every request, in order.
        tokens: the authorization headers seen.
        status: answer everything with this status.
        failing: (piece of a path, status): such requests fail, one for each entry.
        cuts: (end of a path, number of bytes): such a download ends too early, one for each entry.
        status_after_cut: what `status` becomes then.
        silent: accept connections and say nothing.
        answers: set while commits are answered; cleared, they wait.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.made: list[dict] = []
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: int | None = None
        self.failing: list[tuple[str, int]] = []
        self.cuts: list[tuple[str, int]] = []
        self.status_after_cut: int | None = None
        self.silent = False
        self.answers = threading.Event()
        self.answers.set()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_folder(self, repo_id: str, folder: Path) -> None:
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.repos.setdefault(repo_id, {}).update(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        )

    def downloads(self, name: str) -> int:
        return sum(line.startswith("GET ") and line.endswith(name) for line in self.requests)


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """For a new process that is to ask this hub."""
    return {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "",
    }  # fmt: skip


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Have the client of this process ask this hub, without a token, and keep its copies in `home`."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()  # connections to the hub of the test before


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/agent-harnesses":  # the client's own statistics
            self._fail(404)
            return
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.silent:
            hub.closing.wait()
            self.close_connection = True
        elif hub.status is not None:
            self._fail(hub.status)
        elif fault := next((fault for fault in hub.failing if fault[0] in path), None):
            hub.failing.remove(fault)
            self._fail(fault[1])
        elif path == "/api/repos/create":
            self._make(json.loads(body))
        elif path.startswith("/api/"):
            kind, owner, name, *rest = path.removeprefix("/api/").split("/")
            self._api(kind, f"{owner}/{name}", rest, body)
        else:
            owner, name, _, _, *file = path.strip("/").split("/")
            self._send_file(f"{owner}/{name}", "/".join(file))

    def _make(self, wanted: dict) -> None:
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        self.hub.made.append(wanted)
        self.hub.repos.setdefault(repo_id, {})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def _api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        files = self.hub.repos.get(repo_id)
        match rest[:1]:
            case _ if files is None:
                self._fail(404, "RepoNotFound")
            case ["tree"]:
                self._json(
                    [
                        {"type": "file", "path": n, "size": len(b), "oid": _etag(b)}
                        for n, b in files.items()
                    ]
                )
            case ["preupload"]:
                names = [file["path"] for file in json.loads(body)["files"]]
                self._json(
                    {
                        "files": [
                            {"path": n, "uploadMode": "regular", "shouldIgnore": False}
                            for n in names
                        ]
                    }
                )
            case ["commit"]:
                self.hub.answers.wait(60)
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"{self.hub.endpoint}/{repo_id}/commit/{COMMIT}"
                self._json({"success": True, "commitUrl": url, "commitOid": COMMIT})
            case _:
                self._json(
                    {
                        "id": repo_id,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in files],
                    }
                )

    def _send_file(self, repo_id: str, name: str) -> None:
        hub = self.hub
        content = hub.repos.get(repo_id, {}).get(name)
        if content is None:
            self._fail(404, "EntryNotFound")
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = next((cut for cut in hub.cuts if name.endswith(cut[0])), None)
        if cut is None:
            self.wfile.write(content[start:])
        else:
            hub.cuts.remove(cut)
            hub.status = hub.status_after_cut
            self.wfile.write(content[start : start + cut[1]])
            self.close_connection = True

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str = "") -> None:
        # As an unkind hub would: the token comes back in the message.
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self._json(
            {"error": f"sorry {token}".strip()}, status, **({"X_Error_Code": code} if code else {})
        )


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
