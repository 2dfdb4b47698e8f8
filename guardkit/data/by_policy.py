"""One set of images under several policies: each image once, and what each policy says of it.

Either the labels say what an image shows (a category), and a policy forbids what it names and allows the rest; or each policy has labels of
its own: a column of a table, rows of an items file, or classes that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guardkit.data.grouping import DISTANCE, group, load_source
from guardkit.data.sources.base import Loaded, Source
from guardkit.data.splits import split_test
from guardkit.policy import Policy
from guardkit.schema import SAFE, UNSAFE, InputError, Record, Rejected

Verdict = tuple[int, str | None]
"""Label and category of one image under one policy."""


@dataclass
class ByPolicy:
    """Images, and their labels under each of several policies. It is a source: of the images, unsafe where any policy forbids them.

    Attributes:
        name, asked: as of a source.
        loaded: the images.
        verdicts: policy -> id of an image -> what the policy says of it. An image that is not there was not judged under the policy.
        notes: what a reader must know of the labels, in sentences.
        near_duplicate_distance: of the source.
    """

    name: str
    asked: dict[str, Any]
    loaded: Loaded
    verdicts: Mapping[str, Mapping[str, Verdict]]
    notes: tuple[str, ...] = ()
    near_duplicate_distance: int = DISTANCE

    def load(self) -> Loaded:
        """See `Source`."""
        return self.loaded

    def under(self, policy: str, test_share: float, split_seed: int) -> Source:
        """The images as one policy has them, with the test images that all policies share set aside; those it did not judge are left out.

        Args:
            policy: its name.
            test_share, split_seed: of a source that brings no test images of its own.
        """
        train, test = self.loaded.train, self.loaded.test
        if test is None:
            train, test = split_test(train, test_share, split_seed)
        said = self.verdicts[policy]
        train, test = ([judged(one, said) for one in records if one.id in said] for records in (train, test))
        pairs = self.loaded.test_pairs
        if pairs is not None:
            pairs = [(judged(one, said), twin) for one, twin in pairs if said.get(one.id, (SAFE, None))[0] == UNSAFE]
        loaded = replace(self.loaded, train=train, test=test, test_pairs=pairs, rejected=[], given=len(train) + len(test), set_aside=[])
        return _Under(self.name, self.asked, loaded, self.near_duplicate_distance)


@dataclass
class _Under:
    """See `ByPolicy.under`."""

    name: str
    asked: dict[str, Any]
    loaded: Loaded
    near_duplicate_distance: int

    def load(self) -> Loaded:
        return self.loaded


def judged(record: Record, said: Mapping[str, Verdict]) -> Record:
    """A record with the label and the category that a policy gives it, which must have judged it."""
    label, category = said[record.id]
    # a box is around what another policy forbids
    return replace(record, label=label, category=category, region=record.region if label == UNSAFE else None)


def check_policies(policies: Sequence[Policy]) -> None:
    """Raises InputError unless there are several policies, each with a name of its own."""
    names = [policy.name for policy in policies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two of the policies are called {twice!r}; give each policy a name of its own (the field name of its file)")
    if len(policies) < 2:
        raise InputError(f"policies must be a list of at least two, got {len(policies)}; for one policy give policy= or policy_file=")


def by_category(source: Source, policies: Sequence[Policy]) -> ByPolicy:
    """Labels by what the images show: a policy forbids the categories that it names, and allows all others.

    Args:
        source: read under all policies at once (`Policy.joined`).
        policies: several; each name once.
    Raises:
        InputError: the labels name no category that any of the policies has.
    """
    check_policies(policies)
    loaded = load_source(source)
    records = [*loaded.train, *(loaded.test or [])]
    named = {one.category for one in records if one.label == UNSAFE and one.category is not None}
    idle = [policy for policy in policies if not named & set(policy.category_names)]
    if len(idle) == len(policies):
        said = f"name {', '.join(sorted(named))}" if named else "name no category of unsafe images"
        raise InputError(
            f"the labels of source={source.name} {said}, and none of the policies {', '.join(one.name for one in policies)} has one of these; "
            "translate them (source.categories={NAME: CATEGORY}), or give each policy labels of its own (label_columns={POLICY: COLUMN})"
        )
    notes = [f"{one.name} forbids nothing that the labels name ({', '.join(sorted(named))})." for one in idle]
    unknown = sum(one.label == UNSAFE and one.category is None for one in records)
    if unknown:
        notes.append(f"{unknown} unsafe images have no category, so that no policy can be asked about them; they are left out.")

    def verdict(record: Record, policy: Policy) -> Verdict | None:
        if record.label == UNSAFE and record.category is None:
            return None
        if record.category in policy.category_names:
            return record.label, record.category
        return SAFE, None

    verdicts = {policy.name: {one.id: found for one in records if (found := verdict(one, policy)) is not None} for policy in policies}
    distance = getattr(source, "near_duplicate_distance", DISTANCE)
    return ByPolicy(source.name, source.asked, loaded, verdicts, tuple(notes), distance)


def _joined_groups(lists: Iterable[Sequence[Record]]) -> dict[str, str]:
    """A group for each id: the same for images that any of the lists has in one group, whose name follows from what else it holds."""
    leader: dict[tuple[str, ...], tuple[str, ...]] = {}

    def find(key: tuple[str, ...]) -> tuple[str, ...]:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    ids = {}
    for number, records in enumerate(lists):
        for one in records:
            ids[one.id] = ("id", one.id)
            leader[find(("group", str(number), one.group))] = find(ids[one.id])
    first: dict[tuple[str, ...], str] = {}
    return {name: first.setdefault(find(key), name) for name, key in ids.items()}


def by_own_labels(sources: Mapping[str, Source]) -> ByPolicy:
    """Labels of each policy by itself: the same images, read once for each.

    Args:
        sources: policy -> the images with its labels. An image that one of them lacks, or has no label for, was not judged under that
            policy. Images are the same where their ids are.
    Raises:
        InputError: the sources have no image in common.
    """
    loads = {name: load_source(source) for name, source in sources.items()}
    first = next(iter(sources.values()))
    verdicts: dict[str, dict[str, Verdict]] = {}
    train: dict[str, Record] = {}
    test: dict[str, Record] = {}
    groups = _joined_groups([*loaded.train, *(loaded.test or [])] for loaded in loads.values())
    rejected: dict[tuple[str, str], Rejected] = {}
    for name, loaded in loads.items():
        verdicts[name] = {one.id: (one.label, one.category) for one in [*loaded.train, *(loaded.test or [])]}
        for records, found in ((loaded.train, train), (loaded.test or [], test)):
            for one in records:
                # the strictest policy says into which part of a split it goes
                if one.id not in found or (one.label == UNSAFE and found[one.id].label == SAFE):
                    found[one.id] = replace(one, group=groups[one.id])
        rejected |= {(one.id, one.reason): one for one in loaded.rejected}
    if len(sources) > 1 and not set.intersection(*(set(one) for one in verdicts.values())):
        counts = ", ".join(f"{name} {len(one)}" for name, one in verdicts.items())
        raise InputError(
            f"no image of source={first.name} has a label under all policies (images by policy: {counts}); label the same images"
        )
    kept = [one for one in rejected.values() if one.id not in train and one.id not in test]
    tests = None if all(loaded.test is None for loaded in loads.values()) else list(test.values())
    pairs: dict[str, tuple[Record, Record]] = {}
    for loaded in loads.values():
        for pair in loaded.test_pairs or []:
            pairs.setdefault(pair[0].id, pair)
    merged = Loaded(
        train=[one for one in train.values() if one.id not in test],
        test=tests,
        rejected=kept,
        given=len(set(train) | set(test)) + len(kept),
        test_pairs=list(pairs.values()) if any(loaded.test_pairs is not None for loaded in loads.values()) else None,
        is_drawn=all(loaded.is_drawn for loaded in loads.values()),
        encoder_fingerprint=next(iter(loads.values())).encoder_fingerprint,
    )
    distance = getattr(first, "near_duplicate_distance", DISTANCE)
    # images that no policy judged together may be near-duplicates of each other
    merged = group(merged, check_images=False, near_duplicate_distance=distance)
    n = len(merged.train) + len(merged.test or [])
    notes = [
        f"{name} judges {len(said)} of the {n} images; the others are left out under it."
        for name, said in verdicts.items()
        if len(said) < n
    ]
    return ByPolicy(first.name, {name: source.asked for name, source in sources.items()}, merged, verdicts, tuple(notes), distance)
