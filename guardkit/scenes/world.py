"""The embedded world: scenes that know their label, their words, their region and their exact counterfactual.

A `Scene` is a small immutable description; `draw` turns it into pixels. A scene's counterfactual is the same
description with a safe look-alike in the feature's place, so the two images differ there and nowhere else. A
`ScenePool` describes endless natural scenes, each fixed by (seed, split, index) alone. Nothing here knows of
classifiers, and nothing but NumPy and OpenCV is imported.

Labels: 1 = unsafe (the scene shows an unsafe feature of some category), 0 = safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np

from guardkit.scenes.features import KINDS
from guardkit.scenes.pen import Colour, Pen
from guardkit.scenes.stage import ACTORS, COLOURS, FIXED, OBJECTS, PLACES, POSES, draw_actor
from guardkit.schema import Region

CATEGORIES: tuple[str, ...] = tuple(KINDS)
RENDERINGS: tuple[str, ...] = ("photo", "generated")
SPLITS: tuple[str, ...] = ("train", "test")
N_VARIANTS = 8
TEST_ONLY_VARIANTS: tuple[int, ...] = (6, 7)

# How a variant draws its feature: index of the main colour, stretch, lean. The last two never occur in training
# pools: colours, proportions and leans that no training image shows.
_VARIANTS: tuple[tuple[int, float, float], ...] = (
    (0, 1.0, 0.0),
    (1, 0.85, 0.1),
    (2, 1.15, -0.1),
    (0, 0.9, -0.12),
    (1, 1.1, 0.0),
    (2, 1.0, 0.12),
    (3, 0.8, 0.18),
    (4, 1.25, -0.18),
)

_LIGHTS = {"in daylight": 1.0, "at dusk": 0.72, "in bright light": 1.18}
_SKINS = ((222, 172, 136), (150, 104, 76), (96, 64, 48), (240, 200, 170))
_HAIRS = ((40, 30, 26), (110, 70, 40), (200, 160, 90), (150, 60, 40))
_BASE_RGB = (*FIXED.values(), *COLOURS.values())
_PALETTE_NAMES = (*FIXED, *(f"main:{name}" for name in COLOURS), "wall", "trim", "cloth", "skin", "hair")
_GROUND_Y = 0.66  # where ground features stand, a fraction of the height
_PHRASES = {
    phrase: (category, label) for category, kind in KINDS.items() for label, group in ((1, kind.unsafe), (0, kind.safe)) for phrase in group
}


@dataclass(frozen=True)
class Scene:
    """One drawn image before it is drawn.

    Attributes:
        key: (seed, split, index), from which all randomness that is not described below follows.
        label: 1 = unsafe, 0 = safe.
        category: of the feature or the look-alike; None when the scene shows neither.
        feature: the noun phrase of what is shown, with "{c}" for its colour.
        variant: how the feature is drawn, 0 to N_VARIANTS - 1.
        size: the feature's box as a fraction of the image's width.
        null_edits: how often something irrelevant was changed.
    """

    key: tuple[int, str, int]
    rendering: str
    label: int
    category: str | None
    feature: str
    colour: str
    variant: int
    place: str
    actor: str
    clothes: str
    pose: str
    mirror: bool
    size: float
    angle: float
    actor_x: float
    actor_size: float
    distractors: tuple[tuple[str, str, float], ...]  # object, colour, x as a fraction of the width
    light: str
    blur: float
    noise: float
    null_edits: int = 0

    @property
    def words(self) -> str:
        """What the feature is called, colour included, with its article."""
        return _with_article(self.feature.format(c=self.colour))

    @property
    def caption(self) -> str:
        """A description in words; it names things, never a verdict."""
        verb = "next to" if self._on_ground else POSES[self.pose][1]
        other = _with_article(f"{self.distractors[0][1]} {self.distractors[0][0]}")
        return f"{_with_article(self.actor)} in {self.clothes} {verb} {self.words} {self.place} {self.light}, with {other}"

    @property
    def name(self) -> str:
        """A file name without folder, unique within the world."""
        seed, split, index = self.key
        return f"{split}_{seed}_{self.rendering}_{'unsafe' if self.label else 'safe'}_{index}"

    @property
    def _on_ground(self) -> bool:
        return self.category is not None and KINDS[self.category].place == "ground"

    def counterfactual(self, seed: int = 0, *, wanted: str = "") -> Scene:
        """The same scene with the label flipped: a safe look-alike for an unsafe feature, or the other way round.

        Args:
            seed: chooses among the category's features; the same seed gives the same one.
            wanted: words; the first of those features that they name, without its colour, is taken instead.
        Raises:
            ValueError: the scene shows no feature of any category.
        """
        if self.category is None:
            raise ValueError(f"scene {self.name} shows {self.words!r}, which has no counterfactual: it belongs to no category")
        kind = KINDS[self.category]
        others = list(kind.safe if self.label else kind.unsafe)
        named = [phrase for phrase in others if f" {' '.join(phrase.replace('{c}', '').split())} " in f" {wanted} "]
        feature = named[0] if named else _pick(_rng(self.key, 1, seed), others)
        return replace(self, label=1 - self.label, feature=feature)

    def null_edit(self, seed: int = 0) -> Scene:
        """The same scene with something irrelevant changed: one distractor becomes another, in another colour."""
        rng = _rng(self.key, 2, seed)
        (thing, colour, x), *rest = self.distractors
        thing = _pick(rng, [name for name in OBJECTS if name != thing])
        colour = _pick(rng, [name for name in COLOURS if name != colour])
        return replace(self, distractors=((thing, colour, x), *rest), null_edits=self.null_edits + 1)


@dataclass(frozen=True)
class Drawn:
    """A scene as pixels.

    Attributes:
        image: (size, size, 3) uint8 RGB.
        region: x_min, y_min, x_max, y_max of the feature as fractions of width and height.
    """

    image: np.ndarray
    region: Region


def draw(scene: Scene, size: int = 128) -> Drawn:
    """Draws a scene, `size` pixels wide and high. The same scene always gives the same pixels."""
    generated = scene.rendering == "generated"
    rng = _rng(scene.key, 3)  # must not depend on the feature, or a counterfactual would differ elsewhere
    canvas = np.zeros((size, size, 3), np.uint8)
    outline = max(1, round(size / 96)) if generated else 0
    palette = _palette(rng)
    pen = partial(_pen, canvas, palette, outline)
    backdrop = Pen(canvas, (size / 2, size / 2), size / 2, palette)
    PLACES[scene.place](backdrop, rng)
    if not generated:
        canvas[:] = cv2.GaussianBlur(canvas, (0, 0), size / 128 * float(rng.uniform(0.6, 1.6)))  # depth of field
    legs, y = float(rng.random()), _actor_y(scene)
    for thing, colour, x in scene.distractors:
        half = 0.1 + 0.04 * float(rng.random())
        OBJECTS[thing](pen(x, 0.84 + 0.06 * float(rng.random()), half, colour, mirror=bool(rng.random() < 0.5)))
    draw_actor(pen(scene.actor_x, y, scene.actor_size, scene.clothes, mirror=scene.mirror), scene.actor, scene.pose, legs)
    x_min, y_min, x_max, y_max = _draw_feature(scene, pen, y)
    return Drawn(_finish(canvas, scene, rng), (x_min / size, y_min / size, x_max / size, y_max / size))


def find_region(scene: Scene) -> Region:
    """Where the feature lies, as `draw` would say, at a fraction of its cost."""
    canvas = np.zeros((128, 128, 3), np.uint8)
    outline = 1 if scene.rendering == "generated" else 0
    palette: dict[str, Colour] = FIXED | {f"main:{name}": rgb for name, rgb in COLOURS.items()} | {"skin": _SKINS[0]}
    x_min, y_min, x_max, y_max = _draw_feature(scene, partial(_pen, canvas, palette, outline), _actor_y(scene))
    return x_min / 128, y_min / 128, x_max / 128, y_max / 128


@dataclass(frozen=True)
class ScenePool:
    """Natural scenes without end: `scene(label, index)` describes the index-th of each label.

    Args:
        split: "train" or "test". Test scenes share no key with training scenes, are balanced whatever
            `scene_shift` says, and alone show the variants in TEST_ONLY_VARIANTS.
        seed: of the whole pool.
        rendering: "photo" or "generated".
        scene_shift: how differently places and actors are distributed between unsafe and safe natural scenes of a
            training pool, in [0, 1]: 0 alike, 1 disjoint.
        look_alike_rate: share of natural safe scenes that show a safe look-alike; the others show an everyday object.
    Raises:
        ValueError: an argument out of range.
    """

    split: str = "train"
    seed: int = 0
    rendering: str = "photo"
    scene_shift: float = 0.5
    look_alike_rate: float = 0.25

    def __post_init__(self) -> None:
        for name, value, allowed in (("split", self.split, SPLITS), ("rendering", self.rendering, RENDERINGS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, share in (("scene_shift", self.scene_shift), ("look_alike_rate", self.look_alike_rate)):
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"{name} must be a number in [0, 1], got {share!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")

    def scene(self, label: int, index: int) -> Scene:
        """Describes natural scene `index` with `label`; unsafe ones go round the categories in a shuffled order."""
        key = (self.seed, self.split, 2 * index + label)
        rng = _rng(key, 0)
        category: str | None
        if label:
            # every run of nine indices covers the nine categories once, so small samples stay balanced
            turn, position = divmod(index, len(CATEGORIES))
            category = CATEGORIES[_order(self.seed, self.split, turn)[position]]
            feature = _pick(rng, list(KINDS[category].unsafe))
        elif rng.random() < self.look_alike_rate:
            category = _pick(rng, CATEGORIES)
            feature = _pick(rng, list(KINDS[category].safe))
        else:
            category, feature = None, "{c} " + _pick(rng, list(OBJECTS))
        variants = [v for v in range(N_VARIANTS) if self.split == "test" or v not in TEST_ONLY_VARIANTS]
        variant = variants[int(rng.integers(len(variants)))]
        colours = KINDS[category].colours if category else tuple(COLOURS)
        shift = self.scene_shift if self.split == "train" else 0.0
        mirror = bool(rng.random() < 0.5)
        actor_x = float(rng.uniform(0.3, 0.42))
        n_distractors = int(rng.integers(1, 3))
        distractors = tuple(
            (_pick(rng, list(OBJECTS)), _pick(rng, list(COLOURS)), float(x)) for x in rng.permutation([0.12, 0.88, 0.5])[:n_distractors]
        )
        return Scene(
            key=key,
            rendering=self.rendering,
            label=label,
            category=category,
            feature=feature,
            colour=colours[_VARIANTS[variant][0]],
            variant=variant,
            place=_pick_shifted(rng, list(PLACES), label, shift),
            actor=_pick_shifted(rng, ACTORS, label, shift),
            clothes=_pick(rng, list(COLOURS)),
            pose=_pick(rng, list(POSES)),
            mirror=mirror,
            size=float(rng.uniform(0.26, 0.4)),
            angle=float(rng.uniform(-0.2, 0.2)),
            actor_x=1 - actor_x if mirror else actor_x,
            actor_size=float(rng.uniform(0.27, 0.34)),
            distractors=distractors,
            light=_pick(rng, list(_LIGHTS)),
            blur=float(rng.uniform(0, 0.6)),
            noise=float(rng.uniform(2, 9)),
        )


def features(label: int) -> dict[str, str]:
    """Noun phrase -> category of every unsafe (label 1) or safe look-alike (label 0) feature."""
    return {phrase: category for phrase, (category, phrase_label) in _PHRASES.items() if phrase_label == label}


def _actor_y(scene: Scene) -> float:
    return 0.62 + float(_rng(scene.key, 5).uniform(-0.03, 0.05))


def _pen(canvas: np.ndarray, palette: dict[str, Colour], outline: int, x: float, y: float, half: float, main: str, **how: Any) -> Pen:
    """A pen whose centre and half-width are fractions of the canvas, and whose colours `a` and `b` follow `main`."""
    size = canvas.shape[0]
    rgb = palette[f"main:{main}"]
    colours = palette | {"a": rgb, "b": _mix(rgb, (250, 245, 235), 0.55)}
    return Pen(canvas, (x * size, y * size), half * size, colours, outline=outline, **how)


def _draw_feature(scene: Scene, pen: Callable[..., Pen], y: float) -> Region:
    """Draws what the scene is about and returns its bounds in pixels."""
    side = -1 if scene.mirror else 1
    if scene._on_ground:
        x = scene.actor_x + side * (0.16 + scene.size / 2)
        top = _GROUND_Y + 0.12 - scene.size / 4
        angle = 0.0
    else:
        (hand_x, hand_y), _ = POSES[scene.pose]
        x = scene.actor_x + side * hand_x * scene.actor_size + side * scene.size * 0.2
        top = y + hand_y * scene.actor_size
        angle = scene.angle
    half = scene.size / 2
    # the whole feature stays in the picture
    x, top = float(np.clip(x, half, 1 - half)), float(np.clip(top, half, 1 - half))
    _, stretch, lean = _VARIANTS[scene.variant]
    p = pen(x, top, half, scene.colour, stretch=stretch, lean=lean, angle=angle, mirror=scene.mirror)
    if scene.category is None:
        OBJECTS[scene.feature.removeprefix("{c} ")](p)
    else:
        kind = KINDS[scene.category]
        (kind.unsafe if scene.label else kind.safe)[scene.feature](p)
    return p.bounds


def _finish(canvas: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Light, grain and blur of a photograph; flat, saturated, banded colour of a generated image."""
    size = canvas.shape[0]
    gain = _LIGHTS[scene.light]
    corner = rng.uniform(-0.18, 0.18, (2, 2)).astype(np.float32) + np.float32(gain)
    shade = cv2.resize(corner, (size, size), interpolation=cv2.INTER_LINEAR)[..., None]
    if scene.rendering == "generated":
        soft = cv2.resize(rng.uniform(-10, 10, (3, 3, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        image: np.ndarray = canvas.astype(np.float32)
        grey = image.mean(axis=2, keepdims=True)
        image = grey + 1.45 * (image - grey)  # more saturated than a photograph
        image = np.rint(image * (0.5 + 0.5 * shade) / 24) * 24 + soft
        image = image + 0.25 * cv2.GaussianBlur(np.clip(image - 190, 0, 65), (0, 0), size / 24)  # glow
        return np.clip(image, 0, 255).astype(np.uint8)
    grain = rng.normal(1, 0.07, (size // 4, size // 4)).astype(np.float32)
    texture = cv2.resize(grain, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]
    tint = rng.uniform(0.93, 1.07, 3).astype(np.float32)
    photo: np.ndarray = canvas.astype(np.float32) * (shade * texture) * tint
    photo = photo + scene.noise * rng.standard_normal(photo.shape, dtype=np.float32)
    if scene.blur > 0.1:
        photo = cv2.GaussianBlur(photo, (0, 0), scene.blur * size / 64)
    return np.clip(photo, 0, 255).astype(np.uint8)


def _rng(key: tuple[int, str, int], *more: int) -> np.random.Generator:
    seed, split, index = key
    return np.random.default_rng([seed, SPLITS.index(split), index, *more])


@lru_cache(1024)
def _order(seed: int, split: str, turn: int) -> tuple[int, ...]:
    """The categories of one round of unsafe scenes."""
    return tuple(_rng((seed, split, turn), 4).permutation(len(CATEGORIES)).tolist())


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _pick_shifted(rng: np.random.Generator, items: Sequence[str], label: int, shift: float) -> str:
    """Uniform with probability 1 - shift, else from the half of the items that belongs to the label."""
    half = len(items) // 2
    own = items[half:] if label else items[:half]
    return _pick(rng, own if rng.random() < shift else items)


def _palette(rng: np.random.Generator) -> dict[str, Colour]:
    """This scene's shade of every named colour; "main:NAME" are those that captions name."""
    names = list(COLOURS)
    drawn = [COLOURS[names[i]] for i in rng.integers(len(names), size=3)]
    drawn += [_SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]]
    rgb = np.array([*_BASE_RGB, *drawn])
    rgb = np.clip(rgb + rng.integers(-14, 15, rgb.shape), 0, 255)
    palette: dict[str, Colour] = {name: (int(r), int(g), int(b)) for name, (r, g, b) in zip(_PALETTE_NAMES, rgb, strict=True)}
    palette["wall"] = _mix(palette["wall"], (225, 220, 210), 0.65)
    return palette


def _mix(rgb: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (int((1 - share) * mine + share * theirs) for mine, theirs in zip(rgb, other, strict=True))
    return red, green, blue


def _with_article(noun: str) -> str:
    if noun.split()[-1] in ("flames", "tulips"):
        return noun
    if noun.startswith(("smoke", "flood")):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
