from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.data.vocabulary import Vocabulary, check_distinct, numbering, read_names, renamed, templates_of


def test_prompts_are_all_classes_in_each_template() -> None:
    vocabulary = Vocabulary(("cat", "desk_lamp"), templates_of("a {} | the {}"))
    assert vocabulary.prompts == ["a cat", "a desk lamp", "the cat", "the desk lamp"]


def test_names_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\n\n dog, big \nfish\n")
    assert read_names("cat, big dog ,fish") == ("cat", "big dog", "fish")
    assert read_names(str(tmp_path / "names")) == ("cat", "dog, big", "fish")
    assert read_names("") == ()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("cat,dog,cat", "cat more than once"),
        ("cat,", "at least two"),
        ("names.txt", "no such file"),
        ("/no/names", "can't be read"),
    ],
)
def test_unusable_names_are_reported(setting: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_names(setting)


def test_names_may_be_put_in_another_order_and_be_more_or_be_other_words() -> None:
    own = ("cat", "dog")
    assert renamed(own, ()) == (own, own)
    assert renamed(own, ("dog", "emu", "cat")) == (("dog", "emu", "cat"), own)
    assert renamed(own, ("kitten", "puppy")) == (("kitten", "puppy"), ("kitten", "puppy"))
    with pytest.raises(UserError, match=r"has 3 names and lacks dog; give all of the data's 2 .*: cat, dog"):
        renamed(own, ("cat", "puppy", "emu"))


@pytest.mark.parametrize("wanted", [("dog", "kitten"), ("kitten", "Cat"), ("puppy", "dog")])
def test_other_words_must_all_be_new_for_labels_could_be_swapped(wanted: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="a new name for each of them, in this order: cat, dog"):
        renamed(("cat", "dog"), wanted)


@pytest.mark.parametrize(
    ("one", "other"), [("Cat", "cat"), ("fire truck", "Fire_truck"), ("H\u00fcndin", "Hu\u0308ndin"), ("a  b", "a b")]
)
def test_names_that_differ_only_in_their_spelling_are_refused(one: str, other: str) -> None:
    check_distinct([one, "horse"])
    with pytest.raises(UserError, match="would be two classes"):
        check_distinct([one, "horse", other])


def test_a_site_may_know_fewer_classes_but_no_others() -> None:
    assert numbering(("dog", "cat"), ("cat", "emu", "dog")) == [2, 0]
    with pytest.raises(UserError, match="does not know: cow, emu"):
        numbering(("emu", "dog", "cow"), ("cat", "dog"))


@pytest.mark.parametrize("content", ["cat\n\x1b[2Jdog\n", "cat\n\u202egod\n"])
def test_names_that_steer_a_terminal_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "names").write_text(content)
    with pytest.raises(UserError, match="plain characters") as error:
        read_names(str(tmp_path / "names"))
    assert str(error.value).isprintable()


def test_a_file_of_names_that_never_ends_is_not_read() -> None:
    with pytest.raises(UserError, match="not a regular file"):
        read_names("/dev/zero")
