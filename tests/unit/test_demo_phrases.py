"""The loose requests: each means a caption of the scene grammar, and the held-out ones are never sampled."""

from __future__ import annotations

import random

from omni_ray.demo import phrases, scenes


def test_every_request_means_a_canonical_caption() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text, caption = phrases.sample(rng)
        assert scenes.parse(caption).caption() == caption
        assert text.strip()
        assert len(text) < 300
        assert not phrases.held_out_phrase(text)


def test_held_out_requests_are_fixed_and_different() -> None:
    pairs = phrases.held_out_pairs(100)
    assert pairs == phrases.held_out_pairs(100)
    assert len({text for text, _ in pairs}) == 100
    assert all(phrases.held_out_phrase(text) and phrases.held_out_phrase(text.upper()) for text, _ in pairs)


def test_the_tables_name_every_word_of_the_grammar() -> None:
    assert set(phrases.SHAPE_NOUNS) == set(phrases.SOMETHING) == set(scenes.SHAPES)
    assert set(phrases.THINGS) == set(phrases.PLACES) == set(phrases.COLOUR_WORDS) == set(scenes.COLOURS)
    assert set(phrases.RELATION_WORDS) == set(phrases.REVERSED) == set(scenes.RELATIONS)
    assert set(phrases.SIZE_WORDS) == set(scenes.SIZES)


def test_no_loose_word_means_two_things() -> None:
    for table in (phrases.SHAPE_NOUNS, phrases.COLOUR_WORDS, phrases.THINGS, phrases.PLACES):
        words = [word for row in table.values() for word in row]
        assert len(words) == len(set(words))
