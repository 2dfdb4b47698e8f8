"""A guard as a `Classifier` of Meta's python-threatexchange.

The interface is that of threatexchange 1.2.17, `threatexchange.classifier.classifier`: content types, and `classify(content_type,
content_val)`, whose value is a path for photos, gives labels of which each is a match or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guardkit.classifier import GuardClassifier
from guardkit.schema import ImageError, InputError
from guardkit.thresholds import check_scope


def threatexchange_classifier(guard: GuardClassifier, *, scope: Sequence[str] | None = None) -> Any:
    """A classifier of photos for python-threatexchange and what is built on it.

    Args:
        guard: decides.
        scope: categories that count; None: all.
    Returns:
        A `threatexchange.classifier.classifier.Classifier`. Its labels are "unsafe", a match where the image is to be blocked or reviewed, and the
        guard's categories, a match where one caused that; each has its score. A photo that cannot be decided raises ImageError: no label
        would say that.
    Raises:
        InputError: python-threatexchange is missing, or the scope has an unknown category.
    """
    try:
        from threatexchange.classifier.classifier import ClassificationInfo, ClassificationResult, Classifier
        from threatexchange.content_type.photo import PhotoContent
    except ImportError as error:
        raise InputError("a classifier of python-threatexchange needs it; install it with: pip install threatexchange") from error
    check_scope(scope, guard.policy.category_names)

    @dataclass
    class Scored(ClassificationInfo):
        """A label's score, in [0, 1]."""

        score: float = 0.0

        def weight_str(self) -> str:
            return f"{self.score:.1%}"

    class GuardkitClassifier(Classifier):
        """A guard."""

        @classmethod
        def get_content_types(cls) -> list[Any]:
            return [PhotoContent]

        def classify(self, content_type: Any, content_val: str) -> Any:
            """`content_val` is the path of a photo; nothing is fetched."""
            if content_type is not PhotoContent:
                raise InputError(f"a guard classifies photos, got {content_type.get_name()}")
            (decision,) = guard.predict(content_val, scope=scope)
            if decision.action == "error":
                raise ImageError(f"{content_val}: {decision.error}")
            labels = {"unsafe": Scored(decision.action != "allow", decision.score)}
            labels |= {name: Scored(name in decision.violated, score) for name, score in decision.categories.items()}
            return ClassificationResult(labels)

    return GuardkitClassifier()
