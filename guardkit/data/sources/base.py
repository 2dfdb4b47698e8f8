"""What a source is: labelled records, and what could not be used. What rows mean is said in `rows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guardkit.schema import InputError, Record, Rejected


@dataclass(frozen=True)
class Loaded:
    """What a source holds.

    Attributes:
        train: records to choose labelled images from; all records when `test` is None.
        test: natural test records; None when the data module is to hold some out.
        rejected: what could not be used, with reasons.
        given: how many inputs there were: train + test + rejected.
        test_pairs: (unsafe test record, its counterfactual) known to be exact; None when an editor must make them.
        is_drawn: no image shows anything real, so that even unsafe ones may be made; else only safe ones are.
        encoder_fingerprint: of the encoder that made the records' embeddings, where they bring some and it is known.
        set_aside: images among `rejected`, under the same id, that are not trained on but could be embedded: without a label
            (label -1), or in a group with a test image.
        is_grouped: whether `guardkit.data.grouping` has seen it.
        without_labels: what a command that needs labels says where none of the images has one; "" where each has a reason of its own.
        notes: what a report should say of it, in sentences.
    """

    train: Sequence[Record]
    test: Sequence[Record] | None
    rejected: Sequence[Rejected]
    given: int
    test_pairs: list[tuple[Record, Record]] | None = None
    is_drawn: bool = False
    encoder_fingerprint: str | None = None
    set_aside: Sequence[Record] = ()
    is_grouped: bool = False
    without_labels: str = ""
    notes: Sequence[str] = ()


class Source(Protocol):
    """Where labelled images come from.

    Attributes:
        name: as in `source=NAME`.
        asked: what was asked for, in plain JSON types.
    """

    name: str
    asked: dict[str, Any]

    def load(self) -> Loaded:
        """Lists the records without reading more pixels than it must. Raises InputError."""
        ...


def check_source(source: object) -> None:
    """Raises InputError for something that is no `Source`, such as a path."""
    if not callable(getattr(source, "load", None)) or not hasattr(source, "asked"):
        raise InputError(
            f"source must be an object with a method load that lists its images, such as guardkit.FolderSource(...), got {source!r}"
        )
