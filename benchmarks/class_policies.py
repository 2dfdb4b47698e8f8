"""Many policies made of classes, so that what is said of photographs has an interval over policies and not only over seeds.

    python benchmarks/class_policies.py classes=../shared/data/tiny_imagenet/classes.csv

In each, three or four classes that share a hypernym of WordNet are forbidden, and their nearest other classes are look-alikes.
No class is forbidden by two policies, so that they are as good as independent. `class_policies.json` beside this file holds them,
divided once into those to tune on and those to test on; the command makes the same file again.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from guardkit.artifacts import written
from guardkit.data.sources.parquet import ParquetSource
from guardkit.policy import Policy

FILE = Path(__file__).with_suffix(".json")
SEED = 14
N_TEST = 24
LOOK_ALIKES = 6
_ORDINARY = 8
_MOST = 18  # classes under a hypernym: one with more says little about them


@dataclass(frozen=True)
class ClassPolicy:
    """A policy as the names of classes.

    Attributes:
        split: "tune" or "test".
        hypernym: the nearest that all forbidden classes share.
        classes: three or four, forbidden.
        look_alikes: the nearest other classes, nearest first.
        ordinary: some that are far from the forbidden ones.
    """

    split: str
    hypernym: str
    classes: tuple[str, ...]
    look_alikes: tuple[str, ...]
    ordinary: tuple[str, ...]

    @property
    def policy(self) -> Policy:
        """With one category. Harmless: what it forbids are everyday things."""
        name = re.sub(r"[^a-z0-9]+", "_", self.hypernym.lower()).strip("_")
        category = {
            "name": name,
            "definition": f"{self.hypernym.capitalize()}: {', '.join(self.classes)}.",
            "edit": f"Replace it with one of these: {', '.join(self.look_alikes)}, and change nothing else.",
            "unsafe_texts": [photo_of(one) for one in self.classes],
            "safe_texts": [photo_of(one) for one in self.look_alikes],
            "classes": list(self.classes),
            "look_alikes": list(self.look_alikes),
        }
        return Policy.from_dict(
            {
                "name": "_".join([name, *re.findall("[a-z]+", self.classes[0].lower())]),
                "description": f"Forbids {', '.join(self.classes)}.",
                "source": "benchmarks/class_policies.py",
                "harmless": True,
                "safe_texts": [photo_of(one) for one in self.ordinary],
                "categories": [category],
            }
        )


def photo_of(name: str) -> str:
    """Such as "a photo of an Egyptian cat"."""
    return f"a photo of {'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def policies(split: str) -> list[ClassPolicy]:
    """Those of the file to "tune" or to "test" on."""
    said = json.loads(FILE.read_text(encoding="utf-8"))
    found = [ClassPolicy(**{key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}) for one in said]
    return [one for one in found if one.split == split]


def source_of(policy: Policy, data: Path) -> ParquetSource:
    """The photographs of `train.parquet` and `val.parquet` in a folder, labelled under a policy."""
    return ParquetSource(
        policy,
        str(data / "train.parquet"),
        test=str(data / "val.parquet"),
        name="photos",
        class_column="name",
        caption_column="name",
        check_images=False,
    )


def read_chains(path: Path) -> dict[str, list[str]]:
    """The hypernyms of each class of a `classes.csv`, nearest first."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["hypernyms"].split("|") for row in csv.DictReader(file)}


def make_policies(chains: dict[str, list[str]], seed: int = SEED, n_test: int = N_TEST) -> list[ClassPolicy]:
    """As many policies as there are classes for; all but `n_test` of them are to tune on."""
    rng = np.random.default_rng(seed)
    names = sorted(chains)
    below: dict[str, list[str]] = {}
    for name in names:
        for hypernym in chains[name]:
            below.setdefault(hypernym, []).append(name)

    def apart(one: str, other: str) -> int:
        """How many classes the narrowest hypernym of both has."""
        return min((len(below[shared]) for shared in set(chains[one]) & set(chains[other])), default=len(names))

    left = set(names)
    made: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = []
    while True:
        open_ones = sorted(one for one, members in below.items() if len(members) <= _MOST and len(left.intersection(members)) >= 3)
        if not open_ones:
            break
        members = sorted(left.intersection(below[open_ones[rng.integers(len(open_ones))]]))
        first = members[rng.integers(len(members))]
        size = min(len(members), int(rng.integers(3, 5)))
        chosen = _nearest([first], members, apart, rng)[: size - 1]
        forbidden = tuple(sorted([first, *chosen]))
        others = _nearest(forbidden, [name for name in names if name not in forbidden], apart, rng)
        far = others[len(others) // 2 :]
        ordinary = tuple(sorted(far[i] for i in rng.choice(len(far), min(_ORDINARY, len(far)), replace=False)))
        shared = next(one for one in chains[forbidden[0]] if all(one in chains[name] for name in forbidden))
        made.append((shared, forbidden, tuple(others[:LOOK_ALIKES]), ordinary))
        left -= set(forbidden)
    tested = set(rng.permutation(len(made))[:n_test].tolist())
    return [ClassPolicy("test" if i in tested else "tune", *one) for i, one in enumerate(made)]


def _nearest(to: Sequence[str], names: Sequence[str], apart: Callable[[str, str], int], rng: np.random.Generator) -> list[str]:
    """By mean distance; in random order where it is equal."""
    shuffled = [names[i] for i in rng.permutation(len(names)) if names[i] not in to]
    return sorted(shuffled, key=lambda name: sum(apart(name, one) for one in to))


def main(arguments: Sequence[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    made = make_policies(read_chains(Path(given["classes"])))
    with written(FILE) as temporary:
        temporary.write_text("[\n" + ",\n".join(json.dumps(asdict(one)) for one in made) + "\n]\n", encoding="utf-8")
    print(f"{len(made)} policies, {sum(one.split == 'test' for one in made)} of them to test on: {FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
