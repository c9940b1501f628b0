from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedclip_flwr.masking import (
    DIGEST,
    PRIVATE_PIECE,
    PUBLIC,
    SEED_PIECE,
    Gathering,
    LetterError,
    MaskingError,
    Member,
    Numbers,
    Shares,
    dequantise,
    finest_step,
    neighbours,
    quantise,
    threshold,
)

TEN = [f"site-{number}" for number in range(10)]
CONTEXT = "run 7, round 3"
STEPS = ("keys", "shares", "vectors", "reveals")


def vector(name: str, size: int = 50) -> Numbers:
    """Numbers that follow from the name."""
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * size), "<u4").astype(np.uint32)


def total(names: Iterable[str], size: int = 50) -> list[int]:
    return [sum(column) % 2**32 for column in zip(*(vector(name, size).tolist() for name in names), strict=True)]


def travelled(member: Member) -> Member:
    """As the next process finds it: out of Flower's own serialisation."""
    record = recorddict_to_proto(RecordDict({"masking": ConfigRecord(member.dump())})).SerializeToString()
    return Member.load(recorddict_from_proto(type(recorddict_to_proto(RecordDict())).FromString(record))["masking"])


def sent_on(shares: Mapping[str, Shares]) -> dict[str, dict[str, bytes]]:
    """For each member what the others have for it, as the server sends it on."""
    return {name: {sender: of.to(name) for sender, of in shares.items() if sender != name} for name in shares}


def until_vectors(names: Iterable[str], gone: Mapping[str, str], most: int) -> tuple[Gathering, dict[str, Member]]:
    """A round in which the masked vectors have come; `gone` tells who drops out in which step."""
    gathering, members = Gathering(CONTEXT, 50, most), {}
    for name in names:
        if gone.get(name) != "keys":
            members[name] = Member.begin(name, CONTEXT)
            gathering.join(name, members[name].public)
    for name, publics in gathering.neighbourhoods().items():
        if gone.get(name) != "shares":
            members[name] = travelled(members[name])
            gathering.share(name, members[name].share(publics))
    for name, letters in gathering.letters().items():
        if gone.get(name) != "vectors":
            members[name] = travelled(members[name])
            gathering.add(name, members[name].mask(letters, vector(name)))
    return gathering, members


def summed(names: Iterable[str], gone: Mapping[str, str], most: int = 20) -> list[int]:
    gathering, members = until_vectors(names, gone, most)
    for name, (survivors, dropped) in gathering.lists().items():
        if gone.get(name) != "reveals":
            gathering.reveal(name, travelled(members[name]).reveal(survivors, dropped))
    return list(gathering.sum().tolist())


@pytest.mark.parametrize(
    "gone",
    [
        {},
        *({"site-0": step, "site-6": step} for step in STEPS),
        {"site-0": "vectors", "site-6": "vectors", "site-1": "reveals", "site-9": "reveals"},
        {"site-4": "keys", "site-8": "shares", "site-3": "vectors", "site-5": "reveals"},
    ],
    ids=lambda gone: "-".join(gone.values()) or "nobody",
)
def test_the_sum_is_that_of_those_whose_vector_came_whoever_drops_out(gone: dict[str, str]) -> None:
    assert summed(TEN, gone) == total(name for name in TEN if gone.get(name, "reveals") == "reveals")


def test_three_members_are_enough_and_one_of_them_may_not_reveal() -> None:
    assert summed("abc", {"b": "reveals"}) == total("abc")


def test_forty_in_a_ring() -> None:
    names = [f"site-{number}" for number in range(40)]
    assert summed(names, {}, most=9) == total(names)
    gone = {"site-3": "keys", "site-30": "shares", "site-17": "vectors", "site-22": "vectors", "site-9": "reveals"}
    there = [name for name in names if gone.get(name, "reveals") == "reveals"]
    assert summed(names, gone, most=11) == total(there)


def test_who_has_too_few_left_near_it_does_not_go_on() -> None:
    """Five of the eight next to `lonely` do not share: it could not be unmasked, and the rest goes on without it."""
    names = [f"site-{number}" for number in range(40)]
    gathering, members = Gathering(CONTEXT, 50, most=9), {name: Member.begin(name, CONTEXT) for name in names}
    for name, member in members.items():
        gathering.join(name, member.public)
    publics = gathering.neighbourhoods()
    silent = sorted(publics["site-0"].keys() - {"site-0"})[:5]
    for name in publics.keys() - silent:
        gathering.share(name, members[name].share(publics[name]))
    letters = gathering.letters()
    assert "site-0" not in letters
    assert len(letters) >= 20
    for name, pieces in letters.items():
        gathering.add(name, members[name].mask(pieces, vector(name)))
    for name, lists in gathering.lists().items():
        gathering.reveal(name, members[name].reveal(*lists))
    assert gathering.sum().tolist() == total(letters)


def test_neighbours_are_each_others() -> None:
    names = [f"site-{number}" for number in range(40)]
    near = neighbours(names, 10, b"seed")
    assert near.keys() == set(names)
    assert all(len(near[name]) == 9 and name in near[name] for name in names)
    assert all(name in near[other] for name in names for other in near[name])
    assert near == neighbours(reversed(names), 10, b"seed")
    assert near != neighbours(names, 10, b"another")
    assert neighbours(names[:10], 10, b"seed") == dict.fromkeys(names[:10], frozenset(names[:10]))


def test_two_groups_of_a_threshold_have_a_member_in_common() -> None:
    assert [threshold(sharing) for sharing in (3, 4, 5, 10, 11)] == [2, 3, 3, 6, 6]


# What can be seen


def masked_vectors(size: int, numbers: Mapping[str, int]) -> dict[str, Numbers]:
    """By each of them, of the same number throughout."""
    members = {name: Member.begin(name, CONTEXT) for name in numbers}
    publics = {name: member.public for name, member in members.items()}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    return {
        name: member.mask(letters[name], np.full(size, numbers[name], np.uint32)) for name, member in members.items()
    }


def test_a_masked_vector_looks_like_noise_whatever_is_in_it() -> None:
    """Chi-square over bytes: 255 on average, with a standard deviation of 22.6; six of them are one in a billion."""
    size = 100_000
    masked = masked_vectors(size, {"a": 0, "b": 0, "c": 12345, "d": 2**32 - 1})
    for vector in masked.values():
        assert len(np.unique(vector)) > 0.99 * size
        for byte in range(4):
            counts = np.bincount((vector >> np.uint32(8 * byte)) & np.uint32(255), minlength=256)
            assert abs(((counts - size / 256) ** 2).sum() / (size / 256) - 255) < 6 * 22.6
    together = np.corrcoef([*masked.values(), np.roll(masked["a"], 1), np.arange(size)])
    assert np.abs(together - np.eye(len(together))).max() < 6 / size**0.5


def test_without_reveals_the_total_tells_nothing_of_the_sum() -> None:
    """All pairs' masks are gone from it, and each member's own is still there."""
    names = dict.fromkeys("abcd", 1)
    wrong = sum(masked_vectors(10_000, names).values(), np.zeros(10_000, np.uint32))
    assert np.count_nonzero(wrong == 4) <= 1
    gathering, _ = until_vectors(TEN, {}, 20)
    with pytest.raises(MaskingError, match="0 members revealed their piece of site-0, 6 must"):
        gathering.sum()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869, for 32 bytes and no salt."""
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\1", "sha256")


def keystream(secret: bytes, info: bytes, size: int) -> list[int]:
    """AES-256 of block after block of a counter."""
    blocks = b"".join(block.to_bytes(16, "big") for block in range(size // 4 + 1))
    stream = Cipher(algorithms.AES256(hkdf(secret, info)), modes.ECB()).encryptor().update(blocks)
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(size)]


def test_masks_are_keystream_of_aes_in_counter_mode() -> None:
    members = {name: Member.begin(name, "ctx") for name in "abc"}
    publics = {name: member.public for name, member in members.items()}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    seed, private = (
        members["b"].seed,
        ec.derive_private_key(int.from_bytes(members["b"].private[0], "big"), ec.SECP384R1()),
    )

    def pair(other: str, info: bytes) -> list[int]:
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), publics[other][:PUBLIC])
        return keystream(base64.urlsafe_b64encode(hkdf(private.exchange(ec.ECDH(), point), b"")), info, 9)

    own = keystream(seed, b'["own", "ctx", "b"]', 9)
    with_a, with_c = pair("a", b'["pair", "ctx", "a", "b"]'), pair("c", b'["pair", "ctx", "b", "c"]')
    masked = members["b"].mask(letters["b"], np.arange(9, dtype=np.uint32))
    assert masked.tolist() == [(i + own[i] - with_a[i] + with_c[i]) % 2**32 for i in range(9)]


def test_the_same_vector_is_masked_anew_in_each_round() -> None:
    first, second = (masked_vectors(1000, {"a": 1, "b": 2, "c": 3}) for _ in range(2))
    assert all(np.count_nonzero(first[name] == second[name]) <= 1 for name in first)


# What a member refuses


def five(step: str) -> tuple[dict[str, Member], dict[str, dict[str, bytes]]]:
    """Five members that are to take this step, and what has come for each."""
    members = {name: Member.begin(name, CONTEXT) for name in "abcde"}
    publics = {name: member.public for name, member in members.items()}
    if step == "shares":
        return members, {name: dict(publics) for name in members}
    letters = sent_on({name: member.share(publics) for name, member in members.items()})
    if step == "reveals":
        for name, member in members.items():
            member.mask(letters[name], vector(name))
    return members, letters


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda publics: [publics.pop(name) for name in "cde"], "2 members to share with, expected 3"),
        (lambda publics: publics.pop("a"), "own public keys"),
        (lambda publics: publics.update(a=publics["b"]), "own public keys"),
        (lambda publics: publics.update(b=publics["c"]), "two public keys are the same"),
        (lambda publics: publics.update(b=publics["b"][:PUBLIC] * 2), "two public keys are the same"),
        (lambda publics: publics.update(b=b"short"), "another size"),
        (lambda publics: publics.update(b=b"\2" + b"\xff" * (2 * PUBLIC - 1)), "no point of its curve"),
    ],
)
def test_sharing_is_refused(change: Callable[[dict[str, bytes]], object], why: str) -> None:
    members, publics = five("shares")
    sound = dict(publics["a"])
    change(publics["a"])
    with pytest.raises(MaskingError, match=why):
        members["a"].share(publics["a"])
    assert members["a"].share(sound).letters.keys() == set("bcde")  # what was refused has changed nothing


def tampered(letter: bytes) -> bytes:
    raw = bytearray(base64.urlsafe_b64decode(letter[: -2 * DIGEST]))
    raw[60] ^= 1
    return base64.urlsafe_b64encode(raw) + letter[-2 * DIGEST :]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda letters: letters.update(b=tampered(letters["b"])), "from b are damaged"),
        (lambda letters: letters.update(b=letters["c"]), "from b are damaged"),
        (lambda letters: letters.update(b=b""), "from b are damaged"),
        (lambda letters: letters.update(b=letters["b"][:-1] + b"x"), "from b have other digests than it told"),
        (lambda letters: letters.update(z=letters["b"]), "nothing was shared with: z"),
        (lambda letters: letters.update(a=letters["b"]), "nothing was shared with: a"),
        (lambda letters: [letters.pop(name) for name in "bcd"], "came of 2 members, expected 3"),
    ],
)
def test_masking_is_refused(change: Callable[[dict[str, bytes]], object], why: str) -> None:
    members, letters = five("vectors")
    sound = dict(letters["a"])
    change(letters["a"])
    with pytest.raises(MaskingError, match=why):
        members["a"].mask(letters["a"], vector("a"))
    assert len(members["a"].mask(sound, vector("a"))) == 50


def test_pieces_that_come_back_to_their_sender_or_are_of_another_round_are_refused() -> None:
    """The two have one key, whoever writes: so what is in them tells sender, receiver and round."""
    members = {name: Member.begin(name, CONTEXT) for name in "abc"}
    publics = {name: member.public for name, member in members.items()}
    sent = {name: member.share(publics) for name, member in members.items()}
    own = sent["a"].digests["b"]
    with pytest.raises(MaskingError, match="from b are of another round, sender or receiver"):
        members["a"].mask({"b": sent["a"].letters["b"] + own, "c": sent["c"].to("a")}, vector("a"))
    members["a"].context = "run 7, round 4"
    with pytest.raises(MaskingError, match="of another round, sender or receiver"):
        members["a"].mask({"b": sent["b"].to("a"), "c": sent["c"].to("a")}, vector("a"))


@pytest.mark.parametrize("numbers", [np.zeros(50, np.int32), np.zeros(50), np.zeros((5, 10), np.uint32)])
def test_other_numbers_are_refused(numbers: Numbers) -> None:
    members, letters = five("vectors")
    with pytest.raises(MaskingError, match="expected uint32 in one"):
        members["a"].mask(letters["a"], numbers)


@pytest.mark.parametrize(
    ("survivors", "dropped", "why"),
    [
        ("abcd", "de", "both pieces are asked of d"),
        ("abcz", "de", "never came: of z"),
        ("abc", "dz", "never came: of z"),
        ("ab", "cde", "2 members came, expected 3"),
        ("bcde", "a", "this member is not among"),
        ("bcde", "", "this member is not among"),
    ],
)
def test_revealing_is_refused(survivors: str, dropped: str, why: str) -> None:
    members, _ = five("reveals")
    with pytest.raises(MaskingError, match=why):
        members["a"].reveal(survivors, dropped)
    told = members["a"].reveal("abc", "de")
    assert {name: len(piece) for name, piece in told.items()} == {
        **dict.fromkeys("abc", SEED_PIECE),
        **dict.fromkeys("de", PRIVATE_PIECE),
    }


def test_each_step_is_taken_once_and_in_order() -> None:
    members, publics = five("shares")
    for_a = sent_on({name: member.share(publics[name]) for name, member in members.items()})["a"]
    steps: dict[str, Callable[[Member], object]] = {
        "shares": lambda member: member.share(publics["a"]),
        "vectors": lambda member: member.mask(for_a, vector("a")),
        "reveals": lambda member: member.reveal("abcde", ""),
    }
    members["a"] = travelled(members["a"])
    for now, after in (("vectors", "reveals"), ("reveals", "nothing")):
        for other in steps.keys() - {now}:
            with pytest.raises(MaskingError, match=f"asked for {other}, expected to be asked for {now}"):
                steps[other](travelled(members["a"]))
        steps[now](members["a"])
        members["a"] = travelled(members["a"])
        assert members["a"].step == after
    for step in steps.values():
        with pytest.raises(MaskingError, match="expected to be asked for nothing"):
            step(members["a"])


def test_secrets_are_forgotten_when_they_are_no_longer_needed_and_never_shown() -> None:
    members, _ = five("vectors")
    assert len({secret for member in members.values() for secret in (member.seed, *member.private)}) == 3 * 5
    secrets = [members["a"].seed, *members["a"].private]
    assert all(len(secret) >= 32 and secret.hex() not in repr(members["a"]) for secret in secrets)
    members, _ = five("reveals")
    assert (members["a"].seed, members["a"].private) == (b"", [])
    members["a"].reveal("abcde", "")
    assert not any(value for key, value in members["a"].dump().items() if key not in ("name", "context", "step"))


# What the server refuses


def test_what_comes_from_a_member_late_twice_or_wrong_is_refused() -> None:
    gathering, members = Gathering(CONTEXT, 50, 20), {name: Member.begin(name, CONTEXT) for name in "abcd"}
    for name, member in members.items():
        gathering.join(name, member.public)
    own = members["a"].public
    for public, why in (
        (b"short", "have 5 bytes, expected 98"),
        (b"\5" * 2 * PUBLIC, "no point"),
        (Member.begin("e", CONTEXT).public[:PUBLIC] * 2, "there already"),
        (Member.begin("e", CONTEXT).public[:PUBLIC] + own[:PUBLIC], "there already"),
    ):
        with pytest.raises(MaskingError, match=why):
            gathering.join("e", public)
    with pytest.raises(MaskingError, match="too late or twice"):
        gathering.join("a", members["a"].public)

    sent = {name: members[name].share(publics) for name, publics in gathering.neighbourhoods().items()}
    with pytest.raises(MaskingError, match="too late or twice"):
        gathering.join("e", Member.begin("e", CONTEXT).public)
    with pytest.raises(MaskingError, match="not for those"):
        gathering.share("a", sent["a"]._replace(letters={"b": sent["a"].letters["b"]}))
    with pytest.raises(MaskingError, match="not for those"):
        gathering.share("a", sent["a"]._replace(digests={"a": b""}))
    with pytest.raises(MaskingError, match="longer than 1000"):
        gathering.share("a", sent["a"]._replace(letters=dict.fromkeys("bcd", bytes(1001))))
    for wrong in ({"seed": b"x"}, {"digests": dict.fromkeys("abcd", b"x")}):
        with pytest.raises(MaskingError, match="digests have another size"):
            gathering.share("a", sent["a"]._replace(**wrong))
    with pytest.raises(MaskingError, match=r"vectors came .* from a member that was not asked"):
        gathering.add("a", np.zeros(50, np.uint32))
    for name in "abcd":
        gathering.share(name, sent[name])
    with pytest.raises(MaskingError, match="shares came too late, twice"):
        gathering.share("a", sent["a"])

    masked = {name: members[name].mask(letters, vector(name)) for name, letters in gathering.letters().items()}
    for other in (masked["a"][:-1], masked["a"].view(np.float32)):
        with pytest.raises(MaskingError, match=r"expected uint32\[50\]"):
            gathering.add("a", other)  # type: ignore[arg-type]
    for name in "abc":
        gathering.add(name, masked[name])
    for name in "az":
        with pytest.raises(MaskingError, match="vectors came too late, twice"):
            gathering.add(name, masked["a"])

    told = {name: members[name].reveal(*lists) for name, lists in gathering.lists().items()}
    with pytest.raises(MaskingError, match="vectors came too late"):
        gathering.add("d", masked["d"])
    with pytest.raises(MaskingError, match=r"reveals came .* from a member that was not asked"):
        gathering.reveal("d", told["a"])
    with pytest.raises(MaskingError, match="not those that were asked for"):
        gathering.reveal("a", {**told["a"], "d": told["a"]["a"]})
    for name in "ab":
        gathering.reveal(name, told[name])
    with pytest.raises(MaskingError, match="2 members revealed their piece of a, 3 must"):
        gathering.sum()
    gathering.reveal("c", told["c"])
    assert gathering.sum().tolist() == gathering.sum().tolist() == total("abc")


@pytest.mark.parametrize(("of", "damaged"), [("a", SEED_PIECE), ("a", 20), ("e", PRIVATE_PIECE), ("e", 20)])
def test_pieces_that_are_not_what_was_shared_are_found_out_and_whose_they_are(of: str, damaged: int) -> None:
    """The others' are enough."""
    gathering, members = until_vectors("abcde", {"e": "vectors"}, 20)
    for name, lists in gathering.lists().items():
        told = members[name].reveal(*lists)
        if name == "b":
            told[of] = told[of][:4] + os.urandom(damaged - 4) + told[of][damaged:]
            with pytest.raises(MaskingError, match="not the one that it was given"):
                gathering.reveal(name, told)
        else:
            gathering.reveal(name, told)
    assert gathering.sum().tolist() == total("abcd")


@pytest.mark.parametrize("secret", ["seed", "private"])
def test_who_shares_what_is_no_secret_of_its_own_is_found_out(secret: str) -> None:
    gathering, members = Gathering(CONTEXT, 50, 20), {name: Member.begin(name, CONTEXT) for name in "abcde"}
    for name, member in members.items():
        gathering.join(name, member.public)
    for name, publics in gathering.neighbourhoods().items():
        shares = members[name].share(publics)
        if name == "b" and secret == "seed":
            shares = shares._replace(seed=bytes(32))
        if name == "b" and secret == "private":  # its pieces are those of another key than it told
            honest, members["b"] = members["b"], Member.begin("b", CONTEXT)
            members["b"].private[1] = honest.private[1]
            shares = members["b"].share({**publics, "b": members["b"].public})
        gathering.share(name, shares)
    for name, letters in gathering.letters().items():
        if name != "b" or secret == "seed":
            gathering.add(name, members[name].mask(letters, vector(name)))
    for name, lists in gathering.lists().items():
        gathering.reveal(name, members[name].reveal(*lists))
    with pytest.raises(LetterError, match="the pieces from b do not fit together") as found:
        gathering.sum()
    assert found.value.sender == "b"


def test_a_sum_of_two_is_not_made() -> None:
    """From it and the next one, in which the third takes part, that one's vector could be told."""
    gathering, members = until_vectors("abc", {"c": "vectors"}, 20)
    with pytest.raises(MaskingError, match=r"vectors came of 2 members near [ab], 3 must: nothing is unmasked"):
        gathering.lists()
    with pytest.raises(MaskingError, match="vectors of 2 members came, expected 3"):
        members["a"].reveal("ab", "c")


def test_a_round_with_too_few_members_ends() -> None:
    with pytest.raises(MaskingError, match="expected 3 or more"):
        Gathering(CONTEXT, 50, most=2)
    with pytest.raises(MaskingError, match="from 2 members, expected 3 or more"):
        summed("ab", {})
    with pytest.raises(MaskingError, match="pieces came from 5 of 10 members: too few"):
        summed(TEN, dict.fromkeys(TEN[:5], "shares"))
    with pytest.raises(MaskingError, match=r"vectors came of 5 members near site-.*, 6 must: nothing is unmasked"):
        summed(TEN, dict.fromkeys(TEN[:5], "vectors"))
    with pytest.raises(MaskingError, match="5 members revealed their piece of site-0, 6 must"):
        summed(TEN, dict.fromkeys(TEN[:5], "reveals"))
    with pytest.raises(MaskingError, match="no vector came"):
        summed(TEN, dict.fromkeys(TEN, "vectors"))


# Numbers


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


def test_the_step_is_the_finest_with_which_no_sum_overflows() -> None:
    assert finest_step(1, 1.0) == 2.0**-30  # at 2⁻³¹ the bound itself would be 2³¹
    assert finest_step(3, 1.0) == 2.0**-29
    assert finest_step(10, 0.5) == 2.0**-28
    assert finest_step(1000, 2147483.647) == 2.0  # 2³¹ − 1 in all, but not when each is rounded up
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
