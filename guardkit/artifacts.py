"""What every store and every folder stands on: fingerprints, write-then-rename, JSON from disk, and what ships.

A stored thing is named by a fingerprint of all its inputs. Files appear under their name only when complete. What is read
back may have been damaged or made up by somebody: it is parsed within limits, and one line says what is wrong with it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardkit.schema import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_PACKAGE = Path(__file__).resolve().parent
SHIPPED = "guardkit:"
_VARIANTS = ("fp16", "bf16")  # what diffusers and transformers put into the names of files in half precision
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 256 << 20, 64
_TEMPORARY = re.compile(r"\..*\.\d+\.\d+\.tmp")  # names that `written` gives: process, thread


def fingerprint(inputs: Any) -> str:
    """A hash (64 hex digits) of a value made of plain JSON types; the order of keys does not matter."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened to read bytes.

    Raises:
        OSError: it cannot be opened, or is something else: a pipe would block, and a device might never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115 -- given to the caller
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is a pipe or device, not a file", str(path))
    return file


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it when the block ends without an error.

    with written(folder / "metrics.json") as temporary:
        temporary.write_text(text)

    The file can be read by whom the umask allows, whatever wrote it: some writers, safetensors among them, keep theirs
    to their owner.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, because writers such as matplotlib choose the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        # a new file shows what umask and folder allow; asking for the umask would change it for all threads meanwhile
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Adds bytes to a file that is open without a buffer, and returns when they are on the disk.

    Raises:
        OSError: they cannot be written; the file is as it was.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed while they wrote left in a folder and below it.

    Only for a folder that nobody else writes to meanwhile.
    """
    for left in folder.rglob(".*.tmp*"):
        if _TEMPORARY.match(left.name):
            left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, complete or not at all. NaN is refused: a figure that cannot be computed is null."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_table(path: Path, table: pa.Table, *, compression: str = "snappy") -> None:
    """Writes Parquet, complete or not at all."""
    import pyarrow.parquet as pq  # here, because commands that only print their help write none

    # an open file, because pyarrow takes no path whose bytes are not UTF-8
    with written(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(table, file, compression=compression)


def read_json(path: Path, what: str, mend: str = "copy it anew") -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: to read.
        what: the file should be, such as "a guard's configuration".
        mend: what to do when it is not.
    Raises:
        InputError: it cannot be read, or does not hold what `parse_json` gives, or no object.
    """
    try:
        with open_regular(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes > _MAX_JSON_BYTES:
                raise ValueError(f"it has {n_bytes} bytes, allowed are {_MAX_JSON_BYTES}")
            value = parse_json(file.read())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} instead of an object")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}), it should be {what}; {mend}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}), it should be {what}; {mend}") from error
    return value


def parse_json(text: bytes) -> Any:
    """The value that a JSON text in UTF-8 stands for, of moderate depth and with numbers that a float holds.

    Raises:
        ValueError: it is none; what exactly is wrong, in one line.
    """
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    _check_json(value)
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_json(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH}")
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inside += one.keys()
                inside += one.values()
            elif isinstance(one, list):
                inside += one
            elif isinstance(one, str):
                if not one.isascii() and any("\ud800" <= c <= "\udfff" for c in one):
                    raise ValueError("half a character in a text")
            elif (isinstance(one, int) and one.bit_length() > 64) or (isinstance(one, float) and not math.isfinite(one)):
                raise ValueError("a number that is too large")
        level, depth = inside, depth + 1


def weights_variant(files: Iterable[str]) -> str | None:
    """The `variant` to ask diffusers or transformers for: that of a folder with nothing but safetensors in half precision.

    Args:
        files: paths below the model's folder, with "/"; each folder among them is looked at by itself, and the parts of a
            pipeline that have plain files are loaded from these.
    Returns:
        "fp16" or "bf16"; None where every folder has plain files or none.
    """
    variants: dict[str, set[str | None]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if name.endswith(".safetensors"):
            # model.fp16.safetensors, or a part of it: model.fp16-00001-of-00002.safetensors
            marks = {part.partition("-")[0] for part in name.split(".")[1:]}
            variants.setdefault(folder, set()).add(next((one for one in _VARIANTS if one in marks), None))
    only = [found for found in variants.values() if None not in found]
    return next((one for one in _VARIANTS if any(one in found for found in only)), None)


def brought_along(name: str) -> Path:
    """A folder that comes with guardkit, "conf" or "checkpoints": inside the package in a wheel, beside it in a checkout."""
    return next((path for path in (_PACKAGE / f"_{name}", _PACKAGE.parent / name) if path.is_dir()), _PACKAGE.parent / name)


def shipped(weights: str) -> Path | None:
    """The folder of a model that comes with guardkit, for `weights` like "guardkit:scenes_clip"; None for all others.

    Raises:
        InputError: guardkit brings none of that name.
    """
    if not weights.startswith(SHIPPED):
        return None
    root, name = brought_along("checkpoints"), weights.removeprefix(SHIPPED)
    names = sorted(path.name for path in root.glob("*/") if not path.name.startswith("_"))
    if name not in names:
        raise InputError(f"guardkit ships no model {name!r}; it ships {', '.join(names) or 'none'}")
    return root / name
