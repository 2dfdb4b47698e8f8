"""The written rules: a policy with named categories, loaded from YAML, validated, with a digest. Knows no model."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from guardkit.artifacts import fingerprint, written
from guardkit.schema import InputError

_RESERVED = ("safe", "unsafe", "decision")
# aliases in a YAML file can make a small text a value that is huge when written out in an error
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_MAX_NODES = 100_000  # of a YAML file
_SNAKE_CASE = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Category:
    """One rule of a policy.

    Attributes:
        name: in snake_case, such as "weapons"; not "safe", "unsafe" or "decision".
        definition: what the category means.
        covered: examples of what violates it; may be empty.
        not_covered: examples of what looks like it and is allowed; may be empty.
        edit: how an edit would remove the violation, one imperative sentence.
        unsafe_texts: descriptions of violating images, for a text encoder; at least one.
        safe_texts: descriptions of their allowed look-alikes; at least one.
    """

    name: str
    definition: str
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    edit: str
    unsafe_texts: tuple[str, ...]
    safe_texts: tuple[str, ...]


@dataclass(frozen=True)
class Policy:
    """What makes an image unsafe.

    Attributes:
        name: in snake_case.
        description: who made it and what for.
        categories: at least one, each name once.
        safe_texts: descriptions of ordinary allowed images, for a text encoder; may be empty.
        source: where the categories come from; may be empty.
    """

    name: str
    description: str
    categories: tuple[Category, ...]
    safe_texts: tuple[str, ...] = ()
    source: str = ""

    @property
    def category_names(self) -> tuple[str, ...]:
        """In the policy's order."""
        return tuple(category.name for category in self.categories)

    def __getitem__(self, name: str) -> Category:
        self.check_category(name, f"policy[{name!r}]")
        return self.categories[self.category_names.index(name)]

    @cached_property
    def digest(self) -> str:
        """A hash of the content; comments, order of fields and layout do not matter."""
        return fingerprint(self.to_dict())

    def check_category(self, name: str, where: str) -> None:
        """Raises InputError unless the policy has the category; `where` says what asked for it."""
        if name not in self.category_names:
            known = ", ".join(self.category_names)
            raise InputError(
                f"{where}: category {name!r} is not in policy {self.name!r}, which has {known}; "
                "use one of these, add it to the policy, or choose another with policy="
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and maps, as in the YAML file."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Writes YAML that `load` reads back to an equal policy."""
        with written(Path(path)) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads a YAML file.

        Raises:
            InputError: naming the file, the field and the fix.
        """
        try:
            data = _parsed(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: there is no such policy file; give the path of a YAML file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the policy cannot be read ({error}); give the path of a YAML file in UTF-8") from error
        except Exception as error:  # beside YAMLError, PyYAML lets out whatever int(), date() or deep nesting raise
            mark = getattr(error, "problem_mark", None)
            place = f" line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or " ".join(str(error).split())
            raise InputError(f"{path}{place}: not valid YAML ({reason}); correct the syntax there") from error
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "policy") -> Policy:
        """Validates plain data.

        Args:
            data: as `to_dict` gives it.
            where: names the data in errors.
        Raises:
            InputError: naming `where`, the field and the fix.
        """
        given = _mapping(data, where, "", Policy, optional=("safe_texts", "source"))
        raw = given["categories"]
        if not isinstance(raw, list | tuple) or not raw:
            raise InputError(f"{where}: categories must be a list of at least one category, got {_show(raw)}; write one map for each")
        categories = tuple(_category(item, where, f"categories[{i}]") for i, item in enumerate(raw))
        first: dict[str, int] = {}
        for i, category in enumerate(categories):
            if first.setdefault(category.name, i) != i:
                before = f"categories[{first[category.name]}]"
                raise InputError(f"{where}: categories[{i}].name repeats {category.name!r} of {before}; merge the two, or rename one")
        return cls(
            name=_snake_case(given["name"], where, "name"),
            description=_text(given["description"], where, "description"),
            categories=categories,
            safe_texts=_texts(given.get("safe_texts", []), where, "safe_texts", least=0),
            source=_text(given.get("source", ""), where, "source", may_be_empty=True),
        )


def _parsed(text: str) -> Any:
    """Plain data from YAML. Raises ValueError when its aliases make a small text a large value."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            _written_out(root, {})
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there would be without aliases; `known` has those of each node that was looked at."""
    known[id(node)] = _MAX_NODES  # an alias of what it stands in has no end
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    inside = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
    n = 1 + sum(known.get(id(part)) or _written_out(part, known) for part in inside)
    if n > _MAX_NODES:
        raise ValueError("aliases that never end, or are too many")
    known[id(node)] = n
    return n


def _category(data: Any, where: str, field: str) -> Category:
    given = _mapping(data, where, field, Category)
    name = _snake_case(given["name"], where, f"{field}.name")
    if name in _RESERVED:
        raise InputError(f"{where}: {field}.name must not be {name!r}, a name that guardkit itself gives to scores; choose another")
    return Category(
        name=name,
        definition=_text(given["definition"], where, f"{field}.definition"),
        covered=_texts(given["covered"], where, f"{field}.covered", least=0),
        not_covered=_texts(given["not_covered"], where, f"{field}.not_covered", least=0),
        edit=_text(given["edit"], where, f"{field}.edit"),
        unsafe_texts=_texts(given["unsafe_texts"], where, f"{field}.unsafe_texts", least=1),
        safe_texts=_texts(given["safe_texts"], where, f"{field}.safe_texts", least=1),
    )


def _mapping(data: Any, where: str, field: str, kind: type, optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Checks the keys of one map against the fields of `kind`; `field` is where the map stands, "" at the top."""
    known = [one.name for one in fields(kind)]
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: {field or 'the policy'} must be a mapping with the fields {', '.join(known)}, got {_show(data)}")
    prefix = f"{field}." if field else ""
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"
            raise InputError(f"{where}: {prefix}{key if str(key).isidentifier() else _SHORT.repr(key)} is not a field; {hint}")
    for key in known:
        if key not in data and key not in optional:
            raise InputError(f"{where}: {prefix}{key} is missing; add it")
    return data


def _text(value: Any, where: str, field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} must be a text, got {_show(value)}; write one, in quotes if it looks like something else")
    if not (value.strip() or may_be_empty):
        raise InputError(f"{where}: {field} must not be empty; write a text")
    # where a text is laid out as a block, YAML may end it with a line break
    return value.strip()


def _texts(value: Any, where: str, field: str, *, least: int) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {field} must be a list of texts, got {_show(value)}; write one text a line, each after a dash")
    if len(value) < least:
        raise InputError(f"{where}: {field} must not be empty; write at least {least} text")
    return tuple(_text(item, where, f"{field}[{i}]") for i, item in enumerate(value))


def _snake_case(value: Any, where: str, field: str) -> str:
    name = _text(value, where, field)
    if not _SNAKE_CASE.fullmatch(name):
        raise InputError(
            f"{where}: {field} must be lower-case letters, digits and underscores, a letter first, got {_show(name)}; rename it"
        )
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {_SHORT.repr(value)}"
