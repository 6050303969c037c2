"""Captioned scenes of coloured shapes, rendered with numpy: the tiny checkpoint's training data.

A `Scene` has units relative to the image: centres are fractions of width and height, radii and
texture periods are fractions of the shorter side. The same scene can therefore be rendered at any
resolution and aspect ratio. Edges are antialiased by signed distances.

    scene = random_scene(np.random.default_rng(0))
    image = render(scene, 512, 512)                 # float32 [512, 512, 3] in [0, 1]
    text = caption(scene, np.random.default_rng(1))

Some combinations of (shape, colour, size, texture), chosen by a hash, are held out: training never
draws them, and `random_scene(..., unseen=True)` draws only them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.12, 0.60, 0.20),
    "cyan": (0.10, 0.76, 0.82),
    "blue": (0.12, 0.25, 0.86),
    "purple": (0.50, 0.14, 0.70),
    "pink": (0.98, 0.50, 0.74),
}
# Side of a token in an image of 512 px. All centres and radii are multiples of it, so that tokens
# repeat between images.
TOKEN = 1 / 32
# Half of the larger side of the bounding box, over the shorter side of the image.
SIZES = {"small": 4 * TOKEN, "medium": 6 * TOKEN, "large": 10 * TOKEN}
TEXTURES = ("plain", "striped", "checked", "dotted")
TONES = {"white": 0.97, "black": 0.07}  # the second tone of a textured shape
BACKGROUNDS = {  # of low saturation, and between the two tones
    "grey": (0.55, 0.55, 0.55),
    "dark grey": (0.36, 0.36, 0.37),
    "light grey": (0.72, 0.72, 0.72),
    "beige": (0.77, 0.71, 0.60),
    "pale blue": (0.66, 0.72, 0.80),
    "pale green": (0.66, 0.76, 0.67),
}
GROUNDS = ("plain", "graded")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Centres of the things of a scene in tokens, (x, y), before a common random shift. Of two things
# with a relation, the first is left of or above the other; "right of" and "below" swap them.
BESIDE, STACKED = ((8, 16), (24, 16)), ((16, 8), (16, 24))
PLACES = {
    1: ((16, 16),),
    2: BESIDE,
    3: ((16, 8), (8, 24), (24, 24)),
    4: ((8, 8), (24, 8), (8, 24), (24, 24)),
}
# Choices of the common shift along each axis in tokens, for one thing and for several.
SHIFTS_OF_ONE, SHIFTS_OF_SEVERAL = (-2, 2), (-1, 1)
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Thing:
    """One shape in a scene.

    Attributes:
        shape, colour, size, texture: words from the tables above.
        x, y: centre, as fractions of the image's width and height.
        radius: half of the larger side of the bounding box, over the image's shorter side.
        rgb: the colour, a random variation of `COLOURS[colour]`, in [0, 1].
        tone: the second tone of a texture, a key of `TONES`.
        angle: angle of the stripes in radians.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]
    tone: str = "white"
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One to four things on a background.

    Attributes:
        things: the things.
        background: colour of the background, a key of `BACKGROUNDS`.
        ground: "plain", or "graded" for a linear change of brightness.
        slope: direction of the change in radians.
        ramp: amount of the change; 0 for none.
        relation: one of `RELATIONS`, of things[0] to things[1]; "" for none.
    """

    things: tuple[Thing, ...]
    background: str
    ground: str = "plain"
    slope: float = 0.0
    ramp: float = 0.0
    relation: str = ""


# ------------------------------------------------------------------------------------- sampling


def held_out(shape: str, colour: str, size: str, texture: str) -> bool:
    """Whether a combination is held out from training, as one in `HELD_OUT_ONE_IN` is."""
    return zlib.crc32(f"{shape}/{colour}/{size}/{texture}".encode()) % HELD_OUT_ONE_IN == 0


def _choose(rng: np.random.Generator, names, p=None) -> str:
    names = tuple(names)
    return names[int(rng.choice(len(names), p=p))]


def _attributes(rng, sizes, unseen: bool) -> tuple[str, str, str, str]:
    """Draw (shape, colour, size, texture), held out from training if `unseen`, else not."""
    while True:
        drawn = (
            _choose(rng, SHAPES),
            _choose(rng, COLOURS),
            _choose(rng, sizes),
            _choose(rng, TEXTURES, (0.7, 0.1, 0.1, 0.1)),
        )
        if held_out(*drawn) == unseen:
            return drawn


def _thing(rng, shape, colour, size, texture, place: np.ndarray) -> Thing:
    """Return a thing with these attributes at `place` (x, y in tokens); the rest is random."""
    x, y = (float(v) * TOKEN for v in place)
    jitter = rng.uniform(-0.025, 0.025, 3)
    rgb = tuple(float(v) for v in np.clip(np.add(COLOURS[colour], jitter), 0, 1))
    angle = float(rng.integers(4)) * np.pi / 4
    return Thing(shape, colour, size, texture, x, y, SIZES[size], rgb, _choose(rng, TONES), angle)


def relation_holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` stands in `relation` to `b`: apart, and closer to its axis than to the other."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > abs(across) and sign * along > a.radius + b.radius


def _ground(rng) -> tuple[str, str, float, float]:
    ground = _choose(rng, GROUNDS)
    ramp = float(rng.uniform(0.09, 0.15)) if ground == "graded" else 0.0
    return _choose(rng, BACKGROUNDS), ground, float(rng.uniform(0, 2 * np.pi)), ramp


def random_scene(
    rng: np.random.Generator, things: int = 1, same: bool = False, unseen: bool = False
) -> Scene:
    """Draw a random scene.

    Args:
        rng: source of all randomness.
        things: number of things, 1 to 4.
        same: whether they share shape, colour, size and texture ("two green rings").
        unseen: whether all combinations are held-out ones; otherwise none is.
    """
    sizes = tuple(SIZES) if things == 1 else ("small", "medium")
    first = _attributes(rng, sizes, unseen)
    others = [first if same else _attributes(rng, sizes, unseen) for _ in range(things - 1)]
    places, relation = PLACES[things], ""
    if things == 2 and not same:
        relation = _choose(rng, RELATIONS)
        places = BESIDE if relation in ("left of", "right of") else STACKED
        if relation in ("right of", "below"):
            places = places[::-1]
    places = np.add(places, rng.choice(SHIFTS_OF_ONE if things == 1 else SHIFTS_OF_SEVERAL, 2))
    drawn = tuple(
        _thing(rng, *attributes, place)
        for attributes, place in zip((first, *others), places, strict=True)
    )
    background, ground, slope, ramp = _ground(rng)
    return Scene(drawn, background, ground, slope, ramp, relation)


def training_scene(rng: np.random.Generator) -> Scene:
    """Draw one thing (40 %), two different things (35 %), or two to four that are alike (25 %)."""
    kind = rng.uniform()
    if kind < 0.4:
        return random_scene(rng)
    if kind < 0.75:
        return random_scene(rng, things=2)
    return random_scene(rng, things=2 + int(rng.integers(3)), same=True)


# ------------------------------------------------------------------------------------- captions


def _phrase(rng, thing: Thing, size: bool, texture: bool, plural: bool = False) -> str:
    """Name a thing without an article, as in "large red striped circle"."""
    size_word = {
        "medium": _choose(rng, ("medium", "medium-sized"), (0.8, 0.2)),
        "large": _choose(rng, ("large", "big"), (0.8, 0.2)),
        "small": _choose(rng, ("small", "little"), (0.8, 0.2)),
    }[thing.size]
    texture_word = {"checked": _choose(rng, ("checked", "chequered"), (0.8, 0.2))}.get(
        thing.texture, thing.texture
    )
    words = [thing.colour]
    if texture:
        words.insert(int(rng.integers(2)), texture_word)
    if size:
        words.insert(0, size_word)
    noun = thing.shape + ("" if not plural else "es" if thing.shape == "cross" else "s")
    return " ".join((*words, noun))


def _a(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(
    scene: Scene,
    rng: np.random.Generator,
    size: bool | None = None,
    texture: bool | None = None,
    background: bool | None = None,
    relation: bool | None = None,
) -> str:
    """Write a caption of a scene. It always names shapes and colours.

    Args:
        scene: the scene.
        rng: source of all randomness.
        size: whether to name sizes; None names "medium" at random and other sizes always.
        texture: whether to name textures; None names "plain" at random and others always.
        background: whether to name the background; None decides at random.
        relation: whether to name the relation; None names "left of" at random and others always.
    """

    def mentions(thing: Thing) -> tuple[bool, bool]:
        p_size = 0.5 if thing.size == "medium" else 1
        p_texture = 0.2 if thing.texture == "plain" else 1
        return (
            bool(rng.uniform() < p_size) if size is None else size,
            bool(rng.uniform() < p_texture) if texture is None else texture,
        )

    first = scene.things[0]
    count = len(scene.things)
    # Without a relation in the caption, the first thing is the left one.
    p_relation = 0.4 if scene.relation == "left of" else 1.0
    same = count > 1 and len({(t.shape, t.colour, t.size, t.texture) for t in scene.things}) == 1
    if same:
        text = f"{NUMBERS[count]} {_phrase(rng, first, *mentions(first), plural=True)}"
    else:
        phrases = [_a(_phrase(rng, thing, *mentions(thing))) for thing in scene.things]
        if count == 1:
            text = phrases[0]
        elif scene.relation and (rng.uniform() < p_relation if relation is None else relation):
            text = f"{phrases[0]} {scene.relation} {phrases[1]}"
        else:
            text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if rng.uniform() < 0.4 if background is None else background:
        kind = "" if rng.uniform() < 0.4 else scene.ground + " "
        where = _choose(rng, ("on", "against"), (0.8, 0.2))
        text += f" {where} {_a(kind + scene.background)} background"
    opening = _choose(rng, ("", "a picture of ", "there is "), (0.84, 0.08, 0.08))
    return (opening if not (same and opening == "there is ") else "there are ") + text


# -------------------------------------------------------------------------------------- drawing


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute the signed distance to the outline of a shape, negative inside.

    Distances are exact near the outline and away from corners, which suffices for antialiasing.

    Args:
        shape: one of `SHAPES`.
        u: horizontal coordinates; the bounding box is [-1, 1] along its larger side.
        v: vertical coordinates, downwards.

    Raises:
        ValueError: `shape` is unknown.
    """
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.78) - 0.22
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 1
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1, b - 0.34), np.maximum(a - 0.34, b - 1))
    if shape == "triangle":
        half = 3**0.5 / 2
        return np.maximum(v - half, (3**0.5 * np.abs(u) - v - half) / 2)
    if shape == "star":
        outer = 1 / np.sin(np.radians(72))
        inner = 0.44 * outer
        middle = outer * (1 - np.cos(np.radians(36))) / 2  # from the bounding box's centre
        v = v - middle
        sector = 2 * np.pi / 5
        angle = np.arctan2(u, -v)  # from the upper tip
        angle = np.abs(angle - sector * np.round(angle / sector))
        r = np.hypot(u, v)
        a, b = r * np.cos(angle), r * np.sin(angle)
        ex, ey = inner * np.cos(sector / 2) - outer, inner * np.sin(sector / 2)
        return ((a - outer) * ey - b * ex) / np.hypot(ex, ey)
    raise ValueError(f"shape is {shape!r}; expected one of {SHAPES}")


PERIOD = 3 * TOKEN  # period of all textures


def second_tone(thing: Thing, x: np.ndarray, y: np.ndarray, pixels: int) -> np.ndarray:
    """Compute the coverage by the second tone of a texture, in [0, 1].

    Args:
        thing: the thing.
        x: horizontal offsets from its centre, over the image's shorter side.
        y: vertical offsets from its centre, over the image's shorter side.
        pixels: the image's shorter side in pixels.
    """
    scale = PERIOD * pixels  # pixels per period

    def stripe(s: np.ndarray) -> np.ndarray:
        """Signed distance in pixels to stripes that fill half of each period."""
        return (np.abs(np.mod(s, 1) - 0.5) - 0.25) * scale

    if thing.texture == "striped":
        distance = stripe((x * np.cos(thing.angle) + y * np.sin(thing.angle)) / PERIOD)
    elif thing.texture == "checked":
        a, b = stripe(x / PERIOD), stripe(y / PERIOD)
        distance = np.where((a < 0) == (b < 0), -1, 1) * np.minimum(np.abs(a), np.abs(b))
    elif thing.texture == "dotted":
        a, b = np.mod(x / PERIOD, 1) - 0.5, np.mod(y / PERIOD, 1) - 0.5
        distance = (np.hypot(a, b) - 0.29) * scale
    else:
        return np.zeros_like(x)
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Render a scene as an image: float32 [height, width, 3] in [0, 1]."""
    short = min(height, width)
    image = np.empty((height, width, 3), np.float32)
    image[:] = np.asarray(BACKGROUNDS[scene.background], np.float32)
    if scene.ramp:
        across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.cos(scene.slope)
        down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * np.sin(scene.slope)
        image += np.float32(scene.ramp) * (across[None, :] + down[:, None])[..., None]
    for thing in scene.things:
        cx, cy, r = thing.x * width, thing.y * height, thing.radius * short
        x0, x1 = max(int(cx - r) - 2, 0), min(int(cx + r) + 3, width)
        y0, y1 = max(int(cy - r) - 2, 0), min(int(cy + r) + 3, height)
        x = ((np.arange(x0, x1) + 0.5 - cx) / short).astype(np.float32)[None, :]
        y = ((np.arange(y0, y1) + 0.5 - cy) / short).astype(np.float32)[:, None]
        x, y = np.broadcast_arrays(x, y)
        alpha = np.clip(
            0.5 - r * signed_distance(thing.shape, x / thing.radius, y / thing.radius), 0, 1
        )[..., None]
        colour = np.asarray(thing.rgb, np.float32)
        if thing.texture != "plain":
            tone = second_tone(thing, x, y, short)[..., None]
            colour = colour + tone * (np.float32(TONES[thing.tone]) - colour)
        patch = image[y0:y1, x0:x1]
        patch += alpha.astype(np.float32) * (colour - patch)
    return np.clip(image, 0, 1)
