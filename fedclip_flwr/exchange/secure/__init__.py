"""Secure aggregation: the protocol, its arithmetic, and the site's side. The server's side is in `server/`."""
