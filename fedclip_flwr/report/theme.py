"""The colours of reports. Each has a role, and a shade in the light and in the dark theme.

Blue, orange and green differ for any colour vision, and as text have a contrast of 4.5 or more.
"""

from __future__ import annotations

STEPS = 8
"""Shades of a scale from 0 to 1, and of each side of a scale around 0."""

_BLUES = ("#eef3fa", "#dbe7f6", "#c2d7f0", "#a3c3e8", "#7da9dc", "#5289cb", "#2e69b3", "#174b8f")
_BLUES_IN_THE_DARK = ("#1b2430", "#1e2d40", "#223953", "#28496d", "#315f90", "#37699f", "#62a0e0", "#93c4fb")
_REDS = ("#faf1ec", "#f7e3d8", "#f3d1bd", "#ecb898", "#e1976c", "#d07342", "#b35221", "#8a3911")
_REDS_IN_THE_DARK = ("#2a211d", "#38281f", "#4a3022", "#633c26", "#824d2c", "#aa6638", "#d5874f", "#fab27f")

LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "line": "#d8dce1",
    "zero": "#7a828c",
    "seen": "#1f63b8",
    "unseen": "#b8500f",
    "own": "#0d7a63",
    "strong": "#fefefe",
    **{f"more-{step}": shade for step, shade in enumerate(_BLUES)},
    **{f"less-{step}": shade for step, shade in enumerate(_REDS)},
}
DARK = {
    "paper": "#14171c",
    "ink": "#e7eaee",
    "soft": "#a3acb7",
    "line": "#343b45",
    "zero": "#8e98a4",
    "seen": "#6cabf7",
    "unseen": "#f0935a",
    "own": "#4cc3a5",
    "strong": "#0c0f13",
    **{f"more-{step}": shade for step, shade in enumerate(_BLUES_IN_THE_DARK)},
    **{f"less-{step}": shade for step, shade in enumerate(_REDS_IN_THE_DARK)},
}


def variables(theme: dict[str, str]) -> str:
    """The colours of the theme as CSS."""
    return " ".join(f"--{role}: {colour};" for role, colour in theme.items())
