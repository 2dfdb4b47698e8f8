"""Zero-shot classification by the policy's texts (CLIP, Radford et al., 2021, section 3.1): no label is used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from guardkit.baselines.base import HeadGuard, covered
from guardkit.encoders.base import Encoder, require_texts
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
