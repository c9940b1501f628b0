"""What a site does in a run."""

from __future__ import annotations

TRAIN, HOLDOUT = ROLES = ("train", "holdout")
"""What a site does: it trains, or it only evaluates, and what it holds is unseen."""
