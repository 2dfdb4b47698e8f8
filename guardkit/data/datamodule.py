"""The data module: it chooses the labelled images of an arm and asks for their counterfactuals on the fly.

Edits and embeddings are made by one background thread, in chunks and in the order in which the first epoch needs
them, ahead of the optimizer; training waits only for a chunk that is not there yet. The thread lives from `setup` to
`teardown`; what it has not made by then is made when it is asked for. Which images, variants and batches an epoch sees
follows from the seed alone, never from who was faster, so a run is repeatable bit for bit whether the stores were cold
or warm.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from guardkit.checks import MAX_SEED, check_choice, check_flag, check_number, check_same, check_whole, completed, is_list
from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.data.arms import NEGATIVES, OF_THE_UNSAFE, POSITIVES, TRANSFORMS, Batch, Choice, Orders, make_batch
from guardkit.data.budget import check_edits, check_transplants, chosen_in_budget, edited
from guardkit.data.columns import LARGE, RecordTable, are_many, check_listable, is_of_large_folder, labels_of, picked, usable, with_images
from guardkit.data.controls import Control, make_controls
from guardkit.data.duplicates import perceptual_hash
from guardkit.data.grouping import load_source, why_rejected
from guardkit.data.look_alikes import LOOK_ALIKES, LookAlikes, by_texts
from guardkit.data.sources.base import Loaded, Source
from guardkit.data.splits import split_test, why_few
from guardkit.data.views import EDITED, BlockOrder, Later, Pool, StoredPool, ViewMaker
from guardkit.embeddings import EmbeddingStore
from guardkit.policy import Policy
from guardkit.schema import SAFE, UNSAFE, Content, InputError, Record

log = logging.getLogger(__name__)

MAX_CONTROLS = 256
_MOST_AHEAD, _BYTES_AHEAD = 8, 1 << 26  # batches of stored embeddings that are ready before their turn
ORIGINALS = ("unsafe", "natural", "look_alike")  # kinds of images that are there as they are, unless a transform changes them


class GuardDataModule(L.LightningDataModule):
    """Labelled embeddings of one arm, with counterfactuals made while training runs.

    Args:
        source: where labelled images come from.
        policy: names the categories.
        store: embeds images, each once.
        pipeline: makes counterfactuals and null edits.
        n_unsafe: labelled unsafe images, validation included: the label budget; or "all" there are.
        negatives: what the unsafe images are told from, see `guardkit.data.arms.Arm`.
        positives: what stands beside the unsafe images, see there.
        safe_per_unsafe: natural safe images for each unsafe one, or "all".
        look_alikes: which safe images are: "marked" ones, with a category, or found by the policy's "texts", see
            `guardkit.data.look_alikes`.
        transform: what every image passes through first: "none", "null_edit" (the editor, with an irrelevant change)
            or "classic" (crops, flips, colour changes).
        variants_per_image: counterfactuals, other edits, or classic views, of each image.
        batch_size: unsafe images in a batch.
        all_views: every view in every epoch, rather than one after the other.
        test_share: of a source that brings no test set of its own, in (0, 1).
        split_seed: of that test set.
        seed: of the choice of images and of the order of batches.
    Raises:
        InputError: an argument out of range, or a source without images of a class.
    """

    def __init__(
        self,
        source: Source,
        policy: Policy,
        store: EmbeddingStore,
        pipeline: CounterfactualPipeline,
        *,
        n_unsafe: int | Literal["all"] = 64,
        negatives: Sequence[str] = ("natural",),
        positives: Sequence[str] = (),
        safe_per_unsafe: int | Literal["all"] = 1,
        look_alikes: LookAlikes = "marked",
        transform: Literal["none", "null_edit", "classic"] = "none",
        variants_per_image: int = 1,
        batch_size: int = 64,
        all_views: bool = False,
        test_share: float = 0.3,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if n_unsafe != "all":
            check_whole("data.n_unsafe", n_unsafe, 2)
        for name, value, least in (
            ("variants_per_image", variants_per_image, 1),
            ("batch_size", batch_size, 1),
            ("split_seed", split_seed, 0),
        ):
            check_whole(f"data.{name}", value, least)
        check_whole("seed", seed, 0, MAX_SEED)
        if not is_list(negatives) or not negatives or not all(one in NEGATIVES for one in negatives):
            raise InputError(f"data.negatives must be a list of some of {', '.join(NEGATIVES)}, got {negatives!r}")
        if not is_list(positives) or not all(one in POSITIVES for one in positives):
            raise InputError(f"data.positives must be a list of some of {', '.join(POSITIVES)}, or empty, got {positives!r}")
        if safe_per_unsafe != "all":
            check_whole("data.safe_per_unsafe (a number, or all)", safe_per_unsafe, 1)
        check_choice("data.look_alikes", look_alikes, LOOK_ALIKES)
        check_choice("data.transform", transform, TRANSFORMS)
        check_flag("data.all_views", all_views)
        check_number("data.test_share", test_share, "(0, 1)")
        self.source, self.policy, self.store, self.pipeline = source, policy, store, pipeline
        self.n_unsafe, self.negatives, self.transform = n_unsafe, tuple(negatives), transform
        self.positives, self.safe_per_unsafe, self.look_alikes = tuple(positives), safe_per_unsafe, look_alikes
        self.batch_size, self.test_share, self.split_seed, self.seed = batch_size, test_share, split_seed, seed
        self.variants_per_image, self.all_views = variants_per_image, all_views
        self.edits = EditCounts()  # of this arm
        self.views = ViewMaker(store, pipeline, transform=transform, variants_per_image=variants_per_image, counts=self.edits)
        self.other_edits = EditCounts()  # of the controls and of test pairs
        self.notes: list[str] = []  # what the source could not give this arm
        self._candidates: Sequence[Record] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._stage: str | None = None  # that started it
        self._tests = Later(self.make_test_set)
        self._controls = Later(lambda: make_controls(self.views, self.choice.train["unsafe"][:MAX_CONTROLS], self.other_edits))

    # --- choosing -----------------------------------------------------------------------------------------------------

    @cached_property
    def choice(self) -> Choice:
        """The images of this arm.

        Raises:
            InputError: the source cannot serve it.
        """
        where = f"source={self.source.name}"
        kinds = ("unsafe", *self.positives, *self.negatives)
        orders = self.orders(self.seed, kinds)
        choice, self.notes = chosen_in_budget(orders, self.n_unsafe, kinds, self.safe_per_unsafe, where, why_rejected(self.loaded))
        n_batches = -(-len(choice.train["unsafe"]) // self.batch_size)
        for kind, records in choice.train.items():
            if is_of_large_folder(records) and are_many(len(records) // max(1, n_batches)):
                raise InputError(
                    f"{where} would put {len(records)} {kind} images into {n_batches} batches, allowed are {LARGE} in one; give a number as "
                    "data.safe_per_unsafe, more unsafe images, or a smaller data.batch_size"
                )
        self.notes += check_transplants(self.pipeline, choice, where)
        self.notes += check_edits(self.pipeline, edited(choice, self.transform), where)
        self.notes += self._notes
        for note in self.notes:
            log.warning("%s", note)
        return choice

    def orders(self, seed: int, kinds: Sequence[str]) -> Orders:
        """The order in which a seed takes images, look-alikes included where an arm has that kind."""
        found = self._look_alikes if self.look_alikes == "texts" and "look_alike" in kinds else None
        return Orders.of(self.load(), seed, found)

    @cached_property
    def _look_alikes(self) -> Sequence[Record]:
        pool = self.load()
        check_listable(pool, "data.look_alikes=texts", "mark look-alikes by a category instead")
        return by_texts([record for record in pool if record.label == SAFE], self.policy, self.store)

    def load(self) -> Sequence[Record]:
        """Loads the source, once, sets the test images aside and returns the pool to train on."""
        if self._candidates is None:
            self.loaded: Loaded = load_source(self.source)
            self._check_embeddings(self.loaded)
            if self.loaded.test is None:
                self._candidates, test = split_test(self.loaded.train, self.test_share, self.split_seed)
            else:
                self._candidates, test = self.loaded.train, self.loaded.test
            self._notes = list(self.loaded.notes)
            if self.loaded.test is None:
                self._notes += why_few(len(test), len(self.loaded.train), self.test_share)
            test, bad = usable(test)
            if bad:
                self._notes.append(f"{len(bad)} test images were left out, the first is {bad[0].id[:100]}: {bad[0].reason}")
            self.test: Sequence[Record] = test
            self.pipeline.supply(self._candidates)
        return self._candidates

    def _check_embeddings(self, loaded: Loaded) -> None:
        brought = next((record.embedding for record in loaded.train if record.embedding is not None), None)
        if brought is None:
            return
        encoder, made_by = self.store.encoder, loaded.encoder_fingerprint
        if len(brought) != encoder.dim or (made_by is not None and made_by != encoder.fingerprint):
            raise InputError(
                f"source={self.source.name} holds {len(brought)}-d embeddings of encoder {(made_by or 'unknown')[:12]}, the run has encoder {encoder.name} "
                f"({encoder.dim}-d, {encoder.fingerprint[:12]}); choose the encoder= that made them"
            )

    @cached_property
    def _pools(self) -> tuple[dict[str, Pool | StoredPool], dict[str, Pool | StoredPool]]:
        """Of training and of validation, by kind."""

        def pools(images: dict[str, Sequence[Record]], chunk: int | None) -> dict[str, Pool | StoredPool]:
            found: dict[str, Pool | StoredPool] = {}
            for kind, records in images.items():
                if is_of_large_folder(records) and kind in ORIGINALS and self.transform == "none":
                    found[kind] = StoredPool(records, self.policy.category_names)
                    continue
                found[kind] = pool = self.views.pool(kind, self.policy.category_names)
                pool.add(records, partial(self.views.make, kind), chunk or len(records), self._order(kind, len(records), 1))
            return found

        return pools(self.choice.train, self.batch_size), pools(self.choice.validation, None)

    def _order(self, kind: str, n: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, _stream(kind), epoch]).permutation(n)

    def _turns(self, kind: str, pool: Pool | StoredPool, epoch: int) -> np.ndarray | BlockOrder:
        """In which order an epoch takes the records of a pool."""
        if isinstance(pool, StoredPool) and not pool.is_held:
            return pool.shuffled([self.seed, 16, epoch], [self.seed, _stream(kind), epoch])
        return self._order(kind, len(pool.records), epoch)

    # --- what runs in the background ---------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Chooses the images and starts the background work; while that goes on, a second call does nothing.

        Args:
            stage: Lightning's: "fit" starts with what training and validation need; others need nothing ahead. None, which is
                nobody's but the caller's: all that a training report needs, until `close`.
        Raises:
            InputError: the source cannot serve this arm.
        """
        # loading weights draws random numbers: at a time of its own in a thread, it would change those of a head's dropout
        with torch.random.fork_rng(devices=[]):
            _ = self.store.encoder.dim, self.pipeline.editor.config, self.pipeline.verifier.config
            getattr(self.pipeline.verifier, "prepare", lambda: None)()
        train, validation = self._pools
        if self._executor is not None or stage not in ("fit", None):
            return
        self._executor, self._stage = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guardkit-data"), stage
        # first what the first batch needs of each pool, then the second
        in_turn = zip_longest(*(pool.chunks for pool in train.values()))
        chunks = [chunk for turn in in_turn for chunk in turn if chunk is not None]
        for later in [*chunks, *(chunk for pool in validation.values() for chunk in pool.chunks)]:
            later.start(self._executor)
        if stage is None:
            self._controls.start(self._executor)
            self._tests.start(self._executor)

    def teardown(self, stage: str | None = None) -> None:
        """Ends the background work that `setup` began for this stage, once what is under way is done."""
        if self._executor is not None and self._stage == stage:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def close(self) -> None:
        """Ends all background work: what is queued is dropped, what is under way stops after its present batch."""
        if self._executor is not None:
            with self.store.stopping():
                self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def on_exception(self, exception: BaseException) -> None:  # noqa: ARG002
        """Lightning's: a training has failed, or was interrupted."""
        self.close()

    def make_test_set(self) -> TestSet:
        """Embeds the test images and makes the test pairs."""
        started = time.perf_counter()
        pairs = self.loaded.test_pairs
        if pairs is not None:
            # a counterfactual stands beside its original as a record of its own
            position = {record.id: i for i, record in enumerate(self.test)}
            rows = np.array([position[unsafe.id] for unsafe, _ in pairs], int)
            counterfactuals = self.views.embed([counterfactual for _, counterfactual in pairs])
            made_by = f"{self.source.name}: exact"
        else:
            unsafe_rows = np.flatnonzero(labels_of(self.test) == UNSAFE)
            views = self.views.edited(picked(self.test, unsafe_rows), 1, "counterfactual", self.other_edits)
            there = views.there[:, 0]
            rows, counterfactuals = unsafe_rows[there], views.vectors[there, 0]
            made_by = f"editor={self.pipeline.editor.name}"
        vectors = self.views.embed(self.test)
        # of stored embeddings the vectors stand beside the records
        records = list(self.test.without_vectors()) if isinstance(self.test, RecordTable) else self.test
        return TestSet(records, vectors, rows, counterfactuals, made_by, time.perf_counter() - started)

    def counterfactual_of(self, record: Record) -> Content | None:
        """The counterfactual that test pairs hold for an unsafe test record, or None."""
        if self.loaded.test_pairs is not None:
            return next((safe.content for unsafe, safe in self.loaded.test_pairs if unsafe.id == record.id), None)
        (one,) = self.pipeline.make([record], [0])
        return one if one is not None and one.accepted else None

    # --- giving out ----------------------------------------------------------------------------------------------------

    def test_set(self) -> TestSet:
        """The test images and pairs, embedded."""
        return self._tests.get()

    def controls(self) -> dict[str, Control]:
        """Unsafe training images, untouched and after each step that should not matter; see guardkit.data.controls."""
        return self._controls.get()

    def used_images(self) -> list[tuple[str, Record]]:
        """("train" or "validation", image) of all that this arm was given, and of its counterfactuals, but for those of drawn scenes and of
        `used_tables`."""
        parts = {"train": self.choice.train, "validation": self.choice.validation}
        used = [
            (split, record)
            for split, images in parts.items()
            for kind, records in images.items()
            if (kind == "unsafe" or kind not in OF_THE_UNSAFE)  # each image once
            if not is_of_large_folder(records)
            for record in records
        ]
        if set(EDITED) & set(self.negatives):
            used += [(split, safe) for split, record in used for safe in self._used_counterfactuals(record)]
        return used

    def used_tables(self) -> list[tuple[str, RecordTable]]:
        """("train" or "validation", images) of what this arm was given of a folder with too many to be listed one by one."""
        parts = {"train": self.choice.train, "validation": self.choice.validation}
        return [
            # in the order in which they are read fastest
            (split, RecordTable(records.columns, np.sort(records.rows)))
            for split, images in parts.items()
            for kind, records in images.items()
            if is_of_large_folder(records) and (kind == "unsafe" or kind not in OF_THE_UNSAFE)
        ]

    def lent_images(self) -> list[Record]:
        """Safe images of the pool whose parts show, or may show, in what this arm was given: what the editor pastes from, and what
        transplants are made of."""
        shown = {id(content) for content in self.views.lent({*self.positives, *self.negatives}, self.choice.of("unsafe"))}
        used = {id(record.content) for _, record in self.used_images()} if shown else set[int]()
        return [record for record in with_images(self.load()) if id(record.content) in shown - used] if shown else []

    def _used_counterfactuals(self, record: Record) -> list[Record]:
        """What the source brought along, or else the editor made, each with the hash by which it is known when it is saved anew."""
        pairs: Iterable[tuple[Content, int | None]]
        if record.counterfactuals:
            pairs = zip_longest(record.counterfactuals, record.counterfactual_hashes)
        elif record.label == UNSAFE and record.perceptual_hash is not None:
            seeds = list(range(self.variants_per_image))
            tries = self.pipeline.make([record] * len(seeds), seeds, "counterfactual", EditCounts())
            pairs = [(one, perceptual_hash(one.load())) for one in tries if one is not None and one.accepted]
        else:
            return []
        return [
            replace(record, content=content, counterfactuals=(), perceptual_hash=seen, counterfactual_hashes=()) for content, seen in pairs
        ]

    def labelled(self) -> tuple[np.ndarray, np.ndarray]:
        """All embeddings that training saw, (n, d), and their labels, (n,): the first view of each."""
        batch = _whole(self._pools[0])
        return batch["embeddings"].numpy(), batch["labels"].numpy().astype(int)

    def train_dataloader(self) -> Batches:
        """The batches of the trainer's present epoch, anew on every pass."""
        return Batches(self.n_batches, lambda: self.batches(1 + (self.trainer.current_epoch if self.trainer else 0)))

    def val_dataloader(self) -> Batches:
        """One batch with all validation images."""
        return Batches(1, lambda: [self.validation_batch()])

    def test_dataloader(self) -> Batches:
        """One batch with all test images; their pairs are in `test_set`."""
        return Batches(1, lambda: [{"embeddings": torch.from_numpy(self.test_set().embeddings)}])

    def validation_batch(self) -> Batch:
        """All validation images and their negatives, first view of each."""
        return _whole(self._pools[1])

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.choice.train["unsafe"]) // self.batch_size)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 1: the same for the same seed and epoch.

        Of up to `columns.LARGE` images of a kind the order is a permutation of all; of more, which must be stored embeddings, see
        `BlockOrder`, and while one batch is trained on the next is read.
        """
        made = self._batches(epoch)
        return _ahead(made) if any(isinstance(pool, StoredPool) and not pool.is_held for pool in self._pools[0].values()) else made

    def _batches(self, epoch: int) -> Iterator[Batch]:
        pools = self._pools[0]
        orders = {kind: self._turns(kind, pool, epoch) for kind, pool in pools.items()}
        n = len(orders["unsafe"])
        for start in range(0, n, self.batch_size):
            places = np.arange(start, min(start + self.batch_size, n))
            rows = {}
            for kind, order in orders.items():
                # a smaller pool goes round, so that every batch has negatives; a batch that is the whole epoch has all
                whole = len(places) == n and kind not in OF_THE_UNSAFE
                if whole or not len(order):
                    rows[kind] = order[:]
                elif len(order) > n:  # a larger one is divided among the batches
                    rows[kind] = order[places[0] * len(order) // n : (places[-1] + 1) * len(order) // n]
                else:
                    rows[kind] = order[places % len(order)]
            yield make_batch(pools, rows, None if self.all_views else epoch)
        for pool in pools.values():
            if isinstance(pool, StoredPool):
                pool.end()

    @property
    def n_counterfactuals(self) -> int:
        """Accepted counterfactuals among training and validation images."""
        return self._n_views(EDITED)

    @property
    def n_transplants(self) -> int:
        """Unsafe halves of transplants among training and validation images; as many safe halves stand beside them."""
        return self._n_views(("transplant",))

    def _n_views(self, kinds: Collection[str]) -> int:
        return sum(int(pool.there().sum()) for pools in self._pools for kind, pool in pools.items() if kind in kinds)

    def unusable(self) -> list[str]:
        """What of stored embeddings, that were not looked at before, came up in training and could not be used; in sentences."""
        rows = {row for pools in self._pools for pool in pools.values() if isinstance(pool, StoredPool) for row in pool.unusable}
        if not rows:
            return []
        first = next(pool for pool in self._pools[0].values() if isinstance(pool, StoredPool)).records.columns.names(np.array([min(rows)]))[
            0
        ]
        return [f"{len(rows)} chosen images were left out, the first is {first[:100]}: their vectors are zero or not finite"]

    def check_both_sides(self) -> None:
        """Raises InputError when not a single unsafe image, or not a single negative, came through, with the reasons."""
        there = {kind: int(pool.there().sum()) for kind, pool in self._pools[0].items()}
        for label, n in (("unsafe", there["unsafe"]), ("safe", sum(there[kind] for kind in self.negatives))):
            if not n:
                reasons = "; ".join(f"{count} x {reason}" for reason, count in self.edits.rejected.items())
                raise InputError(
                    f"no {label} image to train with: {sum(self.edits.rejected.values())} of {self.edits.requested} edits were rejected ({reasons}); "
                    "choose another editor or verifier, or experiment=unpaired, which edits none"
                )

    # --- going on from a checkpoint -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, for a checkpoint: what the batches depend on."""
        settings = {
            name: getattr(self, name)
            for name in (
                "n_unsafe",
                "negatives",
                "positives",
                "safe_per_unsafe",
                "look_alikes",
                "transform",
                "batch_size",
                "all_views",
                "test_share",
                "split_seed",
            )
        }
        return {
            "data": settings | {"variants_per_image": self.variants_per_image},
            "seed": self.seed,
            "source": self.source.asked,
            "encoder": self.store.encoder.fingerprint,
            "policy": self.policy.digest,
            "editor": self.pipeline.editor.config,
            "verifier": self.pipeline.verifier.config,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's: refuses a checkpoint that was made with other images."""
        now = self.state_dict()
        earlier = {**state_dict, "data": completed(state_dict["data"], now["data"], GuardDataModule)}
        check_same("the checkpoint", earlier, now)


@dataclass(frozen=True)
class TestSet:
    """What a guard is tested on.

    Attributes:
        records: natural test images.
        embeddings: (n, d) of them.
        pair_rows: (p,) which of them are the unsafe members of test pairs.
        counterfactuals: (p, d) embeddings of their counterfactuals.
        pairs_made_by: who made the counterfactuals.
        seconds: it took to draw or read, edit and embed them.
    """

    __test__ = False  # pytest collects classes by their name

    records: Sequence[Record]
    embeddings: np.ndarray
    pair_rows: np.ndarray
    counterfactuals: np.ndarray
    pairs_made_by: str
    seconds: float


class Batches:
    """What Lightning needs of a data loader: a length, and a new pass on every iteration.

    A pass begins with its first batch: Lightning also makes iterators to see whether it can, long before the images are
    there, and that of a resumed run before it knows the epoch.
    """

    def __init__(self, n_batches: int, batches: Callable[[], Iterable[Batch]]) -> None:
        self._n_batches, self._batches = n_batches, batches

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches()


def _stream(kind: str) -> int:
    """Of random numbers: kinds that stand side by side have the same."""
    return 13 if kind in OF_THE_UNSAFE else 14


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, made while those before them are used: at least one, and several while they are small."""
    with ThreadPoolExecutor(1, thread_name_prefix="guardkit-batches") as worker:
        waiting = deque([worker.submit(next, batches, None)])
        try:
            while (batch := waiting.popleft().result()) is not None:
                n_ahead = max(1, min(_MOST_AHEAD, _BYTES_AHEAD // max(1, batch["embeddings"].nbytes)))
                while len(waiting) < n_ahead:
                    waiting.append(worker.submit(next, batches, None))
                yield batch
        finally:
            for one in waiting:
                one.cancel()


def _whole(pools: dict[str, Pool | StoredPool]) -> Batch:
    """All images in one batch, the first view of each."""
    return make_batch(pools, {kind: np.arange(len(pool.records)) for kind, pool in pools.items()}, 0)
