"""A message's metadata set in place: Flower lets only grids and SuperLinks do so, and has no public way."""

from __future__ import annotations

from flwr.app import Message


def set_metadata(message: Message, **fields: object) -> None:
    """Sets fields of the metadata by their public names, such as `src_node_id`."""
    message.metadata.__dict__.update({f"_{name}": value for name, value in fields.items()})
