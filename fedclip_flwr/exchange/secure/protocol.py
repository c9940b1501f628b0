"""Secure aggregation as messages: the server sees the sum of the sites' updates, and nothing else of them.

With `one-round`, the sites' sums take the place of their updates.

The site's side is in `site.py`, the server's in `server/secure_sum.py`, the arithmetic in `masking.py`. This module has
what other runs need too. The server asks in four steps:

    query.keys    a number for the site, and a name for this attempt  →  public keys
    query.shares  public keys of others                               →  pieces of its secrets in a letter for each
    train         letters from others, and the adapter                →  scores, and its update or sums, masked
    query.unmask  whose update arrived, and whose did not             →  pieces of their secrets

Between the steps a site's secrets are in the memory of its SuperNode, in Flower's `context.state`. Each attempt numbers
the sites anew, so that no site can track another over rounds. Sites may drop out in any step: as long as more than half
of those that a site shares with stay, the result is the sum of the updates that arrived. Flower 1.31 has its own
SecAgg+, which can't be used here: docs/security.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from flwr.app import ConfigRecord

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.exchange.records import ExchangeError

MASKED = "masked"
"""The name of the masked vector, which is sent instead of the adapter's tensors."""
ANSWERS = {
    "keys": frozenset({"public"}),
    "shares": frozenset({"to", "letters", "of", "digests", "seed"}),
    "unmask": frozenset({"of", "pieces"}),
}
"""The keys of a site's answers in the three steps besides `train`."""

Memory = MutableMapping[str, ConfigRecord]
"""Where a site keeps its secrets between steps: the records of Flower's `context.state`."""


class MaskingError(ValueError):
    """A violation of the protocol; the text describes it in one line."""


class LetterError(MaskingError):
    """A letter that can't be opened; `sender` wrote it."""

    def __init__(self, sender: str, why: str) -> None:
        super().__init__(f"the pieces from {one_line(sender, 64)} {why}")
        self.sender = sender


def paired(record: Mapping[str, Any], names: str, values: str) -> dict[str, bytes]:
    """Two lists of a record, of keys and of values, as one mapping."""
    lists = record[names], record[values]
    for found, kind in zip(lists, (str, bytes), strict=True):
        if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
            raise ExchangeError(f"malformed lists: {names}, {values}")
    return dict(zip(*lists, strict=True))
