"""Models of the hub, from a hub that runs here: it serves folders as huggingface.co does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import fedclip_flwr
from fedclip_flwr import clip
from fedclip_flwr import hub as hubs
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features
from tests.learnt import saved_adapter
from tests.local_hub import CONVERTED, SHA, Hub, local_hub

Env = dict[str, str]
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["fedclip_flwr.clip"])
"""Processes of their own, which the hub's library reads its environment in, but with torch there already."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as server:
        yield server


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
