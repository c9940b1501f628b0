"""Pages from the templates beside. No text can leave its place in them, and nothing refers to another place."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedclip_flwr.base import text
from fedclip_flwr.base.errors import shown
from fedclip_flwr.report.theme import DARK, LIGHT, variables

THUMBNAIL = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def render(template: str, **values: Any) -> str:
    """A complete, self-contained page. All values are escaped, and get a � for each control character."""
    templates = Environment(
        loader=PackageLoader("fedclip_flwr.report"),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else shown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"counted": text.counted, "thousands": "{:,}".format}
    templates.tests["thumbnail"] = lambda image: THUMBNAIL.fullmatch(str(image)) is not None
    return templates.get_template(template).render(light=variables(LIGHT), dark=variables(DARK), **values)


def gain(zero: float | None, adapted: float | None) -> str:
    """The difference of the rounded figures, with a true minus sign."""
    return text.gain(zero, adapted).replace("-", "−")


def setting(value: object) -> str:
    """A setting's value as given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
