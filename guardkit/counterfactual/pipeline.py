"""From an unsafe image to its verified counterfactual: instructor, editor, verifier, and the store under them.

Every try passes through the store, accepted or rejected, so nothing is made twice: not in a second epoch, not in a
second run, not by another arm. An edit's key names all that it depends on: image, instruction, region, editor, seed and
kind; a verdict's adds policy, category and verifier. What an instructor abstains from is no try and is asked again in the next run.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.checks import check_whole
from guardkit.counterfactual.instructor import Instruction, Instructor
from guardkit.counterfactual.store import Edit, Try, TryStore
from guardkit.counterfactual.verifier import Candidate, Verdict, Verifier, sanity
from guardkit.editors.base import NULL_INSTRUCTION, Editor, EditRequest, EditResult, Kind, Photograph, refusal, supply
from guardkit.engines.base import Put
from guardkit.images import decode_png, encode_png
from guardkit.policy import Policy
from guardkit.schema import SAFE, ImageError, Record, unreadable

_NO_IMAGE = "no image: the source holds embeddings only"
_Pixels = tuple[np.ndarray, np.ndarray]  # of an original and its edit, (h, w, 3) uint8 RGB


@dataclass
class EditCounts:
    """requested = accepted + sum of rejected; cache_hits of them were not made anew. It took `tries` edits."""

    requested: int = 0
    tries: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict:
        """The counts in the form of metrics.json."""
        return {
            "requested": self.requested,
            "tries": self.tries,
            "accepted": self.accepted,
            "rejected": dict(sorted(self.rejected.items())),
            "cache_hits": self.cache_hits,
        }


class CounterfactualPipeline:
    """Makes counterfactuals and null edits.

    Args:
        policy: what makes an image unsafe.
        instructor: writes the instruction.
        editor: makes the edit.
        verifier: decides whether it is kept.
        cache_dir: where tries are stored; None keeps them in memory.
        batch_size: how many edits the editor is asked for at once.
        max_tries: how often an edit is tried, each time with another seed, until one is accepted.
    """

    def __init__(
        self,
        policy: Policy,
        instructor: Instructor,
        editor: Editor,
        verifier: Verifier,
        *,
        cache_dir: Path | None,
        batch_size: int = 16,
        max_tries: int = 1,
    ) -> None:
        check_whole("edit_batch_size", batch_size, 1)
        self.policy, self.instructor, self.editor, self.verifier = policy, instructor, editor, verifier
        check_whole("edit_max_tries", max_tries, 1)
        self.batch_size, self.max_tries = batch_size, max_tries
        self.photographs: list[Photograph] = []
        self._lock = threading.Lock()
        self._store = TryStore(cache_dir)

    @property
    def n_damaged(self) -> int:
        """Stored edits and verdicts so far that did not pass their check, and were made anew."""
        return self._store.n_damaged

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def with_parts(self, put: Put) -> Self:
        """The same, working with other parts: see `guardkit.engines.base.Put`. What a verifier embeds with is a part as well."""
        new = copy.copy(self)
        inside = getattr(self.verifier, "with_parts", None)
        new.instructor, new.editor = put("instructor", self.instructor), put("editor", self.editor)
        new.verifier = put("verifier", self.verifier if inside is None else inside(put))
        return new

    def make(
        self,
        records: Sequence[Record],
        seeds: Sequence[int],
        kind: Kind = "counterfactual",
        counts: EditCounts | None = None,
    ) -> list[Try | None]:
        """One edit per record, in order: the accepted try, else the last one; None where there is nothing to edit.

        Args:
            records: what to edit.
            seeds: one per record; the same record and seed give the same edit.
            kind: of all requests; see `EditRequest`.
            counts: what happened is added here.
        """
        return [tries[-1] if tries else None for tries in self.make_all(records, seeds, kind, counts)]

    def make_all(
        self,
        records: Sequence[Record],
        seeds: Sequence[int],
        kind: Kind = "counterfactual",
        counts: EditCounts | None = None,
    ) -> list[list[Try]]:
        """Like `make`, with every try of each record; empty where the source holds no image."""
        counts = EditCounts() if counts is None else counts
        # one caller at a time: editors are not expected to be thread-safe, and two callers must not make the same edit
        with self._lock, self._store:
            started = time.perf_counter()
            made: list[list[Try]] = [[] for _ in records]
            rows = [row for row, record in enumerate(records) if record.content is not None]
            batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

            def instruct(batch: list[int]) -> list[Instruction]:
                return self._instruct([records[row] for row in batch], [seeds[row] for row in batch], kind)

            with ThreadPoolExecutor(1, thread_name_prefix="guardkit-instructor") as ahead:
                # an instructor may wait for a distant model: it writes for the next batch while this one is edited
                waiting = ahead.submit(instruct, batches[0]) if batches else None
                for i, batch in enumerate(batches):
                    assert waiting is not None
                    instructions = waiting.result()
                    waiting = ahead.submit(instruct, batches[i + 1]) if i + 1 < len(batches) else None
                    chosen = [records[row] for row in batch]
                    tries = self._make_batch(chosen, [seeds[row] for row in batch], instructions, kind, counts)
                    for row, of_row in zip(batch, tries, strict=True):
                        made[row] = of_row
            for record in records:
                if record.content is None:
                    counts.requested += 1
                    counts.rejected[_NO_IMAGE] += 1
            counts.seconds += time.perf_counter() - started
            return made

    def supply(self, pool: Sequence[Record]) -> None:
        """Gives the editor the safe images of a training pool that it may paste from; `photographs` holds them.

        Args:
            pool: what may be trained on; nothing that is tested on.
        Raises:
            InputError: they are fewer than the editor asks for.
        """
        self.photographs = [
            Photograph(record.content, record.region, record.caption, is_look_alike=record.category is not None)
            for record in (() if getattr(pool, "holds_embeddings", False) else pool)
            if record.label == SAFE and record.content is not None and record.region is not None
        ]
        supply(self.editor, self.photographs)

    def refusals(self, records: Sequence[Record], kind: Kind = "counterfactual") -> Counter[str]:
        """Why records will not be edited, and how many, as far as it is known without their pixels."""
        found: Counter[str] = Counter()
        if getattr(records, "holds_embeddings", False) and records:
            return Counter({_NO_IMAGE: len(records)})
        for record in records:
            reason = None
            if record.content is None:
                reason = _NO_IMAGE
            elif not (record.counterfactuals and kind == "counterfactual"):
                reason = refusal(self.editor, EditRequest(record.content, "", record.region, 0, kind, record.label))
            if reason is not None:
                found[reason] += 1
        return found

    def _instruct(self, records: Sequence[Record], seeds: Sequence[int], kind: Kind) -> list[Instruction]:
        if kind != "counterfactual":
            return [Instruction(NULL_INSTRUCTION) for _ in records]
        return self.instructor.instruct(records, seeds, self.policy)

    def _make_batch(
        self, records: Sequence[Record], seeds: Sequence[int], instructions: list[Instruction], kind: Kind, counts: EditCounts
    ) -> list[list[Try]]:
        made: list[list[Try]] = [[] for _ in records]
        found: set[str] = set()
        open_rows = list(range(len(records)))
        for attempt in range(self.max_tries):
            again = [_seed_of(seeds[row], attempt) for row in open_rows]
            if attempt:
                instructions = self._instruct([records[row] for row in open_rows], again, kind)
            tries, stored = self._try([records[row] for row in open_rows], again, instructions, kind)
            found |= stored
            for row, one in zip(open_rows, tries, strict=True):
                made[row].append(one)
            open_rows = [row for row, one in zip(open_rows, tries, strict=True) if not one.accepted and not one.abstained]
            if not open_rows:
                break
        for tries in made:
            counts.requested += 1
            counts.tries += len(tries)
            counts.cache_hits += all(one.key in found for one in tries)
            if tries[-1].accepted:
                counts.accepted += 1
            else:
                counts.rejected[str(tries[-1].verdict.reason)] += 1
        return made

    def _try(
        self, records: Sequence[Record], seeds: Sequence[int], instructions: list[Instruction], kind: Kind
    ) -> tuple[list[Try], set[str]]:
        """One try per record, and the keys of those that came from the store."""
        keys: list[str] = []
        wanted: dict[str, tuple[Record, EditRequest]] = {}
        tries: dict[str, Try] = {}
        for record, seed, instruction in zip(records, seeds, instructions, strict=True):
            assert record.content is not None
            request = EditRequest(record.content, instruction.text, record.region, seed, kind, record.label, instruction.target)
            try:
                key = self._key(record, request)
            except ImageError as error:
                raise unreadable(record.content, error) from error
            keys.append(key)
            if instruction.reason is None:
                wanted[key] = (record, request)
            else:
                tries[key] = Try(key, seed, "", Verdict(f"instructor={self.instructor.name}: {instruction.reason}"), None, abstained=True)
        edits = self._store.edits(wanted)
        stored = set(edits)
        missing = {key: what for key, what in wanted.items() if key not in edits}
        pixels: dict[str, _Pixels] = {}
        if missing:
            made, pixels = self._edit(missing)
            self._store.put_edits(made)
            edits |= {one.key: one for one in made}
        verdicts = self._judge(wanted, edits, pixels)
        for key, (_, request) in wanted.items():
            tries[key] = Try(key, request.seed, request.instruction, verdicts[key], edits[key].png)
        return [tries[key] for key in keys], stored

    def _key(self, record: Record, request: EditRequest) -> str:
        return "edit:" + fingerprint(
            {
                "image": request.content.key,
                "twins": [twin.key for twin in record.counterfactuals] if request.kind == "counterfactual" else [],
                "region": record.region,
                "instruction": request.instruction,
                "target": request.target,
                "editor": self.editor.config,
                "seed": request.seed,
                "kind": request.kind,
                "label": record.label,
            }
        )

    def _edit(self, wanted: dict[str, tuple[Record, EditRequest]]) -> tuple[list[Edit], dict[str, _Pixels]]:
        """New edits, and the pixels of those that can be judged, which need not be read and decoded again."""
        edits: list[Edit] = []
        pixels: dict[str, _Pixels] = {}
        for key, result in self._results(wanted).items():
            image = result.image
            if image is None:
                edits.append(Edit(key, None, result.reason or "editor gave no reason"))
                continue
            original = wanted[key][1].content.load()
            reason = sanity(original, image)
            storable = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0
            edits.append(Edit(key, encode_png(image) if storable else None, reason))
            if reason is None:
                pixels[key] = original, np.ascontiguousarray(image)
        return edits, pixels

    def _judge(
        self, wanted: dict[str, tuple[Record, EditRequest]], edits: dict[str, Edit], pixels: Mapping[str, _Pixels]
    ) -> dict[str, Verdict]:
        """A verdict for each edit, found or new; `pixels` are those at hand."""
        verdicts = {key: Verdict(edits[key].reason) for key in wanted if edits[key].reason is not None}
        judge = {"policy": self.policy.digest, "verifier": self.verifier.config}
        names = {
            key: "verdict:" + fingerprint({"edit": key, "category": record.category, **judge})
            for key, (record, _) in wanted.items()
            if key not in verdicts
        }
        stored = self._store.verdicts(names.values())
        verdicts |= {key: stored[name] for key, name in names.items() if name in stored}
        candidates = []
        for key, (record, request) in wanted.items():
            png = edits[key].png
            if key not in verdicts and png is not None:
                original, edited = pixels[key] if key in pixels else (request.content.load(), decode_png(png))
                candidates.append(Candidate(key, record, request, original, edited))
        new = dict(zip((one.key for one in candidates), self.verifier.verify(candidates), strict=True)) if candidates else {}
        self._store.put_verdicts({names[key]: verdict for key, verdict in new.items()})
        return verdicts | new

    def _results(self, wanted: dict[str, tuple[Record, EditRequest]]) -> dict[str, EditResult]:
        """From the source where it brings counterfactuals of its own, else from the editor."""
        results: dict[str, EditResult] = {}
        for key, (record, request) in wanted.items():
            if record.counterfactuals and request.kind == "counterfactual":
                try:
                    results[key] = EditResult(record.counterfactuals[request.seed % len(record.counterfactuals)].load())
                except ImageError as error:
                    results[key] = EditResult(None, f"unreadable counterfactual: {error}")
        asked = [key for key in wanted if key not in results]
        made = self.editor.edit([wanted[key][1] for key in asked]) if asked else []
        if len(made) != len(asked):
            raise RuntimeError(f"editor {self.editor.name} returned {len(made)} results for {len(asked)} requests")
        return results | dict(zip(asked, made, strict=True))


def _seed_of(seed: int, attempt: int) -> int:
    """The seed of a further attempt, far from those of other variants; the first attempt has the seed itself."""
    return seed + 1_000_003 * attempt
