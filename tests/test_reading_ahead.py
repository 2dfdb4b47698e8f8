"""Reading ahead: in order, no more than was asked for, errors in their turn, and no thread left behind."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from conftest import picture

from guardkit import reading_ahead
from guardkit.embeddings import EmbeddingStore
from guardkit.images import ArrayContent
from guardkit.reading_ahead import read_ahead
from guardkit.schema import ImageError

CONTENTS = [ArrayContent(np.asarray(picture(seed, (40, 30)))) for seed in range(10)]


def threads():
    return [one for one in threading.enumerate() if one.name.startswith("reading")]


def test_items_come_in_order_whichever_is_ready_first():
    slow = lambda n: time.sleep(0.01 * (n % 3 == 0)) or n * n  # noqa: E731
    assert list(read_ahead(range(20), slow, ahead=6)) == [(n, n * n) for n in range(20)]
    assert list(read_ahead([], slow, ahead=6)) == []
    assert list(read_ahead(range(4), slow, ahead=2, is_needed=lambda n: n % 2)) == [(0, None), (1, 1), (2, None), (3, 9)]


@pytest.mark.parametrize(("ahead", "n_bytes", "most"), [(4, 0, 4), (100, reading_ahead._MOST_BYTES // 4, 4), (100, 1 << 40, 1)])
def test_no_more_is_read_ahead_than_was_asked_for(ahead, n_bytes, most):
    asked = itertools.count()
    stream = read_ahead(asked, str, ahead=ahead, n_bytes=lambda _: n_bytes)
    assert next(stream) == (0, "0")
    assert next(asked) == most
    stream.close()
    assert not threads()


def test_errors_are_raised_when_their_turn_comes():
    def items():
        yield from range(3)
        raise OSError("the shard ends here")

    stream = read_ahead(items(), str, ahead=9)
    assert [next(stream)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the shard ends here"):
        next(stream)
    stream = read_ahead([1, 0, 2], lambda n: 1 // n, ahead=3)
    assert next(stream) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert not threads()


def test_it_goes_on_while_the_caller_works():
    read = threading.Event()
    stream = read_ahead(range(3), lambda n: n != 2 or read.set(), ahead=3)
    next(stream)
    assert read.wait(5)
    stream.close()


class Bad:
    """An image that cannot be read."""

    def __init__(self, key):
        self.key = key

    def load(self):
        raise ImageError(f"{self.key} is damaged")


@pytest.mark.parametrize("keeps", [True, False])
def test_a_stream_of_embeddings_is_that_of_each_by_itself(scenes_encoder, tmp_path, keeps):
    expected = EmbeddingStore(scenes_encoder, None).embed(CONTENTS)
    given = [*CONTENTS, Bad("a"), *CONTENTS[::-1], Bad("a"), *CONTENTS[:3]] * 8
    rows = [*range(10), None, *range(9, -1, -1), None, *range(3)] * 8
    store = EmbeddingStore(scenes_encoder, tmp_path if keeps else None, keeps=keeps)
    for row, outcome in zip(rows, store.stream(iter(given)), strict=True):
        if row is None:
            assert str(outcome) == "a is damaged"
        else:
            np.testing.assert_array_equal(outcome, expected[row])
    assert store.n_encoded == (10 if keeps else 8 * 23)
    assert not threads()


def test_a_stream_that_is_left_and_begun_again_lacks_nothing(scenes_encoder, tmp_path):
    store = EmbeddingStore(scenes_encoder, tmp_path)
    stream = store.stream(iter(CONTENTS * 30))
    next(stream)
    stream.close()
    np.testing.assert_array_equal(store.embed(CONTENTS), EmbeddingStore(scenes_encoder, None).embed(CONTENTS))
    assert not threads()
