"""Banks of hashes: images that are known already, and decided before any model looks at them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.checks import check_path
from guardkit.schema import InputError

KINDS = ("sha256", "pdq")
PDQ_DISTANCE = 31  # bits of 256 in which two images that match differ at most, as those use who exchange such hashes
_PDQ_QUALITY = 50  # of 100: below it, an image has too little in it for its hash to mean anything
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 30


class Bank:
    """Hashes of known images.

    A file has one a line: 64 hex digits, after "sha256:" (of a file's bytes; also without it) or "pdq:" (of what an image looks like).
    What follows a "#" is passed over.

    Args:
        name: in decisions, such as "block_list".
        path: of the file.
    Raises:
        InputError: it cannot be read, a line is no hash, or it has PDQ hashes and pdqhash is not installed.
    """

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, check_path(name, path)
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{name}={path} has more than {_MAX_BYTES} bytes; split it")
            content = self.path.read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
            raise InputError(f"{name}={path} cannot be read ({reason}); give a text file with a hash a line") from error
        found: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
        broken = []
        for number, line in enumerate(lines, 1):
            text = line.split("#")[0].strip().casefold()
            kind, _, digits = text.rpartition(":")
            if not text:
                continue
            if (kind or "sha256") not in KINDS or not _HEX.fullmatch(digits):
                broken.append(number)
            else:
                found[kind or "sha256"].append(bytes.fromhex(digits))
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise InputError(
                f"{name}={path} has lines that are no hashes ({', '.join(map(str, broken[:3]))}{more}); each must be sha256: or pdq: and 64 hex digits"
            )
        self.digest = hashlib.sha256(content).hexdigest()
        self._exact = frozenset(found["sha256"])
        self._pdq = np.frombuffer(b"".join(found["pdq"]), ">u8").reshape(-1, 4).astype(np.uint64)
        if len(self._pdq):
            pdq_of(np.zeros((64, 64, 3), np.uint8))  # says if it is not installed

    @property
    def needs_pixels(self) -> bool:
        """Whether images have to be decoded for it."""
        return len(self._pdq) > 0

    def match(self, sha256: bytes, pdqs: Iterable[np.ndarray | None]) -> str | None:
        """By which kind of hash an image is known; None: it is not.

        Args:
            sha256: of its bytes.
            pdqs: of its frames, as `pdq_of` gives them.
        """
        if sha256 in self._exact:
            return "sha256"
        for one in pdqs:
            if one is not None and len(self._pdq) and (np.bitwise_count(self._pdq ^ one).sum(axis=1) <= PDQ_DISTANCE).any():
                return "pdq"
        return None


def pdq_of(image: np.ndarray) -> np.ndarray | None:
    """(4,) uint64, the PDQ hash of (h, w, 3) uint8 RGB; None of an image with too little in it.

    Raises:
        InputError: pdqhash is not installed.
    """
    try:
        import pdqhash
    except ImportError as error:
        raise InputError("PDQ hashes need the package pdqhash; run: pip install 'guardkit[pdq]'") from error
    bits, quality = pdqhash.compute(image)
    return np.packbits(bits).view(">u8").astype(np.uint64) if quality >= _PDQ_QUALITY else None


def banks_of(lists: Mapping[str, Any]) -> list[Bank]:
    """Those that were asked for; a block list goes before an allow list."""
    return [Bank(name, path) for name in ("block_list", "allow_list") if (path := lists.get(name)) is not None]
