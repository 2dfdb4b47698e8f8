"""Asking a vision-language model: images and a prompt in, text or a reason out; for instructors, verifiers and judges.

What the model itself says (an answer, a refusal, an empty or cut-off reply) is final and may be stored. What kept it from
saying anything (no connection, a rate limit, a spent budget) is transient and asked again next time. This room knows
neither policies nor edits, and no prompts: what a reply means is the caller's business. A reply is never more than text,
whatever it asks for.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guardkit.artifacts import fingerprint, parse_json
from guardkit.images import ArrayContent
from guardkit.schema import InputError
from guardkit.stores import KeyValueStore

VERSION = 1  # counts up when the same question reaches a model in another form
_MAX_REPLY_CHARS = 50_000
_STORE_BLOCK = 32
_STORED = ("text", "reason", "detail")


@dataclass(frozen=True, eq=False)
class Question:
    """What a model is asked.

    Attributes:
        images: (h, w, 3) uint8 RGB each, shown in this order before the prompt.
        prompt: what is asked, including the wanted form of the reply.
        system: what the model is told beforehand; empty for nothing.
        schema: JSON schema of the wanted reply. Endpoints that can are asked to keep to it; `parse_json` checks.
        seed: tells apart repetitions of the same question; passed on to endpoints, of use where temperature > 0.
    Raises:
        ValueError: an image of another type or shape.
    """

    images: tuple[np.ndarray, ...]
    prompt: str
    system: str = ""
    schema: Mapping[str, Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for image in self.images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an image of a question must be (h, w, 3) uint8, got {image.dtype} of shape {image.shape}")


@dataclass(frozen=True)
class Answer:
    """What a model said, or why it said nothing (exactly one of text and reason).

    Attributes:
        text: the reply, without control characters.
        reason: why there is none, in words that can be counted.
        detail: what an endpoint or model said about it, for people; it may differ from time to time.
        transient: the reason lies outside the model, and asking again may help.
        n_calls: to the model, repetitions included; 0 when the answer was stored.
        cached: whether it was stored.
    """

    text: str | None
    reason: str | None = None
    detail: str = ""
    transient: bool = False
    n_calls: int = 0
    cached: bool = False


class VLM(Protocol):
    """Answers questions about images.

    Attributes:
        name: a short name for tables.
        config: everything its answers depend on besides the question, in plain JSON types; never a key.
    """

    name: str

    @property
    def config(self) -> dict[str, Any]: ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            InputError: the model cannot be asked at all (no key, wrong key, no such model, a missing extra).
        """
        ...


REFUSED = Answer(None, "refused on safety grounds")
CUT_OFF = Answer(None, "reply was cut off at the token limit")


class StoredVLM:
    """A model whose final answers are stored, so that nothing is asked twice; transient failures are asked again.

    The key of an answer names the model's `config`, the images' pixels, prompt, system, schema and seed.

    Args:
        vlm: is asked what is not stored.
        cache_dir: where answers are kept; None keeps them in memory.
    Raises:
        InputError: the store in `cache_dir` cannot be used.
    """

    def __init__(self, vlm: VLM, cache_dir: Path | None) -> None:
        self.vlm, self.name = vlm, vlm.name
        self._store = KeyValueStore(cache_dir, "answers.sqlite", {"format": 1})

    @property
    def config(self) -> dict[str, Any]:
        """The model's."""
        return self.vlm.config

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order; of equal questions one is asked.

        Raises:
            InputError: the model cannot be asked at all. What was answered before is stored.
        """
        config = self.config
        keys = [_key(config, question) for question in questions]
        with self._store:
            answers = {key: replace(answer, cached=True) for key, answer in self._store.get(keys, _parsed).items()}
            missing = list({key: question for key, question in zip(keys, questions, strict=True) if key not in answers}.items())
            # stored block by block, so that a run that is stopped has paid for little in vain
            for start in range(0, len(missing), _STORE_BLOCK):
                block = missing[start : start + _STORE_BLOCK]
                new = dict(zip((key for key, _ in block), self.vlm.ask([question for _, question in block]), strict=True))
                self._store.put({key: _stored(answer) for key, answer in new.items() if not answer.transient})
                answers |= new
        return [answers[key] for key in keys]


def _stored(answer: Answer) -> bytes:
    return json.dumps({name: getattr(answer, name) for name in _STORED}).encode()


def _parsed(value: bytes) -> Answer:
    """Raises ValueError when the value is no answer: a text, or why there is none."""
    said = parse_json(value)
    if not isinstance(said, dict) or said.keys() != set(_STORED) or not isinstance(said["detail"], str):
        raise ValueError("not an answer")
    if sorted((type(said["text"]).__name__, type(said["reason"]).__name__)) != ["NoneType", "str"]:
        raise ValueError("neither a text nor a reason, or both")
    return Answer(**said)


def _key(config: Mapping[str, Any], question: Question) -> str:
    asked = {name: getattr(question, name) for name in ("prompt", "system", "schema", "seed")}
    return "answer:" + fingerprint({"config": config, "images": [ArrayContent(image).key for image in question.images], **asked})


def reply(text: str) -> Answer:
    cleaned = clean(text).strip()
    if len(cleaned) > _MAX_REPLY_CHARS:
        return Answer(None, f"reply longer than {_MAX_REPLY_CHARS} characters")
    return Answer(cleaned) if cleaned else Answer(None, "empty reply")


def clean(text: str) -> str:
    """Without control and invisible formatting characters and lone surrogates; lines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def one_line(text: str) -> str:
    return " ".join(clean(text).split())[:200]


def check_model(model: object) -> None:
    if not isinstance(model, str) or not model.strip():
        raise InputError(f"vlm.model must be the name of a model, got {model!r}")
