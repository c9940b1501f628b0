from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import ReadError, UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.base import Columns
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.data.holdout import held_out, pick_holdout
from fedclip_flwr.data.opening import open_source
from fedclip_flwr.features.opening import open_features
from tests.failing import failing


def test_a_tree_is_read_in_sorted_order(tree: Path) -> None:
    source, _ = open_source(f"folder:{tree}")
    assert source.domains == ("cartoon", "photo")
    assert source.class_names == ("car", "cat", "fish")
    labels = [label for _, label, image in source.pictures("photo") if image is not None]
    assert labels == [0] * 4 + [1] * 4 + [2] * 4
    assert source.count("photo") == 12


def test_a_tree_without_domains_is_one_domain(tree: Path) -> None:
    source, _ = open_source(f"folder:{tree / 'photo'}")
    assert source.domains == ("photo",)
    assert source.class_names == ("car", "cat", "fish")
    assert source.content("photo") == ImageFolder(tree).content("photo")


def test_rows_are_in_an_order_that_does_not_depend_on_names(tree: Path) -> None:
    def images() -> list[tuple[int, bytes]]:
        return [(p.label, p.image.tobytes()) for p in ImageFolder(tree).pictures("photo") if p.image]

    before = images()
    for i, path in enumerate(sorted((tree / "photo").rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"renamed-{i}.png"))
    assert images() == before


def test_files_that_are_not_taken_for_images_are_reported(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (tree / "photo" / "cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    (tree / "photo" / "fish" / "0.png").rename(tree / "photo" / "fish" / "0")
    (tree / "photo" / "fish" / "1.png").rename(tree / "photo" / "fish" / "1.JFIF")
    (tree / "__MACOSX" / "car").mkdir(parents=True)
    shutil.copy(tree / "photo" / "car" / "0.png", tree / "__MACOSX" / "car")
    source = ImageFolder(tree)
    assert source.domains == ("cartoon", "photo")
    assert source.count("photo") == 7
    assert f"{tree}: ignored 5 files without an image extension: none, .heic" in caplog.text


def test_a_class_that_a_domain_lacks_keeps_its_number(tree: Path) -> None:
    shutil.rmtree(tree / "photo" / "car")
    assert {picture.label for picture in ImageFolder(tree).pictures("photo")} == {1, 2}


def test_broken_images_are_left_out_and_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"")
    data = (tree / "photo" / "fish" / "1.png").read_bytes()
    (tree / "photo" / "fish" / "1.png").write_bytes(data[: len(data) // 2])
    (tree / "photo" / "fish" / "notes.txt").write_text("not an image")
    (tree / "photo" / "fish" / "nowhere.png").symlink_to("nothing")
    (tree / "photo" / "fish" / "folder.png").mkdir()
    examples = open_features(Settings(data=f"folder:{tree}"), root=tree / "store", progress=False).examples("photo")
    assert examples.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert "photo: 3 of 13 images can't be read and are left out: photo/cat/0.png, photo/fish/1.png, " in caplog.text


def test_what_only_has_the_name_of_an_image_is_left_out_and_reported_in_one_line(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tree / "photo" / "cat"
    os.mkfifo(place / "pipe.png")
    (place / "zeros.png").symlink_to("/dev/zero")
    (place / "loop.png").symlink_to("loop.png")
    with (place / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    (place / "a\nb\x1b[2J.png").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(place) + b"/\xff.png")).write_bytes(b"")
    shutil.copy(place / "0.png", Path(os.fsdecode(os.fsencode(place) + b"/\xfe\n.png")))
    examples = open_features(Settings(data=f"folder:{tree}"), root=tree / "store", progress=False).examples("photo")
    assert len(examples.labels) == 13
    (line,) = [record.getMessage() for record in caplog.records if "can't be read" in record.getMessage()]
    assert line.startswith("photo: 6 of 19 images can't be read and are left out: ")
    assert line.isprintable()
    assert "photo/cat/a�b�[2J.png" in line


def test_links_that_lead_back_are_no_images_and_no_endless_way(tree: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tree / f"back-{number}").symlink_to("." if number % 2 else tree)
        (tree / "photo" / f"back-{number}").symlink_to("..")
    (tree / "photo" / "cat" / "back").symlink_to(".")
    assert (ImageFolder(tree).domains, ImageFolder(tree).class_names) == (("cartoon", "photo"), ("car", "cat", "fish"))
    flat = ImageFolder(tree / "photo")
    assert flat.count("photo") == 12
    empty = tmp_path / "empty"
    for one in range(12):
        (empty / str(one)).mkdir(parents=True)
        for other in range(12):
            (empty / str(one) / f"to-{other}").symlink_to(empty / str(other))
    with pytest.raises(UserError, match="no images"):
        ImageFolder(empty)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[2J", b" ", b"x\xe2\x80\xaey"])
@pytest.mark.parametrize("place", ["", "photo"])
def test_a_folder_whose_name_cannot_be_shown_is_refused(tree: Path, place: str, name: bytes) -> None:
    folder = tree / "photo" / "cat" if place else tree / "photo"
    shutil.copytree(folder, tree / place / os.fsdecode(name))
    with pytest.raises(UserError, match=f"a {'class' if place else 'domain'} is called .*plain characters") as error:
        open_source(f"folder:{tree}")
    assert str(error.value).isprintable()


def test_a_path_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        open_source(f"folder:{tmp_path / ('x' * 300)}")


def test_a_domain_of_broken_images_only_has_none(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (tree / "photo").rglob("*.png"):
        path.write_bytes(b"nothing")
    features = open_features(Settings(data=f"folder:{tree}"), root=tree / "store", progress=False)
    assert features.examples("photo").features.shape == (0, 128)
    assert features.examples("photo").labels.tolist() == []
    assert caplog.text.count("photo: none of the 12 images can't be read") == 0
    assert "photo: none of the 12 images can be read: photo/car/0.png, " in caplog.text
    assert ", …" in caplog.text


def test_the_content_is_that_of_the_images_wherever_they_are(tree: Path, tmp_path: Path) -> None:
    first = ImageFolder(tree).content("photo")
    copy = Path(shutil.copytree(tree, tmp_path / "copy"))
    assert ImageFolder(copy).content("photo") == first
    times = os.stat(copy / "photo" / "cat" / "0.png")
    swapped = (copy / "photo" / "cat" / "1.png").read_bytes()
    size = max(times.st_size, len(swapped))
    for name in ("0.png", "1.png"):  # as long as each other, with the old times put back
        path = copy / "photo" / "cat" / name
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    padded = ImageFolder(copy).content("photo")
    (copy / "photo" / "cat" / "0.png").write_bytes(swapped.ljust(size, b"\0"))
    os.utime(copy / "photo" / "cat" / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len({first, padded, ImageFolder(copy).content("photo")}) == 3


def test_the_content_hash_depends_on_class_numbers(tree: Path, tmp_path: Path) -> None:
    before = ImageFolder(tree).content("photo")
    (tree / "cartoon" / "bird").mkdir()
    shutil.copy(tree / "cartoon" / "cat" / "0.png", tree / "cartoon" / "bird")
    assert ImageFolder(tree).content("photo") != before


IO = OSError(errno.EIO, os.strerror(errno.EIO))


def image_of(tree: Path, name: str) -> Path:
    """An image with a name that no other one has."""
    return (tree / "photo" / "cat" / "0.png").rename(tree / "photo" / "cat" / name)


def labels(tree: Path) -> list[int]:
    features = open_features(Settings(data=f"folder:{tree}"), root=tree / "store", progress=False)
    return features.examples("photo").labels.tolist()


@pytest.mark.parametrize("after", [0, 1])
def test_an_image_that_cannot_be_read_for_a_moment_is_not_left_out(
    tree: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when its content is hashed, nor when it is encoded."""
    image_of(tree, "a.png")
    tries = failing(monkeypatch, "a.png", IO, after=after, times=2)
    assert labels(tree) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("error", "after"), [(IO, 0), (IO, 1), (FileNotFoundError(errno.ENOENT, "gone"), 1), (MemoryError(), 1)]
)
def test_one_that_cannot_be_read_at_all_now_is_an_error_and_nothing_is_lost(
    tree: Path, error: Exception, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error is, an image that could be read when the content was hashed is not left out."""
    path = image_of(tree, "a.png")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "a.png", error, after=after)
        with pytest.raises(ReadError, match=f"^{path} ") as raised:
            labels(tree)
    assert "\n" not in str(raised.value)
    assert not list((tree / "store").glob("*/given-*.safetensors"))
    assert labels(tree) == [0] * 4 + [1] * 4 + [2] * 4


def test_what_is_left_out_without_permission_is_encoded_once_it_may_be_read(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_of(tree, "a.png")
    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "a.png", PermissionError(errno.EACCES, "Permission denied"))
        meanwhile.setattr(os, "access", lambda path, *_, **__: Path(path).name != "a.png")
        assert labels(tree) == [0] * 4 + [1] * 3 + [2] * 4
    assert labels(tree) == [0] * 4 + [1] * 4 + [2] * 4


def test_images_that_are_not_those_whose_content_is_remembered_are_not_stored_under_it(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if their state does not show the change; the next call hashes them again."""
    monkeypatch.setenv("FEDCLIP_HOME", str(tree.parent / "home"))
    monkeypatch.setattr(content, "_facts", lambda _: "the same")
    path, other = image_of(tree, "a.png"), tree / "photo" / "cat" / "1.png"
    before = ImageFolder(tree).content("photo")
    path.write_bytes(other.read_bytes())
    source = ImageFolder(tree)
    with pytest.raises(ReadError, match=r"one of the images in .* has changed since it was first read"):
        list(source.pictures("photo"))
    again = ImageFolder(tree)
    assert again.content("photo") != before
    assert len(list(again.pictures("photo"))) == 12


def test_an_image_that_is_written_to_meanwhile_is_not_stored_under_its_old_content(tree: Path) -> None:
    path, other = image_of(tree, "a.png"), tree / "photo" / "cat" / "1.png"
    source = ImageFolder(tree)
    before, rows = source.content("photo"), source.pictures("photo")
    assert next(rows).image is not None
    path.write_bytes(other.read_bytes())
    with pytest.raises(ReadError, match=f"^{path} has changed since it .*: check that nothing writes to it"):
        list(rows)
    assert source.content("photo") == before
    assert ImageFolder(tree).content("photo") != before


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, "there is no such folder"),
        ((), "(.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff) there; expected domain/class/image"),
        (("photo/cat",), "only one class (cat) there"),
        (("",), "its images, such as x.png, are not in a class folder"),
        (("all/photo/cat",), "its images are too deep, such as all/photo/cat/x.png"),
        (("photo/cat", "photo"), "different depths, such as photo/x.png and photo/cat/x.png"),
    ],
)
def test_an_unusable_folder_gives_one_clear_message(tmp_path: Path, keep: tuple[str, ...] | None, message: str) -> None:
    root = tmp_path / "images"
    if keep is not None:
        root.mkdir()
        for folder in keep:
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(root / folder / "x.png")
    with pytest.raises(UserError) as error:
        open_source(f"folder:{root}")
    assert str(root) in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("closed", ["", "photo", "photo/cat"])
def test_a_folder_that_this_user_may_not_read_is_no_smaller_one(tree: Path, closed: str) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # every user may look in there
        Path(place).chmod(0o755)
        own = Path(shutil.copytree(tree, f"{place}/tree"))
        (own / closed).chmod(0)
        try:
            if user == 0:  # who may look into every folder
                os.seteuid(65534)
            with pytest.raises(UserError, match="this user may not read") as error:
                open_source(f"folder:{own}")
        finally:
            os.seteuid(user)
            (own / closed).chmod(0o700)
    assert str(own / closed) in str(error.value)


def test_columns_of_a_folder_of_images_are_refused(tree: Path) -> None:
    with pytest.raises(UserError, match=r"label-column: .* is a folder of images, not a data set"):
        open_source(f"folder:{tree}", Columns(label="class"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("drwan", "did you mean drawn"),
        ("office_home", "did you mean office-home"),
        ("some where", "expected drawn, drawn:SEED, pacs"),
        ("drawn:x", "expected a whole number"),
        ("drawn:-1", "expected a whole number"),
        ("drawn:9999999", "expected a seed"),
    ],
)
def test_unknown_data_is_refused(data: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        open_source(data)
    assert "\n" not in str(error.value)


def test_the_holdout_is_the_last_domain_by_default() -> None:
    domains = ("art", "photo", "sketch")
    assert pick_holdout("auto", domains) == "sketch"
    assert pick_holdout("art", domains) == "art"
    assert pick_holdout("", domains) is None
    assert pick_holdout("sketch + art", ("art", "photo", "sketch")) == "art+sketch"
    assert held_out("art+sketch", ("art", "photo", "sketch")) == ["art", "sketch"]
    assert held_out("art+deco", ("art", "art+deco", "deco")) == ["art+deco"]  # a domain's own name has a +
    assert held_out(None, domains) == []
    assert pick_holdout("auto", ("only",)) is None
    with pytest.raises(UserError, match="the data has art, photo, sketch"):
        pick_holdout("cartoon", domains)
    with pytest.raises(UserError, match="the only domain"):
        pick_holdout("only", ("only",))
    with pytest.raises(UserError, match="there is no cartoon; the data has art, photo, sketch"):
        pick_holdout("art+cartoon", domains)
    with pytest.raises(UserError, match="these are all domains, so nothing is left"):
        pick_holdout("sketch+photo+art", domains)
