"""Transplants: a pair turned around. The unsafe object is cut out by its box and blended into a safe photograph, which is unsafe then;
beside it, a safe object of a third photograph in the same place, blended by the same means.

Both halves are edited alike and share their scene, so neither tells a guard anything but the feature. The unsafe half is a picture
that somebody might not want to have: both are drawn when somebody asks for their pixels, which only embedding does, and are
neither written nor shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.editors.base import Photograph
from guardkit.editors.blending import box, colour_step, cut_out, in_colours_of
from guardkit.limits import shrink
from guardkit.schema import Content, Region

_VERSION = 1  # counts up when the same transplant has other pixels
_WIDEST = 0.9  # side of a place, as a fraction of the image's
_NARROWEST = 0.35
_RESCALED = (0.6, 1.1)  # size of an object in its new image, as a multiple of that in its own
_FEATHER = 0.2  # width of the soft edge, as a fraction of the ellipse's radius
_LIGHT = 0.25  # how much of the difference in colour to its surroundings an object takes on


@dataclass(frozen=True)
class TransplantContent:
    """An object in another photograph.

    Attributes:
        donor: the image that has the object.
        region: where the object is.
        host: the photograph that it is put into.
        shape: the object whose relative size and shape the place has: (content, region). Both halves of a pair have the same.
        seed: of the place.
    """

    donor: Content
    region: Region
    host: Content
    shape: tuple[Content, Region]
    seed: int

    def __str__(self) -> str:
        return f"{self.host} with the object of {self.donor}"

    @cached_property
    def key(self) -> str:
        """Of the images, the boxes and the seed. Raises ImageError."""
        parts = [_VERSION, cv2.__version__, self.donor.key, self.region, self.host.key, self.shape[0].key, self.shape[1], self.seed]
        return f"transplant:{fingerprint(parts)}"

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB of the host's size, or of the working size if that is smaller. Raises ImageError."""
        host, donor = shrink(self.host.load()), self.donor.load()
        place = box(_place(self.shape[1], np.random.default_rng([self.seed, 31])), host.shape)
        height, width = (part.stop - part.start for part in place)
        patch = in_colours_of(host, cut_out(donor, self.region, width, height))
        patch = np.clip(patch + _LIGHT * colour_step(host, patch, place), 0, 255)
        share = _ellipse(height, width)[..., None]
        result = host.copy()
        result[place] = np.round(share * patch + (1 - share) * host[place])
        return result


def transplant(content: Content, region: Region, photographs: Sequence[Photograph], seed: int, *, is_unsafe: bool) -> TransplantContent:
    """One half of a pair.

    Args:
        content, region: of the unsafe object.
        photographs: safe ones of the training pool, at least two; hosts are ordinary ones, where not all are look-alikes.
        seed: of the pair; several in a row take different hosts.
        is_unsafe: the half with the unsafe object, or the one with another safe object in its place.
    """
    ordinary = [one for one in photographs if not one.is_look_alike]
    if len(ordinary) < 2:
        ordinary = list(photographs)
    # one order for each image, of which every seed takes the next two
    order = np.random.default_rng(int(fingerprint(content.key)[:12], 16)).permutation(len(ordinary))
    host, other = (ordinary[order[(2 * seed + i) % len(order)]] for i in (0, 1))
    donor, at = (content, region) if is_unsafe else (other.content, other.region)
    return TransplantContent(donor, at, host.content, (content, region), seed)


def _place(region: Region, rng: np.random.Generator) -> Region:
    """Anywhere, with the region's shape and about its size."""
    across, down = region[2] - region[0], region[3] - region[1]
    longer = max(across, down)
    scale = float(np.clip(rng.uniform(*_RESCALED) * longer, _NARROWEST, _WIDEST)) / longer
    across, down = across * scale, down * scale
    left, top = float(rng.uniform(0, 1 - across)), float(rng.uniform(0, 1 - down))
    return left, top, left + across, top + down


def _ellipse(height: int, width: int) -> np.ndarray:
    """(height, width) float in [0, 1]: 1 within an ellipse as large as the place, falling softly to 0 at its edge."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return np.clip((1 - np.hypot(y[:, None], x[None])) / _FEATHER, 0, 1)
