from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedclip_flwr.exchange.secure.masking import (
    PUBLIC,
    UINT32,
    UINT64,
    Numbers,
    NumberType,
    dequantise,
    finest_step,
    quantise,
    signed,
    unsigned,
)
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.exchange.secure.protocol import MaskingError
from tests.exchange.secure.rounds import CONTEXT, TEN, sent_on, until_vectors


def masked_vectors(size: int, numbers: Mapping[str, int], dtype: NumberType = UINT32) -> dict[str, Numbers]:
    """By each of them, of the same number throughout."""
    members = {name: Member.begin(name, CONTEXT) for name in numbers}
    publics = {name: member.public for name, member in members.items()}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    return {name: member.mask(letters[name], np.full(size, numbers[name], dtype)) for name, member in members.items()}


@pytest.mark.parametrize("dtype", [UINT32, UINT64], ids=str)
def test_a_masked_vector_looks_like_noise_whatever_is_in_it(dtype: NumberType) -> None:
    """Chi-square over bytes: 255 on average, with a standard deviation of 22.6; six of them are one in a billion."""
    size = 100_000
    masked = masked_vectors(size, {"a": 0, "b": 0, "c": 12345, "d": np.iinfo(dtype).max}, dtype)
    for vector in masked.values():
        assert len(np.unique(vector)) > 0.99 * size
        for byte in vector.view(np.uint8).reshape(size, -1).T:
            counts = np.bincount(byte, minlength=256)
            assert abs(((counts - size / 256) ** 2).sum() / (size / 256) - 255) < 6 * 22.6
    together = np.corrcoef([*masked.values(), np.roll(masked["a"], 1), np.arange(size)])
    assert np.abs(together - np.eye(len(together))).max() < 6 / size**0.5


def test_without_reveals_the_total_says_nothing_of_the_sum() -> None:
    """All pairs' masks are gone from it, and each member's own is still there."""
    names = dict.fromkeys("abcd", 1)
    wrong = sum(masked_vectors(10_000, names).values(), np.zeros(10_000, np.uint32))
    assert np.count_nonzero(wrong == 4) <= 1
    collector, _ = until_vectors(TEN, {}, 20)
    with pytest.raises(MaskingError, match="0 members revealed their piece of site-0, expected 6"):
        collector.sum()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869, for 32 bytes and no salt."""
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\1", "sha256")


def keystream(secret: bytes, info: bytes, size: int, width: int) -> list[int]:
    """AES-256 of block after block of a counter, as numbers of `width` bytes."""
    blocks = b"".join(block.to_bytes(16, "big") for block in range(size * width // 16 + 1))
    stream = Cipher(algorithms.AES256(hkdf(secret, info)), modes.ECB()).encryptor().update(blocks)
    return [int.from_bytes(stream[width * i : width * (i + 1)], "little") for i in range(size)]


@pytest.mark.parametrize("dtype", [UINT32, UINT64], ids=str)
def test_masks_are_keystream_of_aes_in_counter_mode(dtype: NumberType) -> None:
    members = {name: Member.begin(name, "ctx") for name in "abc"}
    publics = {name: member.public for name, member in members.items()}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    seed, private = (
        members["b"].seed,
        ec.derive_private_key(int.from_bytes(members["b"].private[0], "big"), ec.SECP384R1()),
    )

    def pair(other: str, info: bytes) -> list[int]:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), publics[other][:PUBLIC])
        return keystream(
            base64.urlsafe_b64encode(hkdf(private.exchange(ec.ECDH(), point), b"")), info, 9, dtype.itemsize
        )

    own = keystream(seed, b'["own", "ctx", "b"]', 9, dtype.itemsize)
    with_a, with_c = pair("a", b'["pair", "ctx", "a", "b"]'), pair("c", b'["pair", "ctx", "b", "c"]')
    masked = members["b"].mask(letters["b"], np.arange(9, dtype=dtype))
    size = 2 ** (8 * dtype.itemsize)
    assert masked.tolist() == [(i + own[i] - with_a[i] + with_c[i]) % size for i in range(9)]


def test_the_same_vector_is_masked_anew_in_each_round() -> None:
    first, second = (masked_vectors(1000, {"a": 1, "b": 2, "c": 3}) for _ in range(2))
    assert all(np.count_nonzero(first[name] == second[name]) <= 1 for name in first)


def test_quantised_by_hand() -> None:
    """The nearest multiple, of two the even one; cut off at the bound; below zero as two's complement."""
    update = np.array([0.0, 0.25, 0.3, 0.375, 0.125, -0.25, -0.3, 5.0, -5.0], np.float32)
    numbers = quantise(update, step=0.25, bound=2.0)
    assert numbers.dtype == np.uint32
    assert numbers.tolist() == [0, 1, 1, 2, 0, 2**32 - 1, 2**32 - 1, 8, 2**32 - 8]
    assert dequantise(numbers, 0.25).tolist() == [0, 0.25, 0.25, 0.5, 0, -0.25, -0.25, 2, -2]
    total = numbers + quantise(-2 * update, step=0.25, bound=2.0)
    assert dequantise(total, 0.25).tolist() == [0, -0.25, -0.25, -0.25, -0.25, 0.25, 0.25, 0, 0]
    for wrong in (np.nan, np.inf):
        with pytest.raises(MaskingError, match="not finite"):
            quantise(np.array([wrong]), 0.25, 2.0)


def test_sums_are_numbers_modulo_2_to_the_64_in_the_order_of_their_names() -> None:
    """Below zero as two's complement; a total comes out exactly, also where numbers on the way wrap around."""
    sums = [
        {"b": torch.tensor([[1, -1], [-(2**61), 2**61]]), "a": torch.tensor([-3])},
        {"b": torch.tensor([[-5, 0], [-(2**61), 2**61 - 1]]), "a": torch.tensor([2])},
    ]
    numbers = [unsigned(one) for one in sums]
    assert numbers[0].dtype == UINT64
    assert numbers[0].tolist() == [2**64 - 3, 1, 2**64 - 1, 2**64 - 2**61, 2**61]
    shift = np.full(5, 2**63 + 12345, np.uint64)
    total = signed((numbers[0] + shift) + (numbers[1] - shift), sums[0])
    assert total["a"].tolist() == [-1]
    assert total["b"].tolist() == [[-4, -1], [-(2**62), 2**62 - 1]]


def test_the_step_is_the_finest_with_which_no_sum_overflows() -> None:
    assert finest_step(1, 1.0) == 2.0**-30  # at 2⁻³¹ the bound itself would be 2³¹
    assert finest_step(3, 1.0) == 2.0**-29
    assert finest_step(10, 0.5) == 2.0**-28
    assert finest_step(1000, 2147483.647) == 2.0  # 2³¹ − 1 in all, but not when each is rounded up
    assert finest_step(4, 2.0**29 - 0.25) == 2.0  # rounded up, four of them are 2³¹
    for members in (1, 3, 10, 1000):
        for bound in (1e-6, 0.1, 1.0, 8.0, 3e4):
            step = finest_step(members, bound)
            most = quantise(np.array([bound, -bound]), step, bound).view(np.int32).astype(np.int64) * members
            assert 2**29 <= most[0] < 2**31
            assert most[1] == -most[0]
            mean = dequantise(most.astype(np.int32).view(np.uint32), step) / members
            assert np.abs(mean - [bound, -bound]).max() <= step / 2


def test_the_mean_of_updates_is_as_near_as_their_steps() -> None:
    random = np.random.default_rng(5)
    updates = {name: random.normal(0, 0.01, 50).astype(np.float32) for name in TEN}
    step = finest_step(10, 0.1)
    numbers = sum((quantise(update, step, 0.1) for update in updates.values()), np.zeros(50, np.uint32))
    assert (
        np.abs(dequantise(numbers, step) / 10 - np.mean(list(updates.values()), axis=0, dtype=np.float64)).max() < step
    )
