"""What the pages' blocks are run with: one session of bash for a page, block after block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.documentation.pages import Block
from tests.documentation.session import script
from tests.documentation.shell import Course, Shell


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Shell]:
    with closing(Shell("a page", ["bash"], tmp_path)) as shell:
        yield shell


def test_what_a_command_leaves_is_there_for_the_next_one(bash: Shell) -> None:
    assert bash.run("mkdir a; cd a; word=7") == ""
    assert bash.run("echo $word; basename $PWD") == "7\na\n"
    assert bash.run("printf 'no end of line'; cat") == "no end of line"


@pytest.mark.parametrize("wrong", ["false", "false | cat", "{ echo 1 >&2; exit 3; } | cat"])
def test_a_command_that_fails_ends_the_session_and_is_named(bash: Shell, wrong: str) -> None:
    with pytest.raises(AssertionError, match=r"docs/a.md:7: (?s:.*)\nbefore\n"):
        bash.run(f"echo before\n{wrong}\necho after", "docs/a.md:7")
    assert bash.process.returncode


def test_what_runs_in_the_background_and_prints_delays_no_later_command(bash: Shell) -> None:
    bash.run("{ while :; do printf x; done; } &")
    assert all("1\n" in bash.run("echo 1") for _ in range(20))
    bash.run("kill %1")


def test_steps_are_taken_in_their_order_each_once_and_none_after_one_that_failed() -> None:
    taken: list[str] = []

    def wrong() -> None:
        taken.append("c")
        raise AssertionError("c is wrong")

    course = Course({"a": lambda: taken.append("a"), "b": lambda: taken.append("b"), "c": wrong, "d": lambda: None})
    course.take("b")
    course.take("a")
    assert taken == ["a", "b"]
    with pytest.raises(AssertionError, match="c is wrong"):
        course.take("c")
    for later in ("d", "c"):
        with pytest.raises(pytest.fail.Exception, match="not tried: c failed"):
            course.take(later)
    course.take("b")
    assert taken == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("language", "said", "text", "expected"),
    [
        ("bash", {}, "a b  # c\n", "a b  # c"),
        ("bash", {"with": "--d 1"}, "a 'x # y'\nb  # c\n", "a 'x # y'\nb --d 1  # c"),
        ("bash", {"with": "--d 1"}, "a \\\n  b\n", "a \\\n  b --d 1"),
        ("bash", {"background": ""}, "a\n", "{\na\n} &"),
        ("python", {"as": "x.py y z"}, "a\n", "cat > x.py <<'THE END'\na\nTHE END\npython x.py y z"),
    ],
)
def test_a_block_is_given_to_bash_as_its_comments_say(
    language: str, said: dict[str, str], text: str, expected: str
) -> None:
    assert script(Block("docs/a.md", 7, language, text, said)) == expected
