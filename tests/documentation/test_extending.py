"""docs/extending.md: its blocks, put where they say into a copy of the package, make what it promises."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedclip_flwr.base.files import own_app
from fedclip_flwr.data.drawn import Drawn
from tests import forked

HOME = own_app()
LEARN = """
import sys
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.features import Encoded, open_features
from fedclip_flwr.experiments.simulate import make_sites, simulate
from fedclip_flwr.runs.saved import load_adapter, save_adapter
from pathlib import Path

data, out = sys.argv[1:]
given = {"adapter": "mlp", "recipe": "paper", "num-server-rounds": 3, "learning-rate": 0.003}  # so one of them is taken
settings = Settings.from_run_config({**given, "data": f"csv:{data}", "codec": "float16"})
features = open_features(settings)
assert isinstance(features, Encoded)
assert features.domains == ("art", "cartoon", "photo")
assert [features.count(domain) for domain in features.domains] == [20, 20, 21]
assert len(features.examples("photo").labels) == 20  # one can't be read
sites, unseen = make_sites(features, sites=2)
result = simulate(sites, features.classes, unseen, settings)
whole = simulate(sites, features.classes, unseen, Settings.from_run_config(given))
for name, tensor in result.state.items():
    assert tensor.abs().max() > 0
    assert (tensor - whole.state[name]).abs().max() < 1e-4
assert any(not tensor.equal(whole.state[name]) for name, tensor in result.state.items())  # the codec was used
save_adapter(Path(out), result.state, settings, features, 3)
adapter, facts = load_adapter(Path(out))
assert (facts["kind"], type(adapter).__name__) == ("mlp", "Mlp")
"""
INSTEAD = """
import os, sys
os.chdir(os.environ["COPY"])
sys.path.insert(0, os.environ["COPY"])
for name in [name for name in sys.modules if name.partition(".")[0] in ("fedclip_flwr", "tests")]:
    del sys.modules[name]
"""
PYTEST = "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
TESTS = [
    "tests/base/test_kinds.py",
    "tests/base/test_settings.py",
    "tests/learning/test_adapters.py",
    "-k",
    "not app and not contract",
]


def blocks() -> list[tuple[str, str, str]]:
    """Of each block the file, where in it (`above NAME`, `in NAME`, or nothing for a whole file), and the code."""
    found = re.findall(r"```python\n# (\S+?)(?:, (\w+ \w+))?\n(.*?)```", (HOME / "docs/extending.md").read_text(), re.S)
    assert len(found) == (HOME / "docs/extending.md").read_text().count("```python")
    return found


def put(root: Path, name: str, where: str, code: str) -> None:
    path = root / name
    if not where:
        path.write_text(code)
        return
    text, (how, wanted) = path.read_text(), where.split()
    (found,) = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == wanted
    ]
    lines = text.splitlines(keepends=True)
    if how == "above":
        lines.insert(found.lineno - 1, f"{code}\n\n")
    else:
        assert how == "in"
        assert found.value
        assert found.value.end_lineno
        last, end = found.value.end_lineno - 1, (found.value.end_col_offset or 0) - 1
        before = "".join([*lines[:last], lines[last][:end]]).rstrip().rstrip(",")
        lines = [before, ", ", code.strip(), lines[last][end:], *lines[last + 1 :]]
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests with all that the page adds."""
    return copied(tmp_path_factory.mktemp("extended"), blocks())


def copied(root: Path, added: Sequence[tuple[str, str, str]]) -> Path:
    for name in ("fedclip_flwr", "tests"):
        shutil.copytree(HOME / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copy(HOME / name, root / name)
    for block in added:
        put(root, *block)
    return root


def play(root: Path, script: str, *arguments: str) -> None:
    """Runs a script in a process that has the copy in place of the package and its tests."""
    env = {**os.environ, "FEDCLIP_HOME": str(root / "home")}
    done = forked.run(INSTEAD + script, *arguments, env=env | {"COPY": str(root)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of twenty images in each of three domains, and of one that is not there."""
    root, drawn = tmp_path_factory.mktemp("listed"), Drawn(3)
    lines = ["label,path,domain"]
    for domain in ("cartoon", "art", "photo"):
        for row in range(0, 420, 21):
            (picture,) = drawn.pictures(domain, row, row + 1)
            assert picture.image
            picture.image.save(root / f"{domain}-{row}.png")
            lines.append(f"{drawn.class_names[picture.label]},{domain}-{row}.png,{domain}")
    lines.append("house,gone.png,photo")
    (root / "all.csv").write_text("\n".join(lines))
    return root / "all.csv"


def test_a_federation_learns_with_all_that_the_page_adds(extended: Path, table: Path, tmp_path: Path) -> None:
    play(extended, LEARN, str(table), str(tmp_path / "out"))


def test_a_list_without_a_column_is_refused_and_one_that_is_not_there(extended: Path, table: Path) -> None:
    code = """
import sys
from fedclip_flwr.data import Columns, open_source
from fedclip_flwr.base.errors import UserError
for name, columns, told in (
    (sys.argv[1], Columns(domain="site"), "no column site; expected path, label, site"),
    (sys.argv[1] + "x", Columns(), "No such file"),
):
    try:
        open_source("csv:" + name, columns)
        raise SystemExit("it was opened")
    except UserError as error:
        assert told in str(error), error
"""
    play(extended, code, str(table))


def test_the_tests_that_the_page_names_look_at_what_it_adds(extended: Path) -> None:
    play(extended, PYTEST, *TESTS)


@pytest.mark.soak
@pytest.mark.parametrize("entry", [block for block in blocks() if block[1].startswith("in ")], ids=lambda b: b[1])
def test_an_entry_that_is_left_out_makes_one_of_them_fail(entry: tuple[str, str, str], tmp_path: Path) -> None:
    """Names that are in one list only: what is there and can't be chosen, and what can be chosen and is not there."""
    root = copied(tmp_path, [block for block in blocks() if block != entry])
    with pytest.raises(AssertionError, match=r"FAILED tests/base/test_(kinds|settings).py::test_every"):
        play(root, PYTEST, *TESTS[:2], "-k", "every_")
