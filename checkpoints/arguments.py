"""Settings of the recipes that made `checkpoints/`, read from `key=value` arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def read_recipe(kind: type[T], arguments: Sequence[str]) -> T:
    """A recipe with its defaults but for what the arguments say.

    Args:
        kind: a dataclass whose fields all have defaults of a plain type.
        arguments: of the form "name=value".
    Raises:
        SystemExit: an unknown name.
    """
    defaults = {name: type(value) for name, value in vars(kind()).items()}
    settings = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in defaults:
            raise SystemExit(f"unknown setting {key!r}: expected one of {', '.join(defaults)}")
        settings[key] = defaults[key](value)
    return kind(**settings)


def read_world(worlds: Mapping[str, type[T]], arguments: Sequence[str]) -> T:
    """The world that `world=NAME` names, with its defaults but for what the other arguments say.

    Raises:
        SystemExit: no world or an unknown one, or an unknown name.
    """
    named = [argument.removeprefix("world=") for argument in arguments if argument.startswith("world=")]
    if len(named) != 1 or named[0] not in worlds:
        raise SystemExit(f"expected one world=NAME, NAME one of {', '.join(worlds)}; got {', '.join(named) or 'none'}")
    return read_recipe(worlds[named[0]], [argument for argument in arguments if not argument.startswith("world=")])
