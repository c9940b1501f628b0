"""The server's side: the loop over rounds, the nodes, the strategy, averaging, robust rules, noise, the secure sum.

Knows nothing of a site's side. May import: base, learning, data, flower, features, exchange.
"""

from fedclip_flwr.server.results import Outcome, RoundResult, RunState

__all__ = ["Outcome", "RoundResult", "RunState"]
