"""Refuses a task that is not a ClientApp's: a site's SuperNode starts this in place of Flower's other programs."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.exit(
        "this site runs only its installed ClientApp, and the server asked for something else: ask the server's "
        "administrator which app the run has"
    )
