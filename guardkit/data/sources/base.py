"""What a source is: labelled records, and what could not be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from guardkit.schema import InputError, Record, Rejected


@dataclass(frozen=True)
class Loaded:
    """What a source holds.

    Attributes:
        train: records to choose labelled images from; all records when `test` is None.
        test: natural test records; None when the data module is to hold some out.
        test_pairs: (unsafe test record, its counterfactual) known to be exact; None when an editor must make them.
        rejected: what could not be used, with reasons.
        given: how many inputs there were: train + test + rejected.
        is_drawn: no image shows anything real, so that even unsafe ones may be made; else only safe ones are.
        encoder_fingerprint: of the encoder that made the records' embeddings, where they bring some and it is known.
    """

    train: list[Record]
    test: list[Record] | None
    rejected: list[Rejected]
    given: int
    test_pairs: list[tuple[Record, Record]] | None = None
    is_drawn: bool = False
    encoder_fingerprint: str | None = None


def read_label(value: Any, where: str) -> int:
    """1 for unsafe and 0 for safe, as tables write them: the words, 0 and 1, or 0.0 and 1.0.

    Raises:
        InputError: anything else; `where` says what table and row.
    """
    label = {"safe": 0, "unsafe": 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(str(value).strip().lower())
    if label is None:
        raise InputError(f"{where} has label {value!r}; allowed are safe, unsafe, 0 and 1")
    return label


class Source(Protocol):
    """Where labelled images come from.

    Attributes:
        name: as in `source=NAME`.
        fingerprint: what was asked for, in plain JSON types.
    """

    name: str
    fingerprint: dict[str, Any]

    def load(self) -> Loaded:
        """Lists the records without reading more pixels than it must. Raises InputError."""
        ...
