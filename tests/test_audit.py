"""The audit: pinned versions against the copy of the advisories, the exceptions, and how the copy is renewed."""

from __future__ import annotations

import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from audit import __main__ as command
from audit import check, files, renew, sbom, scanner
from audit.files import AuditError, Copy, Excepted, Pin

LINES, COPY = files.read_lines(files.ROOT), files.read_copy(files.ADVISORIES)
EXCEPTIONS = files.read_exceptions(files.EXCEPTIONS)
OLD, NEWEST = files.LINES["grpc"], files.NEWEST


def copy_of(*advisories: dict[str, Any]) -> Copy:
    read = tuple(files.advisory({"aliases": [], "summary": "a hole", **one}) for one in advisories)
    return Copy(date(2026, 11, 1), "by hand", frozenset({"hole"}), read)


HOLE = {"id": "CVE-1", "package": "hole", "aliases": ["GHSA-1"], "ranges": [{"introduced": "1.0", "fixed": "2.0"}]}
UNMENDED = {**HOLE, "ranges": [{"introduced": "0"}]}
PINS = {OLD: (Pin("hole", Version("1.5")), Pin("keeper", Version("1")), Pin("else", Version("1")))}
EXCEPTION = Excepted("CVE-1", "hole", OLD, "keeper", "unknown", "because")


def test_every_pinned_version_with_an_advisory_has_an_exception_and_no_exception_is_left_over() -> None:
    assert check.problems(LINES, COPY, EXCEPTIONS) == []


def test_who_is_said_to_exclude_a_fixed_version_does() -> None:
    """Of the line that is installed."""
    found, tried = check.findings(LINES, COPY), 0
    for one in EXCEPTIONS:
        if not one.kept_by or not is_installed("flwr", LINES.get(one.line, ())):
            continue
        (fix,) = {of.fix() for of in found if one.covers(of.line, of.advisory)}
        needs = [Requirement(text) for text in requires(one.kept_by) or []]
        assert any(canonicalize_name(need.name) == one.package and fix not in need.specifier for need in needs), one
        tried += 1
    assert tried or not is_installed("flwr", LINES["constraints.txt"])  # the newest line has no such exception


def is_installed(name: str, pins: tuple[Pin, ...]) -> bool:
    try:
        return Pin(name, Version(version(name))) in pins
    except PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("pinned", "affected"), [("0.9", False), ("1.0", True), ("1.5", True), ("2.0rc1", True), ("2.0", False)]
)
def test_a_version_is_affected_from_the_first_to_before_the_fixed_one(pinned: str, affected: bool) -> None:
    lines = {OLD: (Pin("hole", Version(pinned)), Pin("other", Version("1.5")))}
    assert bool(check.findings(lines, copy_of(HOLE))) == affected


def test_the_last_affected_version_is_affected_and_some_advisories_have_no_end() -> None:
    last = {**HOLE, "ranges": [{"introduced": "0", "last_affected": "1.5"}]}
    for pinned, ends, endless in (("1.5", 1, 1), ("1.6", 0, 1)):
        lines = {OLD: (Pin("hole", Version(pinned)),)}
        assert len(check.findings(lines, copy_of(last))) == ends
        assert len(check.findings(lines, copy_of(UNMENDED))) == endless


def test_a_finding_without_an_exception_is_named_with_the_version_that_mends_it() -> None:
    assert check.problems(PINS, copy_of(HOLE), []) == [f"{OLD}: hole 1.5 has CVE-1 (fixed in 2.0): a hole"]
    (line,) = check.problems(PINS, copy_of(UNMENDED), [])
    assert "no fixed version is known" in line


@pytest.mark.parametrize("name", ["CVE-1", "GHSA-1"])
def test_an_exception_goes_by_the_advisorys_name_or_another_of_its_names(name: str) -> None:
    assert check.problems(PINS, copy_of(HOLE), [EXCEPTION._replace(id=name)]) == []


@pytest.mark.parametrize(
    ("changes", "pins", "why"),
    [
        ({"id": "CVE-2"}, PINS, "the copy has no such advisory"),
        ({}, {OLD: (Pin("hole", Version("2.0")), Pin("keeper", Version("1")))}, "it no longer applies: remove it"),
        ({"package": "else"}, PINS, "it no longer applies: remove it"),
        ({"kept_by": "nobody"}, PINS, "kept_by names nobody, which is not pinned there"),
    ],
)
def test_an_exception_that_does_not_apply_is_a_problem(changes: Mapping[str, str], pins: check.Lines, why: str) -> None:
    wrong = check.problems(pins, copy_of(HOLE), [EXCEPTION._replace(**changes)])
    assert any(why in line for line in wrong)


@pytest.mark.parametrize(
    ("kept_by", "reachable", "advisory", "problems"),
    [
        ("keeper", "no", HOLE, []),
        ("", "no", UNMENDED, []),
        ("", "no", HOLE, ["takes the fixed version"]),
        ("keeper", "unknown", HOLE, ["reachable, or may be"]),
        ("", "yes", HOLE, ["reachable, or may be", "takes the fixed version"]),
    ],
)
def test_the_newest_line_has_exceptions_only_for_what_nothing_reaches_and_no_version_can_mend(
    kept_by: str, reachable: str, advisory: dict[str, Any], problems: list[str]
) -> None:
    one = EXCEPTION._replace(line=NEWEST, kept_by=kept_by, reachable=reachable)
    wrong = check.problems({NEWEST: PINS[OLD]}, copy_of(advisory), [one])
    assert len(wrong) == len(problems)
    assert all(why in line for why, line in zip(problems, wrong, strict=True))


def test_the_summary_says_what_was_checked_and_what_was_not() -> None:
    told = [*check.summary(PINS, copy_of(HOLE), [EXCEPTION], date(2026, 11, 4))]
    assert told == [
        f"{OLD}: 3 pinned versions: 1 findings, 1 of them excepted",
        "  not checked: 2 packages that the copy was not made for: else, keeper…",
        "The copy has 1 advisories, of 2026-11-01 (3 days old): by hand",
    ]


def test_pins_are_read_with_comments_spellings_and_every_marker(tmp_path: Path) -> None:
    older, newer = 'numpy==2.3 ; python_version < "3.12"', 'numpy==2.4;python_version>="3.12"'
    (tmp_path / OLD).write_text(f"# of a line\nGit_Python==3.2.1  # spelt\n\n{older}\n{newer}\n")
    expected = [("git-python", "3.2.1"), ("numpy", "2.3"), ("numpy", "2.4")]
    assert files.read_pins(tmp_path / OLD) == tuple(Pin(name, Version(number)) for name, number in expected)


@pytest.mark.parametrize(
    "line", ["a>=1", "a", "a==1.*", "a==1,!=2", "a===1", "-r other.txt", "a @ https://x/a.whl", "a=1"]
)
def test_a_line_that_pins_no_version_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / OLD).write_text(f"b==1\n{line}\n")
    with pytest.raises(AuditError, match=f"{OLD}, line 2: expected name==version"):
        files.read_pins(tmp_path / OLD)


def test_a_folder_without_constraints_of_both_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / OLD).touch()
    with pytest.raises(AuditError, match=f"{NEWEST} can't be read"):
        files.read_lines(tmp_path)


GOOD = {"date": "2026-11-29", "source": "by hand", "packages": ["hole"], "advisories": [{**HOLE, "summary": "a hole"}]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({**GOOD, "date": "yesterday"}),
        json.dumps({**GOOD, "advisories": [{**HOLE}]}),
        json.dumps({**GOOD, "advisories": [{**HOLE, "summary": "", "ranges": []}]}),
        json.dumps({**GOOD, "advisories": [{**HOLE, "summary": "", "ranges": [{"fixed": "1"}]}]}),
        json.dumps({**GOOD, "advisories": [{**HOLE, "summary": "", "ranges": [{"introduced": "0", "mended": "1"}]}]}),
        json.dumps({**GOOD, "advisories": [{**HOLE, "summary": "", "ranges": [{"introduced": "new"}]}]}),
    ],
)
def test_a_malformed_copy_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AuditError, match=r"a.json is not a copy of advisories") as refused:
        files.read_copy(tmp_path / "a.json")
    assert "\n" not in str(refused.value)


EXCEPTED = (
    '[[exception]]\nid = "CVE-1"\npackage = "hole"\nlines = ["constraints.txt"]\nreachable = "no"\nreason = "it is"\n'
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('reachable = "no"', 'reachable = "perhaps"'),
        ("constraints.txt", "others.txt"),
        ('"it is"', '" "'),
        ('reason = "it is"', ""),
        ('id = "CVE-1"', "id = "),
    ],
)
def test_malformed_exceptions_are_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "e.toml"
    path.write_text(EXCEPTED)
    assert files.read_exceptions(path) == (Excepted("CVE-1", "hole", OLD, "", "no", "it is"),)
    path.write_text(EXCEPTED.replace(old, new))
    with pytest.raises(AuditError, match=r"e\.toml"):
        files.read_exceptions(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one pin, one advisory about it, and its exception."""
    (tmp_path / OLD).write_text("hole==1.5\n")
    (tmp_path / NEWEST).write_text("hole==2.0\n")
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "e.toml").write_text(EXCEPTED)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "ADVISORIES", tmp_path / "a.json")
    monkeypatch.setattr(files, "EXCEPTIONS", tmp_path / "e.toml")
    return tmp_path


def test_the_command_fails_without_the_exception_and_on_a_file_that_is_none(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([]) == 0
    assert "1 findings, 1 of them excepted" in capsys.readouterr().out
    (home / "e.toml").write_text("")
    assert command.main([]) == 1
    assert "hole 1.5 has CVE-1" in capsys.readouterr().out
    (home / "a.json").write_text("{")
    assert command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def pip_audit(folder: Path, output: str, error: str = "") -> Path:
    """A program that answers in pip-audit's place, and knows nothing of the newest line."""
    path = folder / "pip-audit"
    said = f"{answer()!r} if sys.argv[2].endswith({NEWEST!r}) else {output!r}"
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({said})\nsys.exit({error!r})\n")
    path.chmod(0o755)
    return path


def answer(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies})


FOUND = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": "a hole"}


def test_what_pip_audit_finds_needs_an_exception_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = {**FOUND, "id": "PYSEC-2", "aliases": []}
    program = pip_audit(home, answer({"name": "Hole", "version": "1.5", "vulns": [FOUND]}))
    assert command.main(["--pip-audit", str(program)]) == 0
    assert "pip-audit checked 1 of 1 packages; 1 findings" in capsys.readouterr().out
    program = pip_audit(home, answer({"name": "Hole", "version": "1.5", "vulns": [FOUND, new]}))
    assert command.main(["--pip-audit", str(program)]) == 1
    assert "hole 1.5 has PYSEC-2 (fixed in 2.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "error", "verdict"),
    [
        (answer({"name": "hole", "skip_reason": "not found"}), "", "checked 0 of 1 packages: its database has none"),
        ("", "no route to host", "had no database to ask, and checked nothing: no route to host"),
    ],
)
def test_a_pip_audit_without_a_database_is_no_failure_and_no_proof(
    home: Path, output: str, error: str, verdict: str
) -> None:
    text, found = scanner.scan(pip_audit(home, output, error), home / OLD)
    assert verdict in text
    assert not found
    assert "did not run" in scanner.scan(home / "none", home / OLD)[0]


@dataclass
class Database:
    """Answers as OSV does: `records` by id, one id a page."""

    records: dict[str, dict[str, Any]]
    exact: tuple[str, ...] = ()
    """The ids that it names for any pinned version."""

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        if body is None:
            return self.records[path.removeprefix("vulns/")]
        return {"results": [self.result(query) for query in body["queries"]]}

    def result(self, query: Mapping[str, Any]) -> dict[str, Any]:
        name = query["package"]["name"]
        known = [*self.exact] if "version" in query else [*self.records]
        known = [one for one in known if self.records[one]["affected"][0]["package"]["name"].lower() == name]
        at = int(query.get("page_token", 0))
        page: dict[str, Any] = {"vulns": [{"id": one} for one in known[at : at + 1]]} if known else {}
        return page | ({"next_page_token": str(at + 1)} if at + 1 < len(known) else {})


def record(name: str, *events: dict[str, str], package: str = "Hole", kind: str = "ECOSYSTEM") -> dict[str, Any]:
    affected = {"package": {"ecosystem": "PyPI", "name": package}, "ranges": [{"type": kind, "events": [*events]}]}
    return {"id": name, "aliases": [], "details": "a\nhole", "affected": [affected]}


PIN = Pin("hole", Version("1.5"))


def test_a_renewed_copy_has_all_advisories_about_our_packages_in_any_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        record("A", {"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.2"}, {"last_affected": "1.5"}),
        record("B", {"introduced": "2"}),
        record("C", {"introduced": "abc"}, {"fixed": "def"}, kind="GIT"),
        {**record("D", {"introduced": "0"}), "withdrawn": "2026-01-01"},
    ]
    database = Database({one["id"]: one for one in records}, exact=("A", "C"))
    monkeypatch.setattr(renew, "ask", database.ask)
    renew.write(renew.fetched([PIN, Pin("else", Version("1"))]), tmp_path / "a.json")
    copy = files.read_copy(tmp_path / "a.json")
    assert copy.packages == {"hole", "else"}
    assert [one.id for one in copy.advisories] == ["A", "B", "C"]
    affected = {one.id for one in copy.advisories if one.about(PIN)}
    assert affected == {"A", "C"}, "C, which has no versions of ours, as OSV says it of the pinned one"
    assert copy.advisories[0].summary == "a hole"
    assert copy.advisories[0].about(Pin("hole", Version("1.1"))) is None


def test_without_a_network_or_with_an_odd_answer_the_old_copy_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    for reply in (unreachable, lambda *_, **__: io.BytesIO(b"<html>"), lambda *_, **__: io.BytesIO(b'{"code": 3}')):
        monkeypatch.setattr(urllib.request, "urlopen", reply)
        assert renew.main() == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "nothing was changed" in said
    with pytest.raises(AuditError):
        renew.write({**GOOD, "date": None}, home / "a.json")
    assert json.loads((home / "a.json").read_text()) == GOOD
    assert sorted(path.name for path in home.iterdir()) == ["a.json", NEWEST, OLD, "e.toml"]


def test_an_sbom_joins_what_is_pinned_with_what_is_installed() -> None:
    def component(ref: str, name: str, version: str, **more: Any) -> dict[str, Any]:
        own = {"bom-ref": ref, "type": "library", "name": name, "version": version}
        return {**own, "purl": f"pkg:pypi/{name.lower()}@{version}", **more}

    pinned = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [component("L1", "Torch", "2", description="line 1"), component("L2", "six", "1")],
    }
    installed = {
        "components": [
            component("a", "torch", "2+cpu", licenses=[{"license": {"id": "MIT"}}]),
            component("b", "six", "0.9", licenses=[]),
            component("c", "other", "1"),
        ],
        "dependencies": [{"ref": "root", "dependsOn": ["a", "c"]}, {"ref": "a", "dependsOn": ["b", "c"]}, {"ref": "c"}],
    }
    made = sbom.joined(pinned, installed)
    assert [(one["bom-ref"], "licenses" in one) for one in made["components"]] == [
        ("pkg:pypi/six@1", False),
        ("pkg:pypi/torch@2", True),
    ]
    assert "description" not in made["components"][0]
    assert made["dependencies"] == [
        {"ref": "root", "dependsOn": ["pkg:pypi/torch@2"]},
        {"ref": "pkg:pypi/six@1"},
        {"ref": "pkg:pypi/torch@2"},
    ]
