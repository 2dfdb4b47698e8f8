"""What an engine is: the same function on many items, in any order, here or elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from guardkit.schema import InputError

T = TypeVar("T")
R = TypeVar("R")

Put = Callable[[str, Any], Any]
"""(role, part) -> what takes its place: the part itself, or a stand-in that is told what the part is and lets others do its work. The roles
are editor, encoder, instructor and verifier. A task whose parts may be elsewhere has a method `with_parts` that takes such a function, and gives
the task that works with what it gave."""


@contextmanager
def sending(engine: str) -> Iterator[None]:
    """Says of what cannot be pickled what it means.

    Args:
        engine: to whose workers something is sent in the block.
    Raises:
        InputError: it cannot be pickled.
    """
    try:
        yield
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(
            f"a part cannot be sent to workers of engine={engine} ({why}); choose engine=local, or a part that can be pickled"
        ) from error


class Engine(Protocol):
    """Does tasks.

    Attributes:
        name: as in `engine=NAME`.
        is_here: whether it works in this process, one task after the other.
    """

    name: str
    is_here: bool

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Calls the task on every item.

        Args:
            task: may be called more than once on an item, where a worker ended before it had answered. An engine with workers elsewhere
                pickles it once for each of them, and keeps it there.
            items: small; each is pickled when its turn comes.
        Yields:
            The place of an item, and what the task gave, as they are done.
        Raises:
            InputError: as the task raised it, or a worker ended again and again. Other errors of the task are raised as they are.
        """
        ...
