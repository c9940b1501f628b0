"""The small CLIP that comes with the package, and the script that made it. The script may import data."""
