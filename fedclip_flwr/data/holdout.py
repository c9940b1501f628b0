"""The domains that no site trains on."""

from __future__ import annotations

from collections.abc import Sequence

from fedclip_flwr.base import UserError
from fedclip_flwr.data.presets import normalized_name


def pick_holdout(holdout: str, domains: tuple[str, ...]) -> str | None:
    """The domain that no site trains on, or several joined by +; None if there is none.

    `holdout` is the setting. Without `domains` here, any name is valid.
    """
    if not holdout:
        return None
    if not domains:
        return None if holdout == "auto" else holdout
    chosen = domains[-1] if holdout == "auto" and len(domains) > 1 else holdout
    if chosen == "auto":
        return None
    named = held_out(chosen, domains)
    if lacking := {*map(normalized_name, _parts(chosen, domains))} - {*map(normalized_name, named)}:
        what = f"there is no {min(lacking)}" if "+" in chosen else "there is no such domain"
        raise UserError(f"holdout = {holdout!r}: {what}; the data has {', '.join(domains)}")
    if len(named) == len(domains):
        what = "it is the only domain" if len(domains) == 1 else "these are all domains"
        raise UserError(f"holdout = {holdout!r}: {what}, so nothing is left to train on")
    return "+".join(named)


def held_out(holdout: str | None, domains: Sequence[str]) -> list[str]:
    """The domains that `holdout` names."""
    wanted = {normalized_name(name) for name in _parts(holdout or "", domains)}
    return [domain for domain in domains if normalized_name(domain) in wanted]


def _parts(holdout: str, domains: Sequence[str]) -> list[str]:
    """The names in `holdout`, which are joined by +; a domain's own name may contain a +."""
    if normalized_name(holdout) in map(normalized_name, domains):
        return [holdout]
    return [part.strip() for part in holdout.split("+") if part.strip()]
