"""docs/extending.md: its file is a package that a run uses, by module and by short names, and that a site must have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedclip_flwr.base.files import own_app
from fedclip_flwr.data.drawn import Drawn

PAGE = (own_app() / "docs/extending.md").read_text()
CODE = re.search(r"```python\n# sheets.py\n(.*?)```", PAGE, re.S)
ENTRIES = re.findall(r'\[project.entry-points."(\S+)"\]\n(\S+) = "(\S+)"\n', PAGE)
COMMANDS = re.findall(r"^fedclip .*$", PAGE, re.M)
SIMULATE = """
import sys
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.features import Encoded
from fedclip_flwr.learning.adapters import tensor_names
from fedclip_flwr.runs.opening import open_run
from fedclip_flwr.runs.saved import save_adapter
from pathlib import Path

data, adapter, codec, strategy, out = sys.argv[1:]
given = {"recipe": "paper", "num-server-rounds": 3, "learning-rate": 0.003}  # so one of them is selected
more = {"data": data, "adapter": adapter, "codec": codec, "strategy": strategy}
settings, features, _ = open_run({**given, **more})
assert isinstance(features, Encoded)
assert features.domains == ("art", "cartoon", "photo")
assert [features.count(domain) for domain in features.domains] == [20, 20, 21]
assert len(features.examples("photo").labels) == 20  # one can't be read
sites, unseen = make_sites(features, sites=3)
result = simulate(sites, features.classes, unseen, settings)
others = [simulate(sites, features.classes, unseen, Settings(**{**vars(settings), key: default}))
          for key, default in (("codec", "float32"), ("strategy", "fedavg"))]
assert all(tensor.abs().max() > 0 for tensor in result.state.values())
for other, least in zip(others, (0, 1e-4)):  # what the codec rounds is small, what the strategy leaves out is not
    differences = [float((tensor - other.state[name]).abs().max()) for name, tensor in result.state.items()]
    assert max(differences) > least
save_adapter(Path(out), result.state, settings, features, 3)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the page's file."""
    assert CODE
    assert len(CODE[1].splitlines()) < 40
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sheets.py").write_text(CODE[1])
    return tmp_path / "path"


def declare(package: Path, exist_ok: bool = False) -> None:
    """What installing it with the page's entry points leaves."""
    about = package / "sheets-1.0.dist-info"
    about.mkdir(exist_ok=exist_ok)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sheets\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("sheets\n")
    groups = (f"[{group}]\n{name} = {what}\n" for group, name, what in ENTRIES)
    (about / "entry_points.txt").write_text("".join(groups))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV file of twenty images in each of three domains, and of one that is not there."""
    drawn = Drawn(3)
    lines = ["label,path,domain"]
    for domain in ("cartoon", "art", "photo"):
        for row in range(0, 420, 21):
            (picture,) = drawn.pictures(domain, row, row + 1)
            assert picture.image
            picture.image.save(tmp_path / f"{domain}-{row}.png")
            lines.append(f"{drawn.class_names[picture.label]},{domain}-{row}.png,{domain}")
    lines.append("house,gone.png,photo")
    (tmp_path / "images.csv").write_text("\n".join(lines))
    return tmp_path / "images.csv"


def python(package: Path, *arguments: str) -> str:
    """What a new Python says, which has the package on its path."""
    env = {**os.environ, "PYTHONPATH": str(package), "FEDCLIP_HOME": str(package / "home")}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fedclip(package: Path, *arguments: str) -> str:
    return python(package, str(Path(sys.executable).parent / "fedclip"), *arguments)


@pytest.fixture
def commands(table: Path) -> list[list[str]]:
    """The words of the page's commands after `fedclip`, with the images of `table`."""
    return [command.replace("/data/images.csv", str(table)).split()[1:] for command in COMMANDS]


@pytest.mark.documentation
def test_the_pages_run(package: Path, commands: list[list[str]]) -> None:
    said = fedclip(package, *commands[0], "num-server-rounds=1", "recipe=paper", "--nodes", "2")
    assert "mlp of rank 4: " in said
    settings = json.loads((package / "home/runs/latest/settings.json").read_text())
    assert [text.partition(" ")[0] for text in settings["plugins"]] == [
        *("sheets:FLOAT16", "sheets:Mlp", "sheets:Table", "sheets:without_longest")
    ]
    assert settings["adapter-facts"] == {"name": "mlp", "ranked": True, "zero-shot": False}
    assert "mlp-4" in fedclip(package, "runs")
    page = (package / "home/runs/latest/report.html").read_text()
    assert "mlp adapter of rank 4" in page
    assert f"<td>plug-in</td><td>{settings['plugins'][0]}</td>" in page


@pytest.mark.documentation
def test_the_pages_sweep(package: Path, commands: list[list[str]], table: Path) -> None:
    few = (f"--data=sheets:Table:{table}", "--rounds=1", "--seeds=1", "--holdouts=photo", "--jobs=1")
    assert "| plug-in, sheets:Mlp |" in fedclip(package, *commands[1], *few)


@pytest.mark.documentation
def test_by_either_name_they_are_used_and_lead_to_the_same_adapter(package: Path, table: Path, tmp_path: Path) -> None:
    names = {group.rpartition(".")[2]: (what, name) for group, name, what in ENTRIES}
    assert [*names] == ["adapters", "sources", "codecs", "strategies"]
    long, short = tmp_path / "long", tmp_path / "short"
    for folder, number in ((long, 0), (short, 1)):
        adapter, source, codec, strategy = (both[number] for both in names.values())
        python(package, "-c", SIMULATE, f"{source}:{table}", adapter, codec, strategy, str(folder))
        assert json.loads((folder / "adapter.json").read_text())["kind"] == adapter
        declare(package, exist_ok=True)
    assert len({(folder / "adapter.safetensors").read_bytes() for folder in (long, short)}) == 1
