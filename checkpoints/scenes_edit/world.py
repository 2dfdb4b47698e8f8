"""What `checkpoints/scenes_edit` learns from: drawn scenes and their exact counterfactuals, in both directions.

The pool has its own seed; heads are trained and tested on others, and test-only drawing variants never occur.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from checkpoints.edit_recipe import CROP_PX, Pool
from guardkit.scenes.stage import COLOURS
from guardkit.scenes.world import RENDERINGS, Scene, ScenePool, draw
from guardkit.schema import Region

SEED = 7_002
MARGIN = 0.04  # by which the covered box reaches beyond the feature, a fraction of the image's width


@dataclass(frozen=True)
class Scenes:
    """Settings of one training run; with the defaults two idle cores see about as many images as the shipped weights did.

    Attributes:
        n_scenes: drawn once per rendering, with their counterfactuals; each pair is learned in both directions.
    """

    out: str = "scenes_edit"
    autoencoder_minutes: float = 25.0
    unet_minutes: float = 50.0
    n_scenes: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    text: str = "checkpoints/scenes_clip"
    device: str = "cpu"
    workers: int = 2
    start: str = ""

    seed: ClassVar[int] = SEED
    pooled_words: ClassVar[bool] = False

    def pool(self) -> Pool:
        crops, boxes, wanted = draw_pool(self.n_scenes, self.workers)
        return Pool(crops[:, 0], crops[:, 1], boxes, lambda row, rng: words(wanted[row], rng))


def square_around(region: Region, size: int, side: int = CROP_PX) -> tuple[int, int]:
    """Left and top pixel of the square of `side` pixels that has the region in its middle, kept inside the image."""
    x_min, y_min, x_max, y_max = region
    left, top = ((x_min + x_max) * size - side) / 2, ((y_min + y_max) * size - side) / 2
    return int(np.clip(round(left), 0, size - side)), int(np.clip(round(top), 0, size - side))


def pair(index: int, rendering: str, seed: int = SEED) -> tuple[Scene, Scene]:
    """A scene with a feature of either label, in any colour, and its counterfactual."""
    pool = ScenePool("train", seed=seed, rendering=rendering, scene_shift=0.0)
    scene = pool.scene(1, index)
    rng = np.random.default_rng([seed, index])
    scene = replace(scene, colour=list(COLOURS)[int(rng.integers(len(COLOURS)))])
    return scene, scene.counterfactual(int(rng.integers(1 << 30)))


def _draw_block(block: tuple[int, int, str, int]) -> tuple[np.ndarray, np.ndarray]:
    start, stop, rendering, seed = block
    crops, boxes = [], []
    for index in range(start, stop):
        drawn = [draw(scene) for scene in pair(index, rendering, seed)]
        for before, after in (drawn, drawn[::-1]):
            size = before.image.shape[0]
            left, top = square_around(before.region, size)
            crops.append([one.image[top : top + CROP_PX, left : left + CROP_PX] for one in (before, after)])
            grow = MARGIN * size
            x_min, y_min, x_max, y_max = (value * size for value in before.region)
            boxes.append([x_min - left - grow, y_min - top - grow, x_max - left + grow, y_max - top + grow])
    return np.array(crops, np.uint8), np.clip(np.array(boxes), 0, CROP_PX).astype(np.float32)


def draw_pool(n_scenes: int, workers: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray, list[Scene]]:
    """(4 n, 2, 64, 64, 3) uint8 crops before and after, (4 n, 4) covered boxes in pixels, the scenes to be drawn."""
    edges = [*range(0, n_scenes, 500), n_scenes]
    blocks = [(a, b, rendering, seed) for rendering in RENDERINGS for a, b in itertools.pairwise(edges)]
    with ProcessPoolExecutor(workers) as executor:
        made = list(executor.map(_draw_block, blocks))
    wanted = [scene for rendering in RENDERINGS for i in range(n_scenes) for scene in pair(i, rendering, seed)[::-1]]
    return np.concatenate([one[0] for one in made]), np.concatenate([one[1] for one in made]), wanted


def words(scene: Scene, rng: np.random.Generator) -> str:
    """What the square shows: mostly the whole caption, which is what an instructor gives, else the feature alone."""
    return scene.caption if rng.random() < 0.7 else scene.words
