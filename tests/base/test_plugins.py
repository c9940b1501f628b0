"""Adapters, sources, codecs and strategies of other packages: found by name, and imported only if that is allowed."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclip_flwr.base import Settings, UserError, plugins
from fedclip_flwr.base.plugins import ALLOWED, GROUPS, load
from fedclip_flwr.base.settings import place_of

CODE = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\ndef thing(): return 1\nfigure = 7\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with the package `addon`: its module `addon.parts` notes that it was imported."""
    (tmp_path / "addon").mkdir()
    (tmp_path / "addon/__init__.py").write_text("")
    (tmp_path / "addon/parts.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(ALLOWED, raising=False)
    plugins.declared.cache_clear()
    yield tmp_path
    plugins.declared.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "addon"]:
        del sys.modules[name]


def declare(folder: Path, kind: str, name: str = "short", what: str = "addon.parts:thing") -> None:
    about = folder / "addon-1.5.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: addon\nVersion: 1.5\n")
    (about / "top_level.txt").write_text("addon\n")
    (about / "entry_points.txt").write_text(f"[{GROUPS[kind]}]\n{name} = {what}\n")
    plugins.declared.cache_clear()


def loaded(name: str, *, chosen: bool = False) -> object:
    return load("codec", name, {"own": 0}, lambda found: found != 7, "anything but 7", chosen)


def test_a_name_of_ours_needs_no_plug_in(installed: Path) -> None:
    declare(installed, "codec", "own")
    assert loaded("own") == 0


def test_what_this_machines_user_names_is_imported(installed: Path) -> None:
    assert callable(loaded("addon.parts:thing", chosen=True))


def test_what_another_names_is_not_imported(installed: Path) -> None:
    with pytest.raises(
        UserError, match=rf"codec = 'addon.parts:thing': addon is not allowed as a plug-in on this.*{ALLOWED}=addon"
    ):
        loaded("addon.parts:thing")
    assert not (installed / "addon/imported").exists()


def test_but_it_is_if_the_owner_lists_its_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "other, addon")
    assert callable(loaded("addon.parts:thing"))


def test_or_if_its_package_declares_it_for_that_setting(installed: Path) -> None:
    declare(installed, "codec", what="addon.parts:figure")
    with pytest.raises(UserError, match="addon is not allowed"):
        loaded("addon.parts:thing")
    declare(installed, "adapter")
    with pytest.raises(UserError, match="addon is not allowed"):
        loaded("addon.parts:thing")
    assert not (installed / "addon/imported").exists()
    declare(installed, "codec")
    assert callable(loaded("addon.parts:thing"))


def test_or_if_it_is_imported_already(installed: Path) -> None:
    import addon.parts as parts  # type: ignore[import-not-found]

    assert loaded("addon.parts:thing") is parts.thing


def test_a_module_that_is_imported_is_not_asked_for_what_it_would_import(installed: Path) -> None:
    (installed / "addon/lazy.py").write_text("def __getattr__(name): raise SystemExit(name)")
    import addon.lazy  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(UserError, match="addon is not allowed"):
        loaded("addon.lazy:thing")


def test_an_entry_point_is_a_short_name(installed: Path) -> None:
    declare(installed, "codec")
    assert callable(loaded("short"))
    with pytest.raises(UserError, match="strategy = 'short': expected one of mine, an installed plug-in, or package"):
        load("strategy", "short", {"mine": 1}, callable, "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("addon.parts:gone", "addon.parts has no gone"),
        ("addon.none:thing", "no module named 'addon.none': install its package here"),
        ("nowhere:thing", "no module named 'nowhere': install its package here"),
        ("addon.parts:figure", "expected anything but 7"),
        ("addon.broken:thing", r"addon.broken can't be imported \(no\)"),
        ("addon.lacking:thing", r"addon.lacking can't be imported \(.*has no attribute 'gone'\)"),
        ("addon.leaving:thing", r"addon.leaving can't be imported \(4\)"),
        ("addon.parts", "expected one of own, an installed plug-in, or package.module:Name"),
        ("os;x:thing", "expected one of own"),
    ],
)
def test_what_can_not_be_used_is_one_line(installed: Path, name: str, expected: str) -> None:
    (installed / "addon/broken.py").write_text("raise OSError('no')")
    (installed / "addon/lacking.py").write_text("import os; os.gone")
    (installed / "addon/leaving.py").write_text("raise SystemExit(4)")
    with pytest.raises(UserError, match=f"^codec = '{name}': {expected}") as raised:
        loaded(name, chosen=True)
    assert "\n" not in str(raised.value)


def test_a_plug_in_is_known_by_reference_version_and_content(installed: Path) -> None:
    def described() -> str:
        (found,) = plugins.packages({"codec": "addon.parts:thing"})
        return found

    name, *version, _ = without = described().split()
    assert (name, version) == ("addon.parts:thing", ["without", "a", "version"])
    declare(installed, "codec")
    with_version = described()
    assert with_version.split() == ["addon.parts:thing", "1.5", without[-1]]
    assert plugins.packages({"codec": "short"}) == [with_version]
    other = with_version.replace("thing", "figure")
    assert plugins.packages({"codec": "short", "adapter": "addon.parts:figure"}) == [other, with_version]
    (installed / "addon/__pycache__").mkdir(exist_ok=True)
    (installed / "addon/__pycache__/more.pyc").write_bytes(b"compiled")
    assert described() == with_version
    (installed / "addon/table.csv").write_text("1")
    assert described() != with_version


def test_a_package_in_an_archive_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(installed / "packed.zip", "w") as archive:
        archive.writestr("packed/__init__.py", "thing = 1")
    monkeypatch.syspath_prepend(str(installed / "packed.zip"))
    with pytest.raises(UserError, match="packed is no file or folder: install the plug-in's package unpacked"):
        plugins.packages({"codec": "packed:thing"})


def test_a_module_alone_is_a_package_too(installed: Path) -> None:
    (installed / "alone.py").write_text("thing = 1")
    (first,) = plugins.packages({"codec": "alone:thing"})
    (installed / "alone.py").write_text("thing = 22")
    (second,) = plugins.packages({"codec": "alone:thing"})
    assert first.startswith("alone:thing without a version ")
    assert first != second


def test_a_package_that_is_missing_is_named(installed: Path) -> None:
    with pytest.raises(UserError, match="no module named 'nowhere'"):
        plugins.packages({"codec": "nowhere:thing"})


@pytest.mark.parametrize("key", ["adapter", "codec", "strategy"])
def test_settings_take_a_plug_in_by_either_name(installed: Path, key: str) -> None:
    declare(installed, key)
    for name in ("addon.parts:thing", "short"):
        assert Settings.from_run_config({key: name}).as_run_config()[key] == name
    with pytest.raises(UserError, match=f"{key} = 'shorter': expected one of .*, an installed plug-in, or package.mod"):
        Settings.from_run_config({key: "shorter"})
    with pytest.raises(UserError, match=r"recipe = 'addon.parts:thing': expected one of default, paper$"):
        Settings.from_run_config({"recipe": "addon.parts:thing"})


def test_settings_know_the_packages_that_server_and_sites_share(installed: Path) -> None:
    declare(installed, "codec")
    settings = Settings(codec="short", adapter="addon.parts:thing", strategy="addon.parts:thing", data="drawn:5")
    (package,) = settings.shared_packages
    assert package.startswith("addon.parts:thing 1.5 ")
    assert settings.packages("data") == []
    assert Settings(strategy="addon.parts:thing").shared_packages == []
    assert Settings(method="full-model", adapter="addon.parts:thing").shared_packages == []
    assert Settings(data="addon.parts:thing:/a/b").packages("data", "codec", "strategy") == [package]


def test_a_strategy_that_compares_updates_needs_to_see_them(installed: Path) -> None:
    given = {"strategy": "addon.parts:thing", "secure-aggregation": True, "site-weights": "examples", "dp": "central"}
    _, problems = Settings.read(given)
    assert problems.keys() == {"strategy", "site-weights", "dp"}


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("addon.parts:thing:/a/b:c", ("addon.parts:thing:", "/a/b:c")),
        ("short:/a/b", ("short:", "/a/b")),
        ("long:/a/b", ("", "long:/a/b")),
        ("drawn:5", ("", "drawn:5")),
        ("drawn:a:/b", ("", "drawn:a:/b")),
        ("folder:a:/b", ("folder:", "a:/b")),
        ("org/name", ("", "org/name")),
    ],
)
def test_a_source_has_its_path_behind_its_name(installed: Path, data: str, place: tuple[str, str]) -> None:
    declare(installed, "data")
    assert place_of(data) == place


def test_a_source_needs_an_absolute_path(installed: Path) -> None:
    with pytest.raises(UserError, match=r"expected an absolute path, such as addon.parts:thing:/"):
        Settings.from_run_config({"data": "addon.parts:thing:images"})


def test_what_is_allowed_can_be_listed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins.allowed() == {}
    declare(installed, "codec")
    monkeypatch.setenv(ALLOWED, "nowhere, ,a.b, addon")
    listed = plugins.allowed()
    assert listed.keys() == {"addon", "addon.parts:thing", "nowhere"}
    assert listed["addon"] == listed["addon.parts:thing"] != ""
    assert listed["nowhere"] == ""
