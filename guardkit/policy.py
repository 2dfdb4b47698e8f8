"""The written rules: a policy with named categories, loaded from YAML, validated, with a digest. Knows no model."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from guardkit.artifacts import SHIPPED, brought_along, fingerprint, written
from guardkit.local_copies import local
from guardkit.schema import InputError
from guardkit.storage import is_url

_RESERVED = ("safe", "unsafe", "decision")
# aliases in a YAML file can make a small text a value that is huge when written out in an error
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_MAX_NODES = 100_000  # of a YAML file
_MAX_PROBLEMS = 10  # told at once
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
        classes: what a data set calls what violates it, where that says what an image shows instead of a label; may be empty.
        look_alikes: what it calls the allowed look-alikes; may be empty. No class stands in a policy twice.
    """

    name: str
    definition: str
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    edit: str
    unsafe_texts: tuple[str, ...]
    safe_texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    look_alikes: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """It in words, in one line: name, definition, what is covered and what is not."""
        parts = [f"- {self.name}: {self.definition}"]
        if self.covered:
            parts.append(f"Covered: {'; '.join(self.covered)}.")
        if self.not_covered:
            parts.append(f"Not covered: {'; '.join(self.not_covered)}.")
        return " ".join(parts)


@dataclass(frozen=True)
class Policy:
    """What makes an image unsafe.

    Attributes:
        name: in snake_case.
        description: who made it and what for.
        categories: at least one, each name once.
        safe_texts: descriptions of ordinary allowed images, for a text encoder; may be empty.
        source: where the categories come from; may be empty.
        harmless: whether images that violate it are harmless stand-ins, which may be made and shown.
    """

    name: str
    description: str
    categories: tuple[Category, ...]
    safe_texts: tuple[str, ...] = ()
    source: str = ""
    harmless: bool = False

    @cached_property
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

    def rules(self, names: Collection[str] | None = None) -> str:
        """The categories in words, a line each: name, definition, what is covered and what is not.

        Args:
            names: of the categories wanted; None: all.
        """
        return "\n".join(category.rule for category in self.categories if names is None or category.name in names)

    def own_name(self, name: str) -> str:
        """What the policy calls a category that others write in another case, or with blanks or hyphens; other names as they are."""
        own = "_".join(re.split(r"[\s_-]+", name.strip().casefold()))
        return own if own in self.category_names else name

    def check_category(self, name: str, where: str) -> None:
        """Raises InputError unless the policy has the category; `where` says what asked for it."""
        if name not in self.category_names:
            known = ", ".join(self.category_names)
            raise InputError(
                f"{where}: category {name!r} is not in policy {self.name!r}, which has {known}; "
                "use one of these, add it to the policy, or choose another with policy="
            )

    @classmethod
    def joined(cls, policies: Sequence[Policy]) -> Policy:
        """A policy that forbids what any of several does: to read a source once whose labels are told apart afterwards.

        Args:
            policies: at least one. Of categories with one name the first is taken: they are thought to mean the same.
        """
        categories: dict[str, Category] = {}
        for policy in policies:
            for category in policy.categories:
                categories.setdefault(category.name, category)
        return cls(
            name="_or_".join(policy.name for policy in policies),
            description="What any of several policies forbids.",
            categories=tuple(categories.values()),
            harmless=all(policy.harmless for policy in policies),
        )

    @classmethod
    def of_text(cls, name: str, text: str) -> Policy:
        """A policy whose rules are one text, as benchmarks of many policies have them: one category, called "violation".

        Guards that read the policy read that text as the category's definition, and encoders of texts as what violates it.

        Args:
            name: in snake_case.
            text: the rules.
        Raises:
            InputError: no name in snake_case, or no text.
        """
        category = {"name": "violation", "definition": text, "edit": "Remove whatever violates the policy.", "unsafe_texts": [text]}
        return cls.from_dict({"name": name, "categories": [category]}, where=f"policy {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and maps, as in the YAML file. What says how a policy is used with classes is there where it says something:
        other policies keep the digest that saved guards have of them."""
        plain = {key: _plain(value) for key, value in asdict(self).items()}
        for part, names in ((plain, ("harmless",)), *((one, ("classes", "look_alikes")) for one in plain["categories"])):
            for name in names:
                if not part[name]:
                    del part[name]
        return plain

    def save(self, path: str | Path) -> None:
        """Writes YAML that `load` reads back to an equal policy."""
        with written(Path(path)) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Reads a YAML file.

        Args:
            path: of the file, its URL in object storage, or "guardkit:NAME" for one that comes with guardkit, such as "guardkit:scenes".
        Raises:
            InputError: naming the file, the field and the fix.
        """
        if str(path).startswith(SHIPPED):
            folder, name = brought_along("conf") / "policy", str(path).removeprefix(SHIPPED)
            names = sorted(file.stem for file in folder.glob("*.yaml"))
            if name not in names:
                raise InputError(f"guardkit ships no policy {name!r}; it ships {', '.join(names)}")
            path = folder / f"{name}.yaml"
        elif is_url(path):
            path = local("policy_file", path)
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
            data: as `to_dict` gives it. Needed are `name` and `categories`, and of each category `name`, `definition` and `unsafe_texts`.
                A missing `edit` asks to remove the category; missing `safe_texts` are those of the policy, or one made from the name.
            where: names the data in errors.
        Raises:
            InputError: naming `where`, and of every problem the field and the fix.
        """
        problems: list[str] = []
        given = _mapping(data, problems, "", Policy, needed=("name", "categories"))
        name = _snake_case(given["name"], problems, "name") if "name" in given else ""
        safe_texts = _texts(given.get("safe_texts", []), problems, "safe_texts", least=0)
        raw = given.get("categories", ())
        if "categories" in given and (not isinstance(raw, list | tuple) or not raw):
            problems.append(f"categories must be a list of at least one category, got {_show(raw)}; write one map for each")
            raw = ()
        categories = tuple(_category(item, problems, f"categories[{i}]", safe_texts) for i, item in enumerate(raw))
        first: dict[str, int] = {}
        for i, category in enumerate(categories):
            if category.name and first.setdefault(category.name, i) != i:
                before = f"categories[{first[category.name]}]"
                problems.append(f"categories[{i}].name repeats {category.name!r} of {before}; merge the two, or rename one")
        problems += _repeated_classes(categories)
        harmless = given.get("harmless", False)
        if not isinstance(harmless, bool):
            problems.append(f"harmless must be true or false, got {_show(harmless)}; write true only of harmless stand-ins")
        policy = cls(
            name=name,
            description=_text(given["description"], problems, "description") if "description" in given else f"Policy {name}.",
            categories=categories,
            safe_texts=safe_texts,
            source=_text(given.get("source", ""), problems, "source", may_be_empty=True),
            harmless=harmless is True,
        )
        if problems:
            count = f"{len(problems)} problems: " if len(problems) > 1 else ""
            more = f" | and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
            raise InputError(f"{where}: {count}{' | '.join(problems[:_MAX_PROBLEMS])}{more}")
        return policy


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


def text_without(name: str) -> str:
    """The safe text of a category that brings none, under a policy that brings none either."""
    return f"a photo without {name.replace('_', ' ')}"


def _category(data: Any, problems: list[str], field: str, ordinary: tuple[str, ...]) -> Category:
    """One category; `ordinary` texts of the policy stand in where it has no allowed look-alikes of its own."""
    given = _mapping(data, problems, field, Category, needed=("name", "definition", "unsafe_texts"))
    name = _snake_case(given["name"], problems, f"{field}.name") if "name" in given else ""
    if name in _RESERVED:
        problems.append(f"{field}.name must not be {name!r}, a name that guardkit itself gives to scores; choose another")
    plain = name.replace("_", " ")

    def texts(key: str, *, least: int = 0, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        return _texts(given[key], problems, f"{field}.{key}", least=least) if key in given else default

    return Category(
        name=name,
        definition=_text(given["definition"], problems, f"{field}.definition") if "definition" in given else "",
        covered=texts("covered"),
        not_covered=texts("not_covered"),
        edit=_text(given["edit"], problems, f"{field}.edit") if "edit" in given else f"Remove whatever shows {plain}.",
        unsafe_texts=texts("unsafe_texts", least=1),
        safe_texts=texts("safe_texts", least=1, default=ordinary or (text_without(name),)),
        classes=texts("classes"),
        look_alikes=texts("look_alikes"),
    )


def _repeated_classes(categories: Sequence[Category]) -> list[str]:
    """Problems: a class that is said to be two things would be safe or unsafe by the order of the file."""
    problems: list[str] = []
    first: dict[str, str] = {}
    for i, category in enumerate(categories):
        for field in ("classes", "look_alikes"):
            for k, name in enumerate(getattr(category, field)):
                place = f"categories[{i}].{field}[{k}]"
                if name and first.setdefault(name, place) != place:
                    problems.append(f"{place} repeats {name!r} of {first[name]}; keep one of the two")
    return problems


def _mapping(data: Any, problems: list[str], field: str, kind: type, needed: tuple[str, ...]) -> Mapping[str, Any]:
    """Checks the keys of one map against the fields of `kind`; `field` is where the map stands, "" at the top."""
    known = [one.name for one in fields(kind)]
    if not isinstance(data, Mapping):
        problems.append(f"{field or 'the policy'} must be a mapping with the fields {', '.join(known)}, got {_show(data)}")
        return {}
    prefix = f"{field}." if field else ""
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"
            problems.append(f"{prefix}{key if str(key).isidentifier() else _SHORT.repr(key)} is not a field; {hint}")
    problems += [f"{prefix}{key} is missing; add it" for key in needed if key not in data]
    return data


def _text(value: Any, problems: list[str], field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        problems.append(f"{field} must be a text, got {_show(value)}; write one, in quotes if it looks like something else")
        return ""
    if not (value.strip() or may_be_empty):
        problems.append(f"{field} must not be empty; write a text")
    # where a text is laid out as a block, YAML may end it with a line break
    return value.strip()


def _texts(value: Any, problems: list[str], field: str, *, least: int) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        problems.append(f"{field} must be a list of texts, got {_show(value)}; write one text a line, each after a dash")
        return ()
    if len(value) < least:
        problems.append(f"{field} must not be empty; write at least {least} text")
    return tuple(_text(item, problems, f"{field}[{i}]") for i, item in enumerate(value))


def _snake_case(value: Any, problems: list[str], field: str) -> str:
    name = _text(value, problems, field)
    if name and not _SNAKE_CASE.fullmatch(name):
        problems.append(f"{field} must be lower-case letters, digits and underscores, a letter first, got {_show(name)}; rename it")
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return f"{type(value).__name__} {_SHORT.repr(value)}"
