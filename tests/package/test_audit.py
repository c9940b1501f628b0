"""What pip-audit says of the pinned versions, and the SBOMs that go beside the wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from audit import __main__ as audit
from audit.files import LINES, ROOT, read_lines
from fedclip_flwr import __version__
from tests.package.conftest import TREE, Environment, environment

pytestmark = pytest.mark.package


def test_pip_audit_finds_nothing_without_an_exception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its verdict is shown: without a database it has found nothing because it has looked at nothing."""
    with environment(tmp_path) as made:
        done = made.run("python", "-m", "pip", "install", "pip-audit")
        if done.returncode:
            pytest.skip(f"pip-audit can't be installed, so it was not asked: {done.stderr.strip()[-300:]}")
        status = audit.main(["--pip-audit", str(made.root / "bin" / "pip-audit")])
        told = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{told}")
    assert status == 0, told
    assert told.count(": pip-audit ") == len(LINES)


@pytest.fixture(scope="module")
def sboms(tools: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sboms")
    tools.do("python", "-m", "audit.sbom", made, cwd=TREE)
    return made


def read(sboms: Path, line: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sboms / f"fedclip_flwr-{__version__}-{line}.cdx.json").read_text())
    return found


@pytest.mark.parametrize("line", LINES)
def test_an_sbom_lists_what_is_pinned_and_describes_our_package(sboms: Path, line: str) -> None:
    made = read(sboms, line)
    root = made["metadata"]["component"]
    assert (root["name"], root["version"]) == ("fedclip-flwr", __version__)
    pinned = {f"pkg:pypi/{pin.name}@{pin.version}" for pin in read_lines(ROOT)[LINES[line]]}
    assert {one["purl"] for one in made["components"]} == pinned
    assert {one["ref"] for one in made["dependencies"]} == pinned | {root["bom-ref"]}


def test_the_sbom_of_this_environment_has_licences_and_says_who_needs_whom(sboms: Path) -> None:
    made = read(sboms, "grpc")
    licensed = [one for one in made["components"] if one.get("licenses")]
    assert len(licensed) > 0.9 * len(made["components"])
    needs = {one["ref"].partition("@")[0]: one.get("dependsOn", []) for one in made["dependencies"]}
    assert any(of.startswith("pkg:pypi/flwr@") for of in needs["root-component"])
    assert any(of.startswith("pkg:pypi/cryptography@") for of in needs["pkg:pypi/flwr"])


def test_sboms_are_made_again_the_same(tools: Environment, sboms: Path, tmp_path: Path) -> None:
    tools.do("python", "-m", "audit.sbom", tmp_path, cwd=TREE)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in sboms.iterdir()}
    assert len(made) == len(LINES)


CHECK = """
import sys
from pathlib import Path
from audit import sbom
for name in sys.argv[1:]:
    sbom.check(Path(name).read_text())
    print("valid")
"""


def test_sboms_are_valid_by_the_schema(tools: Environment, sboms: Path, tmp_path: Path) -> None:
    spoilt = read(sboms, "grpc")
    spoilt["components"][0]["type"] = "thing"
    (tmp_path / "spoilt.json").write_text(json.dumps(spoilt))
    done = tools.run("python", "-c", CHECK, *sboms.iterdir(), tmp_path / "spoilt.json", cwd=TREE)
    assert done.stdout.split() == ["valid"] * len(LINES)
    assert "not valid CycloneDX" in done.stderr
