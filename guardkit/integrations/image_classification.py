"""A guard that is called, and answers, like transformers' pipeline "image-classification"."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from guardkit.checks import check_whole
from guardkit.classifier import GuardClassifier
from guardkit.inputs import each_image, holds_many
from guardkit.schema import Decision

_TOP = 5


def image_classifier(guard: GuardClassifier, *, top_k: int | None = _TOP) -> ImageClassifier:
    """A guard in the shape of `transformers.pipeline("image-classification")`.

    Args:
        guard: scores.
        top_k: labels that are given where a call names no number; None: all.
    """
    return ImageClassifier(guard, top_k=top_k)


class ImageClassifier:
    """Labels with scores, the highest first: "unsafe", and the guard's categories.

    Attributes:
        task: "image-classification".
        id2label: number -> label, "unsafe" first.
    """

    task = "image-classification"

    def __init__(self, guard: GuardClassifier, *, top_k: int | None = _TOP) -> None:
        check_whole("top_k", top_k, 1, optional=True)
        self._guard, self._top_k = guard, top_k
        self.id2label = dict(enumerate(("unsafe", *guard.policy.category_names)))

    def __call__(self, inputs: Any, *, top_k: int | None = None, **_: Any) -> Any:
        """Scores one image or many.

        Args:
            inputs: one image, whatever `GuardClassifier.predict` takes as that; a list or another collection of them; or an iterator, whose images
                are read as answers are taken.
            top_k: how many labels; by default those that the classifier was made with.
        Other arguments of transformers' pipeline (function_to_apply, batch_size, timeout) change nothing: scores are probabilities already.

        Returns:
            For one image a list of {"label", "score"}, for many a list of such lists, for an iterator an iterator of them. An image that
            cannot be decided gives [{"label": "error", "score": None, "error": the reason}] in its place: no number, so that nothing is
            compared with it.
        Raises:
            InputError: a wrong number.
        """
        check_whole("top_k", top_k, 1, optional=True)
        answers = self._answers(each_image(inputs), top_k or self._top_k)
        if not holds_many(inputs):
            return next(answers)
        return answers if isinstance(inputs, Iterator) else list(answers)

    def _answers(self, images: Iterator[Any], top_k: int | None) -> Iterator[list[dict[str, Any]]]:
        while batch := list(islice(images, self._guard.encoder.batch_size)):
            for decision in self._guard.predict(batch):
                yield _answer(decision, top_k)


def _answer(decision: Decision, top_k: int | None) -> list[dict[str, Any]]:
    if decision.action == "error":
        return [{"label": "error", "score": None, "error": decision.error}]
    scores = {"unsafe": decision.score, **decision.categories}
    return [{"label": label, "score": score} for label, score in sorted(scores.items(), key=lambda one: -one[1])[:top_k]]
