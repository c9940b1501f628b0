"""The documentation as text: its pages, and the blocks of code in them with what is said of how they are tried.

A block of `bash` or `python` is run by the tests, page by page and from the top. Comments above it say more:

    <!-- background -->        it does not end by itself: the next blocks are run beside it
    <!-- with: --rounds 1 -->  its last command is run with these words added, for it would take too long
    <!-- as: see.py photo -->  of Python: it is saved under that name and run with those words
    <!-- tried by: FILE -->    it is run elsewhere: FILE, a page or .ci/run, has each of its lines
    <!-- in parts by: FILE --> it would take too long: FILE runs all that it consists of
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")], key=lambda path: str(path)
)
_BLOCK = re.compile(
    r"^(?P<comments>(?: *<!--[^\n]*-->\n)*)(?P<indent> *)```(?P<language>\S*)\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- *(?P<kind>[a-z ]+?) *(?:: *(?P<what>.*?))? *-->")


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands, its language, its text without the indentation, what comments say of it."""

    page: str
    line: int
    language: str
    text: str
    said: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its lines without comments; those that a backslash continues as one."""
        whole = re.sub(r"\\\n\s*", "", self.text)
        lines = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in whole.splitlines())
        return [line for line in lines if line]


def blocks(path: Path) -> list[Block]:
    """All blocks of a page, from its top."""
    text, found = path.read_text(), []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        body = re.sub(rf"^{indent}", "", match["body"], flags=re.MULTILINE)
        said = {found["kind"]: found["what"] or "" for found in _COMMENT.finditer(match["comments"])}
        line = text.count("\n", 0, match.start("indent")) + 1
        found.append(Block(str(path.relative_to(ROOT)), line, match["language"], body, said))
    return found
