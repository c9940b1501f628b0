"""The foundation of all other wings: settings, errors, content hashes, files, the store, seeds, text.

Imports no other wing, and torch only where tensors are stored.
"""

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings

__all__ = ["Settings", "UserError", "__version__"]
__version__ = "0.1.0"
