"""Files below a root by untrusted names, whatever system the names were written on."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from guardkit.schema import ImageError


class Files:
    """Finds files by name below a root; links are followed, but not out of it.

    A name that means no file may have been written on Windows, with backslashes, or on a Mac, with letters and accents apart; the
    file of the equal name is then meant.
    """

    def __init__(self, root: Path) -> None:
        self._given, self._root = root, root.resolve()
        self._listed = lru_cache(maxsize=256)(_by_normal_form)

    def name(self, name: str) -> str:
        """The name, in its shortest form, under which the file is there; or as it was given."""
        plain = posixpath.normpath(name)
        try:
            if os.path.lexists(self._given / plain):
                return plain
        except (OSError, ValueError):
            return plain
        for one in dict.fromkeys((plain, posixpath.normpath(name.replace("\\", "/")))):
            found = self._equal(one)
            if found is not None:
                return found
        return plain

    def path(self, name: str) -> Path | str:
        """The file that a name means, or why it means none."""
        if name.startswith("/"):
            return "absolute path, where one relative to the folder was expected"
        try:
            path = (self._root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, or links that lead in a circle
            return f"not a usable path: {' '.join(str(error).split())[:100]}"
        if name.split("/")[0] == ".." or not path.is_relative_to(self._root):
            is_link = name.split("/")[0] != ".." and ".." not in name.split("/")
            return "link that leads outside the folder; put a copy in its place" if is_link else "path outside the folder"
        return path

    def _equal(self, name: str) -> str | None:
        """The path below the root whose parts are equal to the name's in Unicode normal form C."""
        place: list[str] = []
        for part in name.split("/"):
            if part == "..":
                return None
            found = self._listed(self._given.joinpath(*place)).get(unicodedata.normalize("NFC", part))
            if found is None:
                return None
            place.append(found)
        return "/".join(place)


def printable(name: str) -> str:
    """A file name that can be written as UTF-8, as every result file is."""
    return name.encode(errors="backslashreplace").decode()


def path_within(roots: Sequence[Path], name: str) -> Path:
    """The file that a table's cell names, by its place below one of the roots or relative to the first; it need not be there.

    Raises:
        ImageError: it names none, or one elsewhere, which a table from somebody else has no business with.
    """
    try:
        path = (roots[0] / name).resolve()
        if any(path.is_relative_to(root.resolve()) for root in roots):
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"not a usable path: {' '.join(str(error).split())[:100]}") from error
    raise ImageError("no bytes, and a path that leads outside the data set's folder")


def _by_normal_form(folder: Path) -> dict[str, str]:
    try:
        return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder))}
    except (OSError, ValueError):
        return {}
