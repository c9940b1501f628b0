from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest

from fedclip_flwr.base import files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.data.drawn import CLASSES, picture
from fedclip_flwr.data.holdout import pick_holdout
from fedclip_flwr.data.opening import open_source
from fedclip_flwr.data.presets import PRESETS, fitting
from fedclip_flwr.experiments.simulate import make_sites
from fedclip_flwr.features.opening import open_features
from tests.data.test_dataset import in_cache


def tree_of(preset: str, root: Path, spelling: dict[str, str] | None = None) -> Path:
    """Pictures in the domains and classes of the preset, two of each."""
    for i, domain in enumerate(PRESETS[preset].domains):
        for j, label in enumerate(PRESETS[preset].class_names):
            folder = root / (spelling or {}).get(domain, domain) / (spelling or {}).get(label, label)
            folder.mkdir(parents=True)
            for k in range(2):
                picture(i, "photo", CLASSES[j % 10], 1000 * j + k)[0].save(folder / f"{k}.png")
    return root


def as_dataset(tree: Path, names: list[str]) -> datasets.Dataset:
    paths = list(tree.rglob("*.png"))
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "domain": [path.parts[-3] for path in paths],
        "label": [names.index(path.parts[-2]) for path in paths],
    }
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return made.cast_column("label", datasets.ClassLabel(names=names))


def test_pacs_from_the_hub_and_from_a_folder_are_divided_in_the_same_way(tmp_path: Path) -> None:
    tree = tree_of("pacs", tmp_path / "PACS")
    made = as_dataset(tree, list(PRESETS["pacs"].class_names)).shuffle(seed=3)
    in_cache("flwrlabs/pacs", made)
    folder = tree.rename(tmp_path / "unpacked")
    for domain, spelt in (("art_painting", "Art Painting"), ("sketch", "Sketch")):
        (folder / domain).rename(folder / spelt)
    both = [open_features(Settings(data=data), progress=False) for data in ("pacs", f"folder:{folder}")]
    for features in both:
        assert features.domains == ("art_painting", "cartoon", "photo", "sketch")
        assert features.vocabulary == (PRESETS["pacs"].class_names, ("a picture of a {}",))
    (sites, unseen), (others, again) = (make_sites(features, sites=4, seed=5) for features in both)
    assert [site.name for site in sites] == ["art_painting-0", "art_painting-1", "cartoon-0", "photo-0"]
    for one, other in zip(sites, others, strict=True):
        assert one.name == other.name
        for part in ("train", "validation", "test"):
            mine, theirs = getattr(one, part), getattr(other, part)
            assert mine.features.equal(theirs.features)
            assert mine.labels.equal(theirs.labels)
    assert unseen["sketch"].features.equal(again["sketch"].features)
    shutil.rmtree(in_cache("flwrlabs/pacs", made).parent.parent.parent)


def test_a_preset_that_cannot_be_had_says_what_to_do(fedclip_home: Path) -> None:
    with pytest.raises(UserError) as error:
        open_source("pacs")
    answer = str(error.value)
    assert answer.startswith("data = 'pacs': ")
    assert "hf download --repo-type dataset flwrlabs/pacs" in answer
    assert f"put its tree domain/class/image into {fedclip_home}/data/pacs, or give data=folder:PATH" in answer
    assert "\n" not in answer
    with pytest.raises(UserError, match="data = 'vlcs': the hub does not have it; put its tree"):
        open_source("vlcs")


@pytest.mark.parametrize("name", PRESETS)
def test_a_tree_in_its_place_is_found_by_the_presets_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    spelling = {"Real_World": "Real World", "Alarm_Clock": "Alarm Clock", "SUN09": "sun", "art_painting": "art"}
    tree_of(name, files.home() / "data" / name, spelling)
    source, preset = open_source(name)
    assert preset is PRESETS[name]
    assert source.domains == tuple(sorted(preset.domains))
    assert source.class_names == preset.class_names
    domain = source.domains[-1]
    assert source.count(domain) == 2 * len(preset.class_names) == len(list(source.pictures(domain)))
    if name == "office-home":
        assert pick_holdout("real world", source.domains) == "Real_World"


def test_other_images_under_a_presets_name_are_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path))
    shutil.copytree(tree, tmp_path / "data" / "pacs")
    with pytest.raises(
        UserError, match=r"expected the domains art_painting, cartoon, .* found cartoon, photo with car"
    ):
        open_source("pacs")


def test_a_preset_is_known_by_all_its_classes_and_some_of_its_domains() -> None:
    names = PRESETS["pacs"].class_names
    assert fitting(["Sketch", "art painting"], names) is PRESETS["pacs"]
    assert fitting(["sketch"], names[1:]) is None
    assert fitting(["sketch", "clipart"], names) is None
    assert fitting(["sketch", "Sketch"], names) is None
    assert fitting(["sketch"], [*names, "Dog"]) is None
    assert all(list(preset.class_names) == sorted(preset.class_names) for preset in PRESETS.values())
