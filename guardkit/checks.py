"""Checks of settings, the same for all: each raises InputError with the setting's name, what came and what may come."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from guardkit.schema import InputError, shortened
from guardkit.storage import check_url, is_url, local_path

_URL_AS_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")
MAX_SEED = 2**63 - 1  # that torch takes


def is_number(value: object) -> TypeGuard[float]:
    """Whether a setting is a finite number; true, NaN and texts are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a setting is a whole number; true and 3.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a setting is a list; a text, or one number without brackets, is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_whole(name: str, value: object, least: int, most: int | None = None, *, optional: bool = False) -> None:
    """A whole number from `least` to `most`, or null where it is optional."""
    if value is None and optional:
        return
    if not is_whole(value) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {limits}{', or null' * optional}, got {value!r}")


def check_mapping(name: str, value: object, example: str) -> None:
    """Names with values, or null."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise InputError(f"{name} must be {example}, or null, got {value!r}")


def check_number(name: str, value: object, within: str, *, optional: bool = False) -> None:
    """A finite number.

    Args:
        name: of the setting.
        value: of the setting.
        within: the interval it must lie in, as mathematics writes it: "[0, 1)", "(0, inf)".
        optional: may be null.
    """
    if value is None and optional:
        return
    low, high = (float(end) for end in within[1:-1].split(","))
    includes_low, includes_high = within[0] == "[", within[-1] == "]"
    is_inside = is_number(value) and (
        (low <= value if includes_low else low < value) and (value <= high if includes_high else value < high)
    )
    if not is_inside:
        open_ended = f"be a number {'of at least' if includes_low else 'above'} {low:g}"
        limits = open_ended if high == math.inf else f"lie in {within}"
        raise InputError(f"{name} must {limits}{', or null' * optional}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")


def check_map(name: str, value: object, example: str, *, optional: bool = True) -> None:
    """A map, or null where it is optional; `example` shows one as a command line has it."""
    if not isinstance(value, Mapping) and not (value is None and optional):
        raise InputError(f"{name} must be a map, as in {name}={example}{', or null' * optional}, got {value!r}")


def check_path(name: str, value: object) -> Path:
    """The path that a text or a Path is, with ~ expanded. An empty one is refused: it would be the present folder, and so is a URL."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        hint = "; was a variable of the shell empty?" if value == "" else ""
        raise InputError(f"{name} must be a path, got {value!r}{hint}")
    if is_url(value):
        path = local_path(check_url(name, str(value)))
        if path is None:
            raise InputError(
                f"{name} must be a path on this machine, got the URL {shortened(str(value), 200)}; copy what lies there, and give its path"
            )
        return path
    if isinstance(value, PurePath) and _URL_AS_PATH.match(str(value)) and not os.path.exists(value):
        raise InputError(f"{name} must be a text where it is a URL, got {value!r}, which has lost a slash")
    return Path(os.fsdecode(value)).expanduser()


def check_choice(name: str, value: object, allowed: Collection[str | bool | None]) -> None:
    """One of a few."""
    if value not in list(allowed):
        words = {None: "null", True: "true", False: "false"}  # as a command line writes them
        shown = ", ".join(one if isinstance(one, str) else words[one] for one in allowed)
        raise InputError(f"{name} must be one of {shown}, got {value!r}")


def changes(before: object, now: object, name: str = "") -> Iterator[str]:
    """What differs between settings, in words: "loss.l2 was 0.1, now 1.0". What one of both lacks, another guardkit noted or did not."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            yield from changes(before.get(key, _LACKING), now.get(key, _LACKING), f"{name}{key}.")
    elif before != now:
        yield f"{name.rstrip('.')} was {before}, now {now}"


class _Lacking:
    def __str__(self) -> str:
        return "not noted (another version of guardkit)"


_LACKING = _Lacking()


def completed(settings: Mapping[str, Any], now: Mapping[str, Any], made_by: Callable[..., Any]) -> dict[str, Any]:
    """Settings that an earlier version noted, with those that it did not have yet.

    Args:
        settings: arguments of then.
        now: arguments of today.
        made_by: takes them. What it got since is by default what was done before.
    """
    defaults = {name: one.default for name, one in inspect.signature(made_by).parameters.items() if one.default is not one.empty}
    return {name: defaults[name] for name in now if name in defaults} | dict(settings)


def check_same(what: str, before: object, now: object) -> None:
    """The settings of something that a run goes on from."""
    found = list(changes(before, now))
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(f"{what} was made with other settings: {'; '.join(found[:3])}{more}; give those again, or start anew")
