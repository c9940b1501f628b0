"""Sources of images, class names and prompts, and which simulated site holds which images.

May import: base.
"""

from fedclip_flwr.data.base import Columns, Picture, Source
from fedclip_flwr.data.holdout import held_out, pick_holdout
from fedclip_flwr.data.opening import open_source
from fedclip_flwr.data.vocabulary import Vocabulary

__all__ = ["Columns", "Picture", "Source", "Vocabulary", "held_out", "open_source", "pick_holdout"]
