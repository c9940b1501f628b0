from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fedclip_flwr.config import Settings
from fedclip_flwr.data import open_source, pick_holdout
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import open_features


def test_a_tree_is_read_in_sorted_order(tree: Path) -> None:
    source = open_source(f"folder:{tree}")
    assert source.domains == ("cartoon", "photo")
    assert source.class_names == ("car", "cat", "fish")
    labels = [label for image, label in source.images("photo") if image is not None]
    assert labels == [0] * 4 + [1] * 4 + [2] * 4
    assert source.count("photo") == 12


def test_a_class_that_a_domain_lacks_keeps_its_number(tree: Path) -> None:
    shutil.rmtree(tree / "photo" / "car")
    assert {label for _, label in ImageFolder(tree).images("photo")} == {1, 2}


def test_broken_images_are_left_out_and_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"")
    whole = (tree / "photo" / "fish" / "1.png").read_bytes()
    (tree / "photo" / "fish" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tree / "photo" / "fish" / "notes.txt").write_text("not an image")
    (tree / "photo" / "fish" / "nowhere.png").symlink_to("nothing")
    (tree / "photo" / "fish" / "folder.png").mkdir()
    examples = open_features(Settings(data=f"folder:{tree}"), store=tree / "store", progress=False).examples("photo")
    assert examples.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert "photo: 4 of 14 images can't be read and are left out" in caplog.text


def test_a_domain_of_broken_images_only_is_refused(tree: Path) -> None:
    for path in (tree / "photo").rglob("*.png"):
        path.write_bytes(b"nothing")
    features = open_features(Settings(data=f"folder:{tree}"), store=tree / "store", progress=False)
    with pytest.raises(UserError, match="photo: none of its 12 images can be read"):
        features.examples("photo")


def test_images_come_upright_and_in_rgb(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "d" / label).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (8, 4)).save(tmp_path / "d" / "a" / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 4)).save(tmp_path / "d" / "b" / "clear.png")
    turned, clear = (image for image, _ in ImageFolder(tmp_path).images("d"))
    assert turned is not None
    assert clear is not None
    assert (turned.mode, turned.size) == ("RGB", (4, 8))
    assert (clear.mode, clear.size) == ("RGB", (8, 4))


def test_the_content_is_that_of_the_images_wherever_they_are(tree: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    first = ImageFolder(tree).content("photo", memory)
    copy = Path(shutil.copytree(tree, tmp_path / "copy"))
    assert ImageFolder(copy).content("photo", memory) == first
    times = os.stat(copy / "photo" / "cat" / "0.png")
    swapped = (copy / "photo" / "cat" / "1.png").read_bytes()
    size = max(times.st_size, len(swapped))
    for name in ("0.png", "1.png"):  # as long as each other, with the old times put back
        path = copy / "photo" / "cat" / name
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    padded = ImageFolder(copy).content("photo", memory)
    (copy / "photo" / "cat" / "0.png").write_bytes(swapped.ljust(size, b"\0"))
    os.utime(copy / "photo" / "cat" / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len({first, padded, ImageFolder(copy).content("photo", memory)}) == 3


def test_the_content_tells_class_numbers_apart(tree: Path, tmp_path: Path) -> None:
    before = ImageFolder(tree).content("photo", tmp_path)
    (tree / "cartoon" / "bird").mkdir()
    shutil.copy(tree / "cartoon" / "cat" / "0.png", tree / "cartoon" / "bird")
    assert ImageFolder(tree).content("photo", tmp_path) != before


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (None, "there is no such folder"),
        ((), "no images there; expected domain/class/image"),
        (("photo/cat",), "only one class (cat) there"),
    ],
)
def test_an_unusable_folder_gives_one_clear_message(tmp_path: Path, keep: tuple[str, ...] | None, told: str) -> None:
    root = tmp_path / "images"
    if keep is not None:
        root.mkdir()
        for folder in keep:
            (root / folder).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(root / folder / "x.png")
    with pytest.raises(UserError) as error:
        open_source(f"folder:{root}")
    assert str(root) in str(error.value)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("data", ["drwan", "drawn:x", "drawn:-1", "drawn:9999999"])
def test_unknown_data_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="expected"):
        open_source(data)


def test_the_holdout_is_the_last_domain_unless_said() -> None:
    domains = ("art", "photo", "sketch")
    assert pick_holdout("auto", domains) == "sketch"
    assert pick_holdout("art", domains) == "art"
    assert pick_holdout("", domains) is None
    assert pick_holdout("auto", ("only",)) is None
    with pytest.raises(UserError, match="the data has art, photo, sketch"):
        pick_holdout("cartoon", domains)
    with pytest.raises(UserError, match="the only domain"):
        pick_holdout("only", ("only",))
