"""Verifying an edit by scores: did the probability of unsafe cross over, and is the rest of the image still there?

The score comes from the policy's texts (`verifier=encoder`, zero-shot) or from a saved guard (`verifier=guard`). A guard
that is later trained on what the verifier accepted inherits the verifier's blind spots: use one made from other labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from guardkit.checks import check_number
from guardkit.counterfactual.preservation import preservation
from guardkit.counterfactual.verifier import Candidate, Verdict
from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Encoder, EncodesTexts, enough, require_texts
from guardkit.engines.base import Put
from guardkit.heads import PromptHead
from guardkit.images import load
from guardkit.policy import Policy
from guardkit.schema import InputError

_DECIMALS = 6
_LEAST_WAY = 1e-3
Probabilities = Callable[[np.ndarray], np.ndarray]
Arrival = Callable[[Sequence[Candidate], np.ndarray, np.ndarray], np.ndarray]


class ScoringGuard(Protocol):
    """What is needed of a guard."""

    encoder: Encoder
    policy: Policy

    @property
    def fingerprint(self) -> str: ...

    def probabilities(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, 1 + k): probability of unsafe, then of each category."""
        ...


class ScoreVerifier:
    """Accepts an edit when the score crossed over and enough of the image was kept.

    Args:
        name: a short name for tables.
        policy: whose categories the scores follow.
        embed: contents -> (n, d) embeddings.
        probabilities: (n, d) -> (n, 1 + k): of unsafe, then of each category.
        made_by: gives what the scores depend on, in plain JSON types; asked when the first edit is judged.
        max_score: an edit to the safe side must score less than this, in (0, 1).
        min_drop: and its score must have fallen by at least this, in [0, 1).
        min_preservation: least similarity of what should have stayed (see `preservation`), in [0, 1].
        min_cosine: least cosine between the embeddings of original and edit, in [-1, 1]. What to ask for depends on the
            encoder: one that tells objects well apart moves a counterfactual far away. -1 asks for nothing.
        arrival: (candidates, embeddings of originals, of edits) -> (n,) how far each edit has come from the words that
            describe its original to those that were asked for; 1 when they describe it as well as the first did the
            original, NaN when nobody knows the words. None: not asked.
        min_arrival: least of it, in [0, 1]; 0 asks for nothing. An edit that only wipes the violation away does not arrive.
        prepare: builds what the scores need; None: it is there.
        with_parts: see the method; None: it is the same with all parts.
    An edit to the unsafe side is judged by the complement of the score, a null edit by preservation alone.
    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        embed: Callable[[Sequence[Any]], np.ndarray],
        probabilities: Probabilities,
        made_by: Callable[[], dict[str, Any]],
        *,
        max_score: float,
        min_drop: float,
        min_preservation: float,
        min_cosine: float,
        arrival: Arrival | None = None,
        min_arrival: float = 0.0,
        prepare: Callable[[], object] | None = None,
        with_parts: Callable[[Put], ScoreVerifier] | None = None,
    ) -> None:
        check_number("verifier.max_score", max_score, "(0, 1)")
        check_number("verifier.min_drop", min_drop, "[0, 1)")
        check_number("verifier.min_preservation", min_preservation, "[0, 1]")
        check_number("verifier.min_cosine", min_cosine, "[-1, 1]")
        check_number("verifier.min_arrival", min_arrival, "[0, 1]")
        self.name = name
        self._policy, self._embed, self._probabilities, self._made_by = policy, embed, probabilities, made_by
        self._arrival, self.min_arrival = arrival, min_arrival
        self._prepare, self._with_parts = prepare, with_parts
        self.max_score, self.min_drop = max_score, min_drop
        self.min_preservation, self.min_cosine = min_preservation, min_cosine

    @classmethod
    def from_texts(
        cls,
        store: EmbeddingStore,
        policy: Policy,
        *,
        scale: float = 30.0,
        max_score: float = 0.5,
        min_drop: float = 0.2,
        min_preservation: float = 0.8,
        min_cosine: float = -1.0,
        min_arrival: float = 0.95,
    ) -> ScoreVerifier:
        """Scores by the policy's texts: zero-shot classification with the training's own encoder.

        Args:
            store: embeds; training finds the same embeddings in it.
            policy: whose texts are compared with the images.
            scale: of the cosine before the softmax.
            max_score: see the class, like the rest.
            min_arrival: compared with the captions of the original and of what was asked for, where both are known. The
                idea is InstructPix2Pix's filter (Brooks et al., 2023, section 3.1.2), which asks for a direction in
                embedding space; a share of the way needs no threshold that depends on the encoder.
        """
        head: list[PromptHead] = []

        def reader() -> EncodesTexts:
            return require_texts(store.encoder, needed_by="verifier=encoder", instead="verifier=vlm, verifier=guard")

        def text_head() -> PromptHead:
            if not head:  # the encoder is built when it is first needed
                reader()
                head.append(PromptHead.build(store.encoder, policy, scale=scale))
            return head[0]

        def probabilities(embeddings: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return torch.sigmoid(text_head()(torch.from_numpy(embeddings)).double()).numpy()

        def made_by() -> dict[str, Any]:
            return {"scale": scale, "encoder": store.encoder.fingerprint, "min_arrival": min_arrival}

        words: dict[str, np.ndarray] = {}

        def described(texts: Sequence[str]) -> np.ndarray:
            new = [text for text in dict.fromkeys(texts) if text not in words]
            words.update(zip(new, reader().encode_texts(new), strict=True) if new else ())
            return np.array([words[text] for text in texts])

        def arrival(candidates: Sequence[Candidate], before: np.ndarray, after: np.ndarray) -> np.ndarray:
            came = np.full(len(candidates), np.nan)
            known = [i for i, one in enumerate(candidates) if one.record.caption and one.request.target]
            if known:
                caption = described([candidates[i].record.caption for i in known])
                target = described([candidates[i].request.target for i in known])
                start = (before[known] * target).sum(axis=1)
                way = (before[known] * caption).sum(axis=1) - start
                # where the encoder does not see that the caption fits the original better, it cannot judge
                seen = np.where(way > _LEAST_WAY, way, np.nan)
                came[known] = ((after[known] * target).sum(axis=1) - start) / seen
            return came

        limits: dict[str, Any] = {
            "max_score": max_score,
            "min_drop": min_drop,
            "min_preservation": min_preservation,
            "min_cosine": min_cosine,
        }
        more: dict[str, Any] = {"arrival": arrival, "min_arrival": min_arrival, "prepare": text_head}

        def with_parts(put: Put) -> ScoreVerifier:
            other = store.like(put("encoder", store.encoder))
            return cls.from_texts(other, policy, scale=scale, min_arrival=min_arrival, **limits)

        return cls("encoder", policy, store.embed, probabilities, made_by, **limits, **more, with_parts=with_parts)

    @classmethod
    def from_guard(
        cls,
        store: EmbeddingStore,
        policy: Policy,
        *,
        guard: ScoringGuard,
        max_score: float = 0.5,
        min_drop: float = 0.2,
        min_preservation: float = 0.8,
        min_cosine: float = -1.0,
    ) -> ScoreVerifier:
        """Scores by a saved guard, with the guard's own encoder.

        Args:
            store: is used where the guard's encoder is the training's own.
            policy: must be the guard's.
            guard: any guard.
            max_score: see the class, like the rest.
        Raises:
            InputError: it is no guard, or enforces other categories.
        """
        if isinstance(guard, (str, os.PathLike)):
            raise InputError(f"verifier.guard must be a guard, got {os.fspath(guard)!r}; name its folder as verifier.guard.folder")
        if guard.policy.category_names != policy.category_names:
            raise InputError(
                f"verifier.guard enforces policy {guard.policy.name!r}, the run has {policy.name!r} with other categories; choose a guard of the run's policy"
            )

        def embed(contents: Sequence[Any]) -> np.ndarray:
            if guard.encoder.fingerprint == store.encoder.fingerprint:
                return store.embed(contents)
            return guard.encoder.encode_images([load(content, enough(guard.encoder)) for content in contents], fixed_batch=True)

        def made_by() -> dict[str, Any]:
            return {"guard": guard.fingerprint}

        limits: dict[str, Any] = {
            "max_score": max_score,
            "min_drop": min_drop,
            "min_preservation": min_preservation,
            "min_cosine": min_cosine,
        }

        def with_parts(put: Put) -> ScoreVerifier:
            is_shared = guard.encoder.fingerprint == store.encoder.fingerprint
            return cls.from_guard(store.like(put("encoder", store.encoder)) if is_shared else store, policy, guard=guard, **limits)

        return cls("guard", policy, embed, guard.probabilities, made_by, **limits, with_parts=with_parts)

    @property
    def config(self) -> dict[str, Any]:
        """Everything the verdicts depend on."""
        limits = {name: getattr(self, name) for name in ("max_score", "min_drop", "min_preservation", "min_cosine")}
        return {"verifier": self.name, "version": 2, **limits, **self._made_by()}

    def prepare(self) -> None:
        """Builds what the scores need, which would otherwise wait for the first edit.

        Raises:
            InputError: the encoder reads no texts, or cannot tell the policy's apart.
        """
        if self._prepare is not None:
            self._prepare()

    def with_parts(self, put: Put) -> ScoreVerifier:
        """The same, embedding with another encoder: see `guardkit.engines.base.Put`."""
        return self if self._with_parts is None else self._with_parts(put)

    def verify(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        """One verdict per candidate: flip_score is the probability of the wanted side after the edit."""
        if not candidates:
            return []
        vectors = self._embed([*(one.request.content for one in candidates), *candidates])
        # the last bits depend on who else is in the batch, and a run that goes on after a stop has other batches
        scores = self._probabilities(vectors).round(_DECIMALS)
        n = len(candidates)
        cosine = (vectors[:n] * vectors[n:]).sum(axis=1).round(_DECIMALS)
        came = np.full(n, np.nan) if self._arrival is None else self._arrival(candidates, vectors[:n], vectors[n:]).round(_DECIMALS)
        return [self._judge(one, scores[i], scores[n + i], float(cosine[i]), float(came[i])) for i, one in enumerate(candidates)]

    def _judge(self, one: Candidate, before: np.ndarray, after: np.ndarray, cosine: float, came: float) -> Verdict:
        kept = preservation(one.original, one.edited, one.request.region)
        names = self._policy.category_names
        column = 1 + names.index(one.record.category) if one.record.category in names else 0
        # of the side that the edit should lead away from
        start, end = (float(values[column]) if one.record.label else 1 - float(values[column]) for values in (before, after))
        is_null = one.request.kind != "counterfactual"
        reason = None
        if not np.isfinite([start, end, cosine, kept]).all():
            # every comparison below is false for NaN, and would let the edit pass
            reason = f"verifier={self.name}: not a finite score"
            return Verdict(reason, None, round(kept, _DECIMALS) if np.isfinite(kept) else None)
        if cosine < self.min_cosine:
            reason = f"verifier={self.name}: the edit is another picture (cosine of embeddings below {self.min_cosine})"
        elif kept < self.min_preservation:
            reason = f"verifier={self.name}: too little was kept (similarity below {self.min_preservation})"
        elif not is_null and end >= self.max_score:
            reason = f"verifier={self.name}: the label did not flip (score not below {self.max_score})"
        elif not is_null and start - end < self.min_drop:
            reason = f"verifier={self.name}: the score hardly moved (by less than {self.min_drop})"
        elif not is_null and self.min_arrival > 0 and came < self.min_arrival:  # NaN, when nobody knows the words, passes
            reason = f"verifier={self.name}: what was asked for is not there (arrival below {self.min_arrival})"
        return Verdict(reason, None if is_null else round(1 - end, _DECIMALS), round(kept, _DECIMALS))
