"""Models of the hub, from a hub that runs here: it serves folders as huggingface.co does."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import pytest

import fedclip_flwr
from fedclip_flwr import clip
from fedclip_flwr import hub as hubs
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features
from tests.learnt import saved_adapter

Env = dict[str, str]
SHA = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "89abcdef0123456789abcdef0123456789abcdef"
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["fedclip_flwr.clip"])
"""Processes of their own, which the hub's library reads its environment in, but with torch there already."""


def git_id(what: Path | bytes) -> str:
    data = what if isinstance(what, bytes) else what.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """`folders` are served by repository and commit; `gated` ones are refused, `asked` has all paths.

    What is uploaded is in `uploaded`, by repository and path; `private` has whether a new repository is to be.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
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
        """Uploads: a repository is made, the ways are told in which its files come, and all come in one commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        name = "/".join(path.split("/")[3:5])
        if self.headers["Authorization"] != "Bearer a-token":
            return self.send(401)
        if path == "/api/repos/create":
            told = json.loads(body)
            made = f"{told['organization']}/{told['name']}"
            if made in self.server.gated:
                return self.send(403)
            url = json.dumps({"url": f"https://huggingface.co/{made}"}).encode()
            if made in self.server.private:
                return self.send(409, url)
            self.server.private[made] = told.get("visibility") == "private" or bool(told.get("private"))
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


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def find(tmp_path: Path, *words: str, hub: Hub | None = None) -> str:
    """What `clip.find` comes to in a process of its own; without a hub it can't be reached."""
    return done(tmp_path, found, *words, hub=hub)


def done(tmp_path: Path, job: Callable[..., str], *words: str, hub: Hub | None = None, more: Env | None = None) -> str:
    """The line that the job comes to in a process of its own, in an environment with `more`."""
    where = f"http://127.0.0.1:{hub.server_port if hub else 9}"
    env = {"HF_HOME": str(tmp_path / "cache"), "FEDCLIP_HOME": str(tmp_path / "home"), "HF_ENDPOINT": where}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours, theirs = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=answer, args=(env | (more or {}), job, words, theirs))
    process.start()
    theirs.close()
    with ours:
        told: str = ours.recv()
    process.join()
    assert len(told.splitlines()) == 1, told
    return told


def answer(env: dict[str, str], job: Callable[..., str], words: tuple[str, ...], to: Connection) -> None:
    assert "huggingface_hub" not in sys.modules
    os.environ |= env
    try:
        to.send(job(*words))
    except UserError as error:
        to.send(str(error))


def found(*words: str) -> str:
    model = clip.find(*words)
    return f"{model.folder.name} {sorted(f.name for f in model.folder.iterdir())}"


def found_adapter(name: str, revision: str = "") -> str:
    folder = fedclip_flwr.FedCLIP.from_pretrained(name, revision=revision).origin
    assert folder
    return f"{folder.name} {sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())}"


def uploaded(folder: str, name: str, private: str = "") -> str:
    return hubs.upload(Path(folder), name, ["README.md", "model/*"], "A message", private=bool(private) or None)


def bundled(tmp_path: Path, without: str = "") -> Path:
    folder = Path(shutil.copytree(clip.BUNDLED, tmp_path / f"model-{without}"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "open_clip_model.safetensors").write_bytes(b"in another layout")
    if without:
        (folder / without).unlink()
    return folder


FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_model_is_downloaded_once_and_without_pickles(hub: Hub, tmp_path: Path) -> None:
    hub.folders["some/clip", SHA] = bundled(tmp_path)
    told = f"{SHA} {FILES}"
    assert find(tmp_path, "some/clip", hub=hub) == told
    assert not any(path.endswith((".bin", "open_clip_model.safetensors")) for path in hub.asked)
    assert find(tmp_path, "some/clip") == told  # from the cache, with the hub out of reach
    asked = len(hub.asked)
    assert find(tmp_path, "some/clip", hub=hub) == told
    assert len(hub.asked) == asked


def test_a_model_that_is_half_downloaded_is_completed_or_told(hub: Hub, tmp_path: Path) -> None:
    hub.folders["some/clip", SHA] = bundled(tmp_path)
    find(tmp_path, "some/clip", hub=hub)
    (weights,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    told = find(tmp_path, "some/clip")
    assert "lacks model.safetensors" in told or "can't be reached" in told
    assert "run `hf download some/clip` where there is one" in told
    assert find(tmp_path, "some/clip", hub=hub) == f"{SHA} {FILES}"


def test_weights_that_are_a_pickle_only_are_taken_from_the_hubs_own_conversion(hub: Hub, tmp_path: Path) -> None:
    hub.folders["some/clip", SHA] = bundled(tmp_path, without="model.safetensors")
    assert "lacks model.safetensors" in find(tmp_path, "some/clip", hub=hub)
    hub.folders["some/clip", CONVERTED] = bundled(tmp_path)
    facts = {"title": "Adding `safetensors` variant", "num": 7, "status": "open", "isPullRequest": True}
    repo = {"name": "some/clip", "type": "model"}
    created, author = "2024-01-01T00:00:00.000Z", {"name": "SFconvertbot"}
    hub.offers = [{**facts, "repo": repo, "createdAt": created, "author": author}]
    assert find(tmp_path, "some/clip", hub=hub) == f"{CONVERTED} {FILES}"
    assert find(tmp_path, "some/clip") == f"{CONVERTED} {FILES}"


def test_a_revision_is_the_one_that_is_taken(hub: Hub, tmp_path: Path) -> None:
    hub.folders["some/clip", SHA] = bundled(tmp_path)
    hub.folders["some/clip", CONVERTED] = bundled(tmp_path, without="tokenizer_config.json")
    assert find(tmp_path, "some/clip", "refs/pr/7", hub=hub).startswith(CONVERTED)
    assert find(tmp_path, "some/clip", "refs/pr/7").startswith(CONVERTED)
    assert "the hub has no revision v9 of it" in find(tmp_path, "some/clip", "v9", hub=hub)
    assert "hf download some/clip --revision v9" in find(tmp_path, "some/clip", "v9")
    for path in ("/", "../main", "refs/../../x", "v9/", "v 9"):
        told = f"model = 'some/clip': {path!r} can't be a revision; expected a commit, a branch or a tag"
        assert find(tmp_path, "some/clip", path) == told
    broken = tmp_path / "cache" / "hub" / "models--some--clip" / "refs" / "v9"
    broken.mkdir()
    told = f"model = 'some/clip': the Hugging Face cache can't be read (Is a directory: {broken})"
    assert find(tmp_path, "some/clip", "v9") == told


def test_what_the_hub_refuses_is_told_with_the_remedy(hub: Hub, tmp_path: Path) -> None:
    assert "the hub has no such model, or it is private: check the name" in find(tmp_path, "some/none", hub=hub)
    hub.folders["some/gated", SHA] = bundled(tmp_path)
    hub.gated.add("some/gated")
    told = find(tmp_path, "some/gated", hub=hub)
    assert told.startswith("model = 'some/gated': access to it has to be asked for")
    assert "hf auth login" in told
    assert "neither a folder here nor a name" in find(tmp_path, "some/clip/too/deep", hub=hub)


@pytest.fixture
def export(tmp_path: Path) -> str:
    """A folder with a file that is to be uploaded, one in a folder, and one that is not."""
    folder = tmp_path / "export"
    (folder / "model").mkdir(parents=True)
    for name in ("README.md", "model/config.json", "notes.txt"):
        (folder / name).write_text(name)
    return str(folder)


def test_a_folder_is_uploaded_in_one_commit_without_other_files(hub: Hub, tmp_path: Path, export: str) -> None:
    told = done(tmp_path, uploaded, export, "some/adapter", "private", hub=hub, more={"HF_TOKEN": "a-token"})
    assert told == f"http://127.0.0.1:{hub.server_port}/some/adapter"
    names = {"README.md": b"README.md", "model/config.json": b"model/config.json"}
    assert hub.uploaded == {("some/adapter", name): data for name, data in names.items()}
    assert hub.private == {"some/adapter": True}
    done(tmp_path, uploaded, export, "some/other", hub=hub, more={"HF_TOKEN": "a-token"})
    assert not hub.private["some/other"]
    told = done(tmp_path, uploaded, export, "some/other", "private", hub=hub, more={"HF_TOKEN": "a-token"})
    assert "it is there already, and for all to see" in told


def test_what_an_older_upload_has_left_is_removed(hub: Hub, tmp_path: Path, export: str) -> None:
    hub.private["some/adapter"] = False
    hub.uploaded = {("some/adapter", "model/old.safetensors"): b"", ("some/adapter", "own.txt"): b"somebody's"}
    done(tmp_path, uploaded, export, "some/adapter", hub=hub, more={"HF_TOKEN": "a-token"})
    assert {path for _, path in hub.uploaded} == {"README.md", "model/config.json", "own.txt"}


def test_an_upload_that_is_refused_is_told_with_the_remedy(hub: Hub, tmp_path: Path, export: str) -> None:
    hub.gated.add("other/adapter")
    logged_in = {"HF_TOKEN": "a-token"}
    refusals: list[tuple[str, Env, str]] = [
        ("some/adapter", {}, "nobody is logged in: run `hf auth login`, or set HF_TOKEN"),
        ("some/adapter", {"HF_TOKEN": "old"}, "the hub does not know the token: log in anew with `hf auth login`"),
        ("other/adapter", logged_in, "the token may not write there: log in with one that may"),
        ("some/adapter", logged_in | {"HF_HUB_OFFLINE": "1"}, "nothing is uploaded while HF_HUB_OFFLINE is set"),
        ("a/b/c", logged_in, "expected a name that the hub can have, such as ORG/NAME"),
    ]
    for name, env, told in refusals:
        assert told in done(tmp_path, uploaded, export, name, hub=hub, more=env)
    assert "the hub can't be reached (" in done(tmp_path, uploaded, export, "some/adapter", more=logged_in)
    assert hub.uploaded == {}


def test_an_adapter_comes_from_the_hub_and_then_from_the_cache(hub: Hub, tmp_path: Path, drawn: Features) -> None:
    saved_adapter(tmp_path / "learnt", drawn)
    hub.folders["some/adapter", SHA] = tmp_path / "out"
    fedclip_flwr.FedCLIP.from_pretrained(tmp_path / "learnt").save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"a pickle")
    told = f"{SHA} ['README.md', 'adapter.safetensors', 'config.json']"
    assert done(tmp_path, found_adapter, "some/adapter", hub=hub) == told
    assert done(tmp_path, found_adapter, "some/adapter") == told
    (tmp_path / "out" / "adapter.safetensors").unlink()
    hub.folders["some/half", SHA] = tmp_path / "out"
    assert "lacks adapter.safetensors" in done(tmp_path, found_adapter, "some/half", hub=hub)
