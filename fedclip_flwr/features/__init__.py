"""A frozen CLIP and its image features, computed once: encoded, stored, or read from a feature folder.

The only wing that loads models with transformers. May import: base, learning, data.
"""

from fedclip_flwr.features.base import Features
from fedclip_flwr.features.clip import Clip
from fedclip_flwr.features.encoded import Encoded, Pixels
from fedclip_flwr.features.folder import FeatureFolder
from fedclip_flwr.features.opening import open_features

__all__ = ["Clip", "Encoded", "FeatureFolder", "Features", "Pixels", "open_features"]
