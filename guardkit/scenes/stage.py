"""Everything in a scene that is not a feature: places, actors, everyday objects.

Places draw on the whole canvas through a pen that covers it; actors and objects fill their own box, -1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from guardkit.scenes.pen import Colour, Pen

# --- places: the horizon lies at y = 0.1 -----------------------------------------------------------------------------

_Place = Callable[[Pen, np.random.Generator], None]


def _kitchen(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.3, "wall")
    for i in range(6):
        p.line([(-1 + 0.4 * i, -1), (-1 + 0.4 * i, 0.3)], 0.015, "light")
    p.rect(-1, 0.3, 1, 1, "wood")
    p.rect(-1, 0.1, 1, 0.38, "metal")
    x = rng.uniform(-0.8, 0.4)
    p.rect(x, -0.8, x + 0.5, -0.3, "trim")


def _office(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.35, "wall")
    p.rect(-1, 0.35, 1, 1, "stone")
    x = rng.uniform(-0.8, 0.2)
    p.rect(x, -0.8, x + 0.7, -0.25, "sky")
    p.line([(x + 0.35, -0.8), (x + 0.35, -0.25)], 0.03, "light")
    p.rect(-1, 0.3, 1, 0.38, "trim")


def _classroom(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.4, "cream")
    p.rect(-1, 0.4, 1, 1, "wood")
    x = rng.uniform(-0.7, -0.3)
    p.rect(x, -0.85, x + 1.1, -0.1, "board")
    for i in range(3):
        p.line([(x + 0.1, -0.65 + 0.18 * i), (x + 0.1 + rng.uniform(0.3, 0.8), -0.65 + 0.18 * i)], 0.02, "light")


def _garage(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.3, "stone")
    for i in range(5):
        p.rect(-0.8, -0.9 + 0.24 * i, 0.8, -0.72 + 0.24 * i, "metal")
    p.rect(-1, 0.3, 1, 1, "soot")
    x = rng.uniform(-0.8, 0.5)
    p.ellipse(x, 0.7, 0.3, 0.06, "ink")


def _living_room(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.3, "wall")
    p.rect(-1, 0.3, 1, 1, "wood")
    x = rng.uniform(-0.7, 0.0)
    p.rect(x, -0.1, x + 0.9, 0.45, "trim")
    p.rect(x - 0.1, 0.15, x + 1.0, 0.5, "trim")
    p.ellipse(0, 0.8, 0.8, 0.14, "cloth")


def _street(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.1, "sky")
    x = -1.0
    while x < 1:
        width, top = rng.uniform(0.3, 0.5), rng.uniform(-0.9, -0.4)
        p.rect(x, top, x + width, 0.2, "stone" if rng.random() < 0.5 else "wall")
        for wy in np.arange(top + 0.12, 0.0, 0.25):
            p.rect(x + 0.08, wy, x + 0.16, wy + 0.1, "gold")
        x += width
    p.rect(-1, 0.2, 1, 1, "soot")
    for i in range(4):
        p.rect(-0.9 + 0.5 * i, 0.6, -0.65 + 0.5 * i, 0.65, "light")


def _park(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.15, "sky")
    p.rect(-1, 0.1, 1, 1, "grass")
    for x in rng.uniform(-0.95, 0.95, 3):
        p.line([(x, 0.2), (x, -0.3)], 0.07, "wood")
        p.circle(x, -0.45, rng.uniform(0.2, 0.32), "leaf")


def _beach(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.0, "sky")
    p.rect(-1, -0.05, 1, 0.35, "water")
    p.rect(-1, 0.3, 1, 1, "sand")
    p.circle(rng.uniform(-0.8, 0.8), -0.7, 0.15, "gold")
    for y in (0.05, 0.18):
        p.line([(-1, y), (1, y + rng.uniform(-0.04, 0.04))], 0.02, "light")


def _forest(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.3, "board")
    p.rect(-1, 0.25, 1, 1, "wood")
    for x in rng.uniform(-1, 1, 5):
        p.line([(x, 0.35), (x, -1)], 0.09, "ink")
        p.poly([(x - 0.3, -0.2), (x, -0.95), (x + 0.3, -0.2)], "leaf")


def _snow_field(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.2, "sky")
    for x in rng.uniform(-1, 1, 3):
        p.poly([(x - 0.6, 0.2), (x, rng.uniform(-0.8, -0.4)), (x + 0.6, 0.2)], "metal")
    p.rect(-1, 0.15, 1, 1, "light")


def _market(p: Pen, rng: np.random.Generator) -> None:
    p.rect(-1, -1, 1, 0.3, "cream")
    for i in range(5):
        p.poly([(-1 + 0.4 * i, -0.9), (-0.8 + 0.4 * i, -0.9), (-0.8 + 0.4 * i, -0.55), (-1 + 0.4 * i, -0.55)], "trim")
    p.rect(-1, 0.1, 1, 0.4, "wood")
    for x in np.arange(-0.9, 1, 0.2):
        p.circle(x, 0.08, 0.08, ("trim", "gold", "leaf")[rng.integers(3)])
    p.rect(-1, 0.4, 1, 1, "stone")


def _stage_curtain(p: Pen, rng: np.random.Generator) -> None:
    for i in range(8):
        p.rect(-1 + 0.25 * i, -1, -0.75 + 0.25 * i, 0.4, "trim" if i % 2 else "cloth")
    p.rect(-1, 0.4, 1, 1, "wood")
    p.ellipse(rng.uniform(-0.3, 0.3), 0.7, 0.8, 0.18, "cream")


PLACES: dict[str, _Place] = {
    "in a kitchen": _kitchen,
    "on a street": _street,
    "in an office": _office,
    "in a park": _park,
    "in a classroom": _classroom,
    "on a beach": _beach,
    "in a garage": _garage,
    "in a forest": _forest,
    "in a living room": _living_room,
    "in a snow field": _snow_field,
    "on a theatre stage": _stage_curtain,
    "at a market": _market,
}

# --- actors: feet at y = 1, hand at the point that `hand` gives ---------------------------------------------------------

ACTORS: tuple[str, ...] = ("man", "woman", "child", "robot", "cook", "farmer", "old man", "clown")

# pose -> where the leading hand is, in the actor's box, and the verb that a caption uses
POSES: dict[str, tuple[tuple[float, float], str]] = {
    "out": ((0.78, -0.1), "holding"),
    "up": ((0.68, -0.8), "raising"),
    "low": ((0.62, 0.32), "carrying"),
    "high": ((0.75, -0.45), "showing"),
}


def draw_actor(p: Pen, actor: str, pose: str, legs: float) -> None:
    """Draws an actor whose clothes are colour `a`; `legs` in [0, 1] is how far the feet are apart."""
    hand = POSES[pose][0]
    spread = 0.12 + 0.2 * legs
    top, head_y, head_r = -0.35, -0.68, 0.24
    if actor == "child":
        top, head_y, head_r = -0.15, -0.5, 0.28
    limb = "metal" if actor == "robot" else "denim"
    p.line([(-0.1, 0.35), (-spread, 1)], 0.17, limb)
    p.line([(0.1, 0.35), (spread, 1)], 0.17, limb)
    p.line([(-0.25, top + 0.1), (-0.5, 0.3)], 0.14, "a")
    if actor == "woman":
        p.poly([(-0.22, top), (0.22, top), (0.42, 0.6), (-0.42, 0.6)], "a")
    elif actor == "robot":
        p.rect(-0.34, top, 0.34, 0.45, "a")
        p.rect(-0.18, top + 0.15, 0.18, top + 0.4, "metal")
    else:
        p.poly([(-0.3, top), (0.3, top), (0.25, 0.45), (-0.25, 0.45)], "a")
    p.line([(0.25, top + 0.1), hand], 0.14, "a")
    p.circle(*hand, 0.1, "skin")
    if actor == "robot":
        p.rect(-0.24, head_y - 0.22, 0.24, head_y + 0.22, "metal")
        p.line([(0, head_y - 0.2), (0, head_y - 0.35)], 0.05, "ink")
    else:
        p.circle(0, head_y, head_r, "skin")
    p.circle(-0.08, head_y - 0.02, 0.04, "ink")
    p.circle(0.1, head_y - 0.02, 0.04, "ink")
    if actor in ("man", "child"):
        p.ellipse(0, head_y - 0.17, 0.23, 0.1, "hair")
    elif actor == "woman":
        p.ellipse(0, head_y - 0.17, 0.26, 0.12, "hair")
        p.ellipse(-0.24, head_y + 0.06, 0.08, 0.26, "hair")
        p.ellipse(0.24, head_y + 0.06, 0.08, 0.26, "hair")
    elif actor == "cook":
        p.rect(-0.2, head_y - 0.4, 0.2, head_y - 0.14, "light")
        p.ellipse(0, head_y - 0.38, 0.28, 0.13, "light")
    elif actor == "farmer":
        p.ellipse(0, head_y - 0.16, 0.46, 0.08, "gold")
        p.ellipse(0, head_y - 0.24, 0.2, 0.12, "gold")
    elif actor == "old man":
        p.poly([(-0.2, head_y + 0.04), (0.2, head_y + 0.04), (0, head_y + 0.4)], "light")
    elif actor == "clown":
        p.circle(-0.26, head_y - 0.08, 0.13, "b")
        p.circle(0.26, head_y - 0.08, 0.13, "b")
        p.circle(0, head_y + 0.05, 0.07, "red")


# --- everyday objects: in the hand of a natural safe scene, or standing about as distractors ---------------------------------


def _cup(p: Pen) -> None:
    p.poly([(-0.6, -0.6), (0.5, -0.6), (0.4, 0.9), (-0.5, 0.9)], "a")
    p.arc(0.5, 0.1, 0.35, -1.4, 1.4, 0.16, "a")


def _book(p: Pen) -> None:
    p.poly([(-0.95, -0.6), (0, -0.4), (0, 0.8), (-0.95, 0.6)], "a")
    p.poly([(0.95, -0.6), (0, -0.4), (0, 0.8), (0.95, 0.6)], "light")


def _umbrella(p: Pen) -> None:
    p.line([(0, -0.2), (0, 0.85), (0.2, 0.95), (0.3, 0.75)], 0.1, "wood")
    angles = np.linspace(np.pi, 2 * np.pi, 12)
    p.poly([(0.95 * np.cos(t), 0.1 + 0.95 * np.sin(t)) for t in angles], "a")


def _box(p: Pen) -> None:
    p.rect(-0.85, -0.5, 0.85, 0.9, "a")
    p.poly([(-0.85, -0.5), (-0.55, -0.9), (0.55, -0.9), (0.85, -0.5)], "b")
    p.rect(-0.12, -0.5, 0.12, 0.9, "b")


def _plant(p: Pen) -> None:
    p.poly([(-0.5, 0.3), (0.5, 0.3), (0.35, 1), (-0.35, 1)], "a")
    for x, turn in ((-0.4, -0.5), (0, 0), (0.4, 0.5)):
        p.ellipse(x, -0.3, 0.2, 0.6, "leaf", turn)


def _lamp(p: Pen) -> None:
    p.line([(0, 0), (0, 0.95)], 0.1, "metal")
    p.rect(-0.4, 0.88, 0.4, 1, "metal")
    p.poly([(-0.35, -0.9), (0.35, -0.9), (0.7, 0), (-0.7, 0)], "a")


def _chair(p: Pen) -> None:
    p.rect(-0.6, -1, -0.4, 1, "a")
    p.rect(0.4, 0.1, 0.6, 1, "a")
    p.rect(-0.6, 0.05, 0.65, 0.28, "a")
    p.rect(-0.6, -0.9, -0.2, -0.4, "a")


def _bucket(p: Pen) -> None:
    p.arc(0, -0.3, 0.6, 3.14, 6.28, 0.09, "ink")
    p.poly([(-0.7, -0.35), (0.7, -0.35), (0.5, 0.95), (-0.5, 0.95)], "a")


def _clock(p: Pen) -> None:
    p.circle(0, 0, 0.9, "a")
    p.circle(0, 0, 0.7, "light")
    p.line([(0, -0.5), (0, 0), (0.35, 0.15)], 0.12, "ink")


def _guitar(p: Pen) -> None:
    p.line([(0.05, 0), (0.7, -0.95)], 0.14, "wood")
    p.circle(-0.35, 0.55, 0.42, "a")
    p.circle(0, 0.15, 0.3, "a")
    p.circle(-0.2, 0.38, 0.13, "ink")


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "cup": _cup,
    "book": _book,
    "umbrella": _umbrella,
    "box": _box,
    "plant": _plant,
    "lamp": _lamp,
    "chair": _chair,
    "bucket": _bucket,
    "clock": _clock,
    "guitar": _guitar,
}

# --- colours -------------------------------------------------------------------------------------------------------------

COLOURS: dict[str, Colour] = {
    "red": (200, 48, 44),
    "blue": (48, 92, 190),
    "green": (58, 140, 70),
    "yellow": (228, 196, 60),
    "orange": (226, 126, 40),
    "purple": (124, 66, 160),
    "pink": (226, 130, 164),
    "brown": (126, 82, 48),
    "grey": (122, 126, 132),
    "black": (42, 42, 48),
    "white": (232, 232, 228),
}

FIXED: dict[str, Colour] = {
    "ink": (30, 28, 32),
    "light": (240, 236, 226),
    "metal": (168, 174, 182),
    "wood": (142, 100, 62),
    "cream": (226, 206, 178),
    "gold": (236, 198, 78),
    "hazard": (30, 28, 32),
    "leaf": (64, 128, 62),
    "soot": (92, 90, 94),
    "water": (70, 130, 190),
    "sky": (156, 196, 228),
    "grass": (112, 160, 84),
    "sand": (220, 198, 148),
    "stone": (150, 146, 142),
    "board": (44, 84, 66),
    "denim": (58, 72, 108),
    "red": (210, 50, 50),
}
