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
from guardkit.encoders.base import Encoder, cut_off, reads_texts, require_texts
from guardkit.kinds import MAX_WIDTH, Kinds, check_arguments
from guardkit.policy import Policy
from guardkit.schema import InputError, shortened

_N_IMAGES, _SHRINKAGE = 2048, 0.003  # that tell how embeddings vary
_SAME_TEXT = 1e-6  # of the cosine, which rounding may keep below 1

HEAD_KINDS = Kinds(
    "head",
    {
        "linear": "guardkit.heads:LinearHead",
        "anchored": "guardkit.heads:AnchoredHead",
        "mlp": "guardkit.heads:MLPHead",
        "prompt": "guardkit.heads:PromptHead",
        "joined": "guardkit.heads:JoinedHead",
    },
)


class KnowsImages(Protocol):
    """What a head may know of images without labels."""

    def whitening(self, n_images: int, shrinkage: float) -> np.ndarray:
        """(d, d), see `guardkit.data.unlabelled`."""
        ...

    def embeddings(self, n_images: int) -> np.ndarray:
        """(n, d), see there."""
        ...

    def null_edits(self, n_images: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, d) images and their null edits, see there."""
        ...


class Head(nn.Module):
    """Interface of all heads: a `forward` from (n, d) float32 to (n, 1 + k) float32 logits.

    A saved one is built again by `type(head)(**head.config)`, and gets its weights by `load_state_dict`: tensors only, finite,
    of the shapes that `config` implies. So the class stands at the top level of its module.

    Attributes:
        config: the constructor's keyword arguments, in plain JSON types. Those called `dim` and `n_categories` are d and k.
        usual_l2: `loss.l2` of a training that is given none.
        is_erased: `features` has the trace of the editor taken out; of a head that was prepared here.
        notes: what a user should know of it, in sentences.
        chosen: what it is, where it was chosen by what encoder and policy have; "" of a head that was named.
    """

    config: dict[str, Any]
    usual_l2: float = 0.0
    is_erased: bool = False
    notes: tuple[str, ...] = ()
    chosen: str = ""

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

    def features(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, e): what it sees of embeddings through whatever is fixed in it."""
        return embeddings

    def decision(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n,) logits of unsafe alone, up to rounding: where categories are not asked for, a head may save their work."""
        return self(embeddings)[:, 0]

    def of_texts_alone(self, embeddings: Tensor) -> Tensor | None:
        """(n, d) -> (n, 1 + k) logits by the policy's texts without a label, where it holds those texts; None elsewhere."""
        del embeddings
        return None


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
        self._is_prepared = True  # no map is to be estimated
        self._whitening: tuple[int, float] | None = None
        self._leace_images = 0
        self.map: Tensor | None
        self.register_buffer("map", torch.eye(dim) if whitened else None)
        self.linear = nn.Linear(dim, 1 + n_categories)
        # a start at zero is the same for every seed, and the loss is convex
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def build(cls, encoder: Encoder, policy: Policy, *, leace_images: int = 0) -> LinearHead:
        """A new head for this encoder and policy.

        Where edits are trained on, the editor's own trace may say what is safe. LEACE (Belrose et al., 2023, "LEACE: perfect linear concept
        erasure in closed form") takes out of the embeddings what tells null edits from the images that they were made of: afterwards both
        have the same mean, so that no linear head finds it, and nothing else is changed more than that needs. An image and its
        null edit have one label, so that nothing of the labels is taken out. The erasure is part of the head's fixed map, and costs nothing
        where the guard is used.

        Args:
            encoder: made the embeddings.
            policy: has the categories.
            leace_images: training images, whatever their labels, whose null edits show the trace; 0: nothing is taken out. `prepare` has
                the editor edit them.
        """
        check_whole("head.leace_images", leace_images, 0)
        head = cls(encoder.dim, len(policy.categories), whitened=bool(leace_images))
        head._is_prepared, head._leace_images = not leace_images, leace_images
        return head

    @classmethod
    def whitened(
        cls, encoder: Encoder, policy: Policy, *, n_images: int = _N_IMAGES, shrinkage: float = _SHRINKAGE, leace_images: int = 0
    ) -> LinearHead:
        """A head that sees embeddings in which images without labels vary alike in all directions.

        What scenes have in common with each other, and not with safety, takes up most of the variance of embeddings, and
        the penalty of a plain probe protects exactly those directions. Whitened, none is easier to use than another. The
        map is estimated by `prepare` from training images whose labels are not looked at.

        Args:
            encoder: made the embeddings.
            policy: has the categories.
            n_images: to estimate the covariance from.
            shrinkage: how much of the mean variance is added to every direction's, above 0.
            leace_images: see `build`.
        """
        check_whole("head.n_images", n_images, 2)
        check_number("head.shrinkage", shrinkage, "(0, inf)")
        check_whole("head.leace_images", leace_images, 0)
        head = cls(encoder.dim, len(policy.categories), whitened=True)
        head._is_prepared, head._whitening, head._leace_images = False, (n_images, shrinkage), leace_images
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
        encoded, head.notes = reader.encode_texts([*safe, *unsafe]), cut_off(encoder, [*safe, *unsafe])
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
        """Whitens and erases, as far as that is wanted."""
        if self._is_prepared or self.map is None:
            return
        made = images.whitening(*self._whitening) if self._whitening else np.eye(len(self.map))
        if self._leace_images:
            made = _erasing(images, self._leace_images) @ made
        self.map.copy_(torch.from_numpy(made))
        self._is_prepared, self.is_erased = True, self._leace_images > 0

    @property
    def is_prepared(self) -> bool:
        """Not where its map is still to be estimated: until then that is the identity."""
        return self._is_prepared

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self.linear(self.features(embeddings))

    def decision(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n,) logits of unsafe: one vector times the embeddings."""
        if type(self).forward is not LinearHead.forward:  # a class of somebody's that sees more than this one
            return super().decision(embeddings)
        weights = self.linear.weight[0] * embeddings.shape[1] ** 0.5
        return torch.addmv(self.linear.bias[:1], embeddings, weights if self.map is None else self.map @ weights)

    def features(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, d): what the weights are multiplied with, a linear map of the embeddings."""
        return _scaled(embeddings, self.map)


class AnchoredHead(Head):
    """A linear probe beside the zero-shot logits of the policy's texts.

    What the weights are multiplied with are the d coordinates of a linear probe and 1 + k zero-shot logits, those of an untrained
    `PromptHead`, each divided by its standard deviation over images without labels. At the start every logit is `strength` times the
    zero-shot one, and with `loss.l2` above 0 training pulls the head there: few labels correct the texts a little, many overrule them.
    With the weights of both sides fixed it is WiSE for a head (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models"); that a
    probe of few labels wants an anchor in the texts is CLAP's finding (Silva-Rodriguez et al., 2024, "A closer look at the few-shot
    adaptation of large vision-language models"). docs/heads.md compares them.

    Args:
        dim: d, width of the embeddings.
        n_categories: k.
        n_prompts: m, number of texts.
        mapped: embeddings pass through a fixed (d, d) map on their way to the probe.
        strength: standard deviation of the logits at the start.
        scale: that the texts were multiplied with.
    """

    usual_l2 = 1.0  # fixed on the policies to tune on, see docs/heads.md

    def __init__(
        self, dim: int, n_categories: int, *, n_prompts: int, mapped: bool = False, strength: float = 1.0, scale: float = 10.0
    ) -> None:
        super().__init__()
        check_number("head.strength", strength, "(0, inf)")
        check_number("head.scale", scale, "(0, inf)")
        self.config = {
            "dim": dim,
            "n_categories": n_categories,
            "n_prompts": n_prompts,
            "mapped": mapped,
            "strength": strength,
            "scale": scale,
        }
        self._n_images: int | None = None  # that tell how zero-shot logits vary, until they have
        self._leace_images = 0
        self.map: Tensor | None
        self.prompts: Tensor
        self.members: Tensor
        self.spread: Tensor
        self.register_buffer("map", torch.eye(dim) if mapped else None)
        self.register_buffer("prompts", torch.zeros(n_prompts, dim))
        self.register_buffer("members", torch.zeros(2 + n_categories, n_prompts, dtype=torch.bool))
        self.register_buffer("spread", torch.ones(1 + n_categories))
        self.linear = nn.Linear(dim + 1 + n_categories, 1 + n_categories)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight[:, dim:].fill_diagonal_(strength)

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        policy: Policy,
        *,
        strength: float = 1.0,
        scale: float = 10.0,
        n_images: int = 256,
        leace_images: int = 0,
    ) -> AnchoredHead:
        """A new head for this encoder and policy.

        Args:
            encoder: made the embeddings, and encodes the texts.
            policy: has them.
            strength: standard deviation of the logits at the start.
            scale: of the cosine before the softmax over the texts.
            n_images: training images, labels not looked at, that tell how zero-shot logits vary.
            leace_images: see `LinearHead.build`. The texts' part stays as it is: no edit was trained on to make it.
        Raises:
            InputError: the encoder has no texts, or the same vector for a safe and an unsafe one.
        """
        check_whole("head.n_images", n_images, 2)
        check_whole("head.leace_images", leace_images, 0)
        encoded, members, notes = _texts(encoder, policy, needed_by="head=anchored", instead="head=linear")
        sizes = encoder.dim, len(policy.categories)
        head = cls(*sizes, n_prompts=len(encoded), mapped=bool(leace_images), strength=strength, scale=scale)
        head._n_images, head._leace_images, head.notes = n_images, leace_images, notes
        head.prompts.copy_(scale * torch.from_numpy(encoded))
        head.members.copy_(members)
        return head

    def prepare(self, images: KnowsImages) -> None:
        """Measures how zero-shot logits vary, and erases if that is wanted."""
        if self._n_images is None:
            return
        logits = self._zero_shot(torch.from_numpy(images.embeddings(self._n_images)))
        self.spread.copy_(logits.std(dim=0, correction=0).clamp(min=_SAME_TEXT))
        if self.map is not None:
            self.map.copy_(torch.from_numpy(_erasing(images, self._leace_images)))
        self._n_images, self.is_erased = None, self.map is not None

    @property
    def is_prepared(self) -> bool:
        """Not where it is still unknown how zero-shot logits vary."""
        return self._n_images is None

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self.linear(self.features(embeddings))

    def decision(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n,) logits of unsafe: each text's exponential is taken once, not once a category."""
        if type(self).forward is not AnchoredHead.forward:
            return super().decision(embeddings)
        cosine = embeddings @ self.prompts.to(embeddings).T
        sums = (cosine - cosine.amax(dim=1, keepdim=True)).exp() @ self.members.to(embeddings).T  # (n, 2 + k)
        if not (sums > torch.finfo(sums.dtype).tiny).all():  # a side so far below another that nothing is left of it
            return super().decision(embeddings)
        sides = sums.log()
        texts = torch.cat([sides[:, :1], sides[:, 2:]], dim=1) - sides[:, 1:2]
        d = embeddings.shape[1]
        weights = self.linear.weight[0, :d] * d**0.5
        probe = torch.addmv(self.linear.bias[:1], embeddings, weights if self.map is None else self.map @ weights)
        return torch.addmv(probe, texts, self.linear.weight[0, d:] / self.spread)

    def features(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, d + 1 + k): what the weights are multiplied with."""
        return torch.cat([_scaled(embeddings, self.map), self.of_texts_alone(embeddings)], dim=1)

    def of_texts_alone(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits: where it starts, up to `strength`."""
        return self._zero_shot(embeddings) / self.spread.to(embeddings)

    def _zero_shot(self, embeddings: Tensor) -> Tensor:
        return _log_odds(embeddings @ self.prompts.to(embeddings).T, self.members)


def automatic(encoder: Encoder, policy: Policy) -> AnchoredHead | LinearHead:
    """The head that is trained where none is named: anchored in the policy's texts, or a plain linear one without them.

    docs/heads.md has the figures that speak for it.

    Args:
        encoder: made the embeddings.
        policy: has the categories, and the texts.
    Returns:
        An `AnchoredHead` where the encoder reads texts, and reads no unsafe one as it reads a safe one. Elsewhere a `LinearHead` that is
        pulled towards zero as strongly, and that notes why.
    """
    head: AnchoredHead | LinearHead
    try:
        head = AnchoredHead.build(encoder, policy)
        head.chosen = "anchored"
    except InputError as error:
        # what is wrong with the encoder itself is raised again here
        head = LinearHead.build(encoder, policy)
        head.usual_l2, head.chosen = AnchoredHead.usual_l2, "linear"
        why = str(error) if reads_texts(encoder) else f"encoder {encoder.name} reads no texts"
        head.notes = (f"the guard learns from labels alone (head=linear), not from the policy's texts: {why}",)
    return head


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
        """A head whose vectors are the policy's texts, encoded.

        Raises:
            InputError: the encoder has no texts, or reads every unsafe one as it reads a safe one.
        """
        encoded, members, notes = _texts(encoder, policy, needed_by="head=prompt", instead="head=linear", may_tie=True)
        head = cls(encoder.dim, len(policy.categories), n_prompts=len(encoded), scale=scale)
        head.notes = notes
        head.members.copy_(members)
        with torch.no_grad():
            head.prompts.copy_(torch.from_numpy(encoded))
        return head

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self._of(embeddings, self.members) + self.bias

    def decision(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n,) logits of unsafe: all unsafe texts against all safe ones."""
        if type(self).forward is not PromptHead.forward:
            return super().decision(embeddings)
        return self._of(embeddings, self.members[:2])[:, 0] + self.bias[0]

    def _of(self, embeddings: Tensor, members: Tensor) -> Tensor:
        cosine = embeddings @ functional.normalize(self.prompts, dim=1).T
        return _log_odds(self.log_scale.exp() * cosine, members)


def _scaled(embeddings: Tensor, by: Tensor | None) -> Tensor:
    """(n, d) -> (n, d) what a linear probe sees, through a (d, d) map if there is one."""
    # unit vectors have coordinates of size d ** -0.5: brought to size 1, the learning rate suits any width
    scaled = embeddings * embeddings.shape[1] ** 0.5
    return scaled if by is None else scaled @ by.to(scaled)


def _erasing(images: KnowsImages, n_images: int) -> np.ndarray:
    """(d, d) map x @ E that takes the trace of an editor out of embeddings, see `LinearHead.build`."""
    original, edited = images.null_edits(n_images)
    whitening = images.whitening(_N_IMAGES, _SHRINKAGE)
    # among whitened embeddings LEACE is the projection along the difference of the means
    trace = whitening @ (edited - original).mean(axis=0)
    length = max(float(trace @ trace), np.finfo(float).tiny)
    return np.eye(len(trace)) - np.outer(whitening @ trace, np.linalg.solve(whitening, trace)) / length


class JoinedHead(Head):
    """Heads side by side on the same embeddings: what each says of its categories stays as it is, and an image is as unsafe as the head
    says that finds it most unsafe.

    Args:
        dim: d, width of the embeddings.
        n_categories: k, of all heads together.
        parts: kind and settings of each head, one of guardkit's own, in the order of their categories.
    """

    def __init__(self, dim: int, n_categories: int, *, parts: list) -> None:
        super().__init__()
        self.config = {"dim": dim, "n_categories": n_categories, "parts": parts}
        heads, n = [], 0
        for i, part in enumerate(parts):
            if not isinstance(part, dict) or set(part) != {"kind", "settings"} or not isinstance(part["settings"], dict):
                raise ValueError(f"parts[{i}] must have kind and settings")
            if part["kind"] not in HEAD_KINDS.ours or part["kind"] == "joined":
                raise ValueError(f"parts[{i}].kind must be one of guardkit's heads, got {shortened(repr(part['kind']))}")
            kind = HEAD_KINDS.load(part["kind"], ())
            check_arguments(kind, part["settings"], f"parts[{i}].settings")
            if part["settings"].get("dim") != dim:
                raise ValueError(f"parts[{i}].settings.dim must be {dim}, got {part['settings'].get('dim')!r}")
            heads.append(kind(**part["settings"]))
            n += part["settings"]["n_categories"]
        if n != n_categories:
            raise ValueError(f"parts have {n} categories, expected {n_categories}")
        self.heads = nn.ModuleList(heads)

    @classmethod
    def of(cls, *heads: Head) -> JoinedHead:
        """Trained heads side by side; those of joined ones one by one.

        Raises:
            InputError: one is not guardkit's own.
        """
        single = [one for head in heads for one in (head.heads if isinstance(head, JoinedHead) else [head])]
        described = [HEAD_KINDS.describe(one) for one in single]
        foreign = [name for name, _ in described if name not in HEAD_KINDS.ours]
        if foreign:
            raise InputError(f"a guard with a head of kind {foreign[0]} cannot be extended; only guardkit's own heads stand side by side")
        n_categories = sum(config["n_categories"] for _, config in described)
        joined = cls(described[0][1]["dim"], n_categories, parts=[{"kind": name, "settings": config} for name, config in described])
        joined.heads = nn.ModuleList(single)
        return joined.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        each = [head(embeddings) for head in self.heads]
        decision = torch.stack([logits[:, 0] for logits in each]).amax(dim=0)
        return torch.cat([decision[:, None], *(logits[:, 1:] for logits in each)], dim=1)


def _texts(
    encoder: Encoder, policy: Policy, *, needed_by: str, instead: str, may_tie: bool = False
) -> tuple[np.ndarray, Tensor, tuple[str, ...]]:
    """(m, d) encoded texts of a policy, and (2 + k, m) bool: all unsafe texts, all safe ones, each category's unsafe ones; and notes.

    Raises InputError for an encoder without texts, or one that reads an unsafe text as it reads a safe one; with may_tie, every unsafe one.
    """
    reader = require_texts(encoder, needed_by=needed_by, instead=instead)
    texts: list[str] = list(policy.safe_texts)
    rows: list[int] = [1] * len(texts)
    for i, category in enumerate(policy.categories):
        texts += [*category.unsafe_texts, *category.safe_texts]
        rows += [2 + i] * len(category.unsafe_texts) + [1] * len(category.safe_texts)
    encoded = reader.encode_texts(texts)
    sides = [[i for i, row in enumerate(rows) if (row >= 2) == is_unsafe] for is_unsafe in (False, True)]
    safe, unsafe = ([texts[i] for i in side] for side in sides)
    tied = _check_sides(safe, encoded[sides[0]], unsafe, encoded[sides[1]], may_tie=may_tie)
    row = torch.tensor(rows)
    members = torch.stack([row >= 2, *(row == i for i in range(1, 2 + len(policy.categories)))])
    return encoded, members, (*cut_off(encoder, texts), *tied)


def _log_odds(logits: Tensor, members: Tensor) -> Tensor:
    """(n, m) logits of texts -> (n, 1 + k) log-odds of a softmax over them: all unsafe ones, and each category's, against the safe ones."""
    side = logits[:, None, :].masked_fill(~members, float("-inf")).logsumexp(dim=2)  # (n, 2 + k)
    against_safe = side - side[:, 1:2]
    return torch.cat([against_safe[:, :1], against_safe[:, 2:]], dim=1)


def _check_sides(
    safe: Sequence[str], safe_vectors: np.ndarray, unsafe: Sequence[str], unsafe_vectors: np.ndarray, *, may_tie: bool = False
) -> tuple[str, ...]:
    """Raises InputError where the encoder reads an unsafe text as it reads a safe one: a head that starts there would be pulled both ways.

    Among texts that are compared side by side such a pair weighs nothing: with may_tie it is an error only where no unsafe text is left, and
    noted otherwise.
    """
    same = np.argwhere(safe_vectors @ unsafe_vectors.T > 1 - _SAME_TEXT)
    if not len(same):
        return ()
    first, second = shortened(unsafe[same[0, 1]]), shortened(safe[same[0, 0]])
    n_tied = len(set(same[:, 1]))
    if may_tie and n_tied < len(unsafe):
        return (
            f"{n_tied} of the policy's {len(unsafe)} unsafe texts are the same to the encoder as a safe one, such as {first!r} and {second!r}: "
            "they say nothing here; reword them, or choose another encoder",
        )
    raise InputError(
        f"the policy's unsafe text {first!r} and its safe text {second!r} are the same to the encoder "
        f"({len(same)} such pair(s)): it knows too few of their words, as the small encoders that come along do, or they differ only beyond its "
        "context length; leave out, shorten or reword such texts, or choose another encoder"
    )
