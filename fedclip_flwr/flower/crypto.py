"""Flower's secret sharing, encryption and key pairs, used by secure aggregation.

Flower's public SecAgg+ workflow can't be used here (docs/security.md says why), and its parts have no public names.
"""

from __future__ import annotations

from flwr.common.secure_aggregation.crypto.shamir import combine_shares as combine_shares  # private to the workflow
from flwr.common.secure_aggregation.crypto.shamir import create_shares as create_shares  # private to the workflow
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt as decrypt  # private to the workflow
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt as encrypt  # private to the workflow
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    generate_shared_key as generate_shared_key,  # private to the workflow
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs as generate_key_pairs  # for the same curve
