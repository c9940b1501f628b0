"""Flower's secret sharing, encryption and key pairs, on which secure aggregation builds.

Flower's public SecAgg+ workflow can't be used here (docs/security.md says why), and its parts have no public names.
"""

from __future__ import annotations

from flwr.common.secure_aggregation.crypto.shamir import combine_shares as combine_shares  # the workflow keeps it
from flwr.common.secure_aggregation.crypto.shamir import create_shares as create_shares  # the workflow keeps it
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt as decrypt  # the workflow keeps it
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt as encrypt  # the workflow keeps it
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    generate_shared_key as generate_shared_key,  # the workflow keeps it
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs as generate_key_pairs  # for the same curve
