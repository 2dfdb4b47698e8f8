"""An independent judge of edited scenes: a small network on pixels, trained on what the world itself knows.

    python benchmarks/scene_judge.py judge=outputs/scene_judge.safetensors

It sees the square around a feature and names the feature, or says that there is none. It shares nothing with the encoder
behind `verifier=encoder`: no weights, no texts, no training scenes. To say "nothing" it learned from squares whose feature
was painted over, blurred beyond recognition or scrambled.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from checkpoints.edit_recipe import CROP_PX
from checkpoints.scenes_edit.world import draw_pool, square_around
from guardkit.artifacts import written
from guardkit.scenes.world import Scene, features
from guardkit.schema import Region

SEED = 9_003  # of its scenes and weights; no pool elsewhere has it
FEATURES = [*features(1), *features(0)]
N_UNSAFE = len(features(1))
NOTHING = len(FEATURES)
_NOTHING_RATE = 0.2


class Judge(nn.Module):
    """(n, 3, 64, 64) float in [0, 1] -> (n, 55) logits: one for each feature, the last for none."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 96), (96, 192)):
            blocks += [nn.Conv2d(before, after, 3, padding=1, stride=1 + (before > 3), bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(192, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192), nn.ReLU())
        self.head = nn.Linear(4 * 192, NOTHING + 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Where things lie matters little: features are averaged over quarters."""
        return self.head(functional.adaptive_avg_pool2d(self.blocks(pixels - 0.5), 2).flatten(1))

    @torch.inference_mode()
    def names(self, crops: np.ndarray) -> np.ndarray:
        """(n, 64, 64, 3) uint8 -> (n,) index into FEATURES, NOTHING for none."""
        return torch.cat([self(_pixels(part)).argmax(1) for part in np.array_split(crops, -(-len(crops) // 256))]).numpy()


def crop(image: np.ndarray, region: Region) -> np.ndarray:
    """The square that the judge looks at."""
    left, top = square_around(region, image.shape[0])
    return image[top : top + CROP_PX, left : left + CROP_PX]


def index_of(scene: Scene) -> int:
    """The right answer for a scene."""
    return FEATURES.index(scene.feature)


def train(path: Path, *, n_scenes: int = 8_000, epochs: int = 7, workers: int = 2) -> Judge:
    """Trains a judge and keeps it."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    started = time.monotonic()
    crops, boxes, wanted = draw_pool(n_scenes, workers, seed=SEED)
    crops, names = crops[:, 1], np.array([index_of(scene) for scene in wanted])
    judge = Judge()
    n_steps = epochs * len(crops) // 128
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=n_steps)
    losses = []
    for step in range(n_steps):
        rows = rng.integers(len(crops), size=128)
        given, asked = crops[rows].copy(), names[rows].copy()
        for i in np.flatnonzero(rng.random(len(rows)) < _NOTHING_RATE):
            given[i], asked[i] = _without(given[i], boxes[rows[i]], rng), NOTHING
        pixels = _moved(_pixels(given), rng)
        loss = functional.cross_entropy(judge(pixels), torch.from_numpy(asked), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 199:
            print(f"judge: step {step + 1} of {n_steps}, loss {np.mean(losses[-200:]):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    with written(path) as temporary:
        save_file(judge.state_dict(), temporary)
    return judge.eval()


def load(path: Path) -> Judge:
    """The judge kept at `path`, trained first where there is none."""
    if not path.is_file():
        return train(path)
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


def _pixels(crops: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 255


def _moved(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """By a few pixels, lighter or darker, and less sharp: what edits may be without being wrong."""
    right, down = rng.integers(-4, 5, 2)
    pixels = torch.roll(pixels, (int(down), int(right)), (2, 3))
    if rng.random() < 0.5:
        side = int(rng.integers(40, 60))
        pixels = functional.interpolate(functional.interpolate(pixels, side, mode="area"), CROP_PX, mode="bilinear")
    return (pixels * float(rng.uniform(0.85, 1.15))).clamp(0, 1)


def _without(one: np.ndarray, box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The square with nothing recognisable in its box."""
    import cv2

    left, top, right, bottom = box.astype(int)
    inside = (slice(top, bottom), slice(left, right))
    one, kind = one.copy(), rng.integers(4)
    if kind == 0:
        one[inside] = rng.integers(0, 256, 3)
    elif kind == 1:
        one = cv2.inpaint(one, _box_mask(inside), 3, cv2.INPAINT_TELEA)
    elif kind == 2:
        one[inside] = cv2.GaussianBlur(one, (0, 0), float(rng.uniform(7, 12)))[inside]
    else:
        patch = one[inside].reshape(-1, 3)
        one[inside] = cv2.GaussianBlur(rng.permutation(patch).reshape(one[inside].shape), (0, 0), 2)
    return one


def _box_mask(inside: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((CROP_PX, CROP_PX), np.uint8)
    mask[inside] = 255
    return mask


if __name__ == "__main__":
    options = dict(one.split("=", 1) for one in sys.argv[1:])
    train(Path(options.get("judge", "outputs/scene_judge.safetensors")))
