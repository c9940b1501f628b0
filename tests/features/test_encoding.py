from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fedclip_flwr.base.errors import ReadError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.features import ahead, clip, encoding, models
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.encoded import Encoded
from fedclip_flwr.features.opening import open_features
from tests import forked
from tests.failing import failing

ENCODE = """
import os, signal, sys
from pathlib import Path
from fedclip_flwr.features import ahead
from fedclip_flwr.features import clip
from fedclip_flwr.features import opening
from fedclip_flwr.base import growing
from fedclip_flwr.base.settings import Settings
clip.PART = 2
left = int(sys.argv[4])
def counted(place, name, moment):
    made = getattr(place, name)
    def announced(*given, **more):
        global left
        if name == "encode":
            print(len(given[1]["pixel_values"]), flush=True)
        left -= moment == sys.argv[3]
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*given, **more)
    setattr(place, name, announced)
counted(clip.Clip, "encode", "encode")
counted(growing.Growing, "_write_line", "write")
counted(os, "fsync", "sync")
counted(Path, "replace", "rename")
if "workers" in sys.argv:
    ahead.workers = lambda *_: 2
settings = Settings(data=f"folder:{sys.argv[1]}")
opened = opening.open_features(settings, root=Path(sys.argv[2]), progress=False)
opened.examples("photo")
"""


def encode(tree: Path, store: Path, moment: str = "never", left: int = 0, *more: str) -> tuple[int, int]:
    """A process that encodes the photos and is killed at a moment; how many it encoded, and how it ended."""
    done = forked.run(ENCODE, str(tree), str(store), moment, str(left), *more)
    return sum(map(int, done.stdout.split())), done.returncode


def entry(store: Path) -> bytes:
    (path,) = store.glob("*/given-*.safetensors")
    assert {file.suffix for file in path.parent.iterdir()} == {".safetensors", ".lock"}
    return path.read_bytes()


def resumed(tree: Path, store: Path) -> tuple[int, bytes]:
    """How many images this process encodes, and the entry."""
    made = open_features(Settings(data=f"folder:{tree}"), root=store, progress=False)
    made.examples("photo")
    assert isinstance(made, Encoded)
    return made.encoded, entry(store)


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("encode", 4),
        pytest.param("write", 3, marks=pytest.mark.soak),
        pytest.param("sync", 0, marks=pytest.mark.soak),
        ("rename", 0),
    ],
)
def test_after_a_kill_one_batch_at_most_is_encoded_twice(
    tree: Path, moment: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "PART", 2)
    _, expected = resumed(tree, tmp_path / "other")
    first, code = encode(tree, tmp_path / "store", moment, left)
    assert code == -9
    again, found = resumed(tree, tmp_path / "store")
    assert 12 <= first + again <= 12 + 2
    assert found == expected


def test_after_an_unreadable_image_encoding_resumes_where_it_was(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "PART", 2)
    _, expected = resumed(tree, tmp_path / "other")
    last = list(ImageFolder(tree).pictures("photo"))[-1].name
    (tree / last).rename(tree / "photo" / "fish" / "last.png")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "last.png", OSError(errno.EIO, "Input/output error"), after=1)
        made = opened(tree)
        with pytest.raises(ReadError, match=r"last.png can't be read now"):
            made.examples("photo")
        assert made.stored("photo") == 8
    again, found = resumed(tree, tree / "store")
    assert again == 4
    assert found == expected


@pytest.mark.soak
def test_workers_change_nothing_also_after_a_kill(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "PART", 2)
    (tree / "photo" / "cat" / "1.png").write_bytes(b"no picture")
    _, expected = resumed(tree, tmp_path / "other")
    _, code = encode(tree, tmp_path / "store", "encode", 3, "workers")
    assert code == -9
    monkeypatch.setattr(ahead, "workers", lambda *_: 1)
    again, found = resumed(tree, tmp_path / "store")
    assert again <= 12 - 2 * 2
    assert found == expected


FULL = ENCODE.replace("opened.examples", "opened.classes; limit(); opened.examples").replace(
    "settings =",
    """
def limit():
    import resource
    size = 2**14 + 8 * 12 + 4 * 128 * 5  # two batches fit, and a half
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
settings =""",
)


def test_a_full_disk_is_reported_in_one_line_and_what_is_done_is_kept(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "PART", 2)
    done = forked.run(FULL, str(tree), str(tmp_path / "store"), "never", "0")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "File too large" in last
    assert "make room there, or set FEDCLIP_HOME to another folder" in last
    assert sum(map(int, done.stdout.split())) == 6
    again, _ = resumed(tree, tmp_path / "store")
    assert again == 12 - 4


@pytest.mark.soak
def test_pixels_are_the_same_with_workers(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "PART", 4)
    settings = Settings(data=f"folder:{tree}", method="full-model")
    found = []
    for count in (0, 2):
        monkeypatch.setattr(ahead, "workers", lambda *_, count=count: count)
        found.append(open_features(settings, root=tmp_path / str(count), progress=False).examples("photo"))
    assert torch.equal(found[0].features, found[1].features)
    assert torch.equal(found[0].labels, found[1].labels)


def test_the_progress_counts_what_was_there_before(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tree, tmp_path / "store", "encode", 5)
    settings = Settings(data=f"folder:{tree}")
    made = open_features(settings, root=tmp_path / "store")
    made.examples("photo")
    bar = capsys.readouterr().err.split("\r")
    assert "10/12" in bar[1]
    assert "12/12" in bar[-1]
    assert "images/s" in bar[-1]
    assert isinstance(made, Encoded)
    assert made.encoded == 2


def opened(tree: Path, **settings: Any) -> Encoded:
    made = open_features(Settings(data=f"folder:{tree}", **settings), root=tree / "store", progress=False)
    assert isinstance(made, Encoded)
    return made


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has bfloat16, and the bundled model counts as large."""
    monkeypatch.setattr(models, "has_bfloat16", lambda: True)
    monkeypatch.setattr(models, "LARGE", 0)


@pytest.mark.usefixtures("able")
def test_a_lower_precision_is_compared_once_and_stored_in_half_the_space(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = opened(tree, precision="float32").examples("photo")
    lower = opened(tree)
    found = lower.examples("photo")
    assert lower.folder.name.endswith("-bfloat16")
    assert found.features.dtype == torch.float16
    assert full.features.dtype == torch.float32
    torch.testing.assert_close(*(F.normalize(e.features.float()) for e in (found, full)), rtol=0, atol=0.03)
    half = full.features.half().float()  # which is what keeping them so takes away, at lengths from 15 to 20
    torch.testing.assert_close(half, full.features, rtol=2**-11, atol=1e-6)
    (agreement,) = lower.folder.glob("agreement-*.safetensors")
    assert load_file(agreement)["same"].tolist() == [True] * 24
    assert "float32" not in caplog.text
    assert len(lower.classes.text) == 3
    monkeypatch.setattr(Clip, "__init__", lambda *_: pytest.fail("loaded again"))
    assert torch.equal(opened(tree).examples("photo").features, found.features)


def far_from_zero(folder: Path, offset: float) -> Path:
    """The bundled model with all patches so far from zero; in float32 it takes that off again."""
    shutil.copytree(models.BUNDLED, folder)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["vision_model.embeddings.position_embedding.weight"] += offset
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.usefixtures("able")
def test_float32_is_used_where_less_finds_other_classes(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A number of 1000 leaves bfloat16 no room for what was in the patches."""
    folder = far_from_zero(tmp_path / "clip", 1000)
    made = opened(tree, model=str(folder))
    found = made.examples("photo")
    assert caplog.text.count("using float32") == 1
    assert made.folder.name.endswith("-float32")
    assert found.features.dtype == torch.float32
    assert torch.equal(opened(tree, model=str(folder), precision="float32").examples("photo").features, found.features)
    assert opened(tree, model=str(folder)).folder == made.folder
    assert caplog.text.count("using float32") == 1


def test_a_number_that_overflows_is_no_agreement(tree: Path, tmp_path: Path) -> None:
    folder = far_from_zero(tmp_path / "clip", 70_000)
    made = opened(tree, model=str(folder), precision="float16")
    assert made.folder.name.endswith("-float32")
    assert made.examples("photo").features.isfinite().all()


@pytest.mark.usefixtures("able")
def test_a_domain_without_a_readable_image_is_kept_in_the_precision_of_the_others(tree: Path) -> None:
    for file in (tree / "photo").rglob("*.png"):
        file.write_bytes(b"nothing")
    assert opened(tree).examples("photo").features.dtype == torch.float16


@pytest.mark.usefixtures("able")
def test_a_lower_precision_is_compared_anew_for_other_classes(tree: Path) -> None:
    made = [opened(tree), opened(tree, class_names="kitten,sedan,trout")]
    assert made[0].folder == made[1].folder
    assert len([*made[0].folder.glob("agreement-*.safetensors")]) == 2


@pytest.mark.parametrize(
    ("same", "cosine", "good"),
    [(19, 0.99, True), (18, 1.0, False), (20, 0.98, False), (0, 0.0, False)],
)
def test_a_precision_is_good_enough_if_nearly_all_classes_are_the_same_and_all_features_close(
    same: int, cosine: float, good: bool
) -> None:
    """Of twenty images, 19 are the 95 % that it takes."""
    cosines = torch.ones(20)
    cosines[7] = cosine
    assert encoding.good_enough({"same": torch.arange(20) < same, "cosine": cosines}) == good
