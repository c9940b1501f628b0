"""One site's side: its data, its context for answering a message, its training in a round.

Knows nothing of the server. May import: base, learning, data, flower, features, exchange.
"""

from fedclip_flwr.site.context import OpenedContext, SiteContext, open_context
from fedclip_flwr.site.holdings import Site

__all__ = ["OpenedContext", "Site", "SiteContext", "open_context"]
