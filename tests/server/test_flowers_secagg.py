"""Why secure aggregation is not Flower's own: what its parts in 1.31 do. One day they may be good: then this fails."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState, _unmask, secaggplus_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.workflow import SecAggPlusWorkflow


def test_its_workflow_takes_no_context_of_todays_apps() -> None:
    with pytest.raises(TypeError, match="Expect a LegacyContext, but get Context"):
        SecAggPlusWorkflow(3, 2)(None, Context(1, 1, {}, RecordDict(), {}))  # type: ignore[arg-type]


def test_its_mod_takes_no_reply_of_todays_apps() -> None:
    state = ConfigRecord(SecAggPlusState(current_stage=Stage.SHARE_KEYS, nid=1, threshold=1).to_dict())
    context = Context(1, 1, {}, RecordDict({RECORD_KEY_STATE: state}), {})
    asked = {Key.STAGE: Stage.COLLECT_MASKED_VECTORS, Key.CIPHERTEXT_LIST: [], Key.SOURCE_LIST: []}
    message = Message(RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(asked)}), 1, "train")  # type: ignore[arg-type]
    reply = RecordDict({"arrays": ArrayRecord([np.zeros(3)]), "metrics": MetricRecord({"num-examples": 1})})
    with pytest.raises(KeyError, match=r"fitres\.parameters"):
        secaggplus_mod(message, context, lambda asked, _: Message(reply, reply_to=asked))


def test_its_masks_have_32_bits_at_most() -> None:
    """Seeds that are the same when their parts of four bytes are XORed make the same mask."""
    seed = bytes(range(32))
    short = np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")).tobytes() + bytes(28)
    assert np.array_equal(pseudo_rand_gen(seed, 2**32, [(100,)])[0], pseudo_rand_gen(short, 2**32, [(100,)])[0])


def test_its_sites_reveal_both_secrets_of_one() -> None:
    state = SecAggPlusState(nid=1, threshold=2)
    state.rd_seed_share_dict, state.sk1_share_dict = {1: b"seed 1", 2: b"seed 2"}, {1: b"key 1", 2: b"key 2"}
    asked = ConfigRecord({Key.ACTIVE_NODE_ID_LIST: [1, 2], Key.DEAD_NODE_ID_LIST: [2]})
    revealed = _unmask(state, asked)
    assert revealed[Key.SHARE_LIST] == [b"seed 1", b"seed 2", b"key 2"]
