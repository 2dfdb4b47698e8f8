"""The values that rooms hand to each other: records, contents, decisions, errors. Knows no model and no file format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from typing_extensions import TypeIs

UNSAFE, SAFE = 1, 0
UNLABELLED = -1
_MAX_NAME = 300  # of a content, in messages

Region = tuple[float, float, float, float]
"""x_min, y_min, x_max, y_max as fractions of width and height."""


class InputError(ValueError):
    """What a user gave cannot be used. The message is one line: what came, what was expected, what to do."""


class ImageError(InputError):
    """An image cannot be read; the message is the reason."""


class TooLargeError(ImageError):
    """An image asks for more work than is allowed: bytes, pixels, sides, frames. It may be sound."""


def shortened(text: str, n: int = 60) -> str:
    """A text in one line of at most `n` characters, for messages: its beginning and, where it is longer, its end."""
    text = " ".join(text.split())
    return text if len(text) <= n else f"{text[: n // 2]} … {text[-(n - n // 2 - 3) :]}"


class Content(Protocol):
    """Pixels that are not read yet. As a text it names itself to people, as a file does by its path."""

    @property
    def key(self) -> str:
        """A hash of everything that determines the pixels (a file's bytes, a scene's description)."""
        ...

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError with the reason when there is no image to be had."""
        ...


def unreadable(content: Content, error: ImageError) -> ImageError:
    """What is said of an image that cannot be read when it is too late to leave it out."""
    name = str(content)
    return ImageError(
        f"{name if len(name) <= _MAX_NAME else shortened(name, _MAX_NAME)} cannot be read ({error}); mend it or take it out of the source, "
        "or let the source look for such images and leave them out (source.check_images=true)"
    )


@dataclass(frozen=True)
class Record:
    """One labelled image of a source.

    Attributes:
        id: unique within the source, for instance the file's path below the source's root.
        label: 1 = unsafe, 0 = safe; -1 = unknown, only among the images that a source sets aside from training.
        category: the policy's category it violates (or, when safe, looks like); None when unknown or none.
        source: where it comes from; metrics are also given by source.
        group: records of one group never straddle a split (a pair, near-duplicates).
        content: its pixels; None when only an embedding is known.
        region: where the unsafe feature is, if known.
        caption: what it shows, in words; may be empty.
        counterfactuals: those that the source brings along; where there are some, no editor is asked.
        embedding: (d,) float32 unit vector, when the source holds embeddings instead of images.
        perceptual_hash: 64 bits, by which near-duplicates are found; None where the image was not looked at.
        counterfactual_hashes: the same of `counterfactuals`, in their order; empty where nobody looked at them.
        listed_group: the group that the source lists it in, by its own name; None where `group` is only derived.
        is_corrected: people looked at a guard's decision on it: it is trained on beside those of a budget, and not drawn for a test set, whose
            images no guard has chosen.
    """

    id: str
    label: int
    category: str | None
    source: str
    group: str
    content: Content | None
    region: Region | None = None
    caption: str = ""
    counterfactuals: tuple[Content, ...] = ()
    embedding: np.ndarray | None = field(default=None, compare=False, repr=False)
    perceptual_hash: int | None = field(default=None, compare=False)
    counterfactual_hashes: tuple[int | None, ...] = field(default=(), compare=False)
    listed_group: str | None = field(default=None, compare=False)
    is_corrected: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Rejected:
    """An input that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What a guard says of one image.

    A decision has no truth value, because an image that could not be decided is neither: ask for `action` or `flagged`.

    Attributes:
        label: 1 = flagged as unsafe (score >= threshold), 0 = not; None when the image could not be decided.
        score: probability of unsafe in [0, 1]; within a scope, of the category in it that decided; NaN when the image could not be decided.
        threshold: from which on an image is flagged: reviewed, or blocked.
        categories: probability per category of the policy, in [0, 1], whatever the scope.
        error: why there is no score; None when there is one.
        threshold_block: from which on it is blocked; None: the same as `threshold`, so that nothing is reviewed.
        violated: the categories that caused it, highest score first; empty where the image is not flagged.
    """

    label: int | None
    score: float
    threshold: float
    categories: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    threshold_block: float | None = None
    violated: tuple[str, ...] = ()

    @property
    def action(self) -> Literal["allow", "review", "block", "error"]:
        """What to do with the image: "allow", "review" (let a person look), "block", or "error" when there is no decision, which never
        means allow."""
        if self.error is not None or self.label not in (SAFE, UNSAFE) or not math.isfinite(self.score):
            return "error"
        if self.label == SAFE:
            return "allow"
        return "review" if self.threshold_block is not None and self.score < self.threshold_block else "block"

    @property
    def flagged(self) -> bool:
        """Whether the image was found unsafe: to be blocked, or to be reviewed first.

        Raises:
            ValueError: the image could not be decided.
        """
        if self.action == "error":
            raise ValueError(
                f"this image was not decided ({self.error or 'no finite score'}), so it is neither flagged nor safe; ask for action first"
            )
        return self.action != "allow"

    @property
    def top_category(self) -> str | None:
        """The category with the highest probability, flagged or not; None where there is none."""
        return max(self.categories, key=self.categories.__getitem__, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Valid JSON: `action`, `top_category` and the attributes; what is not a finite number is null."""
        return {
            "action": self.action,
            "label": self.label,
            "score": _finite(self.score),
            "threshold_review": _finite(self.threshold),
            "threshold_block": _finite(self.threshold if self.threshold_block is None else self.threshold_block),
            "categories": {name: _finite(value) for name, value in self.categories.items()},
            "violated": list(self.violated),
            "top_category": self.top_category,
            "error": self.error,
        }

    def __bool__(self) -> bool:
        raise TypeError(
            'a decision is not true or false; ask for decision.action ("allow", "review", "block" or "error") or decision.flagged'
        )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Judgment:
    """What a classifier that looks at images itself says of one.

    Attributes:
        score: probability of unsafe in [0, 1]; NaN when it abstains.
        reason: why it abstains; None when it does not.
        transient: something outside the classifier stood in its way (no connection, a spent budget), and asking again may
            give another judgment: not to be stored.
    """

    score: float
    reason: str | None = None
    transient: bool = False


class _AnyGuard(Protocol):
    """What evaluation needs of every classifier.

    A classifier may say more of itself, for the report: `reads_policy` (whether its scores follow from the policy that it is given, so that
    a new policy needs no training; `for_policy(policy)` then gives the same classifier with another one), `n_labels` (labelled images that it was
    trained on) and `n_parameters`.

    Attributes:
        name: for tables.
        threshold: flag when score >= threshold.
        fingerprint: a hash of everything its scores depend on, 64 hex digits.
        covers: the policy's categories it was made to find; None: all.
    """

    name: str
    threshold: float

    @property
    def fingerprint(self) -> str: ...

    @property
    def covers(self) -> frozenset[str] | None: ...


class EmbeddingGuard(_AnyGuard, Protocol):
    """A classifier that scores embeddings, so that one embedding of an image serves all guards on its encoder.

    Attributes:
        name, threshold, fingerprint, covers: as every guard has them, see `ImageGuard`.
        encoder: the `Encoder` whose embeddings it takes.
        is_normalized: whether it takes unit vectors, or embeddings as the model gave them, norm included.
    """

    @property
    def encoder(self) -> Any: ...

    @property
    def is_normalized(self) -> bool: ...

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(n, d) float -> (n,) unbounded; the score is their sigmoid. Differentiable."""
        ...


class ImageGuard(_AnyGuard, Protocol):
    """A classifier that looks at images itself, each one once: what it says is kept.

    Attributes:
        name: for tables.
        threshold: flag when score >= threshold.
        fingerprint: a hash of everything its scores depend on, 64 hex digits.
        covers: the policy's categories it was made to find; None: all.
    """

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """(h, w, 3) uint8 RGB images -> one judgment each. Never raises because of an image."""
        ...


Guard = EmbeddingGuard | ImageGuard
"""Any classifier that evaluation measures: ours and other people's alike."""


def takes_embeddings(guard: Guard) -> TypeIs[EmbeddingGuard]:
    """Which of the two a guard is: the one with an encoder scores embeddings, the other looks at images."""
    return getattr(guard, "encoder", None) is not None
