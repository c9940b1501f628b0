"""The output of runs: folder, checkpoints, history, terminal, lists, watching, trackers.

May import everything up to site and server.
"""

from fedclip_flwr.runs.arguments import read_settings
from fedclip_flwr.runs.history import Run

__all__ = ["Run", "read_settings"]
