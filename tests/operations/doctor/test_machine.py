from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import pytest

from fedclip_flwr.base import content, plugins
from fedclip_flwr.flower import lines
from fedclip_flwr.operations.doctor import machine
from fedclip_flwr.operations.doctor.findings import Examination


def examined() -> dict[str, tuple[str, ...]]:
    """The findings by what was looked at."""
    ex = Examination(lambda _: None)
    machine.examine(ex)
    ex.look("disk", machine.free, ex, 1_000_000)
    found: dict[str, tuple[str, ...]] = {what: (state, text, remedy) for state, what, text, remedy in ex.findings}
    assert len(found) == len(ex.findings)
    return found


def test_the_machine_that_runs_these_tests_is_fit(fedclip_home: Path) -> None:
    found = examined()
    assert {state for state, *_ in found.values()} <= {"ok", "note"}
    assert found["Python"][1].startswith(platform.python_version())
    assert f"flwr {lines.installed()}, grpcio {metadata.version('grpcio')}" in found["packages"][1]
    assert content.of_package(content.memory())[:12] in found["this package"][1]
    assert str(fedclip_home) in found["FEDCLIP_HOME"][1]
    assert found["disk"][1].endswith("encoding needs 1 MB")
    assert list(found) == ["Python", "packages", "Flower", "this package", "FEDCLIP_HOME", "GPU", "disk"]


def test_versions_that_do_not_fit_are_reported_with_the_command_that_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other_one-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other-one\nVersion: 1.0\nRequires-Python: >=3.99\n"
        "Requires-Dist: grpcio==1.0\nRequires-Dist: flwr[simulation]>=1.31\nRequires-Dist: not-there[fast]>=2\n"
        'Requires-Dist: never>=1; sys_platform == "plan9"\nRequires-Dist: tool>=1; extra == "dev"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "NAME", "other-one")
    found = examined()
    assert found["Python"][0] == "FAIL"
    assert ">=3.99 is required" in found["Python"][1]
    state, text, remedy = found["packages"]
    have = metadata.version("grpcio")
    assert (state, text) == ("FAIL", f"grpcio is {have}, needed ==1.0, not-there is missing, needed >=2")
    assert remedy.endswith("-m pip install grpcio==1.0 'not-there[fast]>=2'")


def test_the_version_of_flower_and_its_transport_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    line = lines.line()
    assert examined()["Flower"] == ("ok", f"{lines.installed()}, {line.transport} between sites and server", "")
    monkeypatch.setattr(lines, "installed", lambda: f"{line.tested[:-1]}7.1")
    state, _, remedy = examined()["Flower"]
    assert state == "note"
    assert "has not been tried with fedclip-flwr: 1.31.x and 1.42.x were" in remedy
    assert remedy.endswith(f"pip install 'flwr=={line.tested}.*'")


def test_a_python_without_the_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NAME", "nowhere-installed")
    found = examined()
    assert [found[what][0] for what in ("Python", "packages")] == ["FAIL", "FAIL"]
    assert "nowhere-installed is not installed in" in found["packages"][1]


def test_a_home_that_can_not_be_written_to_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "file" / "home"))
    found = examined()
    assert found["FEDCLIP_HOME"][0] == "FAIL"
    assert "set FEDCLIP_HOME to another folder" in found["FEDCLIP_HOME"][1]
    assert found["disk"][0] == "ok"


def test_a_disk_without_room_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SPARE", 10**18)
    state, _, remedy = examined()["disk"]
    assert state == "FAIL"
    assert remedy.startswith("make room for 1e+09 GB")


def test_a_gpu_that_torch_can_not_use_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert "is for CPUs only" in examined()["GPU"][1]


def test_plug_ins_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "allowed", lambda: {"here": "1.0 abcd", "gone": ""})
    ex = Examination(lambda _: None)
    machine.examine(ex)
    found = [(state, text, remedy) for state, what, text, remedy in ex.findings if what == "plug-in"]
    assert found == [
        ("ok", "here 1.0 abcd: must be the same at the server and all sites that use it", ""),
        ("note", "gone is not installed here", "install it, or take it out of FEDCLIP_PLUGINS"),
    ]
