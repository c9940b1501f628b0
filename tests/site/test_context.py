from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import PLACES, Settings
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.features import clip, encoding, models
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.recipes import learning_rate
from fedclip_flwr.site.context import SiteContext, in_simulation, open_context, settings_at
from fedclip_flwr.site.holdings import divide

NAMES = ("car", "cat", "fish")
TOLD = Vocabulary(NAMES, ("a {}",))


def site_context(
    tree: Path, node: dict[str, Any], holdout: str = "", simulated: bool = False, **run: Any
) -> SiteContext:
    return open_context({"data": f"folder:{tree}", "seed": 3, **run}, node, session(holdout=holdout), simulated)


def session(vocabulary: Vocabulary = TOLD, holdout: str = "", model: str = "") -> Session:
    return Session(holdout, vocabulary, model, "run-7")


@pytest.mark.parametrize("program", [None, "/bin/flwr-clientapp", "/data/default_worker.py"])
def test_a_process_is_a_real_sites_unless_ray_has_started_it(
    program: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not in_simulation()
    rays = find_spec("ray")
    assert rays
    assert rays.origin
    worker = Path(rays.origin).with_name("_private") / "workers" / "default_worker.py"
    assert worker.is_file(), "Ray starts its workers with another program: simulated sites would be taken for real ones"
    for path, simulated in ((program, False), (str(worker), True)):
        main = ModuleType("__main__")
        main.__file__ = path
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert in_simulation() == simulated


def test_a_simulated_site_holds_its_shard_split(tree: Path) -> None:
    """2 domains of 12 images over 3 sites: cartoon in two shards of 6, photo in one."""
    sites = [site_context(tree, {"partition-id": i, "num-partitions": 3}, simulated=True).site for i in range(3)]
    assert [(s.name, s.domain) for s in sites] == [
        ("cartoon-0", "cartoon"),
        ("photo-0", "photo"),
        ("cartoon-1", "cartoon"),
    ]
    assert [[len(p.labels) for p in (s.train, s.validation, s.test)] for s in sites] == [
        [3, 1, 1],
        [7, 2, 2],
        [3, 1, 1],
    ]
    assert sites[1].class_numbers == [0, 1, 2]


def test_no_site_holds_the_held_out_domain(tree: Path) -> None:
    sites = [site_context(tree, {"partition-id": i, "num-partitions": 2}, "photo", True).site for i in range(2)]
    assert {site.domain for site in sites} == {"cartoon"}


def test_a_site_with_data_of_its_own_holds_all_of_it_but_the_held_out_domain(tree: Path) -> None:
    node = {"site": "north", "data": f"folder:{tree}"}
    assert site_context(tree, node, data="drawn").site.domain == "cartoon+photo"
    own = site_context(tree, node, "photo", data="drawn").site
    assert (own.name, own.domain) == ("north", "cartoon")
    assert [len(p.labels) for p in (own.train, own.validation, own.test)] == [7, 2, 2]
    assert (own.train.features.norm(dim=1) > 10).all()  # as CLIP gives them


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"site": "north"}, "this site's data is not set"),
        ({"partition-id": 0, "num-partitions": 2}, "this site's data is not set"),
        ({"data": "folder:TREE"}, "has no name"),
        ({"data": "folder:/nowhere", "site": "north"}, "no such folder"),
        ({"data": "folder:TREE", "partition-id": 2, "num-partitions": 2}, "expected a number from 0"),
        ({"data": "folder:TREE", "site": "north", "device": "cuda:77"}, "device"),
        ({"data": "folder:TREE", "site": "north", "role": "chief"}, "expected one of train, holdout"),
        ({"data": "folder:TREE", "site": "north", "domains": "photo, x-ray"}, "no x-ray; it has cartoon, photo"),
    ],
)
def test_a_real_sites_error_says_what_its_owner_has_to_mend(tree: Path, node: dict[str, Any], expected: str) -> None:
    given = {key: str(tree).join(v.split("TREE")) if isinstance(v, str) else v for key, v in node.items()}
    with pytest.raises(UserError, match=expected):
        site_context(tree, given)


def test_device_and_precision_are_the_owners_choice(tree: Path) -> None:
    node = {"site": "north", "data": f"folder:{tree}", "device": "cpu", "precision": "bfloat16"}
    own = site_context(tree, node, device="cuda:3", precision="float32")
    assert (own.settings.device, own.settings.precision) == ("cpu", "bfloat16")
    assert own.device == torch.device("cpu")


def test_a_site_may_take_some_of_its_domains(tree: Path) -> None:
    node = {"site": "north", "data": f"folder:{tree}"}
    own = site_context(tree, {**node, "domains": "photo"}).site
    assert (own.domain, len(own.train.labels)) == ("photo", 7)
    assert site_context(tree, {**node, "domains": "cartoon,photo"}).site.domain == "cartoon+photo"


def test_a_holdout_site_tests_all_that_it_holds(tree: Path) -> None:
    node = {"site": "west", "data": f"folder:{tree}", "role": "holdout"}
    own = site_context(tree, node, "photo").site
    assert (own.role, own.domain) == ("holdout", "cartoon+photo")
    assert [len(p.labels) for p in (own.train, own.validation, own.test)] == [0, 0, 24]
    assert own.class_numbers == [0, 1, 2]


def test_the_held_out_domain_is_known_in_other_spellings(tree: Path) -> None:
    assert site_context(tree, {"site": "north", "data": f"folder:{tree}"}, "Photo").site.domain == "cartoon"


def test_where_the_server_has_no_images_a_site_needs_its_own(tree: Path) -> None:
    with pytest.raises(UserError, match="this site's data is not set"):
        site_context(tree, {"site": "north"}, data="none")
    own = site_context(tree, {"site": "north", "data": f"folder:{tree}"}, data="none")
    assert own.site.class_numbers == [0, 1, 2]


@pytest.mark.parametrize("place", PLACES)
def test_no_server_names_a_place_of_a_real_sites_machine(place: str) -> None:
    with pytest.raises(UserError, match="this site's data is not set"):
        settings_at({"data": f"{place}/etc"}, {"site": "north"})
    assert settings_at({"data": "drawn"}, {"site": "north", "data": f"{place}/own"}).data == f"{place}/own"


def test_a_site_that_encodes_in_slices_reports_all_its_images(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "PART", 5)
    monkeypatch.setenv("FEDCLIP_HOME", str(tree.parent / "home"))
    (tree / "photo" / "cat" / "0.png").write_bytes(b"no picture")
    found = []
    for _ in range(9):
        try:
            with encoding.at_most(0):
                own = site_context(tree, {"site": "north", "data": f"folder:{tree}"}, seed=71).site
                break
        except encoding.UnfinishedError as error:
            found.append((error.done, error.of))
    assert found == [(5, 24), (10, 24), (17, 24), (22, 24)]  # a domain's last batch needs no more time
    assert len(own.train.labels) == 13


def test_a_site_whose_images_are_all_held_out_is_refused(tree: Path) -> None:
    for picture in (tree / "photo").rglob("*.png"):
        picture.unlink()
    with pytest.raises(UserError, match="all images of this site belong to cartoon"):
        site_context(tree, {"data": f"folder:{tree}", "site": "north"}, "cartoon")


def test_a_site_numbers_its_classes_as_the_server_does(tree: Path) -> None:
    """The server knows more classes, in another order."""
    shutil.rmtree(tree / "photo" / "car")
    shutil.rmtree(tree / "cartoon")
    vocabulary = Vocabulary(("zebra", "fish", "dog", "cat"), ("a {}",))
    node = {"site": "north", "data": f"folder:{tree}"}
    own = open_context({}, node, session(vocabulary), False)
    assert own.site.class_numbers == [1, 3]
    assert own.features.vocabulary == vocabulary
    assert own.classes.text.shape == (4, 128)


def test_classes_that_the_server_does_not_know_are_named(tree: Path) -> None:
    node = {"site": "north", "data": f"folder:{tree}"}
    with pytest.raises(UserError, match="classes that the run does not know: car, fish"):
        open_context({}, node, session(Vocabulary(("cat", "dog"), ("a {}",))), False)


@pytest.mark.parametrize("names", ["car,cat", "car,cat,dog,bird"])
def test_classes_that_the_servers_list_lacks_are_named_in_a_sites_words(tree: Path, names: str) -> None:
    node = {"site": "north", "data": f"folder:{tree}"}
    with pytest.raises(UserError, match="classes that the run does not know: fish"):
        open_context({"class-names": names}, node, session(Vocabulary(tuple(names.split(",")), ("a {}",))), False)


def test_a_file_of_class_names_is_the_servers_and_no_sites(tree: Path) -> None:
    run = {"class-names": "/server/names.txt"}
    own = open_context(run, {"site": "north", "data": f"folder:{tree}"}, session(), False)
    assert own.features.vocabulary.class_names == NAMES


def test_columns_are_those_of_the_servers_data(tree: Path) -> None:
    node = {"site": "north", "data": f"folder:{tree}"}
    assert open_context({"label-column": "fine"}, node, session(), False).site.class_numbers == [0, 1, 2]
    with pytest.raises(UserError, match="label-column"):
        open_context({}, {**node, "label-column": "fine"}, session(), False)


def test_another_model_than_the_servers_is_refused(tree: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models.BUNDLED, tmp_path / "clip")
    node = {"site": "north", "data": f"folder:{tree}", "model": str(model)}
    own = open_context({"model": "openai/clip", "model-revision": "abc"}, node, session(), False)
    content = own.features.model_content
    assert content
    own.require_same_model()
    replace(own, session=session(model=content)).require_same_model()
    with pytest.raises(UserError, match="differs from the server's"):
        replace(own, session=session(model="0123")).require_same_model()


def test_a_site_with_one_image_trains_on_it(tree: Path) -> None:
    for picture in (tree / "photo").rglob("*.png"):
        if picture.parent.name != "cat" or picture.name != "0.png":
            picture.unlink()
    sites = [site_context(tree, {"partition-id": i, "num-partitions": 2}, simulated=True).site for i in range(2)]
    assert [[len(p.labels) for p in (s.train, s.validation, s.test)] for s in sites] == [[7, 2, 2], [1, 0, 0]]
    assert sites[1].train.labels.tolist() == [1]


def test_a_site_whose_images_are_all_broken_has_none(tree: Path) -> None:
    for picture in (tree / "photo").rglob("*.png"):
        picture.write_bytes(b"no picture")
    own = site_context(tree, {"partition-id": 1, "num-partitions": 2}, simulated=True).site
    assert [len(p.labels) for p in (own.train, own.validation, own.test)] == [0, 0, 0]


def test_sites_of_another_partition_hold_rows_of_all_domains(tree: Path) -> None:
    node = {"partition-id": 1, "num-partitions": 2}
    own = site_context(tree, node, simulated=True, partition="iid").site
    assert (own.name, own.domain) == ("site-1", "cartoon+photo")
    assert [len(p.labels) for p in (own.train, own.validation, own.test)] == [7, 2, 2]


def test_the_settings_of_the_run_are_those_of_the_context(tree: Path) -> None:
    own = site_context(tree, {"partition-id": 0, "num-partitions": 1}, simulated=True, adapter="scale")
    assert own.settings == Settings(data=f"folder:{tree}", seed=3, adapter="scale")


def test_sites_split_equally_many_images_each_in_its_own_way() -> None:
    examples = Examples(torch.eye(50), torch.arange(50))
    first, again, other = (divide(name, "photo", examples, 0).train.labels.tolist() for name in ("a", "a", "b"))
    assert first == again
    assert sorted(first) != sorted(other)


def test_the_learning_rate_is_that_for_the_steps_of_an_epoch_unless_one_is_given() -> None:
    """33 images are two steps, which are as large as ten together."""
    assert learning_rate(Settings(), 512, 33) == pytest.approx(5 * learning_rate(Settings(), 512, 320))
    assert learning_rate(Settings(learning_rate=0.5), 512, 33) == 0.5


def test_a_site_imports_no_plug_in_that_its_owner_has_not_installed_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nasty.py").write_text(f"open({str(tmp_path / 'here')!r}, 'w')\nthing = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"site": "north", "data": "drawn"}
    for key in ("adapter", "codec"):
        with pytest.raises(UserError, match="nasty is not allowed as a plug-in on this machine"):
            settings_at({key: "nasty:thing"}, node)
        assert not (tmp_path / "here").exists()
        with pytest.raises(UserError, match=f"{key} = 'nasty:thing': expected a"):
            settings_at({key: "nasty:thing"}, node, simulated=True)  # its user started this machine's simulation
        (tmp_path / "here").unlink()
        del sys.modules["nasty"]
    assert settings_at({"strategy": "nasty:thing"}, node).strategy == "nasty:thing"  # which is the server's
    assert not (tmp_path / "here").exists()


def test_a_site_that_hides_as_a_whole_takes_part_in_no_run_that_hides_single_images() -> None:
    run = Settings().as_run_config() | {"method": "one-round", "dp": "local", "dp-unit": "image", "epsilon": 20.0}
    node: dict[str, Any] = {"site": "north", "data": "drawn"}
    with pytest.raises(UserError, match="hides this site as a whole, but the run's noise hides single images"):
        settings_at(run, {**node, "dp": "local", "noise-multiplier": 1.0})
    assert settings_at(run, {**node, "epsilon": 20.0}).hides_images


@pytest.mark.parametrize(
    ("own", "delta", "problem"),
    [
        ({"epsilon": 1.0}, 1e-5, ""),
        (
            {"epsilon": 1.0},
            0.5,
            "runs with delta of at most 1e-05, this one has 0.5: set delta=1e-05 for the run, or a",
        ),
        ({"epsilon": 1.0, "delta": 1e-6}, 1e-5, "runs with delta of at most 1e-06, this one has 1e-05"),
        ({"epsilon": 1.0, "delta": 1e-4}, 1e-4, ""),
        ({"delta": 1e-4}, 1e-5, "delta in the node config needs epsilon there"),
        ({"epsilon": 1.0, "delta": "small"}, 1e-5, "delta = 'small' in the node config: expected a number above 0"),
        ({"epsilon": 1.0, "delta": 0}, 1e-5, "delta = 0 in the node config: expected a number above 0 and below 1"),
        ({"epsilon": float("nan")}, 1e-5, "epsilon = nan in the node config: expected a number above 0"),
    ],
)
def test_a_sites_owner_sets_the_largest_delta_beside_epsilon(own: dict[str, Any], delta: float, problem: str) -> None:
    run = Settings(method="one-round", dp="local", dp_unit="image", epsilon=1.0, delta=delta).as_run_config()
    node = {"site": "north", "data": "drawn", **own}
    if not problem:
        assert settings_at(run, node).delta == delta
        return
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        settings_at(run, node)
    assert "\n" not in str(error.value)


def test_no_server_names_a_source_for_a_real_site() -> None:
    with pytest.raises(UserError, match="this site's data is not set"):
        settings_at({"data": "nasty:thing:/etc"}, {"site": "north"})
