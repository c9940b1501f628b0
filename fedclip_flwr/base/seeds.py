"""Seeds derived from their purpose."""

from __future__ import annotations

import hashlib


def seed_of(*parts: str | int) -> int:
    """A seed derived from the parts alone, identical on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
