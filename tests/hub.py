"""A stand-in of the Hugging Face hub: repositories in memory behind the routes that huggingface_hub asks for.

It keeps what was uploaded, by commit, and every request with its headers. Large files take the LFS way, as
safetensors do on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standInTokenThatNobodyMayShow"


class Hub:
    """`files[repo][commit]` are a commit's files by path; `refuse` is what every request is answered with, if set."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.private: dict[str, bool] = {}
        self.refuse: tuple[int, str] | None = None
        self.url = ""

    def head(self, repo: str) -> tuple[str, dict[str, bytes]]:
        """The newest commit of a repository and its files."""
        return list(self.files[repo].items())[-1]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds files in a commit; returns its hash."""
        commits = self.files.setdefault(repo, {"0" * 40: {}})
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[sha] = {**self.head(repo)[1], **files}
        return sha

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request."""
        if self.refuse is not None:
            return self.refuse[0], {"X-Error-Message": self.refuse[1]}, json.dumps({"error": self.refuse[1]}).encode()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.files:
                return 409, {}, json.dumps({"error": "exists", "url": f"{self.url}/{repo}"}).encode()
            self.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.files[repo] = {"0" * 40: {}}
            return 200, {}, json.dumps({"url": f"{self.url}/{repo}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if match := re.fullmatch(r"/blobs/(\w+)", path):
            self.blobs[match[1]] = body
            return 200, {}, b""
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.url}/blobs/{o['oid']}"}}} for o in objects]
            return 200, {}, json.dumps({"transfer": "basic", "objects": upload}).encode()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/\w+", path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False} for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {}, json.dumps({"files": modes}).encode()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/\w+", path):
            return self._commit(match[1], body)
        return self._read(path, body)

    def _commit(self, repo: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
        sha = self.commit(repo, files)
        done = {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha}
        return 200, {}, json.dumps(done).encode()

    def _read(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        missing = 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if match[1] not in self.files:
                return missing
            commits = self.files[match[1]]
            sha = match[2] if match[2] in commits else self.head(match[1])[0]
            if match[2] not in (None, "main", sha):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {}, json.dumps({"id": match[1], "sha": sha, "tags": [], "downloads": 0}).encode()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/(\w+)", path):
            asked = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body or b"{}").get("paths", [])
            files = self.files[match[1]][match[2]]
            found = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                for name in ([asked] if isinstance(asked, str) else asked) if name in files
            ]  # fmt: skip
            return 200, {}, json.dumps(found).encode()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            data = self.files[match[1]][match[2]][match[3]]
            etag = hashlib.sha256(data).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": match[2]}, data
        return missing


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on a port of this machine; `hub.url` is its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self._body()
            hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
            status, headers, data = hub.answer(self.command, self.path.partition("?")[0], body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length + 2)[:-2])
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
