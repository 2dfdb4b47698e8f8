"""Safe images that look like something unsafe, found by the policy's own texts where nobody has marked them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import require_texts
from guardkit.policy import Policy, text_without
from guardkit.schema import InputError, Record

log = logging.getLogger(__name__)

LookAlikes = Literal["marked", "texts"]
LOOK_ALIKES = ("marked", "texts")


def by_texts(safe: Sequence[Record], policy: Policy, store: EmbeddingStore) -> list[Record]:
    """Safe images, the likest first.

    An image is as like as it is nearer, by cosine, to a category's look-alike texts (`safe_texts` of the category) than to the policy's
    ordinary ones. Categories take turns, so that a budget holds look-alikes of each. Every image is embedded.

    Args:
        safe: images, in any order; those that cannot be read are left out.
        policy: has the texts.
        store: embeds.
    Returns:
        Each image at most once; only those that are nearer to a look-alike than to the ordinary.
    Raises:
        InputError: the encoder has no texts, or the policy has no look-alikes.
    """
    reader = require_texts(store.encoder, needed_by="data.look_alikes=texts", instead="data.look_alikes=marked")
    # a category that brings none has those of the policy, or one made of its name
    named = [
        own
        for category in policy.categories
        if (own := [text for text in category.safe_texts if text not in {*policy.safe_texts, text_without(category.name)}])
    ]
    if not named:
        raise InputError(
            f"data.look_alikes=texts finds safe images by the texts of what only looks unsafe, and policy {policy.name!r} has none; write safe_texts "
            "into its categories, or mark look-alikes with a category and set data.look_alikes=marked"
        )
    brought = [record for record in safe if record.embedding is not None]
    read, made, unreadable = store.embed_readable([record for record in safe if record.embedding is None])
    if unreadable:
        log.warning(
            "data.look_alikes=texts leaves out %d safe image(s) that cannot be read, the first is %s: %s",
            len(unreadable),
            unreadable[0].id,
            unreadable[0].reason,
        )
    records = [*brought, *read]
    vectors = np.concatenate([np.reshape([record.embedding for record in brought], (len(brought), made.shape[1])), made])

    def nearest(texts: Sequence[str]) -> np.ndarray:
        return (vectors @ reader.encode_texts(list(texts)).T).max(axis=1)

    ordinary = nearest(policy.safe_texts) if policy.safe_texts else -np.ones(len(vectors), vectors.dtype)
    gaps = np.stack([nearest(texts) - ordinary for texts in named])
    # an image is a look-alike of the category whose texts it is nearest to, and of that one only
    own = gaps.argmax(axis=0)
    turns = []
    for column in range(len(named)):
        rows = np.flatnonzero((own == column) & (gaps[column] > 0))
        turns += [(place, column, int(row)) for place, row in enumerate(rows[np.argsort(-gaps[column, rows], kind="stable")])]
    return [records[row] for _, _, row in sorted(turns)]
