"""`python -m audit`: exit status 0 if each finding has an exception, 1 if not, 2 if a file can't be read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from audit import check, files, scanner


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m audit", description=__doc__)
    parser.add_argument("--pip-audit", type=Path, metavar="PROGRAM", help="ask this pip-audit, too")
    program = parser.parse_args(arguments).pip_audit
    try:
        lines, copy = files.read_lines(files.ROOT), files.read_copy(files.ADVISORIES)
        exceptions = files.read_exceptions(files.EXCEPTIONS)
    except files.AuditError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = check.problems(lines, copy, exceptions)
    report = [*check.summary(lines, copy, exceptions, date.today())]
    report += [] if program else ["pip-audit was not asked: --pip-audit PROGRAM"]
    for line in lines if program else ():
        text, found = scanner.scan(program, files.ROOT / line)
        wrong += check.uncovered(found, exceptions)
        report.append(text)
    print(*wrong, *report, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
