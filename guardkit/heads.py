"""Heads: from (n, d) embeddings to (n, 1 + k) logits: the decision first, then one per category of the policy.

A head knows no encoder and no image. `build` makes a new one for an encoder and a policy; a saved guard keeps `config` and
the weights, and names the class as `HEAD_KINDS` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from guardkit.checks import check_number, check_whole
from guardkit.encoders.base import Encoder, require_texts
from guardkit.kinds import MAX_WIDTH, Kinds
from guardkit.policy import Policy
from guardkit.schema import InputError, shortened

_SAME_TEXT = 1e-6  # of the cosine, which rounding may keep below 1

HEAD_KINDS = Kinds("head", {"linear": "guardkit.heads:LinearHead", "mlp": "guardkit.heads:MLPHead", "prompt": "guardkit.heads:PromptHead"})


class KnowsImages(Protocol):
    """What a head may know of images without labels."""

    def whitening(self, n_images: int, shrinkage: float) -> np.ndarray:
        """(d, d), see `guardkit.data.unlabelled`."""
        ...


class Head(nn.Module):
    """Interface of all heads: a `forward` from (n, d) float32 to (n, 1 + k) float32 logits.

    A saved one is built again by `type(head)(**head.config)`, and gets its weights by `load_state_dict`: tensors only, finite,
    of the shapes that `config` implies. So the class stands at the top level of its module.

    Attributes:
        config: the constructor's keyword arguments, in plain JSON types. Those called `dim` and `n_categories` are d and k.
    """

    config: dict[str, Any]

    @property
    def kind(self) -> str:
        """What a saved guard calls its class: a name in `HEAD_KINDS`, or "package.module:Class"."""
        return HEAD_KINDS.name(type(self))

    def prepare(self, images: KnowsImages) -> None:
        """Called once before training. Most heads need nothing but labelled images."""

    @property
    def is_prepared(self) -> bool:
        """Whether it can be trained; not where `prepare` still has something to do."""
        return True


class LinearHead(Head):
    """A linear probe.

    Args:
        dim: d, width of the embeddings.
        n_categories: k.
        whitened: embeddings pass through a fixed (d, d) map first.
    """

    def __init__(self, dim: int, n_categories: int, *, whitened: bool = False) -> None:
        super().__init__()
        self.config = {"dim": dim, "n_categories": n_categories, "whitened": whitened}
        self._wanted: tuple[int, float] | None = None  # how to whiten, until that is done
        self.map: Tensor | None
        self.register_buffer("map", torch.eye(dim) if whitened else None)
        self.linear = nn.Linear(dim, 1 + n_categories)
        # a start at zero is the same for every seed, and the loss is convex
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def build(cls, encoder: Encoder, policy: Policy) -> LinearHead:
        """A new head for this encoder and policy."""
        return cls(encoder.dim, len(policy.categories))

    @classmethod
    def whitened(cls, encoder: Encoder, policy: Policy, *, n_images: int = 2048, shrinkage: float = 0.003) -> LinearHead:
        """A head that sees embeddings in which images without labels vary alike in all directions.

        What scenes have in common with each other, and not with safety, takes up most of the variance of embeddings, and
        the penalty of a plain probe protects exactly those directions. Whitened, none is easier to use than another. The
        map is estimated by `prepare` from training images whose labels are not looked at.

        Args:
            encoder: made the embeddings.
            policy: has the categories.
            n_images: to estimate the covariance from.
            shrinkage: how much of the mean variance is added to every direction's, above 0.
        """
        check_whole("head.n_images", n_images, 2)
        check_number("head.shrinkage", shrinkage, "(0, inf)")
        head = cls(encoder.dim, len(policy.categories), whitened=True)
        head._wanted = n_images, shrinkage
        return head

    @classmethod
    def from_texts(cls, encoder: Encoder, policy: Policy, *, scale: float = 30.0, shrinkage: float = 1e-3) -> LinearHead:
        """A head that starts as the linear classifier of the policy's own texts, unsafe against safe ones.

        The start is Fisher's linear discriminant of the encoded texts: the difference of the means of both sides, whitened
        by the covariance within them, so that what all texts have in common does not count. With `loss.l2` above 0 training
        pulls the head there rather than towards zero. (Lin et al., 2023, "Multimodality helps unimodality", train on texts and
        images alike; here the texts only say where to start.)

        Args:
            encoder: encodes the texts.
            policy: has them.
            scale: mean difference between the logits of unsafe and safe texts.
            shrinkage: how much of the mean variance is added to every direction's, above 0.
        Raises:
            InputError: the encoder has no texts, or the same vector for a safe and an unsafe one.
        """
        check_number("head.scale", scale, "(0, inf)")
        check_number("head.shrinkage", shrinkage, "(0, inf)")
        reader = require_texts(encoder, needed_by="head=linear_texts", instead="head=linear")
        head = cls.build(encoder, policy)
        safe = [*policy.safe_texts, *(text for category in policy.categories for text in category.safe_texts)]
        unsafe = [text for category in policy.categories for text in category.unsafe_texts]
        encoded = reader.encode_texts([*safe, *unsafe])
        _check_sides(safe, encoded[: len(safe)], unsafe, encoded[len(safe) :])
        vectors = head.features(torch.from_numpy(encoded.astype(np.float64))).numpy()
        there, elsewhere = vectors[len(safe) :], vectors[: len(safe)]
        within = np.concatenate([there - there.mean(axis=0), elsewhere - elsewhere.mean(axis=0)])
        covariance = within.T @ within / len(within)
        covariance += shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        ends = np.cumsum([0, *(len(category.unsafe_texts) for category in policy.categories)])
        sides = [there, *(there[first:last] for first, last in pairwise(ends))]
        gaps = np.stack([side.mean(axis=0) - elsewhere.mean(axis=0) for side in sides])
        weights = np.linalg.solve(covariance, gaps.T).T
        weights *= scale / (weights * gaps).sum(axis=1, keepdims=True)
        with torch.no_grad():
            head.linear.weight.copy_(torch.from_numpy(weights))
        return head

    def prepare(self, images: KnowsImages) -> None:
        """Whitens, if that is wanted."""
        if self._wanted is not None and self.map is not None:
            self.map.copy_(torch.from_numpy(images.whitening(*self._wanted)))
            self._wanted = None

    @property
    def is_prepared(self) -> bool:
        """Not where a whitening is still to be estimated: until then the map is the identity."""
        return self._wanted is None

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self.linear(self.features(embeddings))

    def features(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, d): what the weights are multiplied with, a linear map of the embeddings."""
        # unit vectors have coordinates of size d ** -0.5: brought to size 1, the learning rate suits any width
        scaled = embeddings * self.linear.in_features**0.5
        return scaled if self.map is None else scaled @ self.map.to(scaled)


class MLPHead(Head):
    """One hidden layer.

    Args:
        dim: d, width of the embeddings.
        n_categories: k.
        hidden: width of the hidden layer.
        dropout: share of hidden units dropped in training, in [0, 1).
    """

    def __init__(self, dim: int, n_categories: int, *, hidden: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        check_whole("head.hidden", hidden, 1, MAX_WIDTH)
        check_number("head.dropout", dropout, "[0, 1)")
        self.config = {"dim": dim, "n_categories": n_categories, "hidden": hidden, "dropout": dropout}
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1 + n_categories))

    @classmethod
    def build(cls, encoder: Encoder, policy: Policy, *, hidden: int = 256, dropout: float = 0.1) -> MLPHead:
        """A new head for this encoder and policy."""
        return cls(encoder.dim, len(policy.categories), hidden=hidden, dropout=dropout)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self.layers(embeddings * embeddings.shape[1] ** 0.5)


class PromptHead(Head):
    """Learned class vectors compared with the image by cosine, started from the policy's texts.

    Each text of the policy is one vector, on the unsafe side of a category or on the safe side. The decision is the
    log-odds of a softmax over all of them, unsafe against safe; a category's logit compares its own unsafe vectors
    with all safe ones. Untrained it is zero-shot classification (CLIP, Radford et al., 2021, section 3.1); with one
    vector a side it is Q16 (Schramowski et al., 2022, section 4).

    Args:
        dim: d, width of the embeddings.
        n_categories: k.
        n_prompts: m, number of vectors.
        scale: of the cosine before the softmax, at the start (CLIP's own is 100).
    """

    def __init__(self, dim: int, n_categories: int, *, n_prompts: int, scale: float = 30.0) -> None:
        super().__init__()
        check_number("head.scale", scale, "(0, inf)")
        self.config = {"dim": dim, "n_categories": n_categories, "n_prompts": n_prompts, "scale": scale}
        self.prompts = nn.Parameter(torch.zeros(n_prompts, dim))
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.bias = nn.Parameter(torch.zeros(1 + n_categories))
        self.members: Tensor
        self.register_buffer("members", torch.zeros(2 + n_categories, n_prompts, dtype=torch.bool))

    @classmethod
    def build(cls, encoder: Encoder, policy: Policy, *, scale: float = 30.0) -> PromptHead:
        """A head whose vectors are the policy's texts, encoded. Raises InputError for an encoder without texts."""
        reader = require_texts(encoder, needed_by="head=prompt", instead="head=linear")
        k = len(policy.categories)
        texts: list[str] = list(policy.safe_texts)
        rows: list[int] = [1] * len(texts)  # row 0: all unsafe texts; row 1: all safe ones; row 2 + i: category i's unsafe ones
        for i, category in enumerate(policy.categories):
            texts += [*category.unsafe_texts, *category.safe_texts]
            rows += [2 + i] * len(category.unsafe_texts) + [1] * len(category.safe_texts)
        head = cls(encoder.dim, k, n_prompts=len(texts), scale=scale)
        encoded = reader.encode_texts(texts)
        sides = [[i for i, row in enumerate(rows) if (row >= 2) == is_unsafe] for is_unsafe in (False, True)]
        safe, unsafe = ([texts[i] for i in side] for side in sides)
        _check_sides(safe, encoded[sides[0]], unsafe, encoded[sides[1]])
        row = torch.tensor(rows)
        for i in range(2 + k):
            head.members[i] = row == i
        head.members[0] = row >= 2
        with torch.no_grad():
            head.prompts.copy_(torch.from_numpy(encoded))
        return head

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        cosine = embeddings @ functional.normalize(self.prompts, dim=1).T
        logits = self.log_scale.exp() * cosine
        side = logits[:, None, :].masked_fill(~self.members, float("-inf")).logsumexp(dim=2)  # (n, 2 + k)
        against_safe = side - side[:, 1:2]
        return torch.cat([against_safe[:, :1], against_safe[:, 2:]], dim=1) + self.bias


def _check_sides(safe: Sequence[str], safe_vectors: np.ndarray, unsafe: Sequence[str], unsafe_vectors: np.ndarray) -> None:
    """Raises InputError where the encoder reads an unsafe text as it reads a safe one: it would pull both ways."""
    same = np.argwhere(safe_vectors @ unsafe_vectors.T > 1 - _SAME_TEXT)
    if len(same):
        first, second = unsafe[same[0, 1]], safe[same[0, 0]]
        raise InputError(
            f"the policy's unsafe text {shortened(first)!r} and its safe text {shortened(second)!r} are the same to the encoder "
            f"({len(same)} such pair(s)): it knows too few of their words (scenes_clip, the default, knows those of drawn scenes only: choose "
            "another with encoder=), or they differ only beyond its context length: shorten or reword them"
        )
