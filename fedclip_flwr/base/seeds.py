"""Seeds that follow from what they are for."""

from __future__ import annotations

import hashlib


def seed_of(*parts: str | int) -> int:
    """A seed that follows from the parts alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
