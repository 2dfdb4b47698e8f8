"""Images of many requests, encoded together: a bounded queue, and one thread that empties it in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch

from guardkit.encoders.base import Encoder

_AHEAD = 4  # batches that may wait in memory, as pixels


class Batches:
    """Encodes what several threads put in.

    The encoder takes what is there as soon as it is free. It waits for more only while images are being read, and at most `max_wait_s`.

    Args:
        encoder: of which only this object's thread asks vectors.
        max_batch: images at once.
        max_wait_s: seconds.
        report: is called with the size of each batch.
    """

    def __init__(self, encoder: Encoder, *, max_batch: int, max_wait_s: float, report: Callable[[int], None]) -> None:
        self.encoder = encoder
        self._max_batch, self._max_wait_s, self._report = max_batch, max_wait_s, report
        self._waiting: deque[tuple[torch.Tensor, Future[np.ndarray]]] = deque()
        self._changed = threading.Condition()
        self._coming = 0
        self._is_ended = False
        self._thread: threading.Thread | None = None
        self.at_work = threading.Lock()  # held while the encoder is: whoever looks into it meanwhile takes it first

    def expect(self, n: int) -> None:
        """So many more images are being read, or fewer where it is negative."""
        with self._changed:
            self._coming += n
            self._changed.notify_all()

    def put(self, pixels: torch.Tensor) -> Future[np.ndarray]:
        """Queues one image; waits while the queue is full.

        Args:
            pixels: as the encoder's `preprocess` gives them.
        Returns:
            The (d,) float32 unit vector, once it is there.
        Raises:
            RuntimeError: the service was ended.
        """
        found: Future[np.ndarray] = Future()
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or len(self._waiting) < _AHEAD * self._max_batch)
            if self._is_ended:
                raise RuntimeError("the service was ended")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="guardkit-encoder", daemon=True)
                self._thread.start()
            self._waiting.append((pixels, found))
            self._changed.notify_all()
        return found

    def end(self) -> None:
        """Encodes what waits, and takes no more."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    @property
    def is_alive(self) -> bool:
        """Whether what is put in will be encoded."""
        return not self._is_ended and (self._thread is None or self._thread.is_alive())

    def _work(self) -> None:
        while batch := self._next():
            self._report(len(batch))
            try:
                with self.at_work:
                    vectors = self.encoder.encode_preprocessed([pixels for pixels, _ in batch])
            except Exception as error:  # whoever waits for it is told, and the next batch may be better
                for _, found in batch:
                    _settle(found, error)
            else:
                for (_, found), vector in zip(batch, vectors, strict=True):
                    _settle(found, vector)

    def _next(self) -> list[tuple[torch.Tensor, Future[np.ndarray]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_ended)
            until = time.monotonic() + self._max_wait_s
            while len(self._waiting) < self._max_batch and self._coming > 0 and not self._is_ended:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
            self._changed.notify_all()
        return batch


def _settle(found: Future[np.ndarray], value: np.ndarray | Exception) -> None:
    if not found.set_running_or_notify_cancel():
        return  # nobody waits for it any more
    if isinstance(value, Exception):
        found.set_exception(value)
    else:
        found.set_result(value)
