"""A hub that runs here: it serves folders as huggingface.co does, and takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

SHA = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "89abcdef0123456789abcdef0123456789abcdef"


def git_id(what: Path | bytes) -> str:
    data = what if isinstance(what, bytes) else what.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """`folders` are served by repository and commit; `gated` ones are refused, `asked` has all paths.

    What is uploaded is in `uploaded`, by repository and path; `private` has whether a new repository is to be.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.forget()

    def forget(self) -> None:
        """As if it had been started anew."""
        self.folders: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.offers: list[dict[str, object]] = []
        self.asked: list[str] = []
        self.uploaded: dict[tuple[str, str], bytes] = {}
        self.private: dict[str, bool] = {}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 4:
            made = "/".join(parts[2:])
            if made not in self.server.private:
                return self.send(404, error="RepoNotFound")
            return self.send(200, json.dumps({"id": made, "private": self.server.private[made]}).encode())
        if parts[:2] == ["api", "models"]:
            name, what = "/".join(parts[2:4]), parts[4]
            if what == "discussions":
                page = {"discussions": self.server.offers, "count": len(self.server.offers), "start": 0}
                return self.send(200, json.dumps(page).encode())
            if what == "tree" and name in self.server.private:
                paths = [path for repository, path in self.server.uploaded if repository == name]
                there = [{"type": "file", "path": path, "size": 1, "oid": SHA} for path in paths]
                return self.send(200, json.dumps(there).encode())
            revision = "/".join(parts[5:])
            commit = {"main": SHA, "refs/pr/7": CONVERTED}.get(revision, revision)
            if (name, SHA) not in self.server.folders:
                return self.send(404, error="RepoNotFound")
            if (name, commit) not in self.server.folders:
                return self.send(404, error="RevisionNotFound")
            if what == "revision":
                return self.send(200, json.dumps({"id": name, "sha": commit}).encode())
            files = self.server.folders[name, commit].iterdir()
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": git_id(f)} for f in files]
            return self.send(200, json.dumps(tree).encode())
        if "resolve" not in parts:
            return self.send(404)
        name, commit = "/".join(parts[:2]), parts[3]
        if name in self.server.gated:
            return self.send(403, error="GatedRepo")
        file = self.server.folders[name, commit] / parts[4]
        if not file.exists():
            return self.send(404, error="EntryNotFound")
        return self.send(200, file.read_bytes(), commit)

    def do_POST(self) -> None:
        """Uploads: a repository is made, the ways are named in which its files come, and all come in one commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        name = "/".join(path.split("/")[3:5])
        if self.headers["Authorization"] != "Bearer a-token":
            return self.send(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            made = f"{asked['organization']}/{asked['name']}"
            if made in self.server.gated:
                return self.send(403)
            url = json.dumps({"url": f"https://huggingface.co/{made}"}).encode()
            if made in self.server.private:
                return self.send(409, url)
            self.server.private[made] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.send(200, url)
        if path == "/api/validate-yaml":
            return self.send(200, json.dumps({"errors": [], "warnings": []}).encode())
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.server.uploaded[name, line["value"]["path"]] = data
            if line["key"] == "deletedFile":
                del self.server.uploaded[name, line["value"]["path"]]
        commit = {"success": True, "commitOid": SHA, "commitUrl": f"https://huggingface.co/{name}/commit/{SHA}"}
        return self.send(200, json.dumps(commit).encode())

    def send(self, status: int, body: bytes = b"", commit: str = "", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{git_id(body)}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def local_hub() -> Iterator[Hub]:
    """The hub, answering until it is left."""
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
