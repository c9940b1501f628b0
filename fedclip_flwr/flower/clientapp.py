"""Names that a ClientApp needs and Flower does not make public."""

from __future__ import annotations

from flwr.clientapp.typing import ClientAppCallable as ClientAppCallable  # the type of a mod's third argument
from flwr.common.constant import ErrorCode  # the codes that `flwr.app.Error` takes

RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
"""The code of an error that a site answers with; Flower's own when a ClientApp raises."""
