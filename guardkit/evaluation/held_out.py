"""Nothing is tested on what it was trained on: images that a guard has seen are left out, whoever else is measured.

A guard brings a list of its training and validation images along (`guardkit.seen`). What is in one guard's list is left
out for all, so that they are compared on the same images; with it goes its whole group, so its counterfactuals too.
Images that a guard saw without their labels stay, and are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from guardkit.embeddings import EmbeddingStore
from guardkit.evaluation.benchmark import Benchmark
from guardkit.evaluation.scoring import Contender, embed
from guardkit.progress import progress
from guardkit.schema import InputError, Record, takes_embeddings
from guardkit.seen import Known

_BLOCK = 512


@dataclass(frozen=True)
class Seen:
    """What one guard has seen of a benchmark.

    Attributes:
        n: images left out because of it.
        by: how they are known again -> how many; "group": by another image of their group, or the group's name.
        n_unlabelled: images that are tested on although it saw them, without their labels.
    """

    n: int
    by: dict[str, int]
    n_unlabelled: int


def leave_out_seen(
    benchmark: Benchmark, contenders: Sequence[Contender], stores: Mapping[str, EmbeddingStore]
) -> tuple[Benchmark, dict[str, Seen]]:
    """Leaves out what any of the guards was trained or validated on.

    Args:
        benchmark: all there is to test on.
        contenders: what is measured.
        stores: of their encoders, by fingerprint.
    Returns:
        The rest, and what each guard that has a list had seen.
    Raises:
        InputError: nothing is left.
    """
    images = [*benchmark.records, *benchmark.counterfactuals]
    found = {one.name: _find(images, benchmark, one, stores) for one in contenders if one.training_images is not None}
    groups = {name: {image.group for image, known in zip(images, mine, strict=True) if _is_labelled(known)} for name, mine in found.items()}
    every = set().union(*groups.values())
    seen = {}
    for name, mine in found.items():
        out = [known for record, known in zip(benchmark.records, mine, strict=False) if record.group in groups[name]]
        ways = Counter(known.by if known is not None and _is_labelled(known) else "group" for known in out)
        stays = [known for record, known in zip(benchmark.records, mine, strict=False) if record.group not in every]
        seen[name] = Seen(len(out), dict(ways.most_common()), sum(known is not None for known in stays))
    left = benchmark.without(every)
    if not left.records:
        who = ", ".join(f"{name} {one.n}" for name, one in seen.items() if one.n)
        raise InputError(
            f"nothing is left to test on: all {benchmark.n_left_out + len(benchmark.records)} images of source={benchmark.name} ({benchmark.chosen}) "
            f"were used to train or validate a guard ({who}); choose images that it has not seen, or another guard"
        )
    return left, seen


def sentences(benchmark: Benchmark, seen: Mapping[str, Seen]) -> list[str]:
    """What a reader must know of it; nothing where no guard has seen anything."""
    said = []
    if benchmark.n_left_out:
        n_all = len(benchmark.records) + benchmark.n_left_out
        who = "; ".join(
            f"{name} {one.n} ({', '.join(f'{count} by {way}' for way, count in one.by.items())})" for name, one in seen.items() if one.n
        )
        why = "for all, because a guard was" if len(seen) > 1 else "because the guard was"
        said.append(f"{benchmark.n_left_out} of {n_all} images are left out {why} trained or validated on them: {who}.")
    said += [
        f"{name} saw {one.n_unlabelled} of the images without their labels; they are tested on."
        for name, one in seen.items()
        if one.n_unlabelled
    ]
    return said


def _find(images: Sequence[Record], benchmark: Benchmark, contender: Contender, stores: Mapping[str, EmbeddingStore]) -> list[Known | None]:
    guard = contender.guard
    assert contender.training_images is not None
    assert takes_embeddings(guard)
    store = stores[guard.encoder.fingerprint]
    is_comparable = benchmark.encoder_fingerprint in (None, store.encoder.fingerprint)
    # images are embedded only where the guard knows vectors alone; the scores will need them anyway
    wanted = [
        row
        for row, image in enumerate(images)
        if (image.content is None and is_comparable) or (image.content is not None and contender.training_images.has_vectors_only)
    ]
    vectors = np.zeros((len(images), store.encoder.dim), np.float32)
    blocks = [wanted[start : start + _BLOCK] for start in range(0, len(wanted), _BLOCK)]
    for rows in progress(blocks, total=len(blocks), what="looking for training images") if blocks else ():
        vectors[rows] = embed([images[row] for row in rows], store, {})
    return contender.training_images.find(images, vectors)


def _is_labelled(known: Known | None) -> bool:
    return known is not None and known.split != "unlabelled"
