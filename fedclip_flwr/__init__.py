"""One CLIP for the images of several sites, without moving one image."""

__version__ = "0.1.0"
