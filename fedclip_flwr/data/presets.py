"""Well-known data sets under their usual names, from any origin.

A folder or data set with the domains and classes of a preset gets the preset's spelling of them. So the same images
are divided in the same way, whether they come from the hub or from an unpacked folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedclip_flwr.data.base import Picture, Source


@dataclass(frozen=True)
class Preset:
    """`domains` maps each domain to its other names; `hub_id` is empty if the hub does not have the data set."""

    hub_id: str
    domains: Mapping[str, tuple[str, ...]]
    class_names: tuple[str, ...]
    prompt: str = "a picture of a {}"


OFFICE_HOME = """
Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch
Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet Kettle
Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil Postit_Notes
Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon TV Table
Telephone ToothBrush Toys Trash_Can Webcam
"""
PRESETS = {
    "pacs": Preset(
        "flwrlabs/pacs",
        {"art_painting": ("art",), "cartoon": (), "photo": (), "sketch": ()},
        ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    ),
    "vlcs": Preset(
        "",
        {"Caltech101": ("caltech",), "LabelMe": (), "SUN09": ("sun",), "VOC2007": ("voc", "pascal")},
        ("bird", "car", "chair", "dog", "person"),
    ),
    "office-home": Preset(
        "flwrlabs/office-home",
        {"Art": (), "Clipart": (), "Product": (), "Real_World": ("real",)},
        tuple(OFFICE_HOME.split()),
    ),
}


def normalized_name(name: str) -> str:
    """The name without case, spaces, _ and -, equal for different spellings."""
    return re.sub(r"[\s_-]", "", name).casefold()


def fitting(domains: Sequence[str], class_names: Sequence[str]) -> Preset | None:
    """The preset with exactly these classes that has all of these domains, or None."""
    for preset in PRESETS.values():
        if sorted(map(normalized_name, class_names)) != sorted(map(normalized_name, preset.class_names)):
            continue
        names = [_name(domain, preset) for domain in domains]
        if None not in names and len(set(names)) == len(names):
            return preset
    return None


def _name(domain: str, preset: Preset) -> str | None:
    return next(
        (
            own
            for own, others in preset.domains.items()
            if normalized_name(domain) in map(normalized_name, (own, *others))
        ),
        None,
    )


class Canonical:
    """A source with the preset's spelling of its domains and classes."""

    def __init__(self, source: Source, preset: Preset) -> None:
        self._source = source
        self._own = {_name(domain, preset) or domain: domain for domain in source.domains}
        self.domains = tuple(sorted(self._own))
        spelling = {normalized_name(name): name for name in preset.class_names}
        self.class_names = tuple(spelling[normalized_name(name)] for name in source.class_names)

    def content(self, domain: str) -> str:
        return self._source.content(self._own[domain])

    def count(self, domain: str) -> int:
        return self._source.count(self._own[domain])

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        return self._source.pictures(self._own[domain], start, stop)
