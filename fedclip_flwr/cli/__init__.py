"""The command `fedclip`. Options and help only: the work is in other wings, imported when a command runs.

May import everything but the apps.
"""

from fedclip_flwr.cli import learning, looking, sites, using
from fedclip_flwr.cli.common import app

__all__ = ["app", "learning", "looking", "sites", "using"]
