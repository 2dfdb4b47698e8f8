"""Near-duplicates: images that a viewer would call the same, however they were resized or compressed; vectors equal up to rounding."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_HASH_PX, _LOW = 32, 8
# Rounding the small version to whole grey values alone moves a coefficient by about 0.001, so a sign means something
# from here on; with fewer such signs than this (blank images, stripes, plain gradients) different images look alike.
_NOISE, _MIN_SIGNS = 0.004, 16
_NEXT = 1000  # hashes that one is compared with, of those that share two bands with it


def perceptual_hash(image: np.ndarray) -> int:
    """A 64-bit hash that changes little under resizing, compression and brightness.

    The signs of the low frequencies of a 32 x 32 greyscale version around their median (pHash: Zauner, 2010,
    "Implementation and benchmarking of perceptual image hash functions", section 3.2.1). A departure from it: an
    image with too little structure, such as a blank one, is hashed by the exact pixels of its small version instead,
    because the signs of its frequencies are noise; it is then near to nothing but its equals.

    Args:
        image: (h, w, 3) uint8 RGB.
    """
    small = cv2.resize(image, (_HASH_PX, _HASH_PX), interpolation=cv2.INTER_AREA)
    low = dctn(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float64) / 255, norm="ortho")[:_LOW, :_LOW].ravel()
    rest = low[1:]  # without the mean brightness
    if np.count_nonzero(np.abs(rest) > _NOISE) < _MIN_SIGNS:
        return int.from_bytes(hashlib.sha256(small.tobytes()).digest()[:8], "big")
    bits = np.concatenate([[low[0] > _HASH_PX / 2], rest > np.median(rest)])
    return int(np.packbits(bits).view(">u8")[0])


def near_duplicate_groups(hashes: np.ndarray, max_distance: int = 4) -> np.ndarray:
    """Numbers groups of hashes that are connected by steps of at most `max_distance` bits.

    Two hashes that differ in at most m of 64 bits agree in at least one of m + 1 bands, so only hashes that share a
    band are compared.

    Args:
        hashes: (n,) uint64.
        max_distance: Hamming distance in bits, in [0, 15].
    Returns:
        (n,) int, equal for members of one group.
    """
    if not 0 <= max_distance <= 15:
        raise ValueError(f"max_distance must lie in [0, 15], got {max_distance}")
    values, position = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    if not len(values):
        return np.zeros(0, int)
    edges: list[tuple[np.ndarray, np.ndarray]] = []
    for low, high in itertools.pairwise(np.linspace(0, 64, max_distance + 2).astype(int)):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            if len(bucket) > 1:
                edges += _spanning_edges(values, bucket, max_distance)
    rows, columns = (np.concatenate([edge[i] for edge in edges]) if edges else np.zeros(0, int) for i in (0, 1))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(values), len(values)))
    return connected_components(graph, directed=False)[1][position]


def _spanning_edges(values: np.ndarray, bucket: np.ndarray, max_distance: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Edges that connect what is near in a bucket: fewer than its members, where all near pairs could fill the memory."""
    edges = []
    unseen, reached = bucket[1:], [bucket[0]]
    while len(unseen):
        if not reached:
            reached.append(unseen[0])
            unseen = unseen[1:]
        one = reached.pop()
        near = np.bitwise_count(values[unseen] ^ values[one]) <= max_distance
        if near.any():
            found, unseen = unseen[near], unseen[~near]
            edges.append((np.full(len(found), one), found))
            reached.extend(found)
    return edges


def earliest_near(hashes: np.ndarray, max_distance: int = 4) -> np.ndarray:
    """For each hash the first one of all that comes before it and differs in at most `max_distance` bits.

    Two hashes that differ in at most m of 64 bits agree in at least two of m + 2 bands, so only hashes that share a pair of bands are
    compared. Of very many that share one, each is compared with its next thousand only: the work is bounded, and one of them may be missed.

    Args:
        hashes: (n,) uint64.
        max_distance: Hamming distance in bits, in [0, 15].
    Returns:
        (n,) int: the place of that hash; -1 where there is none.
    """
    hashes = np.asarray(hashes, np.uint64)
    if not len(hashes):
        return np.zeros(0, int)
    values, firsts, position = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = firsts.copy()  # of what is near a value, itself among it
    edges = np.linspace(0, 64, max_distance + 3).astype(int)
    bands = [(values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1) for low, high in itertools.pairwise(edges)]
    for one, other in itertools.combinations(range(len(bands)), 2):
        key = (bands[one] << np.uint64(edges[other + 1] - edges[other])) | bands[other]
        order = np.lexsort((firsts, key))
        sorted_key, here = key[order], np.arange(len(order))
        for step in range(1, _NEXT + 1):
            here = here[here + step < len(order)]
            here = here[sorted_key[here] == sorted_key[here + step]]
            if not len(here):
                break
            first, second = order[here], order[here + step]
            near = np.bitwise_count(values[first] ^ values[second]) <= max_distance
            first, second = first[near], second[near]
            np.minimum.at(earliest, first, firsts[second])
            np.minimum.at(earliest, second, firsts[first])
    found = earliest[position]
    return np.where(found < np.arange(len(hashes)), found, -1)


# Unit vectors in half precision are off by at most about 3e-4, so two roundings of one vector lie within this distance.
_TOLERANCE = 2e-3
_TABLES, _AXES, _NEIGHBOURS, _CHUNK = 4, 6, 8, 8192
_HELD, _AT_ONCE = 1 << 20, 1 << 16  # rows: whose places are kept in memory; that are compared at once


class Rows(Protocol):
    """(n, d) vectors, some at a time: an array, or something that reads them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """(m, d) of a slice or of (m,) rows."""
        ...


def near_equal_groups(vectors: Sequence[np.ndarray] | Rows, tolerance: float = _TOLERANCE) -> np.ndarray:
    """Numbers groups of vectors that are equal up to rounding.

    Vectors are put into the cells of several grids, each over random directions; those that share a cell are compared with the next
    few in it. A pair that every grid happens to divide would be missed, which is rarer than one in a million. The work grows with n
    alone: locality-sensitive hashing (Datar et al., 2004, "Locality-sensitive hashing scheme based on p-stable distributions").
    Vectors themselves are read once in order, and then those that all directions leave open; of millions, what the directions say lies in
    a temporary file.

    Args:
        vectors: n of (d,) float, of unit length.
        tolerance: Euclidean distance up to which two are equal.
    Returns:
        (n,) int, equal for members of one group.
    """
    n = len(vectors)
    if not n:
        return np.zeros(0, int)
    rows: Rows = np.stack(vectors) if isinstance(vectors, Sequence) else vectors
    rng = np.random.default_rng(0)
    dim = rows[:1].shape[1]
    axes = rng.normal(size=(dim, _TABLES * _AXES)) / dim**0.5
    places = _room((n, _TABLES * _AXES))
    for start in range(0, n, _CHUNK):
        places[start : start + _CHUNK] = np.asarray(rows[start : start + _CHUNK], np.float32) @ axes
    # wide enough that rounding seldom crosses a border, narrow enough that few strangers share a cell
    widths = np.maximum(places.std(axis=0) if n <= _HELD else _deviations(places), 4 * tolerance) / 4
    offsets = rng.random(_TABLES * _AXES)
    mixers = rng.integers(1, 2**62, _AXES) * 2 + 1
    # no difference of two vectors is longer along an axis than the axis and it together
    reach = tolerance * np.linalg.norm(axes, axis=0) + 1e-6
    edges: list[tuple[np.ndarray, np.ndarray]] = []
    for table in range(_TABLES):
        mine = slice(table * _AXES, (table + 1) * _AXES)
        cell = np.empty(n, np.int64)
        for start in range(0, n, _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            with np.errstate(over="ignore"):
                cell[some] = (np.floor(places[some, mine] / widths[mine] + offsets[mine]).astype(np.int64) * mixers).sum(axis=1)
        order = np.lexsort((places[:, mine.start], cell))
        sorted_cells = cell[order]
        for step in range(1, _NEIGHBOURS + 1):
            together = np.flatnonzero(sorted_cells[step:] == sorted_cells[:-step])
            for start in range(0, len(together), _AT_ONCE):
                pairs = together[start : start + _AT_ONCE]
                first, second = order[pairs], order[pairs + step]
                is_open = np.abs(places[first] - places[second]) <= reach
                first, second = first[is_open.all(axis=1)], second[is_open.all(axis=1)]
                near = [_near(rows, first[i : i + _CHUNK], second[i : i + _CHUNK], tolerance) for i in range(0, len(first), _CHUNK)]
                if near:
                    chosen = np.concatenate(near)
                    edges.append((first[chosen], second[chosen]))
    one, other = (np.concatenate([edge[i] for edge in edges]) if edges else np.zeros(0, int) for i in (0, 1))
    return connected_components(coo_array((np.ones(len(one), bool), (one, other)), shape=(n, n)), directed=False)[1]


def _room(shape: tuple[int, int]) -> np.ndarray:
    """For numbers: in memory where they are few, else in a file that is gone when nobody looks at it any more."""
    if shape[0] <= _HELD:
        return np.empty(shape)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _deviations(places: np.ndarray) -> np.ndarray:
    """Standard deviations of the columns of an array that is too large for the means of all at once."""
    starts = range(0, len(places), len(places) // 64)
    blocks = [np.asarray(places[start : start + _CHUNK], np.float64) for start in starts]
    return np.concatenate(blocks).std(axis=0)


def _near(vectors: Rows, first: np.ndarray, second: np.ndarray, tolerance: float) -> np.ndarray:
    """(n,) bool: which pairs are nearer than the tolerance."""
    apart = vectors[first] - vectors[second]
    return np.einsum("nd,nd->n", apart, apart) <= tolerance**2
