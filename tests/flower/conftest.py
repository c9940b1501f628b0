"""Files whose names end with a line of Flower are for that line only."""

from __future__ import annotations

from fedclip_flwr.flower import lines

collect_ignore_glob = [f"*_{line.name}.py" for line in lines.LINES if line is not lines.line()]
