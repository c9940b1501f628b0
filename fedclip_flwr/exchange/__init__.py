"""The messages between sites and server, and their checks: records, session, codecs, links, privacy, masks.

May import: base, learning, data, flower.
"""

from fedclip_flwr.exchange.codecs import Codec
from fedclip_flwr.exchange.records import ExchangeError, Hello, Progress, Report, Task
from fedclip_flwr.exchange.session import Session

__all__ = ["Codec", "ExchangeError", "Hello", "Progress", "Report", "Session", "Task"]
