"""The guards that a service decides with: from folders or objects, on as few encoders as they need."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardkit.classifier import GuardClassifier
from guardkit.encoders.base import Encoder
from guardkit.guard_folder import CARD, read_guard
from guardkit.schema import InputError

Given = GuardClassifier | str | Path
ONE = "guard"  # the name of a guard that was given without one
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Served:
    """A guard as it is served.

    Attributes:
        name: by which requests ask for it.
        guard: decides.
        encoder: the fingerprint of its encoder.
        fingerprint: of the guard, and its thresholds.
        card: its model card; "" where there is none.
    """

    name: str
    guard: GuardClassifier
    encoder: str
    fingerprint: str
    card: str

    def to_dict(self) -> dict[str, Any]:
        """What it decides, and how: plain JSON."""
        guard = self.guard
        about = {} if guard.calibration is None else guard.calibration.about
        return {
            "name": self.name,
            "policy": {"name": guard.policy.name, "digest": guard.policy.digest},
            "categories": [{"name": one.name, "definition": one.definition} for one in guard.policy.categories],
            "thresholds": guard.thresholds.to_dict(),
            "promises": list(about.get("promises", [])),
            "prevalence": about.get("prevalence"),
            "encoder": {"name": guard.encoder.name, "fingerprint": self.encoder},
            "fingerprint": self.fingerprint,
            "card": self.card or None,
        }


def named(guard: Given | Mapping[str, Given]) -> dict[str, Given]:
    """Guards by name, of one or of a map of them.

    Raises:
        InputError: no guard, or a name that is none.
    """
    given: Mapping[Any, Any] = guard if isinstance(guard, Mapping) else {ONE: guard}
    if not given:
        raise InputError("there is no guard to serve; give its folder, or a map of names and folders")
    for name, one in given.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
            raise InputError(f"a guard's name must be a text of 1 to 100 characters, got {name!r}")
        if not isinstance(one, (GuardClassifier, str, os.PathLike)):
            raise InputError(f"guard {name} must be a GuardClassifier, or the folder or Hub id of a saved one, got {type(one).__name__}")
    return dict(given)


def loaded(given: Mapping[str, Given], *, trust: Sequence[str] = (), known: Sequence[Encoder] = ()) -> dict[str, Served]:
    """All of them, each encoder once.

    Args:
        given: as `named` gives them.
        trust: packages that saved guards may take their heads and encoders from.
        known: encoders that are built already.
    Raises:
        InputError: as `GuardClassifier.from_pretrained`.
    """
    encoders: dict[str, Encoder] = {one.fingerprint: one for one in known}
    encoders |= {one.encoder.fingerprint: one.encoder for one in given.values() if isinstance(one, GuardClassifier)}
    served: dict[str, Served] = {}
    for name, one in given.items():
        card = ""
        if isinstance(one, GuardClassifier):
            guard = one
        else:
            stored = read_guard(one, trust=trust, needs_encoder=False)
            guard = GuardClassifier.from_pretrained(one, trust=trust, encoder=encoders.get(stored.config["encoder"]["fingerprint"]))
            with suppress(OSError):  # a guard of the Hub is fetched without it
                card = (stored.folder / CARD).read_bytes()[:_MAX_CARD_BYTES].decode("utf-8", "replace")
        fingerprint = guard.encoder.fingerprint
        # guards that were given as objects may bring equal encoders: the first one serves them all
        encoders.setdefault(fingerprint, guard.encoder)
        served[name] = Served(name, guard, fingerprint, guard.fingerprint, card)
    return served
