"""Private names of Flower that a ClientApp needs."""

from __future__ import annotations

from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable  # the type of a mod's third argument
from flwr.common.constant import ErrorCode  # the codes that `flwr.app.Error` takes

RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
"""The code of a site's error reply: the one that Flower uses if a ClientApp raises."""
