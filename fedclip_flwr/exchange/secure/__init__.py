"""Secure aggregation: the protocol, its arithmetic, and a site's end. The server's end is in `server/`."""
