"""Models of the hub, from a local hub that serves folders as huggingface.co does."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import fedclip_flwr
from fedclip_flwr.base import hub as hubs
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.features import models
from fedclip_flwr.features.base import Features
from fedclip_flwr.inference import learnt
from tests import forked
from tests.learnt import saved_adapter
from tests.local_hub import CONVERTED, SHA, Hub, local_hub

Ask = Callable[..., str]
LOGGED_IN = "a-token"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with local_hub() as server:
        yield server


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.forget()
    return server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests, each of which has models of its own names."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(cache: Path, server: Hub) -> Iterator[Ask]:
    """Runs a job in a process that reaches the hub; returns its line, or the error's."""
    yield from answers(cache, server.server_port)


@pytest.fixture(scope="module")
def cut_off(cache: Path) -> Iterator[Ask]:
    """Like `online`, in another process with the same cache that reaches no hub."""
    yield from answers(cache, 9)


def answers(cache: Path, port: int) -> Iterator[Ask]:
    """The hub's library reads these variables once in a process."""
    env = {"HF_HOME": str(cache / "hub"), "FEDCLIP_HOME": str(cache / "home")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours, theirs = forked.CONTEXT.Pipe()
    process = forked.CONTEXT.Process(target=answer, args=(env, theirs))
    process.start()
    theirs.close()

    def ask(job: Callable[..., str], *words: str, token: str = "") -> str:
        ours.send((job, words, token))
        line: str = ours.recv()
        assert len(line.splitlines()) == 1, line
        return line

    with ours:
        yield ask
        ours.send(None)
        process.join()


def answer(env: dict[str, str], asked: Connection) -> None:
    assert "huggingface_hub" not in sys.modules
    os.environ |= env
    while given := asked.recv():
        job, words, os.environ["HF_TOKEN"] = given
        try:
            asked.send(job(*words))
        except UserError as error:
            asked.send(str(error))


def found(*words: str) -> str:
    model = models.find(*words)
    return described(model.folder)


def found_adapter(name: str) -> str:
    return described(learnt.find_learnt(name).folder)


def described(folder: Path) -> str:
    return f"{folder.name} {sorted(f.name for f in folder.iterdir())}"


def uploaded(folder: str, name: str, private: str = "") -> str:
    return hubs.upload(Path(folder), name, ["README.md", "model/*"], "A message", private=bool(private) or None)


def bundled(tmp_path: Path, without: str = "") -> Path:
    folder = Path(shutil.copytree(models.BUNDLED, tmp_path / f"model-{without}"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "open_clip_model.safetensors").write_bytes(b"in another layout")
    if without:
        (folder / without).unlink()
    return folder


FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_model_is_downloaded_once_and_without_pickles(hub: Hub, tmp_path: Path, online: Ask, cut_off: Ask) -> None:
    hub.folders["some/clip", SHA] = bundled(tmp_path)
    line = f"{SHA} {FILES}"
    assert online(found, "some/clip") == line
    assert not any(path.endswith((".bin", "open_clip_model.safetensors")) for path in hub.asked)
    assert cut_off(found, "some/clip") == line  # from the cache
    asked = len(hub.asked)
    assert online(found, "some/clip") == line
    assert len(hub.asked) == asked


def test_a_model_that_is_half_downloaded_is_completed_or_reported(
    hub: Hub, tmp_path: Path, cache: Path, online: Ask, cut_off: Ask
) -> None:
    hub.folders["some/half", SHA] = bundled(tmp_path)
    online(found, "some/half")
    (weights,) = cache.rglob("models--some--half/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    line = cut_off(found, "some/half")
    assert "lacks model.safetensors" in line or "can't be reached" in line
    assert "run `hf download some/half` where there is one" in line
    assert online(found, "some/half") == f"{SHA} {FILES}"


def test_weights_that_are_a_pickle_only_are_taken_from_the_hubs_own_conversion(
    hub: Hub, tmp_path: Path, online: Ask, cut_off: Ask
) -> None:
    hub.folders["some/pickle", SHA] = bundled(tmp_path, without="model.safetensors")
    assert "lacks model.safetensors" in online(found, "some/pickle")
    hub.folders["some/pickle", CONVERTED] = bundled(tmp_path)
    facts = {"title": "Adding `safetensors` variant", "num": 7, "status": "open", "isPullRequest": True}
    repo = {"name": "some/pickle", "type": "model"}
    created, author = "2024-01-01T00:00:00.000Z", {"name": "SFconvertbot"}
    hub.offers = [{**facts, "repo": repo, "createdAt": created, "author": author}]
    assert online(found, "some/pickle") == f"{CONVERTED} {FILES}"
    assert cut_off(found, "some/pickle") == f"{CONVERTED} {FILES}"


def test_a_revision_is_the_one_that_is_taken(hub: Hub, tmp_path: Path, cache: Path, online: Ask, cut_off: Ask) -> None:
    hub.folders["revised/clip", SHA] = bundled(tmp_path)
    hub.folders["revised/clip", CONVERTED] = bundled(tmp_path, without="tokenizer_config.json")
    assert online(found, "revised/clip", "refs/pr/7").startswith(CONVERTED)
    assert cut_off(found, "revised/clip", "refs/pr/7").startswith(CONVERTED)
    assert "the hub has no revision v9 of it" in online(found, "revised/clip", "v9")
    assert "hf download revised/clip --revision v9" in cut_off(found, "revised/clip", "v9")
    for path in ("/", "../main", "refs/../../x", "v9/", "v 9"):
        line = f"model = 'revised/clip': {path!r} is not a valid revision; expected a commit, a branch or a tag"
        assert cut_off(found, "revised/clip", path) == line
    broken = cache / "hub" / "hub" / "models--revised--clip" / "refs" / "v9"
    broken.mkdir()
    line = f"model = 'revised/clip': the Hugging Face cache can't be read (Is a directory: {broken})"
    assert cut_off(found, "revised/clip", "v9") == line


def test_what_the_hub_refuses_is_reported_with_the_remedy(hub: Hub, tmp_path: Path, online: Ask) -> None:
    assert "the hub has no such model, or it is private: check the name" in online(found, "some/none")
    hub.folders["some/gated", SHA] = bundled(tmp_path)
    hub.gated.add("some/gated")
    line = online(found, "some/gated")
    assert line.startswith("model = 'some/gated': access must be requested")
    assert "hf auth login" in line
    assert "neither a folder here nor a valid name" in online(found, "some/clip/too/deep")


@pytest.fixture
def export(tmp_path: Path) -> str:
    """A folder with a file that is to be uploaded, one in a folder, and one that is not."""
    folder = tmp_path / "export"
    (folder / "model").mkdir(parents=True)
    for name in ("README.md", "model/config.json", "notes.txt"):
        (folder / name).write_text(name)
    return str(folder)


def test_a_folder_is_uploaded_in_one_commit_without_other_files(hub: Hub, export: str, online: Ask) -> None:
    line = online(uploaded, export, "some/adapter", "private", token=LOGGED_IN)
    assert line == f"http://127.0.0.1:{hub.server_port}/some/adapter"
    names = {"README.md": b"README.md", "model/config.json": b"model/config.json"}
    assert hub.uploaded == {("some/adapter", name): data for name, data in names.items()}
    assert hub.private == {"some/adapter": True}
    online(uploaded, export, "some/other", token=LOGGED_IN)
    assert not hub.private["some/other"]
    line = online(uploaded, export, "some/other", "private", token=LOGGED_IN)
    assert "the repository exists and is public" in line


def test_what_an_older_upload_has_left_is_removed(hub: Hub, export: str, online: Ask) -> None:
    hub.private["some/adapter"] = False
    hub.uploaded = {("some/adapter", "model/old.safetensors"): b"", ("some/adapter", "own.txt"): b"somebody's"}
    online(uploaded, export, "some/adapter", token=LOGGED_IN)
    assert {path for _, path in hub.uploaded} == {"README.md", "model/config.json", "own.txt"}


def test_an_upload_that_is_refused_is_reported_with_the_remedy(
    hub: Hub, export: str, online: Ask, cut_off: Ask
) -> None:
    hub.gated.add("other/adapter")
    for name, token, line in (
        ("some/adapter", "", "not logged in: run `hf auth login`, or set HF_TOKEN"),
        ("some/adapter", "old", "the hub rejected the token: log in again with `hf auth login`"),
        ("other/adapter", LOGGED_IN, "the token has no write access there: log in with one that has"),
        ("a/b/c", LOGGED_IN, "expected a valid name on the hub, such as ORG/NAME"),
    ):
        assert line in online(uploaded, export, name, token=token)
    assert "the hub can't be reached (" in cut_off(uploaded, export, "some/adapter", token=LOGGED_IN)
    with pytest.raises(UserError, match="uploads are disabled by HF_HUB_OFFLINE"):  # as in these tests' process
        uploaded(export, "some/adapter")
    assert hub.uploaded == {}


def test_an_adapter_comes_from_the_hub_and_then_from_the_cache(
    hub: Hub, tmp_path: Path, drawn: Features, cache: Path, online: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path / "learnt", drawn)
    hub.folders["an/adapter", SHA] = tmp_path / "out"
    fedclip_flwr.FedCLIP.from_pretrained(tmp_path / "learnt").save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"a pickle")
    line = f"{SHA} ['README.md', 'adapter.safetensors', 'config.json']"
    assert online(found_adapter, "an/adapter") == line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub" / "hub"))  # without a network here
    origin = fedclip_flwr.FedCLIP.from_pretrained("an/adapter").origin
    assert origin
    assert described(origin) == line
    (tmp_path / "out" / "adapter.safetensors").unlink()
    hub.folders["half/adapter", SHA] = tmp_path / "out"
    assert "lacks adapter.safetensors" in online(found_adapter, "half/adapter")
