"""Loose ways to ask for a scene, each with the caption it means: the training language of ``demo:chat``."""

from __future__ import annotations

import random

from omni_ray.demo.scenes import Item, Scene, article, default_background, one_in, sample_any

SHAPE_NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc", "disk", "round thing", "dot", "round shape", "round object", "sphere", "ring"),
    "square": ("square", "box", "block", "square thing", "square shape", "cube", "four-cornered thing", "tile"),
    "triangle": (
        "triangle",
        "three-cornered thing",
        "pyramid",
        "triangular thing",
        "triangular shape",
        "three-sided shape",
        "thing with three corners",
        "shape with three sides",
    ),
    "diamond": ("diamond", "rhombus", "lozenge", "diamond shape", "diamond-shaped thing", "kite"),
    "star": (
        "star",
        "five-pointed thing",
        "star shape",
        "starry thing",
        "star-shaped thing",
        "starfish",
        "thing with five points",
    ),
}
SOMETHING: dict[str, tuple[str, ...]] = {
    "circle": ("round", "circular", "like a ball", "shaped like a ball"),
    "square": ("square", "with four equal sides", "shaped like a box", "like a box"),
    "triangle": ("triangular", "with three corners", "with three sides", "shaped like a pyramid", "like a pyramid"),
    "diamond": ("diamond-shaped", "shaped like a diamond", "like a rhombus"),
    "star": ("star-shaped", "shaped like a star", "with five points", "like a starfish"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little", "mini", "teeny", "wee", "minute", "rather small", "very small"),
    "large": ("large", "big", "huge", "giant", "enormous", "massive", "really big", "very large", "gigantic"),
    "medium": ("", "", "", "", "", "medium", "medium-sized", "normal", "average-sized"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet", "ruby", "cherry red", "blood red", "reddish"),
    "orange": ("tangerine", "amber", "pumpkin orange", "orangey"),
    "yellow": ("golden", "lemon yellow", "canary yellow", "sunny yellow", "yellowish"),
    "green": ("emerald", "grass green", "lime", "olive", "greenish"),
    "blue": ("azure", "navy", "sky blue", "cobalt", "bluish", "sapphire"),
    "purple": ("violet", "lavender", "plum", "lilac", "mauve"),
    "pink": ("rosy", "rose pink", "salmon pink", "magenta", "bubblegum pink"),
    "black": ("jet black", "pitch black", "inky", "dark"),
    "white": ("snow white", "snowy", "ivory", "milky"),
}
THINGS: dict[str, tuple[str, ...]] = {
    "red": ("a tomato", "a strawberry", "blood", "a fire engine", "a cherry", "a ruby", "ketchup", "a ripe apple"),
    "orange": ("a carrot", "a pumpkin", "an orange", "a tangerine", "an apricot", "a basketball"),
    "yellow": ("a lemon", "the sun", "a banana", "butter", "a canary", "a sunflower", "sweetcorn", "custard"),
    "green": ("grass", "a leaf", "a frog", "a cucumber", "a lime", "spinach", "an emerald", "a pea", "a forest"),
    "blue": ("the sky", "the sea", "the ocean", "a blueberry", "a sapphire", "blue jeans", "water"),
    "purple": ("a grape", "an aubergine", "lavender", "a plum", "a violet", "an eggplant", "an amethyst"),
    "pink": ("a flamingo", "bubblegum", "a rose", "a piglet", "candyfloss", "cherry blossom"),
    "black": ("coal", "the night", "ink", "a raven", "tar", "soot", "midnight", "a panther"),
    "white": ("snow", "milk", "a swan", "paper", "a cloud", "chalk", "salt", "a sheet"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "red": ("on lava", "on a tomato", "on mars", "on a red carpet", "against a red wall"),
    "orange": ("at sunset", "against the sunset", "on a pumpkin", "on a basketball", "on orange peel"),
    "yellow": ("on the beach", "on sand", "in the desert", "in the sunshine", "on a wheat field", "on a lemon"),
    "green": ("on grass", "on the grass", "in a meadow", "on a lawn", "in the forest", "in a field of grass"),
    "blue": ("on the sea", "in the sky", "on the ocean", "against the sky", "in the water", "on a lake", "at sea"),
    "purple": ("on a lavender field", "on lavender", "on a grape", "in a field of violets"),
    "pink": ("on bubblegum", "on a rose petal", "on candyfloss", "on cherry blossom"),
    "black": ("against the night", "at night", "in the dark", "in the night sky", "at midnight", "in outer space"),
    "white": ("on snow", "on the snow", "on a blank page", "on paper", "in the snow", "on a sheet of paper"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of", "just left of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of", "just right of"),
    "above": ("above", "over", "on top of", "higher than", "right above", "sitting on top of"),
    "below": ("below", "under", "beneath", "underneath", "lower than", "right below"),
}
REVERSED: dict[str, tuple[str, ...]] = {  # the second shape's place, said after it
    "left of": ("to its right", "on its right", "on the right of it", "right of it", "to the right of it"),
    "right of": ("to its left", "on its left", "on the left of it", "left of it", "to the left of it"),
    "above": ("below it", "under it", "beneath it", "underneath", "underneath it"),
    "below": ("above it", "over it", "on top of it", "on top"),
}
OPENINGS = (
    "",
    "",
    "",
    "draw",
    "draw me",
    "please draw",
    "could you draw",
    "can you draw",
    "can you draw me",
    "paint",
    "could you please draw",
    "i want",
    "i'd like",
    "i would like",
    "i would love to see",
    "show me",
    "make",
    "make me",
    "give me",
    "please make",
    "can i have",
    "can i get",
    "could i have",
    "create",
    "please create",
    "sketch",
    "generate",
    "let me see",
    "how about",
    "i need",
    "would you paint",
    "hey, draw",
    "hi! draw",
    "hello, could you make",
    "an image of",
    "a picture of",
    "draw a picture of",
    "make an image of",
    "imagine",
    "generate an image of",
    "show me a picture of",
    "i want to see",
    "would you mind drawing",
    "just",
)
CLOSINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "please",
    "thanks",
    "thank you",
    "if you can",
    "for me",
    "now",
    "pls",
    "if you please",
    "would be nice",
    "would be great",
    "thank you very much",
)


def _thing_adjective(rng: random.Random, colour: str) -> str:
    bare = rng.choice(THINGS[colour]).split(" ", 1)
    noun = bare[1] if bare[0] in ("a", "an", "the") and len(bare) > 1 else " ".join(bare)
    return f"{noun}-{rng.choice(('coloured', 'colored'))}"


def _colour_before(rng: random.Random, colour: str) -> str:
    pick = rng.random()
    if pick < 0.5:
        return colour
    return rng.choice(COLOUR_WORDS[colour]) if pick < 0.8 else _thing_adjective(rng, colour)


def _colour_after(rng: random.Random, colour: str) -> str:
    thing, word = rng.choice(THINGS[colour]), rng.choice(("colour", "color"))
    return rng.choice(
        (
            f"the {word} of {thing}",
            f"in the {word} of {thing}",
            f"with the {word} of {thing}",
            f"in {colour}",
            f"as {colour} as {thing}",
            f"{word}ed like {thing}",
            f"{colour} like {thing}",
            f"that is {colour}",
            f"which has the {word} of {thing}",
            f"that is {rng.choice(COLOUR_WORDS[colour])}",
        )
    )


def _determiner(rng: random.Random, rest: str) -> str:
    return rng.choice((article(rest), article(rest), article(rest), "one", "some", "a single", "the", ""))


def noun_phrase(rng: random.Random, item: Item) -> str:
    """One item, loosely."""
    size = rng.choice(SIZE_WORDS[item.size])
    if rng.random() < 0.2:
        shape = f"something {rng.choice(SOMETHING[item.shape])}"
        pieces = [f"something {size} and {shape.removeprefix('something ')}" if size else shape]
        colour = rng.choice((_colour_after(rng, item.colour), f"and {item.colour}"))
        return _join(rng, [*pieces, colour], after=colour.startswith("and"))
    noun = rng.choice(SHAPE_NOUNS[item.shape]) if rng.random() < 0.75 else item.shape
    if rng.random() < 0.3:
        rest = " ".join(filter(None, [size, noun]))
        return _join(rng, [f"{_determiner(rng, rest)} {rest}", _colour_after(rng, item.colour)])
    rest = " ".join(filter(None, [size, _colour_before(rng, item.colour), noun]))
    return f"{_determiner(rng, rest)} {rest}".strip()


def _join(rng: random.Random, pieces: list[str], after: bool = False) -> str:
    return (", " if rng.random() < 0.3 and not after else " ").join(piece.strip() for piece in pieces)


def background_phrase(rng: random.Random, colour: str) -> str:
    """Where the scene is, loosely."""
    if rng.random() < 0.4:
        return rng.choice(PLACES[colour])
    word = colour
    if rng.random() > 0.6:
        word = rng.choice((rng.choice(COLOUR_WORDS[colour]), _thing_adjective(rng, colour)))
    ground = rng.choice(("background", "background", "backdrop", "canvas", "ground"))
    return rng.choice(
        (
            f"on {article(word)} {word} {ground}",
            f"against {article(word)} {word} {ground}",
            f"on {word}",
            f"with {article(word)} {word} {ground}",
            f"over {article(word)} {word} {ground}",
            f"and the {ground} {word}",
            f"and make the {ground} {word}",
            f"with the {ground} in {word}",
            f"the {ground} should be {word}",
        )
    )


def _items(rng: random.Random, scene: Scene) -> str:
    first = noun_phrase(rng, scene.items[0])
    if scene.relation is None:
        return first
    second, relation = noun_phrase(rng, scene.items[1]), rng.choice(RELATION_WORDS[scene.relation])
    reverse = rng.choice(REVERSED[scene.relation])
    return rng.choice(
        (
            f"{first} {relation} {second}",
            f"{first} {relation} {second}",
            f"{first} {relation} {second}",
            f"{first} that is {relation} {second}",
            f"{first}, {relation} {second}",
            f"{first} with {second} {reverse}",
            f"{first} and {second} {reverse}",
            f"{first} and, {reverse}, {second}",
        )
    )


def _case(rng: random.Random, text: str) -> str:
    pick = rng.random()
    if pick < 0.5:
        return text
    return text[:1].upper() + text[1:] if pick < 0.85 else (text.upper() if pick < 0.93 else text.title())


def _loose(rng: random.Random, scene: Scene) -> str:
    body, place = _items(rng, scene), ""
    usual = scene.background == default_background(scene.items)
    if not usual or rng.random() < 0.25:
        place = background_phrase(rng, scene.background)
        body = (
            f"{place}, {body}"
            if rng.random() < 0.15 and place.startswith(("on ", "in ", "at ", "against "))
            else f"{body}{rng.choice((' ', ' ', ' ', ', '))}{place}"
        )
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    text = f"{opening} {body}".strip()
    return f"{text}{rng.choice((' ', ', '))}{closing}" if closing else text


def phrase(rng: random.Random, scene: Scene) -> str:
    """One loose request for the scene (one in eight is its plain caption), with random case and punctuation."""
    text = scene.caption() if rng.random() < 0.125 else _loose(rng, scene)
    return _case(rng, " ".join(text.split())) + rng.choice(("", "", "", ".", "!", "?", " ", "..."))


def held_out_phrase(text: str) -> bool:
    """Whether a request is kept from training: one in 20, by a hash that case does not change."""
    return one_in(text.lower(), 20)


def sample(rng: random.Random, held: bool = False) -> tuple[str, str]:
    """A (request, caption) pair of the training split, or of the held-out one."""
    while True:
        scene = sample_any(rng, pair_share=0.6)
        text = phrase(rng, scene)
        if held_out_phrase(text) == held:
            return text, scene.caption()


def held_out_pairs(count: int, seed: int = 2024) -> list[tuple[str, str]]:
    """``count`` different held-out (request, caption) pairs, the same at every call."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        text, caption = sample(rng, held=True)
        found[text] = caption
    return list(found.items())
