"""What images an encoder knows, and whether others look to it like these.

A small encoder makes a vector of any image, of one that it knows nothing of too. Where its vectors of images that it knows are described
(`known_images.json` in the model's folder), a single number of other images' vectors tells whether they lie likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import read_json
from guardkit.schema import InputError

KNOWN = "known_images.json"
MAX_IMAGES = 512  # more say nothing else
_MIN_IMAGES = 20  # the numbers of fewer vary too much


@dataclass(frozen=True)
class KnownImages:
    """How the embeddings of images lie that an encoder knows.

    Attributes:
        about: what the images show.
        statistic: "nearest_text", the mean cosine of an image to the nearest of `texts`; or "mean_cosine", that of two
            different images.
        normal: its value on such images.
        limit: less of "nearest_text", or more of "mean_cosine", is the mark of images that the encoder does not know.
        texts: of images that it knows, in words that it knows; for "nearest_text".
    """

    about: str
    statistic: str
    normal: float
    limit: float
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> KnownImages | None:
        """What a model's folder says of it; None where it says nothing.

        Raises:
            InputError: it says something else.
        """
        if not (folder / KNOWN).is_file():
            return None
        said = read_json(folder / KNOWN, "what images an encoder knows")
        found: dict[str, Any] = {name: said.get(name) for name in ("about", "statistic", "normal", "limit", "texts")}
        is_right = (
            isinstance(found["about"], str)
            and found["statistic"] in ("nearest_text", "mean_cosine")
            and all(isinstance(found[name], int | float) and -1 <= found[name] <= 1 for name in ("normal", "limit"))
            and isinstance(found["texts"], list)
            and all(isinstance(text, str) for text in found["texts"])
            and bool(found["texts"]) == (found["statistic"] == "nearest_text")
        )
        if not is_right:
            raise InputError(f"{folder / KNOWN} must say about, statistic, normal, limit and texts as guardkit writes them; copy it anew")
        return cls(**(found | {"texts": tuple(found["texts"])}))


def nearest_text(embeddings: np.ndarray, texts: np.ndarray) -> float:
    """Mean cosine of (n, d) images to the nearest of (m, d) texts."""
    return float((embeddings @ texts.T).max(axis=1).mean())


def mean_cosine(embeddings: np.ndarray) -> float:
    """Mean cosine of two different images of (n, d)."""
    n, total = len(embeddings), embeddings.astype(np.float64).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def unknown_images(encoder: Any, embeddings: Callable[[], np.ndarray]) -> list[str]:
    """Whether images look like nothing that their encoder knows.

    Args:
        encoder: of which nothing is said unless it describes the images that it knows.
        embeddings: gives (n, d) unit vectors of the images; asked where it does.
    Returns:
        One sentence, or none.
    """
    known: KnownImages | None = getattr(encoder, "known_images", None)
    if known is None:
        return []
    vectors = embeddings()
    if len(vectors) < _MIN_IMAGES:
        return []
    # from all over, because sources list their images category by category
    vectors = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), MAX_IMAGES)).astype(int)]
    if known.statistic == "nearest_text":
        value = nearest_text(vectors, encoder.encode_texts(list(known.texts)))
        is_foreign, what, beyond = value < known.limit, "their mean cosine to the nearest text of what it knows", "below"
    else:
        value = mean_cosine(vectors)
        is_foreign, what, beyond = value > known.limit, "the mean cosine of two of them", "above"
    if not is_foreign:
        return []
    return [
        f"encoder {encoder.name} knows {known.about}, and these images look to it like something else: {what} is {value:.2f}, of images that it knows "
        f"{known.normal:.2f}, and {beyond} {known.limit:.2f} it may see little of what they show; try another with encoder= (docs/encoders.md)"
    ]
