"""Scenes as contents: pixels that are drawn when somebody asks for them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.scenes.world import Scene, draw


@cache
def drawing_fingerprint() -> str:
    """A hash of the code that draws: stored images of an older drawing must not be taken for today's."""
    digest = hashlib.sha256(f"{cv2.__version__} {np.__version__}".encode())
    for module in ("pen.py", "stage.py", "features.py", "world.py"):
        digest.update((Path(__file__).parent / module).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SceneContent:
    """A scene, drawn `size` pixels wide and high on demand."""

    scene: Scene
    size: int = 128

    def __str__(self) -> str:
        return f"the scene {self.scene.name}"

    @cached_property
    def key(self) -> str:
        """A hash of the description and of the drawing code, so that nothing need be drawn to look it up."""
        return "scene:" + fingerprint({"scene": asdict(self.scene), "size": self.size, "drawing": drawing_fingerprint()})

    def load(self) -> np.ndarray:
        """(size, size, 3) uint8 RGB."""
        return draw(self.scene, self.size).image
