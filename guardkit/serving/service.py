"""The work of the service, without HTTP: admits images, reads them in a few threads, has them encoded in batches, decides."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardkit.classifier import GuardClassifier
from guardkit.encoders.base import enough
from guardkit.explaining.explanation import Explanation
from guardkit.images import read_frames
from guardkit.moderation.frames import worst_frame
from guardkit.moderation.gate import Refused
from guardkit.schema import Decision, ImageError, InputError, TooLargeError
from guardkit.serving.batches import Batches
from guardkit.serving.figures import Figures
from guardkit.serving.guards import Given, Served, loaded, named
from guardkit.serving.limits import EXPLAINED_PIXELS, Limits
from guardkit.thresholds import check_scope, undecided

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """An encoded image of a request.

    Attributes:
        id: by which the answer names it.
        data: as it came.
    """

    id: str
    data: bytes


@dataclass(frozen=True)
class Verdict:
    """What one guard says of one image.

    Attributes:
        id: of the upload.
        guard: the name of the guard.
        decision: of its worst frame.
        frame: the number of that frame, from 0; None of a still image.
        is_too_large: whether there is no decision because a limit was reached.
    """

    id: str
    guard: str
    decision: Decision
    frame: int | None = None
    is_too_large: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: that of the decision, and what it is of."""
        return {"id": self.id, "guard": self.guard, **self.decision.to_dict(), "frame": self.frame}


_Vectors = Mapping[str, np.ndarray] | ImageError  # fingerprint of the encoder -> (n frames, d); or why there are none


class Service:
    """Decides over the images of many requests at once.

    Args:
        guard: a guard, its folder or Hub id, or a map of names to these. Guards on one encoder embed an image once.
        limits: see `Limits`.
        trust: packages that saved guards may take their heads and encoders from.

    Raises:
        InputError: as `GuardClassifier.from_pretrained`.
    """

    def __init__(self, guard: Given | Mapping[str, Given], *, limits: Limits | None = None, trust: Sequence[str] = ()) -> None:
        self.limits, self.figures, self.n_bytes = limits or Limits(), Figures(), 0
        self._given, self._trust = named(guard), tuple(trust)
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._n_images = 0
        self._served = loaded(self._given, trust=self._trust)
        self._batches: dict[str, Batches] = {}
        self._users: dict[Batches, int] = {}  # requests that are under way on it
        self._loaders: ThreadPoolExecutor | None = None

    # --- what is there ------------------------------------------------------------------------------------------------

    @property
    def guards(self) -> Mapping[str, Served]:
        """By name."""
        return self._served

    @property
    def gauges(self) -> dict[str, float]:
        """Present values, for `Figures.text`."""
        return {"guardkit_queue_images": self._n_images, "guardkit_queue_bytes": self.n_bytes}

    @property
    def is_full(self) -> bool:
        """Whether not one image more would be taken."""
        return self._n_images >= self.limits.max_queue

    @property
    def is_alive(self) -> bool:
        """Whether images will be encoded."""
        return all(one.is_alive for one in list(self._batches.values()))

    # --- deciding -----------------------------------------------------------------------------------------------------

    async def decide(self, uploads: Sequence[Upload], *, guards: Sequence[str] = (), scope: Sequence[str] | None = None) -> list[Verdict]:
        """A verdict of each guard on each image: those on the first image first.

        Args:
            uploads: at least one.
            guards: names; none: all that there are.
            scope: categories, see `GuardClassifier.predict`.
        Raises:
            Refused: no such guard or category (422), or a full queue (429).
        """
        with self._admitted(len(uploads), guards, scope) as (chosen, batches):
            found = await asyncio.gather(*(self._encoded(one, batches) for one in uploads))
        verdicts: list[list[Verdict]] = [[] for _ in uploads]
        for served in chosen:
            for at, one in enumerate(self._decided(served, uploads, found, scope)):
                verdicts[at].append(one)
                self.figures.add("guardkit_images_total", guard=served.name, action=one.decision.action)
        return [one for each in verdicts for one in each]

    async def explain(self, data: bytes, *, guard: str, category: str | None = None, frame: int | None = None) -> Explanation:
        """Where in an image a score comes from, see `GuardClassifier.explain`; no image is encoded meanwhile.

        Args:
            data: an encoded image.
            guard: its name.
            category: whose score; None: that of the decision.
            frame: of an animation, from 0; None: the first.
        Raises:
            Refused: no such guard, category or frame, an image that cannot be read (422), or a full queue (429).
        """
        with self._admitted(1, [guard], None if category is None else [category]) as ((served,), batches):
            _no_longer_read(batches)  # nothing of it will be queued to be encoded
            return await asyncio.to_thread(self._explained, served, batches[served.encoder], data, category, frame or 0)

    def _explained(self, served: Served, batches: Batches, data: bytes, category: str | None, frame: int) -> Explanation:
        seen = itertools.count()
        try:
            if len(data) > self.limits.max_bytes:
                raise TooLargeError(f"{len(data)} encoded bytes are more than {self.limits.max_bytes}")
            frames = read_frames(
                data,
                lambda image: image if next(seen) == frame else None,
                max_pixels=min(self.limits.max_pixels, EXPLAINED_PIXELS),
                max_frames=self.limits.max_frames,
            )
            if frame >= len(frames):
                raise ImageError(f"it has {len(frames)} frames, and none of number {frame}")
            with batches.at_work:
                return served.guard.explain(frames[frame], category, max_pixels=self.limits.max_pixels)
        except TooLargeError as error:
            why = (
                f"the image is too large for a heat map, which takes more memory than a decision ({error}); make it smaller and look again"
            )
            raise Refused(422, why) from error
        except (ImageError, InputError) as error:
            raise Refused(422, str(error)) from error

    @contextmanager
    def _admitted(self, n: int, guards: Sequence[str], scope: Sequence[str] | None) -> Iterator[tuple[list[Served], dict[str, Batches]]]:
        """The guards of a request, which stay the same until it is answered, and a place in the queue."""
        with self._lock:
            chosen = self._chosen(guards, scope)
            if self._n_images + n > self.limits.max_queue:
                raise Refused(429, f"the queue is full ({self.limits.max_queue} images); try again in a second")
            batches = {one.encoder: self._batches_of(one) for one in chosen}
            self._n_images += n
            for used in batches.values():
                self._users[used] += 1
                used.expect(n)
        try:
            yield chosen, batches
        finally:
            with self._lock:
                self._n_images -= n
                for used in batches.values():
                    self._users[used] -= 1
                self._end_unused()

    def _chosen(self, names: Sequence[str], scope: Sequence[str] | None) -> list[Served]:
        chosen = []
        for name in dict.fromkeys(names or self._served):
            if name not in self._served:
                raise Refused(422, f"there is no guard {name!r}; there are {', '.join(self._served)}")
            chosen.append(self._served[name])
            try:
                check_scope(scope, chosen[-1].guard.policy.category_names)
            except InputError as error:
                raise Refused(422, str(error)) from error
        return chosen

    def _batches_of(self, served: Served) -> Batches:
        if served.encoder not in self._batches:
            encoder, limits = served.guard.encoder, self.limits
            made = Batches(
                encoder,
                max_batch=limits.max_batch or encoder.batch_size,
                max_wait_s=limits.max_wait_ms / 1000,
                report=lambda n: self.figures.observe("guardkit_batch_images", n),
            )
            self._batches[served.encoder], self._users[made] = made, 0
        return self._batches[served.encoder]

    async def _encoded(self, upload: Upload, batches: Mapping[str, Batches]) -> _Vectors:
        """Of every frame, by every encoder that is needed."""
        future = self._pool().submit(self._read, upload.data, batches)
        # whatever becomes of it, it is no longer being read then
        future.add_done_callback(lambda _: _no_longer_read(batches))
        try:
            waiting = await asyncio.wrap_future(future)
        except ImageError as error:
            return error
        return {encoder: np.stack(await asyncio.gather(*(asyncio.wrap_future(frame[encoder]) for frame in waiting))) for encoder in batches}

    def _read(self, data: bytes, batches: Mapping[str, Batches]) -> list[dict[str, Future[np.ndarray]]]:
        """Queues every frame as soon as it is decoded, so that a long animation is never in memory as a whole."""
        limits = self.limits
        if len(data) > limits.max_bytes:
            raise TooLargeError(f"{len(data)} encoded bytes are more than {limits.max_bytes}")

        frames: list[dict[str, Future[np.ndarray]]] = []
        for sides in {enough(one.encoder): None for one in batches.values()}:  # mostly one for all
            mine = {name: one for name, one in batches.items() if enough(one.encoder) == sides}

            def take(image: np.ndarray, mine: Mapping[str, Batches] = mine) -> dict[str, Future[np.ndarray]]:
                return {name: one.put(one.encoder.preprocess(image)) for name, one in mine.items()}

            found = read_frames(data, take, max_pixels=limits.max_pixels, max_frames=limits.max_frames, at_least=sides)
            frames = [{**before, **more} for before, more in zip(frames, found, strict=True)] if frames else found
        return frames

    def _decided(
        self, served: Served, uploads: Sequence[Upload], found: Sequence[_Vectors], scope: Sequence[str] | None
    ) -> Iterator[Verdict]:
        """One guard's verdicts, of all images and frames at once."""
        guard: GuardClassifier = served.guard
        parts = [one[served.encoder] for one in found if not isinstance(one, ImageError)]
        decisions = iter(guard.decide(np.concatenate(parts), scope=scope) if parts else ())
        for upload, one in zip(uploads, found, strict=True):
            if isinstance(one, ImageError):
                nothing = undecided(guard.thresholds, str(one))
                yield Verdict(upload.id, served.name, nothing, is_too_large=isinstance(one, TooLargeError))
            else:
                yield Verdict(upload.id, served.name, *worst_frame([next(decisions) for _ in one[served.encoder]]))

    # --- guards anew, and the end -------------------------------------------------------------------------------------

    def reload(self) -> dict[str, bool]:
        """Reads all guards that came from folders again, and takes them up together; requests under way keep those they have.

        Returns:
            Name -> whether the guard is another one now.
        Raises:
            InputError: one cannot be read; all stay as they are.
            Refused: there are only guards that have no folder, or another reload is under way (409).
        """
        if all(isinstance(one, GuardClassifier) for one in self._given.values()):
            raise Refused(409, "the guards were given as objects and have no folders to read again; start the service with folders")
        if not self._loading.acquire(blocking=False):
            raise Refused(409, "the guards are being read already")
        try:
            before = self._served
            now = loaded(self._given, trust=self._trust, known=[one.guard.encoder for one in before.values()])
            with self._lock:
                self._served = now
                self._end_unused()
        except Exception:
            self.figures.add("guardkit_reloads_total", result="refused")
            raise
        finally:
            self._loading.release()
        self.figures.add("guardkit_reloads_total", result="taken")
        return {name: _identity(one) != _identity(before[name]) for name, one in now.items()}

    def reload_quietly(self) -> None:
        """The same for a signal, which nobody answers: the log says what came of it."""
        try:
            changed = self.reload()
            log.warning(
                "read the guards again: %s", ", ".join(f"{name} {'changed' if is_new else 'as before'}" for name, is_new in changed.items())
            )
        except (InputError, Refused) as error:
            log.warning("the guards stay as they are: %s", error)

    def close(self) -> None:
        """Ends the threads; a later request starts new ones."""
        with self._lock:
            for one in self._batches.values():
                one.end()
            self._batches, self._users = {}, {one: n for one, n in self._users.items() if n}
            loaders, self._loaders = self._loaders, None
        if loaders is not None:
            loaders.shutdown(wait=False, cancel_futures=True)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._loaders is None:
                self._loaders = ThreadPoolExecutor(self.limits.loaders, "guardkit-loader")
            return self._loaders

    def _end_unused(self) -> None:
        """Ends the threads of encoders that no guard uses any more, once the last request is done."""
        needed = {one.encoder for one in self._served.values()}
        for encoder in [one for one in self._batches if one not in needed]:
            if not self._users[self._batches[encoder]]:
                gone = self._batches.pop(encoder)
                del self._users[gone]
                gone.end()


def _no_longer_read(batches: Mapping[str, Batches]) -> None:
    for one in batches.values():
        one.expect(-1)


def _identity(served: Served) -> tuple[Any, ...]:
    return served.fingerprint, served.guard.thresholds.to_dict(), served.card
