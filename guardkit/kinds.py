"""Which class a saved part was made by: a short name for one of guardkit's, "package.module:Class" for one of another package.

A file only names a class and its constructor's arguments. A class of another package is imported when the caller has named
that package, never because a file says so.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from guardkit.checks import is_list, is_number, is_whole
from guardkit.schema import InputError, shortened

MAX_WIDTH = 1 << 20
_PATH = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_OF_THE_MACHINE = frozenset({"device", "batch_size"})  # how to run a part is the caller's to say, not a file's


@dataclass(frozen=True)
class Kinds:
    """The kinds that one part of a guard may have.

    Attributes:
        part: "head" or "encoder".
        ours: import paths of classes of guardkit's, by the short names that files keep.
    """

    part: str
    ours: Mapping[str, str]

    def name(self, kind: type) -> str:
        """What a file calls a class."""
        path = f"{kind.__module__}:{kind.__qualname__}"
        return next((name for name, ours in self.ours.items() if ours == path), path)

    def is_name(self, value: object) -> bool:
        """Whether a file may call a class so; nothing is imported."""
        return isinstance(value, str) and (value in self.ours or _PATH.fullmatch(value) is not None)

    def package(self, name: str) -> str | None:
        """The package that has to be trusted for a class; None for one of ours."""
        found = None if name in self.ours else _PATH.fullmatch(name)
        return found[1] if found and found[1] != "guardkit" else None

    def describe(self, part: Any) -> tuple[str, dict[str, Any]]:
        """What a file keeps of a part: the name of its class, and its `config`.

        Raises:
            InputError: nobody could build it from these again.
        """
        name, config = self.name(type(part)), getattr(part, "config", None)
        try:
            if not self.is_name(name):
                raise ValueError("its class must stand at the top level of a module, to be imported from there")
            if not isinstance(config, dict) or json.loads(json.dumps(config, allow_nan=False)) != config:
                raise ValueError("its config must be a dict that JSON gives back as it was (lists instead of tuples, texts as keys)")
            check_arguments(type(part), config, "its config")
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.part} {name} cannot be saved: {error}") from error
        return name, config

    def load(self, name: str, trust: Sequence[str]) -> type:
        """The class that a file names.

        Args:
            name: a name that `is_name` lets pass.
            trust: packages that the caller has named.
        Raises:
            InputError: its package is not among them, or there is no such class in it.
        """
        require_trust([(self, name)], trust, needed_by=f"{self.part} {name}")
        module, _, attribute = self.ours.get(name, name).partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"{self.part} {name} cannot be imported ({error}); install the package in the version it was saved with"
            ) from error
        # what a trusted module has merely imported is not its own, and was not trusted
        if not isinstance(found, type) or self.name(found) != name:
            raise InputError(f"{self.part} {name} is no class that is defined there; a guard's file must name the module that defines it")
        return found


def require_trust(named: Iterable[tuple[Kinds, str]], trust: Sequence[str], *, needed_by: str) -> None:
    """Says which packages would have to be trusted before any of them is imported.

    Raises:
        InputError: one is not in `trust`, or `trust` is no list of packages.
    """
    if not is_list(trust) or not all(isinstance(one, str) and one.isidentifier() for one in trust):
        raise InputError(f'trust must be a list of top-level packages, such as trust=["mypackage"], got {trust!r}')
    parts = {f"{kinds.part} {name}": package for kinds, name in named if (package := kinds.package(name)) not in (None, *trust)}
    if parts:
        # the code of a script or a notebook cannot be imported from another one
        packages = [f'"{one}"' for one in dict.fromkeys(parts.values()) if one != "__main__"]
        ways = [f"trust=[{', '.join(packages)}]"] if packages else []
        ways += [f"the part itself as {' and '.join(f'{one.split()[0]}=' for one in parts)}"]
        raise InputError(
            f"{needed_by} needs code that is not guardkit's ({', '.join(parts)}), which is imported only from packages that you trust; "
            f"if you do, give {', or '.join(ways)}"
        )


def check_arguments(kind: type, given: Mapping[str, Any], where: str) -> None:
    """Checks arguments that a file holds against the constructor that they are for, as far as its annotations go.

    Args:
        kind: the class.
        given: by name.
        where: for messages, such as "head.settings".
    Raises:
        ValueError: one is unknown, missing or of another type; or it is for the caller to set.
    """
    parameters = {name: one for name, one in inspect.signature(kind).parameters.items() if name not in _OF_THE_MACHINE}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    named = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    unknown = set(given) - set(named)
    if (unknown and not takes_any) or unknown & _OF_THE_MACHINE:
        raise ValueError(f"{where} must be among {', '.join(named)}, got {', '.join(sorted(given))}")
    try:
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    except NameError:  # imported for type checkers only
        hints = {}
    for name, parameter in named.items():
        if name not in given and parameter.default is not parameter.empty:
            continue
        if name not in given:
            raise ValueError(f"{where}.{name} is missing")
        rules = _rules(hints.get(name, Any))
        if rules and not any(rule(given[name]) for rule, _ in rules):
            raise ValueError(f"{where}.{name} must be {' or '.join(text for _, text in rules)}, got {shortened(json.dumps(given[name]))}")


def _rules(hint: Any) -> list[tuple[Callable[[Any], bool], str]]:
    """What JSON may hold for an annotation; empty where that is not known."""
    if get_origin(hint) in (Union, UnionType):
        each = [_rules(one) for one in get_args(hint)]
        return [rule for rules in each for rule in rules] if all(each) else []
    found = _RULES.get(get_origin(hint) or hint)
    return [found] if found else []


def is_width(value: object) -> bool:
    """Whether it may be a number of dimensions, categories or units."""
    return is_whole(value) and 1 <= value <= MAX_WIDTH


_RULES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (is_width, f"a whole number from 1 to {MAX_WIDTH}"),
    float: (is_number, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a text"),
    dict: (lambda value: isinstance(value, dict), "an object"),
    Mapping: (lambda value: isinstance(value, dict), "an object"),
    list: (is_list, "a list"),
    NoneType: (lambda value: value is None, "null"),
}
