"""Of an animation every frame is decided over, and the worst one counts."""

from __future__ import annotations

from collections.abc import Sequence

from guardkit.schema import Decision

_SEVERITY = {"allow": 0, "review": 1, "block": 2}


def worst_frame(decisions: Sequence[Decision]) -> tuple[Decision, int | None]:
    """The decision on an image by those on its frames, and the number of the frame that decided, from 0; None of a still image.

    A frame that could not be decided is as bad as can be: what it shows is not known.
    """
    worst = max(range(len(decisions)), key=lambda i: (_SEVERITY.get(decisions[i].action, len(_SEVERITY)), decisions[i].score))
    return decisions[worst], worst if len(decisions) > 1 else None
