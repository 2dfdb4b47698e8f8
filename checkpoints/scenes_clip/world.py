"""What `checkpoints/scenes_clip` learns from: drawn scenes and their captions.

Every batch holds scenes beside their twins, so that each image's hardest negative caption is in the same batch, and every
image has two texts: its whole caption, and the bare name of its object. Captions name objects, actors, places and colours;
the words safe and unsafe never occur. The proportions and leans of test-only drawing variants never occur either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from checkpoints.clip_recipe import Texts
from guardkit.scenes.stage import COLOURS
from guardkit.scenes.world import RENDERINGS, Scene, ScenePool, draw

IMAGE_PX = 64
SEED = 7_001  # of the pool that trains the encoder; heads are trained and tested on pools with other seeds


def twins(index: int, rendering: str) -> tuple[Scene, Scene]:
    """A scene and its hardest neighbour: its counterfactual, or a null edit where it has none.

    The feature may have any colour that captions name, as objects do in the pictures that real CLIP models learn
    from; the proportions and leans of the test-only variants never occur.
    """
    pool = ScenePool("train", seed=SEED, rendering=rendering, scene_shift=0.0)
    scene = pool.scene(label=int(index % 4 != 0), index=index)
    scene = replace(scene, colour=list(COLOURS)[int(np.random.default_rng([SEED, index]).integers(len(COLOURS)))])
    return scene, scene.counterfactual() if scene.category else scene.null_edit()


def captions(scene: Scene, *, with_colours: bool) -> tuple[str, str]:
    """What a scene shows, whole and by its object's bare name."""
    bare = replace(scene, clothes="", colour="", distractors=((scene.distractors[0][0], "", 0.0),))
    whole = scene.caption if with_colours else " ".join(bare.caption.replace(" in  ", " ").split())
    return whole, " ".join(bare.words.split())


def shrink(image: np.ndarray) -> np.ndarray:
    """Resizes as the encoder's preprocessing does: bicubic with antialiasing."""
    return np.asarray(Image.fromarray(image).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))


def _draw_block(block: tuple[int, int, str]) -> np.ndarray:
    start, stop, rendering = block
    return np.stack([np.stack([shrink(draw(scene).image) for scene in twins(i, rendering)]) for i in range(start, stop)])


def draw_pool(n_scenes: int, workers: int) -> np.ndarray:
    """(n_scenes * 2, 2, 64, 64, 3) uint8: both renderings, each scene beside its twin."""
    edges = [*list(range(0, n_scenes, 500)), n_scenes]
    blocks = [(a, b, rendering) for rendering in RENDERINGS for a, b in itertools.pairwise(edges)]
    with ProcessPoolExecutor(workers) as executor:
        return np.concatenate(list(executor.map(_draw_block, blocks)))


@dataclass
class Scenes:
    """Settings of one training run; the defaults made the shipped encoder.

    Attributes:
        minutes: of optimisation, after drawing.
        n_scenes: drawn once per rendering; each adds itself and its twin.
        logit_scale: until two fifths of the time are over. Learned, it grows until objects share a handful of
            dimensions, told apart by text but not by a linear head.
        late_logit_scale: from then on. The smaller the scale, the wider the angles that the loss asks for between
            objects, and the more dimensions they fill.
        averaging: of the weights that are saved, for each step; 0 saves the last ones.
    """

    out: str = "checkpoints/scenes_clip"
    minutes: float = 70.0
    n_scenes: int = 30_000
    batch_scenes: int = 192
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    logit_scale: float = 10.0
    late_logit_scale: float = 4.0
    label_smoothing: float = 0.0
    averaging: float = 0.0
    workers: int = 2
    _pool: np.ndarray = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    _scenes: list[tuple[Scene, Scene]] = field(default_factory=list, init=False, repr=False)
    _order: np.ndarray = field(default_factory=lambda: np.zeros(0, int), init=False, repr=False)

    seed: ClassVar[int] = SEED
    model: ClassVar[dict[str, Any]] = {
        "embed_dim": 256,
        "vision_cfg": {"image_size": IMAGE_PX, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
        "text_cfg": {"context_length": 30, "width": 128, "heads": 4, "layers": 2, "tokenizer_kwargs": {"clean": "lower"}},
    }
    preprocessing: ClassVar[dict[str, Any]] = {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }

    def words(self) -> set[str]:
        words = {"a", "an", "of", "photo", "image", "picture", "drawing", "cartoon", "and", "the", "no", "person", "someone", "something"}
        for rendering in RENDERINGS:
            for index in range(4_000):
                for scene in twins(index, rendering):
                    words |= set(scene.caption.replace(",", " ").lower().split())
        return words

    def prepare(self) -> None:
        self._pool = draw_pool(self.n_scenes, self.workers)
        self._scenes = [twins(i, rendering) for rendering in RENDERINGS for i in range(self.n_scenes)]

    def batch(self, progress: float, rng: np.random.Generator) -> tuple[torch.Tensor, list[Texts]]:  # noqa: ARG002
        if len(self._order) < self.batch_scenes:
            self._order = np.concatenate([self._order, rng.permutation(len(self._pool))])
        chosen, self._order = self._order[: self.batch_scenes], self._order[self.batch_scenes :]
        pixels = torch.from_numpy(self._pool[chosen].reshape(-1, IMAGE_PX, IMAGE_PX, 3)).permute(0, 3, 1, 2).float() / 255
        pixels, coloured = _augment(pixels, rng)
        said = [captions(scene, with_colours=keep) for i, keep in zip(chosen, coloured, strict=True) for scene in self._scenes[i]]
        wholes, objects = zip(*said, strict=True)
        # whole captions teach the rest of the picture; they are long, so half of the batch has to do
        return pixels, [_texts(wholes[: len(said) // 2], weight=0.5), _texts(objects)]


def _texts(said: Sequence[str], weight: float = 1.0) -> Texts:
    different, own = np.unique(said, return_inverse=True)
    return Texts(list(different), own, weight)


def _augment(pixels: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """Shifts, stretches, leans, mirrors and relights a batch; twins share each change because only their difference
    should teach. A quarter of the scenes lose their colours or have them swapped, and the words for them.

    Returns:
        The pixels, and which scenes kept their colours.
    """
    n = len(pixels) // 2
    stretch, turn = np.exp(rng.uniform(-0.15, 0.15, n)), rng.uniform(-0.12, 0.12, n)
    lean, zoom, flip = rng.uniform(-0.22, 0.22, n), rng.uniform(0.92, 1.08, n), np.where(rng.random(n) < 0.5, -1.0, 1.0)
    theta = np.zeros((n, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = flip * zoom * stretch * np.cos(turn), lean - np.sin(turn)
    theta[:, 1, 0], theta[:, 1, 1] = flip * np.sin(turn), zoom / stretch * np.cos(turn)
    theta[:, :, 2] = rng.uniform(-0.1, 0.1, (n, 2))
    grid = functional.affine_grid(torch.from_numpy(theta).repeat_interleave(2, 0), list(pixels.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (n, 3)).astype(np.float32)).repeat_interleave(2, 0)
    pixels = (pixels * gain[:, :, None, None]).clamp(0, 1)
    coloured = rng.random(n) >= 0.25
    for i in np.flatnonzero(~coloured):
        pair = pixels[2 * i : 2 * i + 2]
        pixels[2 * i : 2 * i + 2] = pair.mean(dim=1, keepdim=True) if rng.random() < 0.3 else pair[:, torch.from_numpy(rng.permutation(3))]
    return pixels, coloured
