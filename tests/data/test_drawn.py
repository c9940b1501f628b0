from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.data.drawn import CLASSES, DOMAINS, FIGURES, SEEDS, Drawn, Scene, picture
from fedclip_flwr.data.drawn.canvas import Figure, Rng, arc, place, smooth
from fedclip_flwr.features.base import Features
from fedclip_flwr.learning.training import evaluate


def pixels(seed: int, domain: str, figure: str, index: int) -> bytes:
    return picture(seed, domain, figure, index)[0].tobytes()


def test_a_seed_gives_the_same_pictures_on_every_machine() -> None:
    hasher = hashlib.sha256()
    for domain in sorted(DOMAINS):
        for figure in sorted(FIGURES):
            hasher.update(pixels(0, domain, figure, 0))
    assert hasher.hexdigest()[:16] == "33c1540f2764e8fb"


def test_another_seed_or_number_gives_another_picture() -> None:
    one = pixels(0, "photo", "cat", 0)
    assert one == pixels(0, "photo", "cat", 0)
    assert one not in {pixels(1, "photo", "cat", 0), pixels(0, "photo", "cat", 1), pixels(0, "art", "cat", 0)}


def test_every_domain_holds_150_pictures_of_each_of_ten_classes() -> None:
    source = Drawn(3)
    assert source.class_names == CLASSES
    assert source.domains == ("art", "cartoon", "photo", "sketch")
    labels = []
    for _, label, image in source.pictures("sketch"):
        assert image is not None
        assert (image.mode, image.size) == ("RGB", (64, 64))
        labels.append(label)
    assert len(labels) == source.count("sketch") == 1500
    assert np.bincount(labels).tolist() == [150] * 10


def test_a_scene_varies_in_colour_place_and_what_hides_it() -> None:
    scenes: list[Scene] = [picture(0, "cartoon", "cat", i)[1] for i in range(60)]
    assert len({s.colour for s in scenes}) >= 8
    assert len({s.place for s in scenes}) >= 8
    assert {s.size for s in scenes} == {"small", "big", ""}
    assert 15 < sum(bool(s.before) for s in scenes) < 45


def test_a_sketch_has_no_colour_to_speak_of() -> None:
    for i in range(10):
        image = np.asarray(picture(0, "sketch", CLASSES[i], i)[0], dtype=int)
        assert (image.max(axis=2) - image.min(axis=2)).max() <= 20


def test_the_content_follows_the_seed_and_the_domain() -> None:
    keys = {Drawn(s).content(d) for s in (0, 1) for d in ("art", "photo")}
    assert len(keys) == 4
    assert Drawn(0).content("art") in keys


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_seeds_that_the_bundled_model_has_seen_are_refused(seed: int) -> None:
    with pytest.raises(UserError, match="expected a seed"):
        Drawn(seed)


def test_random_numbers_are_built_on_what_python_guarantees() -> None:
    r = Rng("seed")
    draws = [r.count(1, 3) for _ in range(300)]
    assert set(draws) == {1, 2, 3}
    assert all(2 <= r.near(3, 1) <= 4 for _ in range(100))
    assert {r.pick("ab") for _ in range(50)} == {"a", "b"}


def test_geometry_by_hand() -> None:
    assert arc(0, 0, 2, 1, 0, 90)[0] == (2, 0)
    assert arc(0, 0, 2, 1, 0, 90)[-1] == pytest.approx((0, 1))
    square = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    assert smooth(square)[::4] == square  # the curve passes through its points
    figure = Figure("red", "blue")
    figure.line([(1, 0), (0, 1)], 0.5, "red")
    (moved,) = place(figure.parts, x=0.5, y=0.0, scale=0.5, turn=90, squeeze=-1)
    assert moved.points == ((0.5, -0.5), (0.0, 0.0))
    assert moved.width == 0.25


@pytest.fixture(scope="module")
def every_pixel() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for domain in Drawn.domains:
        rows = [
            (np.asarray(picture(0, domain, f, i)[0].reduce(4)).ravel() / 255, c)
            for i in range(60)
            for c, f in enumerate(CLASSES)
        ]
        found[domain] = (np.stack([r for r, _ in rows]), np.array([c for _, c in rows]))
    return found


@pytest.mark.parametrize("held_out", Drawn.domains)
def test_pixels_alone_stay_far_below_zero_shot(
    held_out: str, every_pixel: dict[str, tuple[np.ndarray, np.ndarray]], drawn: Features
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid

    images = np.concatenate([x for d, (x, _) in every_pixel.items() if d != held_out])
    labels = np.concatenate([y for d, (_, y) in every_pixel.items() if d != held_out])
    zero_shot = evaluate(None, drawn.examples(held_out).ready(), drawn.classes.ready()).accuracy
    assert zero_shot is not None
    for simple in (NearestCentroid(), LogisticRegression(C=0.004, max_iter=1000)):
        accuracy = simple.fit(images, labels).score(*every_pixel[held_out])
        assert accuracy < zero_shot - 0.2


def test_the_bundled_clip_knows_the_drawn_pictures_but_not_too_well(drawn: Features) -> None:
    classes = drawn.classes.ready()
    accuracy = {d: evaluate(None, drawn.examples(d).ready(), classes).accuracy or 0.0 for d in drawn.domains}
    assert all(0.45 <= a <= 0.9 for a in accuracy.values()), accuracy
    assert torch.tensor(list(accuracy.values())).mean() >= 0.6
