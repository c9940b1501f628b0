"""Secure aggregation as messages: what the server sees of the sites' updates is their sum, and nothing else.

A site's end is in `site.py`, the server's in `server/secure_sum.py`, the arithmetic in `masking.py`; here is what other
runs look at, too. The server asks in four steps:

    query.keys    a number for the site, and a name for this attempt  →  public keys
    query.shares  public keys of others                               →  pieces of its secrets in a letter for each
    train         letters from others, and the adapter                →  scores, and its update, masked
    query.unmask  whose update came, and whose did not                →  pieces of their secrets

Between them a site's secrets are in the memory of its SuperNode, in Flower's `context.state`. Sites are numbered anew
in each attempt, so that none can follow another over rounds. In each step some may drop out: as long as more than half
of those that a site shares with stay, the sum is that of those whose update came. Flower 1.31 has a SecAgg+ of its own,
which can't be had here: docs/security.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from flwr.app import ConfigRecord

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.exchange.records import ExchangeError

MASKED = "masked"
"""The name of what travels instead of the adapter's tensors."""
ANSWERS = {
    "keys": frozenset({"public"}),
    "shares": frozenset({"to", "letters", "of", "digests", "seed"}),
    "unmask": frozenset({"of", "pieces"}),
}
"""What a site answers in the steps between."""

Memory = MutableMapping[str, ConfigRecord]
"""Where a site keeps its secrets between the steps: the records of Flower's `context.state`."""


class MaskingError(ValueError):
    """What an honest round does not have; the text says what in one line."""


class LetterError(MaskingError):
    """A letter that can't be opened; `sender` is whose it is."""

    def __init__(self, sender: str, why: str) -> None:
        super().__init__(f"the pieces from {one_line(sender, 64)} {why}")
        self.sender = sender


def paired(record: Mapping[str, Any], names: str, values: str) -> dict[str, bytes]:
    """Two lists of a record as one mapping."""
    lists = record[names], record[values]
    for found, kind in zip(lists, (str, bytes), strict=True):
        if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
            raise ExchangeError(f"{names} and {values} are not what they should be")
    return dict(zip(*lists, strict=True))
