"""One site's side: what it holds, what it needs to answer a message, what it learns in a round.

Knows nothing of the server. May import: base, learning, data, flower, features, exchange.
"""

from fedclip_flwr.site.context import OpenedContext, SiteContext, open_context
from fedclip_flwr.site.holdings import Site

__all__ = ["OpenedContext", "Site", "SiteContext", "open_context"]
