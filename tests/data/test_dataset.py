from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import ReadError, UserError
from fedclip_flwr.data.base import Columns
from fedclip_flwr.data.dataset import DataSet
from fedclip_flwr.data.folder import ImageFolder
from fedclip_flwr.data.opening import open_source
from tests.failing import failing

CLASSES = ["fish", "car", "cat"]


def table(tree: Path, **changes: Any) -> datasets.Dataset:
    """The images of the tree as a data set, in an order of its own; `changes` replace columns (None: left out)."""
    paths = sorted(tree.rglob("*.png"), key=lambda path: path.name)
    columns: dict[str, Any] = {
        "id": list(range(len(paths))),
        "domain": [path.parts[-3] for path in paths],
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [CLASSES.index(path.parts[-2]) for path in paths],
    }
    columns = {name: values for name, values in {**columns, **changes}.items() if values is not None}
    made = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        made = made.cast_column("image", datasets.Image())
    if columns.get("label") and isinstance(columns["label"][0], int):
        made = made.cast_column("label", datasets.ClassLabel(names=CLASSES))
    return made


def save_to_disk(made: datasets.Dataset, folder: Path) -> None:
    made.save_to_disk(str(folder))


def splits_to_disk(made: datasets.Dataset, folder: Path) -> None:
    halves = made.train_test_split(0.5, seed=1)
    halves["unlabelled"] = made.remove_columns(["label"])
    halves.save_to_disk(str(folder))


def parquet(made: datasets.Dataset, folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    made.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))


@pytest.mark.parametrize("write", [save_to_disk, splits_to_disk, parquet])
def test_a_data_set_is_the_same_as_a_folder_of_its_images(
    write: Callable[[datasets.Dataset, Path], None], tree: Path, tmp_path: Path
) -> None:
    (tree / "photo" / "cat" / "0.png").write_bytes(b"no picture")
    write(table(tree), tmp_path / "set")
    (found, _), folder = open_source(f"folder:{tmp_path / 'set'}"), ImageFolder(tree)
    assert isinstance(found, DataSet)
    assert found.domains == folder.domains
    assert found.class_names == folder.class_names == ("car", "cat", "fish")
    for domain in folder.domains:
        assert found.count(domain) == 12
        assert found.content(domain) == folder.content(domain)
        pairs = zip(found.pictures(domain), folder.pictures(domain), strict=True)
        for one, other in pairs:
            assert one.label == other.label
            assert one.image == other.image
    assert [p.name[:4] for p in found.pictures("photo") if p.image is None] == ["row "]


def test_images_with_a_file_that_describes_them(tree: Path, tmp_path: Path) -> None:
    lines = []
    for i, path in enumerate(sorted(tree.rglob("*.png"))):
        shutil.copy(path, tmp_path / f"{i}.png")
        facts = {"file_name": f"{i}.png", "domain": path.parts[-3], "category": path.parts[-2]}
        lines.append(json.dumps(facts) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    source, _ = open_source(f"folder:{tmp_path}")
    assert source.domains == ("cartoon", "photo")
    assert source.content("photo") == ImageFolder(tree).content("photo")


@pytest.mark.parametrize("name", ["../elsewhere.png", "{}/elsewhere.png", "inner/../../elsewhere.png"])
def test_an_image_outside_the_data_set_is_refused(tree: Path, tmp_path: Path, name: str) -> None:
    """CVE-2026-66007: `datasets` before 5.0.1 opens it, and later ones refuse it themselves."""
    (tmp_path / "set").mkdir()
    for number, path in enumerate(sorted(tree.rglob("*.png"))[:2]):
        shutil.copy(path, tmp_path / "set" / f"{number}.png")
        shutil.copy(path, tmp_path / "elsewhere.png")
    rows = f"file_name,label\n0.png,cat\n1.png,car\n{name.format(tmp_path)},car\n"
    (tmp_path / "set" / "metadata.csv").write_text(rows)
    with pytest.raises(UserError, match=r"row 2 names an image outside the data set|Invalid metadata file_name"):
        DataSet(tmp_path / "set", "set")


def test_a_table_may_not_name_images_outside_the_data_set(tree: Path, tmp_path: Path) -> None:
    """Every version of `datasets` opens these."""
    inside, outside = sorted(tree.rglob("*.png"))[:2]
    (tmp_path / "set").mkdir()
    shutil.copy(inside, tmp_path / "set" / "0.png")
    images = [{"bytes": None, "path": str(path)} for path in (tmp_path / "set" / "0.png", outside)]
    kinds = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": images, "label": ["cat", "car"]}, features=kinds)
    pyarrow.parquet.write_table(made.data.table, tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=f"row 1 names an image outside the data set: {outside}"):
        DataSet(tmp_path / "set", "set")


@pytest.fixture
def elsewhere(tree: Path, tmp_path: Path) -> Path:
    """A table that is none of the data set's business, with two images in it."""
    rows = [{"image": {"bytes": path.read_bytes(), "path": None}} for path in sorted(tree.rglob("*.png"))[:2]]
    made = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    made = made.add_column("label", ["cat", "car"])
    made.to_parquet(tmp_path / "elsewhere" / "private.parquet")
    made.save_to_disk(tmp_path / "elsewhere" / "saved")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["../elsewhere/private.parquet", "{}/private.parquet", "file://{}/private.parquet"])
def test_a_data_set_may_not_name_files_outside_it(elsewhere: Path, name: str) -> None:
    root = elsewhere.parent / "set"
    root.mkdir()
    files = f"configs:\n- config_name: default\n  data_files: {name.format(elsewhere)}\n"
    (root / "README.md").write_text(f"---\n{files}---\n")
    with pytest.raises(UserError, match="names a file outside the data set"):
        DataSet(root, "set")


def test_a_saved_data_set_may_not_name_files_outside_it(elsewhere: Path) -> None:
    root = elsewhere.parent / "set"
    shutil.copytree(elsewhere / "saved", root)
    (file,) = root.glob("*.arrow")
    file.unlink()
    state = json.loads((root / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../elsewhere/saved/{file.name}"}]
    (root / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="names a file outside the data set"):
        DataSet(root, "set")


def test_a_data_set_may_be_a_link(elsewhere: Path) -> None:
    (elsewhere / "link").symlink_to(elsewhere / "saved")
    (elsewhere / "tables").mkdir()
    (elsewhere / "tables" / "train.parquet").symlink_to(elsewhere / "private.parquet")
    (elsewhere / "other-link").symlink_to(elsewhere / "tables")
    for name in ("link", "other-link"):
        assert DataSet(elsewhere / name, "set").class_names == ("car", "cat")


RUNS = "{{ cycler.__init__.__globals__.os.mkdir('%s') }}"
"""A template that Jinja renders by making a folder."""


def test_references_to_files_elsewhere_are_refused_and_run_no_code(tmp_path: Path) -> None:
    """CVE-2026-104851: fsspec before 2026.6 renders the templates in them."""
    made = {"key": RUNS % (tmp_path / "ran"), "url": "x", "dimensions": {"i": [1]}}
    (tmp_path / "refs.json").write_text(json.dumps({"version": 1, "templates": {}, "gen": [made], "refs": {}}))
    for number, chain in enumerate(("reference://data.csv::", "simplecache::reference://data.csv::")):
        root = tmp_path / f"set-{number}"
        root.mkdir()
        files = f"configs:\n- config_name: default\n  data_files: {chain}file://{tmp_path}/refs.json\n"
        (root / "README.md").write_text(f"---\n{files}---\n")
        (root / "metadata.csv").write_text("file_name,label\n")
        with pytest.raises(UserError, match="may run code"):
            DataSet(root, "set")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("after", [0, 1])
def test_an_image_of_a_data_set_that_cannot_be_read_now_is_an_error_and_nothing_is_lost(
    tree: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((tree / "photo").rglob("*.png"))
    lines = [json.dumps({"file_name": f"{i}.png", "label": path.parent.name}) for i, path in enumerate(paths)]
    for i, path in enumerate(paths):
        shutil.copy(path, tree / f"{i}.png")
    shutil.rmtree(tree / "cartoon")
    shutil.rmtree(tree / "photo")
    (tree / "metadata.jsonl").write_text("\n".join(lines))

    def images() -> list[bytes]:
        return [picture.image.tobytes() for picture in DataSet(tree, "tree").pictures("tree") if picture.image]

    with monkeypatch.context() as meanwhile:
        failing(meanwhile, "7.png", OSError(errno.ESTALE, "Stale file handle"), after=after)
        with pytest.raises(ReadError, match=r"7.png can't be read now"):
            images()
    assert len(images()) == 12
    monkeypatch.setenv("FEDCLIP_HOME", str(tree.parent / "home"))
    monkeypatch.setattr(content, "_facts", lambda _: "the same")
    assert len(images()) == 12
    shutil.copy(tree / "6.png", tree / "7.png")
    with pytest.raises(ReadError, match=r"one of the images in .* has changed since it was first read"):
        images()
    assert len(images()) == 12


def opened(made: datasets.Dataset, tmp_path: Path, columns: Columns = Columns()) -> DataSet:  # noqa: B008
    save_to_disk(made, tmp_path / "set")
    return DataSet(tmp_path / "set", "some/set", columns)


def test_labels_may_be_words_and_without_a_domain_there_is_one(tree: Path, tmp_path: Path) -> None:
    words = [path.parent.name for path in sorted(tree.rglob("*.png"), key=lambda path: path.name)]
    found = opened(table(tree, label=None, category=words, domain=None), tmp_path)
    assert found.class_names == ("car", "cat", "fish")
    assert found.domains == ("set",)
    assert found.count("set") == 24


def test_domains_may_be_classes_and_labels_numbers(tree: Path, tmp_path: Path) -> None:
    made = table(tree, label=None, target=[i % 3 for i in range(24)])
    found = opened(made.class_encode_column("domain"), tmp_path)
    assert found.class_names == ("0", "1", "2")
    assert found.domains == ("cartoon", "photo")


def test_rows_without_a_label_are_left_out(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = opened(table(tree, label=[-1, None] * 11 + [0, 1]), tmp_path)
    assert sum(found.count(domain) for domain in found.domains) == 2
    assert "data = 'some/set': 22 rows without a label or a domain are left out" in caplog.text
    assert found.class_names == ("car", "cat", "fish")


def test_columns_that_are_named_are_taken(tree: Path, tmp_path: Path) -> None:
    made = table(tree, style=["x", "y"] * 12, fine=["p", "q", "r"] * 8)
    found = opened(made, tmp_path, Columns("image", "fine", "style"))
    assert (found.domains, found.class_names) == (("x", "y"), ("p", "q", "r"))


@pytest.mark.parametrize(
    ("changes", "columns", "expected"),
    [
        ({"image": None}, Columns(), "no column of images is found; name it with image-column: there are id (int64)"),
        ({"label": None}, Columns(), "no column of labels is found"),
        ({}, Columns(image="label"), "image-column = 'label': no such column of images"),
        (
            {},
            Columns(label="colour"),
            "label-column = 'colour': no such column of labels; there are id",
        ),
        ({}, Columns(domain="image"), "domain-column = 'image'"),
        ({"label": ["one"] * 24}, Columns(), "only one class"),
        ({"label": [-1] * 24}, Columns(), "no row has an image and a label"),
    ],
)
def test_unusable_columns_are_reported(
    changes: dict[str, Any], columns: Columns, expected: str, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        opened(table(tree, **changes), tmp_path, columns)
    assert str(error.value).startswith("data = 'some/set': ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_data_set_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="can't be read as a data set") as error:
        open_source(f"folder:{tmp_path}")
    assert "\n" not in str(error.value)


def test_what_datasets_could_not_read_is_said_and_not_only_that_it_could_not(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "cat"}\n{"file_name": 7, "label": 1}\n')
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read as a data set") as error:
        open_source(f"folder:{tmp_path}")
    assert "An error occurred" not in str(error.value)
    assert "\n" not in str(error.value)


AGAIN = """
import sys
from fedclip_flwr.data import open_source
source, _ = open_source("folder:" + sys.argv[1])
print(source.domains, source.class_names, source.content("photo"), source.count("photo"))
print([name for name in ("datasets", "pyarrow", "pandas") if name in sys.modules])
"""


def test_a_data_set_that_is_known_is_not_opened_again(tree: Path, tmp_path: Path) -> None:
    save_to_disk(table(tree), tmp_path / "set")
    source, _ = open_source(f"folder:{tmp_path / 'set'}")
    before = f"{source.domains} {source.class_names} {source.content('photo')} {source.count('photo')}"
    done = subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "set")], capture_output=True, text=True)
    assert done.stdout.splitlines() == [before, "[]"], done.stderr
    shutil.rmtree(tmp_path / "set")
    save_to_disk(table(tree, domain=["photo"] * 24), tmp_path / "set")
    assert open_source(f"folder:{tmp_path / 'set'}")[0].domains == ("photo",)


def in_cache(name: str, made: datasets.Dataset, parts: int = 1) -> Path:
    """The data set as the hub's cache would hold it."""
    import huggingface_hub.constants

    root = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    data = root / "snapshots" / "abc" / "data"
    data.mkdir(parents=True)
    for i in range(parts):
        made.shard(parts, i).to_parquet(str(data / f"train-{i:05}-of-{parts:05}.parquet"))
    return data


def test_a_data_set_of_the_hub_is_found_offline_in_its_cache(tree: Path) -> None:
    in_cache("some/animals", table(tree), parts=2)
    source, _ = open_source("some/animals")
    assert source.domains == ("cartoon", "photo")
    assert source.content("photo") == ImageFolder(tree).content("photo")


def test_one_that_is_half_downloaded_is_reported(tree: Path) -> None:
    data = in_cache("some/half", table(tree), parts=2)
    (data / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"lacks train-00001-of-00002.parquet; .*--repo-type dataset some/half"):
        open_source("some/half")


def test_one_that_cannot_be_had_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match="run `hf download --repo-type dataset some/none`, or do so where") as error:
        open_source("some/none")
    assert str(error.value).startswith(
        "data = 'some/none': neither a folder here nor in the Hugging Face cache, and downloads are disabled"
    )
    assert "\n" not in str(error.value)


def test_labels_are_numbers_of_the_sorted_names(tree: Path, tmp_path: Path) -> None:
    labels = [picture.label for picture in opened(table(tree), tmp_path).pictures("photo")]
    assert torch.bincount(torch.tensor(labels)).tolist() == [4, 4, 4]
    assert labels == sorted(labels)
