"""Zero-shot classification by the policy's texts: no label is used.

By a softmax over all of them (CLIP, Radford et al., 2021, section 3.1), or by the margin between the nearest text of a category and the nearest of its
look-alikes and of ordinary images, as openmoderate 1.1 scores (karammm/openmoderate-image-moderation, Apache 2.0; only its formula is taken).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from guardkit.baselines.base import HeadGuard, covered
from guardkit.checks import check_number
from guardkit.encoders.base import Encoder, cut_off, require_texts
from guardkit.heads import Head, PromptHead
from guardkit.policy import Policy
from guardkit.schema import InputError


class _Decision(nn.Module):
    """The first logit of a head: the decision, without the categories."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.head(embeddings)[:, 0]


def zero_shot(policy: Policy, encoder: Encoder, *, covers: Sequence[str] | None, scale: float = 30.0, threshold: float = 0.5) -> HeadGuard:
    """Compares the image with the policy's unsafe and safe texts by cosine; `PromptHead`, untrained.

    The threshold is not chosen on labels here, unlike in `experiment=zero_shot`; how often 0.5 flags depends on the
    encoder and the texts.

    Args:
        policy: whose texts it reads.
        encoder: encodes images and texts.
        covers: category names, None for all.
        scale: of the cosine before the softmax; CLIP's own is 100.
        threshold: flag when score >= threshold.
    """
    require_texts(encoder, needed_by="baseline zero_shot", instead="another baseline")
    try:
        prompts = PromptHead.build(encoder, policy, scale=scale)
    except InputError as error:
        raise InputError(f"baseline zero_shot: {error}; or leave zero_shot out of baselines") from error
    return HeadGuard(
        "zero_shot",
        _Decision(prompts),
        encoder,
        dim=encoder.dim,
        covers=covered("zero_shot", covers, policy),
        threshold=threshold,
        notes=prompts.notes,
        reads_policy=True,
        n_labels=0,
    )


class MarginHead(nn.Module):
    """The largest margin of a category: 100 * (cosine to the nearest of its unsafe texts - that to the nearest safe one).

    Args:
        unsafe: (m, d) unit vectors of each category's unsafe texts.
        safe: (m, d) of the texts that each category is told from: its look-alikes and the policy's ordinary images.
        bias: margin at which the score is 0.5, in units of 100 * cosine.
        temperature: of the sigmoid, in the same units.
    """

    def __init__(self, unsafe: Sequence[np.ndarray], safe: Sequence[np.ndarray], *, bias: float, temperature: float) -> None:
        super().__init__()
        self.unsafe, self.safe = (nn.ParameterList([torch.from_numpy(one) for one in side]) for side in (unsafe, safe))
        self.bias: Tensor
        self.temperature: Tensor
        # among the weights, by which heads are told apart
        self.register_buffer("bias", torch.tensor(float(bias)))
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) unit vectors -> (n,) logits."""
        margins = [
            (embeddings @ unsafe.T).amax(dim=1) - (embeddings @ safe.T).amax(dim=1)
            for unsafe, safe in zip(self.unsafe, self.safe, strict=True)
        ]
        return (_LOGIT_SCALE * torch.stack(margins).amax(dim=0) - self.bias) / self.temperature


_LOGIT_SCALE = 100.0  # CLIP's own


def zero_shot_margin(
    policy: Policy,
    encoder: Encoder,
    *,
    covers: Sequence[str] | None,
    bias: float = 2.5,
    temperature: float = 1.5,
    threshold: float = 0.5,
) -> HeadGuard:
    """Compares the image with each category's unsafe texts, and with the safe texts nearest to it, look-alikes among them.

    Args:
        policy: whose texts it reads: `unsafe_texts` and `safe_texts` of each category, and its own `safe_texts`.
        encoder: encodes images and texts.
        covers: category names, None for all. Only these categories' texts count.
        bias: margin at which the score is 0.5, in units of 100 * cosine; 2.5 is openmoderate's for OpenAI's CLIP.
        temperature: above 0, in the same units; 1.5 is openmoderate's.
        threshold: flag when score >= threshold; 0.5 is openmoderate's.
    Raises:
        InputError: an encoder without texts, or an argument out of range.
    """
    check_number("baseline.zero_shot_margin.bias", bias, "(-inf, inf)")
    check_number("baseline.zero_shot_margin.temperature", temperature, "(0, inf)")
    reader = require_texts(encoder, needed_by="baseline zero_shot_margin", instead="another baseline")
    names = covered("zero_shot_margin", covers, policy)
    chosen = [one for one in policy.categories if names is None or one.name in names]
    if not chosen:
        raise InputError(f"baseline.zero_shot_margin.covers must name categories of policy {policy.name}, got {covers!r}")
    sides = [(list(one.unsafe_texts), [*one.safe_texts, *policy.safe_texts]) for one in chosen]
    texts = list(dict.fromkeys(text for pair in sides for side in pair for text in side))
    vector_of = dict(zip(texts, reader.encode_texts(texts), strict=True))
    unsafe, safe = ([np.stack([vector_of[text] for text in pair[side]]) for pair in sides] for side in (0, 1))
    return HeadGuard(
        "zero_shot_margin",
        MarginHead(unsafe, safe, bias=bias, temperature=temperature),
        encoder,
        dim=encoder.dim,
        covers=names,
        threshold=threshold,
        notes=cut_off(encoder, texts),
        reads_policy=True,
        n_labels=0,
    )
