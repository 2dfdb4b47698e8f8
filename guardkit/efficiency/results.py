"""Fitted cells on disk: each is kept as soon as it is there, and a folder never mixes two experiments.

`cells.sqlite` holds the test scores of every finished cell, `settings.json` what they were made with. A rerun with more
sizes, seeds, arms or heads goes on from there; anything else that would change a stored cell is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load, save

from guardkit.artifacts import fingerprint, read_json, write_json
from guardkit.checks import changes
from guardkit.efficiency.cells import COUNTS, Cell, CellData, CellError, Stock
from guardkit.efficiency.engine import Engine, FittedCell
from guardkit.folders import claim
from guardkit.progress import progress
from guardkit.schema import InputError
from guardkit.stores import KeyValueStore

SETTINGS, CELLS, TABLE = "settings.json", "cells.sqlite", "cells.parquet"
_SETTINGS = ("shared", "arms", "heads")
_PART_BYTES = 64 << 20  # of embeddings and scores that are held together; an engine needs several times as much
_ROWS_AT_ONCE = 1 << 14  # of the table


class CellStore:
    """Finished cells of one output folder, each under its name and a hash of the settings it was made with.

    Args:
        folder: of the sweep, with its settings.json.
    Raises:
        InputError: settings or cells are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._settings = _read_settings(folder)
        self._store = KeyValueStore(folder, CELLS, {"format": 3}, place="output_dir")

    def __enter__(self) -> CellStore:
        self._store.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    @property
    def n_damaged(self) -> int:
        """Cells so far whose stored scores did not pass their check, and are fitted anew."""
        return self._store.n_damaged

    def get(self, cells: Sequence[Cell]) -> dict[Cell, FittedCell]:
        """Those of the wanted cells that are finished."""
        keys = self._keys(cells)
        found = self._store.get(keys.values(), _read)
        return {cell: found[key] for cell, key in keys.items() if key in found}

    def known(self, cells: Sequence[Cell]) -> set[Cell]:
        """Which of the wanted cells are finished; one at a time is in memory."""
        keys = self._keys(cells)
        found = self._store.known(keys.values(), _read)
        return {cell for cell, key in keys.items() if key in found}

    def put(self, finished: Mapping[Cell, FittedCell]) -> None:
        """Keeps cells, all or none of them."""
        keys = self._keys(list(finished))
        self._store.put({keys[cell]: _written(one) for cell, one in finished.items()})

    def _keys(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        kinds = {(cell.arm, cell.head) for cell in cells}
        shared, arms, heads = (self._settings[name] for name in _SETTINGS)
        made_with = {(arm, head): fingerprint([shared, arms.get(arm), heads.get(head)]) for arm, head in kinds}
        return {cell: f"{cell.key}|{made_with[cell.arm, cell.head]}" for cell in cells}


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any]) -> Iterator[CellStore]:
    """The cells of a folder, for one process at a time.

    Args:
        folder: is made.
        settings: "shared" with all that a cell depends on besides its name, "arms" and "heads" with what their names mean.
    Raises:
        InputError: the folder holds cells made with other settings, or another process is at work in it.
    """
    plain = json.loads(json.dumps(settings))
    # which settings may change between two sweeps into one folder, `_check` knows
    with (
        claim(
            folder,
            "sweep",
            {},
            recognise=lambda: {} if (folder / SETTINGS).is_file() else None,
            check=lambda: _check(folder, plain),
        ),
        CellStore(folder) as store,
    ):
        yield store


def _check(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if path.exists():
        before = _read_settings(folder)
        changed = list(changes(before["shared"], settings["shared"]))
        for group in ("arms", "heads"):
            for name in set(before[group]) & set(settings[group]):
                changed += changes(before[group][name], settings[group][name], f"{group}.{name}.")
            settings[group] = before[group] | settings[group]
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise InputError(
                f"output_dir {folder} holds a sweep with other settings: {shown}. Choose another output_dir, or delete this one"
            )
    write_json(path, settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    what, mend = "the settings of a sweep", "choose another output_dir, or delete this one"
    settings = read_json(folder / SETTINGS, what, mend)
    if settings.keys() != set(_SETTINGS) or not all(isinstance(one, dict) for one in settings.values()):
        raise InputError(f"{folder / SETTINGS} is not {what}: it must hold {', '.join(_SETTINGS)}; {mend}")
    return settings


def run_cells(cells: Sequence[Cell], stock: Stock, engine: Engine, store: CellStore) -> tuple[dict[Cell, str], int]:
    """Fits the cells that are not finished yet, those of one arm, head and size together, and stores them.

    Returns:
        Reasons by cell that could not be fitted, and how many were found finished.
    """
    known = store.known(cells)
    failed: dict[Cell, str] = {}
    blocks: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if cell not in known:
            blocks.setdefault((cell.arm, cell.head, cell.n_unsafe), []).append(cell)
    for block in progress(list(blocks.values()), total=len(blocks), what="fitting heads"):
        for ready in _parts(block, stock, failed):
            outcomes = dict(zip([one.cell for one in ready], engine.fit(ready, stock.test), strict=True))
            failed |= {cell: str(one) for cell, one in outcomes.items() if isinstance(one, CellError)}
            store.put({cell: one for cell, one in outcomes.items() if not isinstance(one, CellError)})
    return failed, len(known)


def _parts(block: Sequence[Cell], stock: Stock, failed: dict[Cell, str]) -> Iterator[list[CellData]]:
    """Cells with their images, as many at once as memory allows; what cannot be fitted goes to `failed`."""
    ready: list[CellData] = []
    n_bytes = 0
    n_scores = 4 * (len(stock.test.embeddings) + len(stock.test.counterfactuals))
    for cell in block:
        try:
            ready.append(stock.data_of(cell))
        except CellError as error:
            failed[cell] = str(error)
            continue
        n_bytes += ready[-1].train["embeddings"].nbytes + n_scores
        if n_bytes >= _PART_BYTES:
            yield ready
            ready, n_bytes = [], 0
    if ready:
        yield ready


_BY_STRENGTH = ("validation_losses", "objectives", "gradients")
_BY_IMAGE = ("logits", "counterfactual_logits", "validation_logits", "validation_labels")


def _written(one: FittedCell) -> bytes:
    arrays = {name: np.ascontiguousarray(getattr(one, name)) for name in (*_BY_STRENGTH, *_BY_IMAGE)}
    arrays["counts"] = np.array([one.chosen, *(one.counts[name] for name in COUNTS)], np.int64)
    return save(arrays | {"seconds": np.array(one.seconds, float)})


def _read(value: bytes) -> FittedCell:
    """Raises ValueError when the value is no finished cell."""
    try:
        arrays = load(value)
    except Exception as error:  # a damaged header names types that there are not, and more
        raise ValueError(str(error)) from error
    names = {*_BY_STRENGTH, *_BY_IMAGE, "counts", "seconds"}
    if arrays.keys() != names or arrays["counts"].dtype != np.int64 or arrays["counts"].shape != (1 + len(COUNTS),):
        raise ValueError("not a finished cell")
    chosen, *counts = (int(number) for number in arrays.pop("counts"))
    seconds = arrays.pop("seconds")
    strengths = {arrays[name].shape for name in _BY_STRENGTH}
    labels = arrays["validation_labels"]
    is_cell = (
        all(one.dtype.kind in "fiub" and one.ndim == 1 for one in arrays.values())
        and seconds.shape == ()
        and 0 <= seconds < np.inf
        and len(strengths) == 1
        and 0 <= chosen < len(arrays["objectives"])
        and min(counts) >= 0
        and len(arrays["validation_logits"]) == len(labels)
        and bool(np.isin(labels, (0, 1)).all())
        and all(np.isfinite(arrays[name]).all() for name in ("validation_losses", *_BY_IMAGE))
    )
    if not is_cell:
        raise ValueError("not a finished cell")
    return FittedCell(chosen=chosen, counts=dict(zip(COUNTS, counts, strict=True)), seconds=float(seconds), **arrays)


class CellTable:
    """cells.parquet: one row per cell and strength of regularisation; figures of the test set stand beside the one that was kept.

    Args:
        path: to write to.
        strengths: of regularisation.
        figures: names of the figures.
    """

    def __init__(self, path: Path, strengths: Sequence[float], figures: Sequence[str]) -> None:
        types = {"arm": pa.string(), "head": pa.string(), "n_unsafe": pa.int64(), "seed": pa.int64()}
        types |= dict.fromkeys(COUNTS, pa.int64()) | {"seconds": pa.float64()}
        types |= dict.fromkeys(("l2", "validation_loss", "objective", "gradient"), pa.float64()) | {"is_chosen": pa.bool_()}
        types |= dict.fromkeys(figures, pa.float64()) | {"reason": pa.string()}
        self._strengths, self._schema, self._rows = strengths, pa.schema(types), list[dict[str, Any]]()
        self._file = open(path, "wb")  # noqa: SIM115 - closed on the way out; pyarrow takes no path whose bytes are not UTF-8
        self._writer = pq.ParquetWriter(self._file, self._schema)

    def __enter__(self) -> CellTable:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._write()
            self._writer.close()

    def add(self, cell: Cell, one: FittedCell | None, figures: Mapping[str, float | None], reason: str | None) -> None:
        """The rows of a cell: finished, left out, or both, where it could be fitted but not measured."""
        row: dict[str, Any] = {"arm": cell.arm, "head": cell.head, "n_unsafe": cell.n_unsafe, "seed": cell.seed, "reason": reason}
        if one is None:
            self._rows.append(row)
        else:
            row |= {**one.counts, "seconds": one.seconds}
            for i, l2 in enumerate(self._strengths):
                gradient = float(one.gradients[i])
                measured = {
                    "l2": float(l2),
                    "validation_loss": float(one.validation_losses[i]),
                    "objective": float(one.objectives[i]),
                    "gradient": None if np.isnan(gradient) else gradient,
                    "is_chosen": i == one.chosen,
                }
                self._rows.append(row | measured | (dict(figures) if i == one.chosen else {}))
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows.clear()
