"""Captioned scenes of coloured shapes, drawn with numpy: the world of the tiny checkpoint.

A `Scene` is a frozen description in units relative to the picture (centres as fractions of width
and height, radii and texture periods as fractions of the shorter side), so the same scene can be
drawn at any resolution and aspect ratio. Edges are antialiased through signed distances.

    scene = random_scene(np.random.default_rng(0))
    image = render(scene, 512, 512)                 # float32 [512, 512, 3] in [0, 1]
    text = caption(scene, np.random.default_rng(1))

Some combinations of (shape, colour, size, texture) are held out by hash: training never draws them
and `evaluation_prompts` asks for nothing else.
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
TOKEN = 1 / 32  # of a picture of 512 px: all centres and radii are multiples, so that tokens repeat
# Half of the larger side of the bounding box, over the shorter side of the picture.
SIZES = {"small": 4 * TOKEN, "medium": 6 * TOKEN, "large": 10 * TOKEN}
TEXTURES = ("plain", "striped", "checked", "dotted")
TONES = {"white": 0.97, "black": 0.07}  # the second tone of a textured shape
BACKGROUNDS = {  # low saturation, well inside the two tones
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
# Where the things of a scene stand, before they move together. Of two with a relation, the first is
# left of or above the other, and "right of" and "below" swap them.
BESIDE, STACKED = ((8, 16), (24, 16)), ((16, 8), (16, 24))
PLACES = {
    1: ((16, 16),),
    2: BESIDE,
    3: ((16, 8), (8, 24), (24, 24)),
    4: ((8, 8), (24, 8), (8, 24), (24, 24)),
}
ALONE, SEVERAL = (-2, 2), (-1, 1)  # how far all things of a scene move, along each axis
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y`: centre as fractions of width and height; `radius`: half extent."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]
    tone: str = "white"
    angle: float = 0.0  # of the stripes, radians


@dataclass(frozen=True)
class Scene:
    """One to four things on a ground; `ramp` is the change of brightness along `slope`."""

    things: tuple[Thing, ...]
    background: str
    ground: str = "plain"
    slope: float = 0.0  # radians
    ramp: float = 0.0
    relation: str = ""  # of things[0] to things[1]


# ------------------------------------------------------------------------------------- sampling


def held_out(shape: str, colour: str, size: str, texture: str) -> bool:
    """Whether this combination is kept from training (one in `HELD_OUT_ONE_IN`)."""
    return zlib.crc32(f"{shape}/{colour}/{size}/{texture}".encode()) % HELD_OUT_ONE_IN == 0


def _pick(rng: np.random.Generator, names, p=None) -> str:
    names = tuple(names)
    return names[int(rng.choice(len(names), p=p))]


def _attributes(rng, sizes, unseen: bool) -> tuple[str, str, str, str]:
    """(shape, colour, size, texture), on the wanted side of the hold-out."""
    while True:
        found = (
            _pick(rng, SHAPES),
            _pick(rng, COLOURS),
            _pick(rng, sizes),
            _pick(rng, TEXTURES, (0.7, 0.1, 0.1, 0.1)),
        )
        if held_out(*found) == unseen:
            return found


def _thing(rng, shape, colour, size, texture, place: np.ndarray) -> Thing:
    """A thing with the named attributes at `place` (in tokens); all else is random."""
    x, y = (float(v) * TOKEN for v in place)
    jitter = rng.uniform(-0.025, 0.025, 3)
    rgb = tuple(float(v) for v in np.clip(np.add(COLOURS[colour], jitter), 0, 1))
    angle = float(rng.integers(4)) * np.pi / 4
    return Thing(
        shape,
        colour,
        size,
        texture,
        x,
        y,
        SIZES[size],
        rgb,
        _pick(rng, TONES),
        angle,
    )


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` stands in `relation` to `b`, clearly (the other axis differs less)."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > abs(across) and sign * along > a.radius + b.radius


def _ground(rng) -> tuple[str, str, float, float]:
    ground = _pick(rng, GROUNDS)
    ramp = float(rng.uniform(0.09, 0.15)) if ground == "graded" else 0.0
    return _pick(rng, BACKGROUNDS), ground, float(rng.uniform(0, 2 * np.pi)), ramp


def random_scene(
    rng: np.random.Generator, things: int = 1, same: bool = False, unseen: bool = False
) -> Scene:
    """A random scene.

    Args:
        rng: source of all randomness.
        things: how many shapes, 1 to 4.
        same: whether they share shape, colour, size and texture (for "two green rings").
        unseen: whether every combination comes from the held-out set instead of the training set.
    """
    sizes = tuple(SIZES) if things == 1 else ("small", "medium")
    first = _attributes(rng, sizes, unseen)
    wanted = [first if same else _attributes(rng, sizes, unseen) for _ in range(things - 1)]
    places, relation = PLACES[things], ""
    if things == 2 and not same:
        relation = _pick(rng, RELATIONS)
        places = BESIDE if relation in ("left of", "right of") else STACKED
        if relation in ("right of", "below"):
            places = places[::-1]
    places = np.add(places, rng.choice(ALONE if things == 1 else SEVERAL, 2))
    found = tuple(
        _thing(rng, *attributes, place)
        for attributes, place in zip((first, *wanted), places, strict=True)
    )
    background, ground, slope, ramp = _ground(rng)
    return Scene(found, background, ground, slope, ramp, relation)


def training_scene(rng: np.random.Generator) -> Scene:
    """One thing in two scenes of five; else two that differ, or two to four that are alike."""
    kind = rng.uniform()
    if kind < 0.4:
        return random_scene(rng)
    if kind < 0.75:
        return random_scene(rng, things=2)
    return random_scene(rng, things=2 + int(rng.integers(3)), same=True)


# ------------------------------------------------------------------------------------- captions


def _phrase(rng, thing: Thing, size: bool, texture: bool, plural: bool = False) -> str:
    """ "large red striped circle" and its like, without an article."""
    size_word = {
        "medium": _pick(rng, ("medium", "medium-sized"), (0.8, 0.2)),
        "large": _pick(rng, ("large", "big"), (0.8, 0.2)),
        "small": _pick(rng, ("small", "little"), (0.8, 0.2)),
    }[thing.size]
    texture_word = {"checked": _pick(rng, ("checked", "chequered"), (0.8, 0.2))}.get(
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
    """A caption that names shapes and colours always, and the rest as asked.

    None: at random where it goes without saying (medium, plain, whatever background), else always.
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
    spoken = 0.4 if scene.relation == "left of" else 1.0  # unsaid: the first is the left one
    same = count > 1 and len({(t.shape, t.colour, t.size, t.texture) for t in scene.things}) == 1
    if same:
        text = f"{NUMBERS[count]} {_phrase(rng, first, *mentions(first), plural=True)}"
    else:
        phrases = [_a(_phrase(rng, thing, *mentions(thing))) for thing in scene.things]
        if count == 1:
            text = phrases[0]
        elif scene.relation and (rng.uniform() < spoken if relation is None else relation):
            text = f"{phrases[0]} {scene.relation} {phrases[1]}"
        else:
            text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if rng.uniform() < 0.4 if background is None else background:
        kind = "" if rng.uniform() < 0.4 else scene.ground + " "
        where = _pick(rng, ("on", "against"), (0.8, 0.2))
        text += f" {where} {_a(kind + scene.background)} background"
    opening = _pick(rng, ("", "a picture of ", "there is "), (0.84, 0.08, 0.08))
    return (opening if not (same and opening == "there is ") else "there are ") + text


# -------------------------------------------------------------------------------------- drawing


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside; the bounding box is [-1, 1] along its larger side.

    `v` points down. Distances are exact near the outline away from corners, which is all that
    antialiasing needs.
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
        middle = outer * (1 - np.cos(np.radians(36))) / 2  # of the bounding box, above the centre
        v = v - middle
        sector = 2 * np.pi / 5
        angle = np.arctan2(u, -v)  # from the upper tip
        angle = np.abs(angle - sector * np.round(angle / sector))
        r = np.hypot(u, v)
        a, b = r * np.cos(angle), r * np.sin(angle)
        ex, ey = inner * np.cos(sector / 2) - outer, inner * np.sin(sector / 2)
        return ((a - outer) * ey - b * ex) / np.hypot(ex, ey)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


PERIOD = 3 * TOKEN  # of every texture


def second_tone(thing: Thing, x: np.ndarray, y: np.ndarray, pixels: int) -> np.ndarray:
    """Coverage by the second tone in [0, 1]; `x`, `y` relative to the centre, in shorter sides."""
    scale = PERIOD * pixels  # pixels in a period

    def stripe(s: np.ndarray) -> np.ndarray:
        """Distance (pixels, negative inside) to stripes that fill half of each period."""
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
    """Draws a scene: float32 [height, width, 3] in [0, 1]."""
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


# ----------------------------------------------------------------------------------- evaluation


def evaluation_prompts(n: int = 120, seed: int = 2026) -> list[tuple[str, Scene, int]]:
    """Unseen single-shape prompts as (caption, scene, seed of the noise), always the same.

    Colour, shape and size are always named; texture in half of them (and always where it is not
    plain), the background in a third. Only the named attributes may be judged.
    """
    found = []
    for index in range(n):
        rng = np.random.default_rng((seed, index))
        scene = random_scene(rng, unseen=True)
        texture = scene.things[0].texture != "plain" or bool(rng.uniform() < 0.3)
        background = bool(rng.uniform() < 1 / 3)
        text = caption(scene, rng, size=True, texture=texture, background=background)
        found.append((text, scene, int(rng.integers(2**31))))
    return found
