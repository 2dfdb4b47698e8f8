"""How the rows of a table say what they mean: one rule for columns, labels, categories and boxes, used by every source.

A cell that is missing is a reason to reject its row; a word that nobody explained is an error that names it, because a guess
would train on the opposite of what was meant.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from guardkit.checks import check_map
from guardkit.policy import Policy
from guardkit.schema import SAFE, UNLABELLED, UNSAFE, InputError, Region, shortened

log = logging.getLogger(__name__)

BOX = ("x_min", "y_min", "x_max", "y_max")
_WORDS = {
    **dict.fromkeys(("safe", "sfw", "no", "false", "0"), SAFE),
    **dict.fromkeys(("unsafe", "nsfw", "yes", "true", "1"), UNSAFE),
}
# what stands for no label: nothing, -1 in the datasets library, and what pandas and spreadsheets make of a missing cell as text
_MISSING = frozenset({"", "-1", "<na>", "#n/a", "n/a", "na", "nan", "none", "null"})
# what YAML reads as a truth value although the table holds the word
_YAML_WORDS = {True: ("true", "yes"), False: ("false", "no")}
_SHOWN = 8
_TYPO = 0.85  # likeness of two names, of 1, from which one is taken for the other misspelt
_ALLOWED = "safe, unsafe, 0 and 1 (or sfw, nsfw, no, yes, false, true)"


@dataclass(frozen=True)
class Row:
    """What a row says of its image.

    Attributes:
        label: 1 = unsafe, 0 = safe, -1 = it does not say.
        category: the policy's, or None; of a safe image, what it looks like.
        region: where the unsafe feature is, if known.
        caption: may be empty.
        group: as listed; None without one.
        source: where the image comes from; None when the row does not say.
        left_out: why it has no label although it says something: a setting leaves it out; "" else.
    """

    label: int
    category: str | None = None
    region: Region | None = None
    caption: str = ""
    group: str | None = None
    source: str | None = None
    left_out: str = ""


def text(value: Any) -> str:
    """A cell as text; "" for a missing one, which tables made with pandas write as NaN."""
    return "" if value is None or value != value else str(value).strip()


def word_label(value: Any) -> int | None:
    """1 or 0 for the words that stand for unsafe and safe, in any case; truth values; 0 and 1. None for anything else."""
    return _WORDS.get(_canonical(value))


def _canonical(value: Any) -> str:
    """A value such that equal ones are equal text: 1, 1.0, "1.0" and " 1"; True, "true" and "TRUE"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    found = text(value).casefold()
    whole, point, rest = found.partition(".")
    return whole if point and rest and not rest.strip("0") and whole.lstrip("-").isdigit() else found


class LabelRule:
    """Reads labels.

    Args:
        labels: value -> safe or unsafe (or another word for these), None for rows to leave out; None: the usual words.
        default: of values that `labels` does not list: safe or unsafe; None: such a value is an error.
    Raises:
        InputError: a word that stands for neither.
    """

    def __init__(self, labels: Mapping[Any, Any] | None = None, default: Any = None) -> None:
        check_map("source.labels", labels, "{good: safe, bad: unsafe}")
        self.labels: dict[str, int] | None = None
        if labels is not None:
            self.labels = {}
            for value, said in labels.items():
                label = UNLABELLED if said is None else _said(said, f"source.labels[{value!r}]")
                names = _YAML_WORDS[value] if isinstance(value, bool) else (_canonical(value),)
                self.labels |= dict.fromkeys(names, label)
        self.default = None if default is None else _said(default, "source.default_label")

    def lists(self, value: Any) -> bool:
        """Whether the mapping explains the value, or the default explains all."""
        return _canonical(value) in (self.labels or {}) or self.default is not None

    def why_left_out(self, value: Any) -> str:
        """Why an image of this label is not used, where the mapping says so; "" else."""
        is_left_out = (self.labels or {}).get(_canonical(value)) == UNLABELLED
        return f"label {shortened(text(value))!r} is left out (null in source.labels)" if is_left_out else ""

    def read(self, value: Any, where: str) -> int:
        """1 = unsafe, 0 = safe, -1 = missing: nothing, NaN, blank, -1, or a word for that such as "nan" or "None".

        Raises:
            InputError: an unknown value; `where` says in what table and row.
        """
        word = _canonical(value)
        if self.labels is not None and word in self.labels:
            return self.labels[word]
        if word in _MISSING:
            return UNLABELLED
        if self.default is not None:
            return self.default
        if self.labels is not None:
            raise InputError(
                f"{where} has label {value!r}, which source.labels does not list; add it there as safe or unsafe (null: leave it out)"
            )
        label = word_label(value)
        if label is None:
            raise InputError(
                f"{where} has label {value!r}; allowed are {_ALLOWED}; translate others: source.labels={{{value}: unsafe, ...}}"
            )
        return label


def _said(value: Any, where: str) -> int:
    label = word_label(value)
    if label is None:
        raise InputError(f"{where} has label {value!r}; allowed are {_ALLOWED}")
    return label


class RowRule:
    """Reads the cells of rows by the settings that every table source has.

    Args:
        policy: whose categories the images violate.
        columns: role -> column, or None: "label", "category", "class", "caption", "group", "source", and what the source adds. With a
            "class" column, label and category follow from the policy's classes and look-alikes, and other names are safe; columns
            of labels and categories are then not read.
        usual: the columns that a table may lack: those that are called so by default.
        labels: value -> safe, unsafe or None; see `LabelRule`.
        default_label: of values that `labels` does not list.
        categories: value -> category of the policy, None for one that this policy does not speak of: its unsafe images are left
            out. In a table without labels they follow from it: a listed value means unsafe, and everything else safe.
        boxes: whether the columns x_min, y_min, x_max, y_max are a box.
    Raises:
        InputError: a setting that does not fit the policy.
    """

    def __init__(
        self,
        policy: Policy,
        columns: Mapping[str, str | None],
        usual: Mapping[str, str] | None = None,
        *,
        labels: Mapping[Any, Any] | None = None,
        default_label: Any = None,
        categories: Mapping[Any, str | None] | None = None,
        boxes: bool = False,
    ) -> None:
        self.policy, self.columns, self.usual, self.boxes = policy, dict(columns), dict(usual or {}), boxes
        self.labels = LabelRule(labels, default_label)
        check_map("source.categories", categories, "{rifle: weapons}")
        # YAML reads 0 as a number, and a column of numbers holds numbers: both are compared as text
        self.categories = None if categories is None else {text(value): category for value, category in categories.items()}
        for value, category in (self.categories or {}).items():
            if category is None:
                continue
            if category not in policy.category_names and word_label(text(category)) == SAFE:
                raise InputError(
                    f"source.categories[{value!r}] is {category!r}, a label and no category; beside classes that are listed leave {value!r} out, "
                    f"which counts it as safe, else give source.labels={{{value}: safe}} in place of it"
                )
            policy.check_category(category, f"source.categories[{value!r}]")
        self._classes: dict[str, tuple[int, str]] = {}
        if self.columns.get("class") is not None:
            self._classes = self._named_classes(labels, default_label, categories)
            self.columns |= {"label": None, "category": None}

    def _named_classes(self, *others: Any) -> dict[str, tuple[int, str]]:
        """Label and category of each class that the policy names."""
        column = self.columns["class"]
        if any(other is not None for other in others):
            raise InputError(
                f"source.class_column={column} takes labels from the policy's classes; leave source.labels, default_label and categories null"
            )
        named = {name: (UNSAFE, one.name) for one in self.policy.categories for name in one.classes}
        if not named:
            raise InputError(
                f"source.class_column={column} takes labels from the policy's classes, and policy {self.policy.name!r} names none; "
                "give its categories classes and look_alikes as conf/policy/photos.yaml has them, or set source.categories"
            )
        bare = [one.name for one in self.policy.categories if one.classes and not one.look_alikes]
        if bare:
            log.warning(
                "policy %s names no look_alikes for %s: how often they are flagged will not be known", self.policy.name, ", ".join(bare)
            )
        return named | {name: (SAFE, one.name) for one in self.policy.categories for name in one.look_alikes}

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, in plain JSON types."""
        return {
            "columns": self.columns,
            "labels": self.labels.labels,
            "default_label": self.labels.default,
            "categories": self.categories,
        }

    def find(self, names: Sequence[str], where: str, *, needed: Sequence[str] = ()) -> dict[str, str]:
        """The columns that a table has, by role.

        Args:
            names: of its columns.
            where: names the table in errors.
            needed: roles that it must have.
        Raises:
            InputError: a column is missing that is needed, or that somebody asked for by name.
        """
        found: dict[str, str] = {}
        for role, column in self.columns.items():
            if column is not None and column in names:
                found[role] = column
            elif role in needed or column not in (None, self.usual.get(role)):
                raise InputError(f"{where} has no column {column!r}; it has {', '.join(names) or 'none'}; set source.{role}_column")
        boxed = [name for name in BOX if name in names] if self.boxes else []
        if boxed and len(boxed) < len(BOX):
            raise InputError(f"{where} has only {', '.join(boxed)} of the box columns {', '.join(BOX)}; give all four or none")
        return found | {name: name for name in boxed}

    def read(self, cells: Mapping[str, Any], where: str) -> Row | str:
        """What a row says, or why it cannot be used.

        Args:
            cells: by role, those that the table has; box cells by their own names.
            where: names the row in errors.
        Raises:
            InputError: a label or an unsafe image's category that nothing explains.
        """
        region = _region(cells)
        if isinstance(region, str):
            return region
        left_out = ""
        if "class" in cells:
            value = text(cells["class"])
            label, category = self._classes.get(value, (SAFE, None)) if value else (UNLABELLED, None)
        elif "label" in cells:
            label, category = self.labels.read(cells["label"], where), self._category(cells)
            left_out = self.why_left_out(cells.get("category")) if label == UNSAFE else self.labels.why_left_out(cells["label"])
        elif self.categories is not None and "category" in cells:
            value = text(cells["category"])
            label, category = self.class_of(value, f"{where} has the class") if value else (UNLABELLED, None)
            left_out = self.why_left_out(value)
        else:
            label, category = UNLABELLED, None
        if left_out:
            label, category = UNLABELLED, None
        if label == UNSAFE and category is not None:
            self.policy.check_category(category, f"{where} (source.categories may translate it)")
        elif category not in self.policy.category_names:
            category = None  # a safe image may look like something that this policy does not speak of
        listed, source = text(cells.get("group")), text(cells.get("source"))
        return Row(label, category, region, text(cells.get("caption")), listed or None, source or None, left_out)

    def check_classes(self, found: Set[str], where: str) -> None:
        """Warns of classes that the policy names and a data set lacks.

        Args:
            found: names of all classes of the data set; nothing is checked where the rule knows no classes.
            where: names the data set.
        Raises:
            InputError: it lacks all of them, or one that it seems to call by another name, whose images would count as safe.
        """
        lacking = [name for name in self._classes if name not in found]
        for name in lacking:
            close = difflib.get_close_matches(name, sorted(found - self._classes.keys()), n=1, cutoff=_TYPO)
            if close:
                raise InputError(
                    f"policy {self.policy.name!r} names the class {name!r}, which {where} lacks; it has {close[0]!r}: use the same name for both"
                )
        if lacking and len(lacking) == len(self._classes):
            raise InputError(
                f"column {self.columns['class']!r} of {where} holds none of the classes of policy {self.policy.name!r}, but "
                f"{', '.join(repr(name) for name in sorted(found)[:3])} and the like; set source.class_column or choose another policy="
            )
        if lacking:
            more = f" and {len(lacking) - _SHOWN} more classes" if len(lacking) > _SHOWN else ""
            log.warning("%s has no image of %s%s, which policy %s names", where, ", ".join(lacking[:_SHOWN]), more, self.policy.name)

    def _category(self, cells: Mapping[str, Any]) -> str | None:
        value = text(cells.get("category"))
        if self.categories is not None and value in self.categories:
            return self.categories[value]
        return self.policy.own_name(value) or None

    def class_of(self, name: str, where: str) -> tuple[int, str | None]:
        """Label and category of a class that is known by its name alone.

        Raises:
            InputError: `source.categories` counts it as safe by leaving it out, and its name denies that; `where` says what has it.
        """
        assert self.categories is not None
        if name in self.categories:
            category = self.categories[name]
            return (UNLABELLED if category is None else UNSAFE), category
        if self.denies(name):
            raise InputError(
                f"{where} {name!r}, which source.categories does not list; what it leaves out counts as safe, "
                f"which the name denies: list it as {{{name}: CATEGORY}} or rename it"
            )
        return SAFE, None

    def denies(self, name: str) -> bool:
        """Whether `source.categories` counts a class as safe by leaving it out, and its name says that it is unsafe."""
        listed = self.categories is None or name in self.categories
        return not listed and (
            (word_label(name) == UNSAFE and not name.isdigit()) or self.policy.own_name(name) in self.policy.category_names
        )

    def why_left_out(self, category: Any) -> str:
        """Why an unsafe image of this category is not used, where `source.categories` says so; "" else."""
        value = text(category)
        is_left_out = self.categories is not None and value in self.categories and self.categories[value] is None
        return f"category {shortened(value)!r} is left out (null in source.categories)" if is_left_out else ""


def _region(cells: Mapping[str, Any]) -> Region | str | None:
    """The box, None without one, or what is wrong with it."""
    values = [text(cells.get(name)) for name in BOX]
    if not any(values):
        return None
    try:
        x_min, y_min, x_max, y_max = (float(value) for value in values)
    except ValueError:
        return f"box must have four numbers, got {str(values)[:100]}"
    if not all(math.isfinite(value) for value in (x_min, y_min, x_max, y_max)) or not (0 <= x_min < x_max <= 1 and 0 <= y_min < y_max <= 1):
        return f"box must satisfy 0 <= min < max <= 1, got {', '.join(values)}"
    return x_min, y_min, x_max, y_max
