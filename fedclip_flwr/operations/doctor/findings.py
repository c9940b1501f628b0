"""The findings of the checks of a machine, reported as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from fedclip_flwr.base import UserError
from fedclip_flwr.base.errors import FaultError, one_line
from fedclip_flwr.base.text import counted

P = ParamSpec("P")
T = TypeVar("T")
OK, NOTE, FAIL = "ok", "note", "FAIL"


class Finding(NamedTuple):
    """The result of a check, and what to do about it."""

    state: str
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<4}  {self.what:<15}  {self.found}"
        return f"{line}\n{'':23}→ {self.remedy}" if self.remedy else line


class Examination:
    """The findings so far; `tell` gets each one at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.findings: list[Finding] = []
        self._tell = tell

    def ok(self, what: str, found: str) -> None:
        self._add(Finding(OK, what, found))

    def note(self, what: str, found: str, remedy: str = "") -> None:
        self._add(Finding(NOTE, what, found, remedy))

    def fail(self, what: str, found: str, remedy: str = "") -> None:
        self._add(Finding(FAIL, what, found, remedy))

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._tell(str(finding))

    def look(self, what: str, see: Callable[P, T], *args: P.args, **more: P.kwargs) -> T | None:
        """The result of `see`; None if it fails, which becomes a finding."""
        try:
            return see(*args, **more)
        except FaultError as fault:
            self.fail(what, fault.found, fault.remedy)
        except UserError as error:
            self.fail(what, " ".join(str(error).split()))
        except Exception as error:  # a failed check must not end the others
            why = one_line(f"{type(error).__name__}: {error}")
            self.fail(what, f"this check failed itself: {why}", "a bug in fedclip-flwr, or in a package that it uses")
        return None

    @property
    def failed(self) -> bool:
        return any(finding.state == FAIL for finding in self.findings)

    def summary(self) -> str:
        """The last line."""
        fine, noted, failed = (sum(f.state == state for f in self.findings) for state in (OK, NOTE, FAIL))
        return f"{counted(len(self.findings), 'check')}: {fine} fine, {noted} to note, {failed} to fix"
