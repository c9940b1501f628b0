"""Images in a folder: `domain/class/image`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from fedclip_flwr import content
from fedclip_flwr.errors import UserError

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder:
    """A tree `domain/class/image`. Class names are those of the folders of all domains, in sorted order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            raise UserError(f"data = 'folder:{root}': there is no such folder")
        self._files: dict[str, list[tuple[str, str]]] = {}
        for domain in _folders(root):
            files = [
                (f"{domain}/{label}/{name}", label)
                for label in _folders(root / domain)
                for name in sorted(os.listdir(root / domain / label))
                if name.lower().endswith(ENDINGS) and not name.startswith(".")
            ]
            if files:
                self._files[domain] = files
        if not self._files:
            raise UserError(
                f"data = 'folder:{root}': no images there; expected domain/class/image with {', '.join(ENDINGS)}"
            )
        self.class_names = tuple(sorted({label for files in self._files.values() for _, label in files}))
        if len(self.class_names) < 2:
            raise UserError(
                f"data = 'folder:{root}': only one class ({self.class_names[0]}) there; expected domain/class/image "
                "with at least two classes"
            )
        self.domains = tuple(sorted(self._files))

    def content(self, domain: str, memory: Path) -> str:
        """Of the images, and of the class numbers that they have in this tree."""
        files = self._files[domain]
        numbers = ",".join(str(self.class_names.index(label)) for _, label in files)
        return content.digest(content.of_files(self.root, [name for name, _ in files], memory), numbers)

    def count(self, domain: str) -> int:
        return len(self._files[domain])

    def images(self, domain: str) -> Iterator[tuple[Image.Image | None, int]]:
        for name, label in self._files[domain]:
            yield _open(self.root / name), self.class_names.index(label)


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _open(path: Path) -> Image.Image | None:
    """The image upright and in RGB; None if it can't be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise whatever they like on damaged files
        log.info("left out %s: %s", path, str(error) or type(error).__name__)
        return None
