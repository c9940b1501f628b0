from __future__ import annotations

import pytest

from fedclip_flwr.base.errors import FaultError, UserError
from fedclip_flwr.operations.doctor.findings import Examination


def test_each_finding_is_a_line_and_says_below_what_to_do() -> None:
    said: list[str] = []
    ex = Examination(said.append)
    ex.ok("Python", "3.11")
    ex.note("GPU", "none")
    ex.fail("disk", "1 GB free", "make room")
    assert said == [
        "ok    Python           3.11",
        "note  GPU              none",
        "FAIL  disk             1 GB free\n                       → make room",
    ]
    assert ex.failed
    assert not Examination(said.append).failed
    assert ex.summary() == "3 checks: 1 fine, 1 to note, 1 to fix"


@pytest.mark.parametrize(
    ("error", "finding"),
    [
        (FaultError("it is so", "do this"), ("FAIL", "it", "it is so", "do this")),
        (UserError("2 are wrong:", "one", "two"), ("FAIL", "it", "2 are wrong: one two", "")),
        (
            ZeroDivisionError("too\nbad"),
            (
                "FAIL",
                "it",
                "this check failed itself: ZeroDivisionError: too bad",
                "a bug in fedclip-flwr, or in a package that it uses",
            ),
        ),
    ],
)
def test_what_goes_wrong_is_a_finding(error: Exception, finding: tuple[str, ...]) -> None:
    def see(number: int) -> int:
        if number:
            raise error
        return number

    ex = Examination(lambda _: None)
    assert ex.look("it", see, 0) == 0
    assert ex.look("it", see, number=1) is None
    assert ex.findings == [finding]
