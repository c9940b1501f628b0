"""The roles that a site can have in a run."""

from __future__ import annotations

TRAIN, HOLDOUT = ROLES = ("train", "holdout")
"""A site trains, or it only evaluates on images that no site trains on."""
