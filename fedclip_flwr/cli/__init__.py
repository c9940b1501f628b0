"""The command `fedclip`. What a command does lives in the package; what brings torch is imported when it is called."""

from fedclip_flwr.cli import learning, looking, sites
from fedclip_flwr.cli.common import app

__all__ = ["app", "learning", "looking", "sites"]
